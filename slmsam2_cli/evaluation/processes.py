"""The processes that score cases: copies of one that has loaded everything already.

Loading takes longer than scoring a small case. `prepare` starts it in the background, to be called before this process loads anything
itself; so this module imports nothing but the standard library.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

MOST = 8  # processes
START_METHOD = "forkserver"  # a copy of this process, which has threads, may hang; a new one for each loads everything again
_LOADED = ("slmsam2_cli.cli", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(wanted: int | None) -> int:
    """How many processes to use: those wanted, else one a core, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores if wanted is None else wanted, MOST))


def prepare(also: Sequence[str] = ()) -> None:
    """Begin to load what scoring needs, and these modules, in the process that others will be copied from; returns at once."""
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_LOADED, *also])
    multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to this one."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD), initializer=_leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
