"""Run work on many cases in worker processes, all forked from one server process that has imported the slow modules once.

`parallel_map` returns results in the order of the cases, within a memory limit. A worker killed by the kernel costs only its own case,
which is run once more alone before it becomes a CaseError. This needs to know which case each worker runs; a ProcessPoolExecutor
does not tell, and one killed worker breaks all its futures. `pool` returns such an executor for scoring, where every case is submitted
and collected by its caller; `prepare` starts its imports in the background. Both share the start method, the protection from Ctrl-C
and the end with the parent. Only the standard library is imported, so that a new process starts quickly.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, TypeVar

from slmsam2_cli.errors import CaseError

Job = TypeVar("Job")
Answer = TypeVar("Answer")

START_METHOD = "forkserver"  # a copy of this process, which may have threads, may hang; a new one each loads everything again
# no folder for a socket, no more processes, no such start method
UNAVAILABLE_ERRORS = (OSError, EOFError, ImportError, NotImplementedError, ValueError)
_SAFE_PATH = "PYTHONSAFEPATH"  # has an effect from Python 3.11 on
_EXCLUSIVE = float("inf")  # bytes: what leaves no room for others
_WORKER_DIED = object()

ForkingPickler.register(CaseError, lambda error: (CaseError, (error.case, error.file, error.what, error.remedy)))


def available_cpus() -> int:
    """How many processes can run at one time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    work: Callable[[Job], Answer],
    jobs: Mapping[str, Job],
    workers: int,
    *,
    bytes_of: Callable[[Job], int] = lambda job: 0,
    max_bytes: int = sys.maxsize,
    advance: Callable[..., None] = lambda steps=1, note="": None,
    preload: Sequence[str] = (),
) -> list[Answer | CaseError]:
    """Return work(job) of every case, or the CaseError it raises, in the order of `jobs` (case id -> job).

    workers: number of worker processes; with 0, or where no process can be started, the jobs run in this process. Jobs run together as
    long as the sum of their bytes_of is at most `max_bytes`; a larger job runs alone. advance(1, case id) is called after each case.
    preload: modules imported once for all workers. `work`, jobs and results must be picklable.

    Raises: RuntimeError when `work` raises anything but a CaseError in a worker.
    """
    results: dict[str, Answer | CaseError] = {}

    def note(case: str, answer: Answer | CaseError) -> None:
        results[case] = answer
        advance(1, case)

    if workers and not multiprocessing.current_process().daemon:  # which may have no processes of its own
        _share(jobs, _WorkerPool(work, workers, preload), bytes_of, max_bytes, note)
    for case in [case for case in jobs if case not in results]:
        note(case, _attempt(work, jobs[case]))
    return [results[case] for case in jobs]


def _attempt(work: Callable[[Job], Answer], job: Job) -> Answer | CaseError:
    try:
        return work(job)
    except CaseError as problem:
        return problem


def _share(
    jobs: Mapping[str, Job],
    pool: _WorkerPool,
    bytes_of: Callable[[Job], int],
    max_bytes: int,
    note: Callable[[str, Answer | CaseError], None],
) -> None:
    """Let the team do the jobs. What is not noted in the end, no process could be had for."""
    waiting = deque(jobs)
    needs: dict[str, float] = {}  # bytes
    try:
        while waiting or pool.running():
            pool.fill_up(len(waiting))
            for worker in pool.idle()[: len(waiting)]:
                needs.setdefault(waiting[0], bytes_of(jobs[waiting[0]]))
                if pool.running() and sum(needs[case] for case in (waiting[0], *pool.running())) > max_bytes:
                    break
                if worker.assign(waiting[0], jobs[waiting[0]]):
                    waiting.popleft()
            if not pool.workers:
                return
            for case, answer in pool.receive():
                if answer is not _WORKER_DIED:
                    note(case, answer)
                elif pool.running() and needs[case] < _EXCLUSIVE:
                    needs[case] = _EXCLUSIVE
                    waiting.append(case)
                else:
                    what = "the worker process was killed, probably out of memory"
                    note(case, CaseError(case, "", what, "Close other programs, or use a machine with more memory"))
    finally:
        pool.end()


