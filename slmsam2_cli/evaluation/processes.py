"""The processes that score cases: copies of one that has loaded everything already.

Loading takes longer than scoring a small case. `prepare` starts it in the background, to be called before this process loads anything
itself; so this module imports nothing but the standard library.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess

MOST = 8  # processes
START_METHOD = "forkserver"  # a copy of this process, which has threads, may hang; a new one for each loads everything again
_REFUSED = (OSError, EOFError, ImportError, NotImplementedError)  # no /dev/shm, no place for a socket, no more processes
_SAFE_PATH = "PYTHONSAFEPATH"  # heeded from Python 3.11 on
_LOADED = ("slmsam2_cli.cli", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(wanted: int | None) -> int:
    """How many processes to use: those wanted, else one a core, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores if wanted is None else wanted, MOST))


def prepare(also: Sequence[str] = ()) -> None:
    """Begin to load what scoring needs, and these modules, in the process that others will be copied from; returns at once.

    Where that cannot be, `pool` will find out.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_LOADED, *also])
    with suppress(*_REFUSED), _undisturbed():
        multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor | None:
    """Processes that leave Ctrl-C to this one and end with it; None where the system does not let them be made."""
    made = None
    try:
        made = ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD), initializer=_follow_the_parent)
        with _undisturbed():
            made.submit(os.getpid)  # starts the first process
    except _REFUSED:
        if made is not None:
            made.shutdown(wait=False)
        return None
    return made


@contextmanager
def _undisturbed() -> Iterator[None]:
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


def _follow_the_parent() -> None:
    """Leave Ctrl-C to it, and end when it has ended, however that came."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
