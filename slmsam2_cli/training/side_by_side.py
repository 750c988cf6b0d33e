"""Long pieces of work side by side, each in a worker process: they are watched and stopped as if they ran in this process.

`parallel_map` is for many short cases without anything to resume. Here each piece of work trains for minutes and saves its own state.
What must be stored before it goes on is sent to this process, which answers when it is on disk; so a record is never behind a state.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.parallel import START_METHOD, UNAVAILABLE_ERRORS, exit_with_parent, without_interrupts, without_main_module

_PARTS = 1000  # of the progress bar, for each piece of work
_WAIT_S = 0.2  # until it is noticed that the user stops the run
_JOIN_S = 10.0
_BEGUN, _STORED, _STOP = "begun", "stored", "stop"


@dataclass(frozen=True)
class Watch:
    """How a piece of work is watched. stopped: whether the user stops the run; store: stores a value, and returns when it is on disk.

    progress: shows a progress bar, as console.progress does.
    """

    stopped: Callable[[], bool]
    store: Callable[[Any], None]
    progress: Callable[[str, int], AbstractContextManager[console.Advance]] = field(default=console.progress)


Work = Callable[[Any, Watch], Any]


@dataclass(frozen=True)
class _Progress:
    """The fraction of a piece of work that is done, and the text next to the bar."""

    done: float
    note: str


@dataclass(frozen=True)
class _Store:
    value: Any


@dataclass(frozen=True)
class _Ended:
    value: Any


@dataclass(frozen=True)
class _Failed:
    """An error as it was raised, or as text where it cannot be sent; trace: its traceback."""

    error: BaseException
    trace: str


@dataclass(eq=False)
class _Worker:
    """A process, the connection to it, and what it last showed."""

    name: str
    process: BaseProcess
    connection: Connection
    shown: _Progress = _Progress(0.0, "")


@dataclass(frozen=True)
class Results:
    """What becomes of what pieces of work send: store(name, value) stores a value, ended(name, result) takes their results."""

    store: Callable[[str, Any], None]
    ended: Callable[[str, Any], None]


def run_side_by_side(
    work: Work,
    jobs: Mapping[str, Any],
    title: str,
    stopped: Callable[[], bool],
    results: Results,
    again: str = "slmsam2 finetune --continue",
) -> bool:
    """Run work(job, watch) for every job in a process of its own. Returns False where no process can be started.

    jobs: name, as in messages -> job; `work` and jobs must be picklable. title: of the progress bar that all share. When `stopped`
    becomes true, all are told to stop and are waited for. again: the command to run after an error.

    Raises: TrainingError, with its name and the way out, when a process was killed; else the error of a piece of work.
    """
    workers = list[_Worker]()
    try:
        try:
            for name, job in jobs.items():
                workers.append(_start(name, work, job))
            for worker in workers:
                worker.connection.recv()  # it has begun
        except UNAVAILABLE_ERRORS:
            return False
        with console.progress(title, _PARTS * len(jobs)) as advance:
            _watch(workers, advance, stopped, results, again)
    finally:
        _end(workers)
    return True


def _start(name: str, work: Work, job: Any) -> _Worker:
    """Start a process for one job. Raises: one of UNAVAILABLE_ERRORS when that is not possible."""
    context: Any = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload([work.__module__])
    ours, theirs = context.Pipe()
    settings = replace(console.settings, progress=False)
    content = pickle.dumps((work, job, settings))  # by the usual pickle: torch's own would move the weights to shared memory
    process = context.Process(target=_serve, args=(content, theirs), daemon=True)
    with without_interrupts(), without_main_module():
        process.start()
    theirs.close()
    return _Worker(name, process, ours)


def _watch(workers: list[_Worker], advance: console.Advance, stopped: Callable[[], bool], results: Results, again: str) -> None:
    """Answer the processes until all have ended."""
    running, told = list(workers), False
    while running:
        if stopped() and not told:
            told = True
            for worker in running:
                _send(worker.connection, _STOP)
        news = wait([worker.connection for worker in running], _WAIT_S)
        for worker in [worker for worker in running if worker.connection in news]:
            message, before = _receive(worker, again), worker.shown
            if isinstance(message, _Store):
                results.store(worker.name, message.value)
                _send(worker.connection, _STORED)
            elif isinstance(message, _Progress):
                worker.shown = message
            else:
                running.remove(worker)
                results.ended(worker.name, message.value)
                worker.shown = replace(before, done=before.done if told else 1.0)
            note = ", ".join(one.shown.note for one in workers if one.shown.note)
            advance(int(_PARTS * worker.shown.done) - int(_PARTS * before.done), note)


def _receive(worker: _Worker, again: str) -> Any:
    """Receive a message. Raises: TrainingError when the process was killed; the error of its work."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        raise TrainingError(
            f"{worker.name}: its process was killed, probably because memory ran out. Close other programs, then run: {again}"
        ) from None
    if isinstance(message, _Failed):
        raise message.error from RuntimeError(message.trace)
    return message


def _send(connection: Connection, message: Any) -> None:
    """Send a message to a process; one that was killed is noticed when it is received from."""
    try:
        connection.send(message)
    except OSError:
        return


def _end(workers: list[_Worker]) -> None:
    """Kill the processes and wait until they have ended."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(_JOIN_S)
        worker.connection.close()


class _Parent:
    """The process that watches, as seen by a worker process."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.stopping, self.waiting = connection, False, False

    def stopped(self) -> bool:
        """Return whether the work was told to stop."""
        while self.connection.poll():
            self._receive()
        return self.stopping

    def store(self, value: Any) -> None:
        """Send a value, and wait until it is stored."""
        self.connection.send(_Store(value))
        self.waiting = True
        while self.waiting:
            self._receive()

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[console.Advance]:
        """Send progress instead of showing a bar."""
        done = 0

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            self.connection.send(_Progress(done / total, f"{title}, {note}" if note else title))

        yield advance

    def _receive(self) -> None:
        if self.connection.recv() == _STOP:
            self.stopping = True
        else:
            self.waiting = False


def _serve(content: bytes, connection: Connection) -> None:
    """Run in a worker process: do the work and send its result or error."""
    exit_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to all processes is for the parent, which tells when to stop
    connection.send(_BEGUN)
    parent = _Parent(connection)
    try:
        work, job, settings = pickle.loads(content)
        vars(console.settings).update(vars(settings))
        message: Any = _Ended(work(job, Watch(parent.stopped, parent.store, parent.progress)))
    except Exception as error:  # noqa: BLE001  raised again in the parent process
        message = _Failed(_sendable(error), traceback.format_exc())
    connection.send(message)


def _sendable(error: BaseException) -> BaseException:
    """Return the error, or its text as a RuntimeError where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
