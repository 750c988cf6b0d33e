"""The processes that score cases: copies of one that has loaded everything already.

Loading takes longer than scoring a small case. `prepare` starts it in the background, to be called before this process loads anything
itself; so this module imports nothing that takes time to load.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

from slmsam2_cli.data.workers import REFUSED, START_METHOD, cores, follow_the_parent, undisturbed

MOST = 8  # processes
_LOADED = ("slmsam2_cli.cli", "slmsam2_cli.evaluation.scoring", "nibabel", "scipy.ndimage", "scipy.spatial")


def count(wanted: int | None) -> int:
    """How many processes to use: those wanted, else one a core, at most 8."""
    return max(1, min(cores() if wanted is None else wanted, MOST))


def prepare(also: Sequence[str] = ()) -> None:
    """Begin to load what scoring needs, and these modules, in the process that others will be copied from; returns at once.

    Where that cannot be, `pool` will find out.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload([*_LOADED, *also])
    with suppress(*REFUSED), undisturbed():
        multiprocessing.forkserver.ensure_running()


def pool(processes: int) -> ProcessPoolExecutor | None:
    """Processes that leave Ctrl-C to this one and end with it; None where the system does not let them be made."""
    made = None
    try:
        made = ProcessPoolExecutor(processes, multiprocessing.get_context(START_METHOD), initializer=follow_the_parent)
        with undisturbed():
            made.submit(os.getpid)  # starts the first process
    except REFUSED:
        if made is not None:
            made.shutdown(wait=False)
        return None
    return made
