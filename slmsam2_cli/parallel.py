"""Run work on many cases in worker processes, all forked from one server process that has imported the slow modules once.

`parallel_map` returns results in the order of the cases, within a memory limit. A worker killed by the kernel costs only its own case,
which is run once more alone before it becomes a CaseError. This needs to know which case each worker runs; a ProcessPoolExecutor
does not tell, and one killed worker breaks all its futures. `pool` returns such an executor for scoring, where every case is submitted
and collected by its caller; `prepare` starts its imports in the background. Both share the start method, the protection from Ctrl-C
and the end with the parent. `fork_map` divides one case among copies of this process. Only the standard library is imported, so that a
new process starts quickly.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from slmsam2_cli.errors import CaseError, SlmSam2Error

Job = TypeVar("Job")
Answer = TypeVar("Answer")

START_METHOD = "forkserver"  # a fork of this process, which may have threads, may hang; spawn imports everything again
# no folder for a socket, no more processes, start method not available
UNAVAILABLE_ERRORS = (OSError, EOFError, ImportError, NotImplementedError, ValueError)
_SAFE_PATH = "PYTHONSAFEPATH"  # has an effect from Python 3.11 on
_EXCLUSIVE = float("inf")  # bytes of a job that must run alone
_WORKER_DIED = object()
MAX_END_S = 3.0  # for a worker to end by itself

ForkingPickler.register(CaseError, lambda error: (CaseError, (error.case, error.file, error.what, error.remedy)))


_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Count the CPUs that this process may use: those it may run on, or fewer where its control group limits their time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, _cpu_quota())))


def _cpu_quota() -> float:
    """Return the CPUs that the control groups of this process grant; infinity without a limit."""
    quotas = [float("inf")]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = _CONTROL_GROUPS / next(line[4:] for line in lines if line.startswith("0::/"))
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):
                quota, period = (group / "cpu.max").read_text().split()
                quotas.append(float(quota) / float(period))
    with suppress(OSError, ValueError):  # the first version of control groups
        quota, period = ((_CONTROL_GROUPS / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        quotas += [float(quota) / float(period)] if float(quota) > 0 else []
    return min(quotas)


@dataclass(frozen=True)
class MemoryLimit:
    """Jobs run together as long as the sum of their bytes_of(job) is at most `max_bytes`; a larger job runs alone."""

    bytes_of: Callable[[Any], int] = lambda job: 0
    max_bytes: int = sys.maxsize


NO_LIMIT = MemoryLimit()


def parallel_map(
    work: Callable[[Job], Answer],
    jobs: Mapping[str, Job],
    workers: int,
    *,
    limit: MemoryLimit = NO_LIMIT,
    advance: Callable[..., None] = lambda steps=1, note="": None,
    preload: Sequence[str] = (),
) -> list[Answer | CaseError]:
    """Return work(job) of every case, or the CaseError it raises, in the order of `jobs` (case id -> job).

    workers: number of worker processes; with 0, or where no process can be started, the jobs run in this process.
    advance(1, case id) is called after each case. preload: modules imported once for all workers. `work`, jobs and results must be
    picklable.

    Raises: the SlmSam2Error that `work` raises in a worker, RuntimeError for any other exception.
    """
    results: dict[str, Answer | CaseError] = {}
    for case, answer in as_completed(work, jobs, workers, limit=limit, preload=preload):
        results[case] = answer
        advance(1, case)
    return [results[case] for case in jobs]


def as_completed(
    work: Callable[[Job], Answer], jobs: Mapping[str, Job], workers: int, *, limit: MemoryLimit = NO_LIMIT, preload: Sequence[str] = ()
) -> Generator[tuple[str, Answer | CaseError], None, None]:
    """Yield (case id, work(job) or the CaseError it raises) as soon as each is done. Otherwise as `parallel_map`.

    Raises: the SlmSam2Error that `work` raises in a worker, RuntimeError for any other exception.
    """
    done = set[str]()
    if workers and not multiprocessing.current_process().daemon:  # a daemon may not start processes
        for case, answer in _run_in_pool(jobs, _WorkerPool(work, workers, preload), limit):
            done.add(case)
            yield case, answer
    for case in [case for case in jobs if case not in done]:
        yield case, _attempt(work, jobs[case])


def _attempt(work: Callable[[Job], Answer], job: Job) -> Answer | CaseError:
    try:
        return work(job)
    except CaseError as problem:
        return problem


def _run_in_pool(jobs: Mapping[str, Any], pool: _WorkerPool, limit: MemoryLimit) -> Iterator[tuple[str, Any]]:
    """Run the jobs in the pool's workers and yield their results; jobs for which no process could be started are left out."""
    waiting = deque(jobs)
    needs: dict[str, float] = {}  # bytes
    beside_others = set[str]()  # cases that did not run alone all the time
    try:
        while waiting or pool.running():
            pool.fill_up(len(waiting))
            idle = [worker for worker in pool.workers if worker.begun and worker.case_id is None]
            for worker in idle[: len(waiting)]:
                needs.setdefault(waiting[0], limit.bytes_of(jobs[waiting[0]]))
                if pool.running() and sum(needs[case] for case in (waiting[0], *pool.running())) > limit.max_bytes:
                    break
                if worker.assign(waiting[0], jobs[waiting[0]]):
                    waiting.popleft()
                    if len(pool.running()) > 1:
                        beside_others.update(pool.running())
            if not pool.workers:
                return
            for case, answer in pool.receive():
                if answer is not _WORKER_DIED:
                    yield case, answer
                elif case in beside_others and needs[case] < _EXCLUSIVE:
                    needs[case] = _EXCLUSIVE
                    waiting.append(case)
                else:
                    what = "the worker process was killed, probably out of memory"
                    yield case, CaseError(case, "", what, "Use fewer --workers, close other programs, or use a machine with more memory")
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
        """Send a case to the process. Returns False when the process has died; `receive` reports it then."""
        try:
            self.connection.send(job)
        except OSError:
            return False
        self.case_id = case
        return True


