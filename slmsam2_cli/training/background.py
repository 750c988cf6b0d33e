"""A second thread that works while nano trains on a CPU: two pieces of work on half of the cores each.

Networks this small do not keep two cores busy, but two of them do (docs/explanation/training.md). Each thread uses half of the cores
for everything it computes, whatever the other thread does meanwhile, so the result does not depend on which one is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def background_thread(device: torch.device, useful: bool = True) -> Iterator[ThreadPoolExecutor | None]:
    """Run a second thread during a block; yields None unless it is useful and this process has two or more cores of a CPU.

    Inside the block torch has half of the cores in both threads.
    """
    threads = torch.get_num_threads()
    if not useful or device.type != "cpu" or threads < 2:
        yield None
        return
    half = threads // 2
    thread = ThreadPoolExecutor(1, "background", initializer=torch.set_num_threads, initargs=(half,))
    try:
        torch.set_num_threads(half)
        thread.submit(torch.get_num_threads).result()  # starts the thread before anything is computed
        yield thread
    finally:
        try:
            thread.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(threads)


def submit(thread: Executor | None, work: Callable[[], T]) -> Future[T]:
    """Run `work` in the thread, in the order of submission; without a thread, when its result is first asked for.

    `work` must not read what the calling thread changes, nor draw from generators that others draw from.
    """
    return thread.submit(work) if thread is not None else _LazyFuture(work)


class _LazyFuture(Future[T]):
    """A future that runs its work in the thread that first asks for the result."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            self.set_result(self._work())
        return super().result(timeout)
