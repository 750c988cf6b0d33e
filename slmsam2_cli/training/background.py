"""How nano uses the cores of a CPU in training: one thread of torch for each piece of work, and a second piece of work where it helps.

On tensors of a few thousand numbers several threads of torch mostly wait for each other, and they wait busily, which takes many times as
long beside other programs (docs/experiments/2026-11-29-finetune-side-by-side.md). So whatever is trained or predicted here is computed
by one thread, and the result does not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from slmsam2_cli.dataset.resources import free_bytes
from slmsam2_cli.device import needs_one_thread, torch_threads
from slmsam2_cli.parallel import available_cpus
from slmsam2_cli.planning.plan import Plan

T = TypeVar("T")


def pieces_at_once(plan: Plan, device: torch.device, bytes_each: int | None, pieces: int) -> int:
    """Compute how many independent pieces of work are run at once in processes: as many as there are cores, and as memory allows.

    Returns 1 where the network uses all cores by itself, or processes share its steps. bytes_each: memory of a piece, None where it is
    unknown.
    """
    if not needs_one_thread(plan.network.size, device) or plan.training.workers > 1 or not bytes_each:
        return 1
    return max(1, min(pieces, available_cpus(), free_bytes() // bytes_each))


def cores_of_each(processes: int) -> int:
    """Compute how many cores each of several processes has for itself."""
    return max(1, available_cpus() // processes)


@contextmanager
def background_thread(device: torch.device, cores: int, useful: bool = True) -> Iterator[ThreadPoolExecutor | None]:
    """Run a second thread during a block; yields None unless it is useful and this process has two or more cores of a CPU.

    Inside the block torch has one thread in each of both.
    """
    if not useful or device.type != "cpu" or cores < 2:
        yield None
        return
    with torch_threads(1), ThreadPoolExecutor(1, "background", initializer=torch.set_num_threads, initargs=(1,)) as thread:
        try:
            thread.submit(torch.get_num_threads).result()  # starts the thread before anything is computed
            yield thread
        finally:
            thread.shutdown(cancel_futures=True)


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