class _WorkerPool:
    """Up to `size` worker processes that all run `work`."""

    def __init__(self, work: Callable[[Any], Any], size: int, preload: Sequence[str]) -> None:
        self.work = pickle.dumps(work)  # by value: multiprocessing would send every tensor as an open file, and only few fit
        self.size, self.preload = size, [*preload]
        self.workers: list[_Worker] = []

    def running(self) -> list[str]:
        """List the cases that are being worked on."""
        return [worker.case_id for worker in self.workers if worker.case_id is not None]

    def fill_up(self, waiting: int) -> None:
        """Start processes for the waiting cases, up to `size`; after a failed start, no more are started."""
        missing = min(self.size, waiting + len(self.running())) - len(self.workers)
        try:
            for _ in range(missing):
                context: Any = multiprocessing.get_context(START_METHOD)
                context.set_forkserver_preload(self.preload)
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                with without_interrupts(), without_main_module():
                    process.start()
                theirs.close()
                self.workers.append(_Worker(process, ours))
        except UNAVAILABLE_ERRORS:
            self.size = 0

    def receive(self) -> Iterator[tuple[str, Any]]:
        """Wait for workers and yield (case, result); the result is _WORKER_DIED when the process has died.

        Raises: RuntimeError when the work raised anything but a CaseError.
        """
        news = wait([worker.connection for worker in self.workers])
        for worker in [worker for worker in self.workers if worker.connection in news]:
            try:
                message = worker.connection.recv()
            except (OSError, EOFError):
                message = _WORKER_DIED
                self.workers.remove(worker)
                self.size = self.size if worker.begun else 0  # a process that dies at its start would do so again
            if isinstance(message, _Failure):
                raise message.expected or RuntimeError(message.line) from RuntimeError(message.trace)
            if not worker.begun and message is not _WORKER_DIED:
                with suppress(OSError):  # a process that has died is noticed at the next turn
                    worker.connection.send_bytes(self.work)
            case, worker.begun, worker.case_id = worker.case_id, True, None
            if case is not None:
                yield case, message

    def end(self) -> None:
        """End the remaining processes, with time to remove their temporary files, and wait until they have ended."""
        deadline = time.monotonic() + MAX_END_S
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(max(0, deadline - time.monotonic()))
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Let a Python process started inside the block ignore Ctrl-C from its start and import nothing from the working directory."""
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
def without_main_module() -> Iterator[None]:
    """Let a Python process started inside the block not run the main script again, which may not be written for that."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@dataclass(frozen=True)
class _Failure:
    """An exception as text, because not every exception can be pickled. expected: the exception itself, if it is one of ours."""

    line: str
    trace: str
    expected: SlmSam2Error | None = None


def _serve(connection: Connection) -> None:
    """Run in a worker process: receive the work, then jobs, and send results until the connection is closed."""
    exit_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are removed on the way out
    connection.send("begun")
    work = None
    while True:
        try:
            work = work or pickle.loads(connection.recv_bytes())
            job = connection.recv()
        except (OSError, EOFError):
            return
        try:
            answer = _attempt(work, job)
        except Exception as error:  # noqa: BLE001  raised again in the parent process
            expected = error if isinstance(error, SlmSam2Error) else None
            answer = _Failure(f"{type(error).__name__}: {error}", traceback.format_exc(), expected)
        connection.send(answer)