@dataclass(eq=False)
class _Worker:
    """A process, the connection to it, whether it has started, and the case it runs (None: idle)."""

    process: BaseProcess
    connection: Connection
    begun: bool = False
    case_id: str | None = None

    def assign(self, case: str, job: object) -> bool:
        """Whether it has taken the case; False when it is gone, as will be heard."""
        try:
            self.connection.send(job)
        except OSError:
            return False
        self.case_id = case
        return True


class _WorkerPool:
    """Up to `size` processes that do one work."""

    def __init__(self, work: Callable[[Any], Any], size: int, preload: Sequence[str]) -> None:
        self.work, self.size, self.preload = work, size, [*preload]
        self.workers: list[_Worker] = []

    def running(self) -> list[str]:
        """The cases at work."""
        return [worker.case_id for worker in self.workers if worker.case_id is not None]

    def idle(self) -> list[_Worker]:
        """Those that wait for a case."""
        return [worker for worker in self.workers if worker.begun and worker.case_id is None]

    def fill_up(self, waiting: int) -> None:
        """Start processes for the cases that wait; none any more where the system does not let them be made."""
        missing = min(self.size, waiting + len(self.running())) - len(self.workers)
        try:
            for _ in range(missing):
                self.workers.append(_started(self.work, self.preload))
        except UNAVAILABLE_ERRORS:
            self.size = 0

    def receive(self) -> Iterator[tuple[str, Any]]:
        """Wait for news: a case and what came of it, _WORKER_DIED when its process has died. RuntimeError."""
        news = wait([worker.connection for worker in self.workers])
        for worker in [worker for worker in self.workers if worker.connection in news]:
            try:
                message = worker.connection.recv()
            except (OSError, EOFError):
                message = _WORKER_DIED
                self.workers.remove(worker)
                self.size = self.size if worker.begun else 0  # the next would fare no better
            if isinstance(message, _Failure):
                raise RuntimeError(message.line) from RuntimeError(message.trace)
            case, worker.begun, worker.case_id = worker.case_id, True, None
            if case is not None:
                yield case, message

    def end(self) -> None:
        """Kill those that are left: nothing they do outlives them."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()


def _started(work: Callable[[Any], Any], preload: list[str]) -> _Worker:
    context: Any = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(preload)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    with without_interrupts(), _without_main_module():
        process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """A Python started meanwhile leaves Ctrl-C to this one from the beginning, and imports nothing from the working directory."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        multiprocessing.resource_tracker.ensure_running()  # first: where it is started, it lets Ctrl-C through again
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextmanager
def _without_main_module() -> Iterator[None]:
    """A Python started meanwhile does not run again what runs here: a script may not expect it, and no work is defined in one."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@dataclass(frozen=True)
class _Failure:
    """An unexpected exception as text: not every exception goes through a pipe."""

    line: str
    trace: str


def _serve(work: Callable[[Any], Any], connection: Connection) -> None:
    """A process's life: answer until nobody asks any more."""
    exit_with_parent()
    connection.send("begun")
    while True:
        try:
            job = connection.recv()
        except (OSError, EOFError):
            return
        try:
            answer = _attempt(work, job)
        except Exception as error:  # noqa: BLE001  raised again by the process that asked
            answer = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        connection.send(answer)


def exit_with_parent() -> None:
    """Leave Ctrl-C to it, and end when it has ended, however that came."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


MAX_WORKERS = 8  # processes
_SCORING_MODULES = ("slmsam2_cli.cli.app", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(requested: int | None) -> int:
    """How many processes to use: those wanted, else one per core, at most 8."""
    return max(1, min(available_cpus() if requested is None else requested, MAX_WORKERS))


def prepare(also: Sequence[str] = ()) -> None:
    """Begin to load what scoring needs, and these modules, in the process that others will be copied from; returns at once.

    Where that cannot be, `pool` will find out.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_SCORING_MODULES, *also])
    with suppress(*UNAVAILABLE_ERRORS), without_interrupts():
        multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor | None:
    """Processes that leave Ctrl-C to this one and end with it; None where the system does not let them be made."""
    made = None
    try:
        made = ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD), initializer=exit_with_parent)
        with without_interrupts():
            made.submit(os.getpid)  # starts the first process
    except UNAVAILABLE_ERRORS:
        if made is not None:
            made.shutdown(wait=False)
        return None
    return made
