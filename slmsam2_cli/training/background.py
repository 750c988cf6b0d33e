"""A second thread beside the one that trains nano on a CPU: two pieces of work on one core each, for one piece on two.

Networks this small do not keep two cores busy, but two of them do (docs/explanation/training.md). Each thread has half of the cores for
all that it does, whatever the other one does meanwhile, so that no bit depends on who is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class PendingResult(Protocol[T_co]):
    """What a piece of work will have found."""

    def result(self) -> T_co:
        """Wait for it; raises what the work raised."""
        ...


class _LazyResult(Generic[T]):
    """Work that is done when somebody asks, and once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work, self.found = work, list[T]()

    def result(self) -> T:
        if not self.found:
            self.found.append(self.work())
        return self.found[0]


class Beside:
    """Takes pieces of work and does them in their order, each when the one before is done; without a pool, when they are asked for."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    @property
    def present(self) -> bool:
        """Whether there is another thread."""
        return self._pool is not None

    def begin(self, work: Callable[[], T]) -> PendingResult[T]:
        """Have it done; it must not touch what this thread changes, nor draw from generators that others draw from."""
        return self._pool.submit(work) if self._pool is not None else _LazyResult(work)


@contextmanager
def beside(device: torch.device, wanted: bool = True) -> Iterator[Beside]:
    """Another thread for the time of a block, where it is wanted, on a CPU of which this process has two cores or more.

    Inside, torch has half of the cores in either thread, whatever this one does there.
    """
    threads = torch.get_num_threads()
    if not wanted or device.type != "cpu" or threads < 2:
        yield Beside(None)
        return
    half = threads // 2
    pool = ThreadPoolExecutor(1, "beside", initializer=torch.set_num_threads, initargs=(half,))
    try:
        torch.set_num_threads(half)
        pool.submit(_nothing).result()  # begun before anything is computed
        yield Beside(pool)
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)


def _nothing() -> None:
    return None