def exit_with_parent() -> None:
    """Ignore Ctrl-C in this process, and end it as soon as its parent process has ended for any reason."""
    parent: Any = multiprocessing.parent_process()

    def exit_after_parent() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def fork_map(
    work: Callable[[Job, Callable[[int], None]], Answer], jobs: Sequence[Job], processes: int, advance: Callable[[int], None]
) -> list[Answer]:
    """Return work(job, advance) of every job, in their order, computed by copies of this process, which share its memory.

    For parts of one case whose inputs are too large to be sent. No other thread of this process may hold a lock. Where a process cannot
    be copied, as on Windows, and on macOS, where libraries do not survive it, the jobs run in this process. torch must have one thread:
    a copy waits for ever for further threads of the process that it was copied from.

    Raises: what `work` raises; MemoryError when a copy was killed.
    """
    if sys.platform != "linux":
        return [work(job, advance) for job in jobs]
    answers: dict[int, Answer] = {}
    waiting = deque(range(len(jobs)))
    copies = dict[Connection, int]()  # connection -> process id
    try:
        for _ in range(min(processes, len(jobs))):
            try:
                connection, process_id = _fork(work, jobs, copies)
            except OSError:  # no more processes
                break
            copies[connection] = process_id
            connection.send(waiting.popleft())
        if not copies:
            return [work(job, advance) for job in jobs]
        while len(answers) < len(jobs):
            ready = wait(list(copies))
            for connection in [one for one in copies if one in ready]:
                kind, index, value = _receive(connection)
                if kind == "step":
                    advance(value)
                elif kind == "error":
                    raise value
                else:
                    answers[index] = value
                    if waiting:
                        connection.send(waiting.popleft())
    finally:
        for connection, process_id in copies.items():
            connection.close()
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
    return [answers[index] for index in range(len(jobs))]


def _receive(connection: Connection) -> tuple[str, int, Any]:
    """Receive a message of a copy. Raises: MemoryError when the copy has died."""
    try:
        content = connection.recv_bytes()
    except (OSError, EOFError):
        raise MemoryError("a process was killed, probably out of memory") from None
    message: tuple[str, int, Any] = pickle.loads(content)
    return message


def _fork(work: Callable[[Any, Any], Any], jobs: Sequence[Any], siblings: Iterable[Connection]) -> tuple[Connection, int]:
    """Copy this process; the copy receives indexes of jobs and sends their results. Returns the connection to it and its process id."""
    ours, theirs = multiprocessing.Pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    parent = os.getpid()
    try:
        process_id = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        ours.close()
        theirs.close()
        raise
    if process_id:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        return ours, process_id
    try:  # in the copy, which never returns
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for connection in (ours, *siblings):
            connection.close()
        _serve_copies(work, jobs, theirs, parent)
    finally:
        os._exit(0)


def _serve_copies(work: Callable[[Any, Any], Any], jobs: Sequence[Any], connection: Connection, parent: int) -> None:
    """Run jobs by their index until the connection is closed or the parent process has ended."""

    def send(kind: str, value: object) -> None:
        connection.send_bytes(pickle.dumps((kind, index, value)))  # by value, as in _WorkerPool

    def advance(steps: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        send("step", steps)

    while True:
        try:
            index = connection.recv()
        except (OSError, EOFError):
            return
        try:
            send("answer", work(jobs[index], advance))
        except Exception as error:  # noqa: BLE001  raised again in the parent process
            try:
                send("error", error)
            except Exception:  # noqa: BLE001  an exception that cannot be sent
                send("error", RuntimeError(f"{type(error).__name__}: {error}"))


MAX_WORKERS = 8  # processes
SCORING_MODULES = ("slmsam2_cli.cli.app", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(requested: int | None) -> int:
    """Return the number of processes to use: those requested, else one per core; 1 to 8."""
    return max(1, min(available_cpus() if requested is None else requested, MAX_WORKERS))


def prepare(modules: Sequence[str]) -> None:
    """Start to import modules in the process that workers are forked from; returns at once. Errors are ignored here."""
    with suppress(*UNAVAILABLE_ERRORS):
        multiprocessing.get_context(START_METHOD).set_forkserver_preload([*modules])
        with without_interrupts():
            multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor | None:
    """Create a pool of worker processes that ignore Ctrl-C and end with this process; None where none can be started."""
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
