"""Cases spread over processes: answers in the order of the cases, within the memory there is, and none lost with a process that dies.

A process that the kernel ends says nothing, so this one knows which case each of them holds. What died while others ran is tried once
more alone: it may be they who took the memory. Nothing but the standard library is imported, so that a new process is there soon.

The processes that score cases: copies of one that has loaded everything already.

Loading takes longer than scoring a small case. `prepare` starts it in the background, to be called before this process loads anything
itself; so this module imports nothing that takes time to load.
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
REFUSED = (OSError, EOFError, ImportError, NotImplementedError, ValueError)  # no place for a socket, no more processes, no such method
_SAFE_PATH = "PYTHONSAFEPATH"  # heeded from Python 3.11 on
_ALONE = float("inf")  # bytes: what leaves no room for others
_WORKER_DIED = object()

ForkingPickler.register(CaseError, lambda error: (CaseError, (error.case, error.file, error.what, error.remedy)))


def cores() -> int:
    """How many processes can run at one time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    work: Callable[[Job], Answer],
    jobs: Mapping[str, Job],
    workers: int,
    *,
    bytes_of: Callable[[Job], int] = lambda job: 0,
    room: int = sys.maxsize,
    advance: Callable[..., None] = lambda steps=1, note="": None,
    loaded: Sequence[str] = (),
) -> list[Answer | CaseError]:
    """What work(job) returns for every case, or the CaseError it raises, in the order of `jobs`, case id -> job.

    workers: processes, 0 for none but this one, which also does what no process could be had for. Jobs run together while their bytes_of
    are no more than `room` together; a larger one runs alone. advance(1, case id) is called after each. loaded: modules to load only once
    for all processes. `work`, jobs and answers go through pipes. RuntimeError when work raises anything else in another process.
    """
    answers: dict[str, Answer | CaseError] = {}

    def note(case: str, answer: Answer | CaseError) -> None:
        answers[case] = answer
        advance(1, case)

    if workers and not multiprocessing.current_process().daemon:  # which may have no processes of its own
        _share(jobs, _WorkerPool(work, workers, loaded), bytes_of, room, note)
    for case in [case for case in jobs if case not in answers]:
        note(case, _attempt(work, jobs[case]))
    return [answers[case] for case in jobs]


def _attempt(work: Callable[[Job], Answer], job: Job) -> Answer | CaseError:
    try:
        return work(job)
    except CaseError as problem:
        return problem


def _share(
    jobs: Mapping[str, Job], team: _WorkerPool, bytes_of: Callable[[Job], int], room: int, note: Callable[[str, Answer | CaseError], None]
) -> None:
    """Let the team do the jobs. What is not noted in the end, no process could be had for."""
    waiting = deque(jobs)
    needs: dict[str, float] = {}  # bytes
    try:
        while waiting or team.held():
            team.fill_up(len(waiting))
            for worker in team.idle()[: len(waiting)]:
                needs.setdefault(waiting[0], bytes_of(jobs[waiting[0]]))
                if team.held() and sum(needs[case] for case in (waiting[0], *team.held())) > room:
                    break
                if worker.takes(waiting[0], jobs[waiting[0]]):
                    waiting.popleft()
            if not team.workers:
                return
            for case, answer in team.hear():
                if answer is not _WORKER_DIED:
                    note(case, answer)
                elif team.held() and needs[case] < _ALONE:
                    needs[case] = _ALONE
                    waiting.append(case)
                else:
                    what = "the process that worked on it was ended, probably for want of memory"
                    note(case, CaseError(case, "", what, "Close other programs, or use a machine with more memory"))
    finally:
        team.end()


@dataclass(eq=False)
class _Worker:
    """A process, the line to it, whether it has begun, and the case that it holds."""

    process: BaseProcess
    line: Connection
    begun: bool = False
    holds: str | None = None

    def takes(self, case: str, job: object) -> bool:
        """Whether it has taken the case; False when it is gone, as will be heard."""
        try:
            self.line.send(job)
        except OSError:
            return False
        self.holds = case
        return True


class _WorkerPool:
    """Up to `size` processes that do one work."""

    def __init__(self, work: Callable[[Any], Any], size: int, loaded: Sequence[str]) -> None:
        self.work, self.size, self.loaded = work, size, [*loaded]
        self.workers: list[_Worker] = []

    def held(self) -> list[str]:
        """The cases at work."""
        return [worker.holds for worker in self.workers if worker.holds is not None]

    def idle(self) -> list[_Worker]:
        """Those that wait for a case."""
        return [worker for worker in self.workers if worker.begun and worker.holds is None]

    def fill_up(self, waiting: int) -> None:
        """Start processes for the cases that wait; none any more where the system does not let them be made."""
        missing = min(self.size, waiting + len(self.held())) - len(self.workers)
        try:
            for _ in range(missing):
                self.workers.append(_started(self.work, self.loaded))
        except REFUSED:
            self.size = 0

    def hear(self) -> Iterator[tuple[str, Any]]:
        """Wait for news: a case and what came of it, _WORKER_DIED when its process has died. RuntimeError."""
        news = wait([worker.line for worker in self.workers])
        for worker in [worker for worker in self.workers if worker.line in news]:
            try:
                said = worker.line.recv()
            except (OSError, EOFError):
                said = _WORKER_DIED
                self.workers.remove(worker)
                self.size = self.size if worker.begun else 0  # the next would fare no better
            if isinstance(said, _Failure):
                raise RuntimeError(said.line) from RuntimeError(said.trace)
            case, worker.begun, worker.holds = worker.holds, True, None
            if case is not None:
                yield case, said

    def end(self) -> None:
        """Kill those that are left: nothing they do outlives them."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.line.close()


def _started(work: Callable[[Any], Any], loaded: list[str]) -> _Worker:
    context: Any = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(loaded)
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


def _serve(work: Callable[[Any], Any], line: Connection) -> None:
    """A process's life: answer until nobody asks any more."""
    exit_with_parent()
    line.send("begun")
    while True:
        try:
            job = line.recv()
        except (OSError, EOFError):
            return
        try:
            answer = _attempt(work, job)
        except Exception as error:  # noqa: BLE001  raised again by the process that asked
            answer = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        line.send(answer)


def exit_with_parent() -> None:
    """Leave Ctrl-C to it, and end when it has ended, however that came."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


MOST = 8  # processes
_LOADED = ("slmsam2_cli.cli.app", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(wanted: int | None) -> int:
    """How many processes to use: those wanted, else one a core, at most 8."""
    return max(1, min(cores() if wanted is None else wanted, MOST))


def prepare(also: Sequence[str] = ()) -> None:
    """Begin to load what scoring needs, and these modules, in the process that others will be copied from; returns at once.

    Where that cannot be, `pool` will find out.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_LOADED, *also])
    with suppress(*REFUSED), without_interrupts():
        multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor | None:
    """Processes that leave Ctrl-C to this one and end with it; None where the system does not let them be made."""
    made = None
    try:
        made = ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD), initializer=exit_with_parent)
        with without_interrupts():
            made.submit(os.getpid)  # starts the first process
    except REFUSED:
        if made is not None:
            made.shutdown(wait=False)
        return None
    return made
