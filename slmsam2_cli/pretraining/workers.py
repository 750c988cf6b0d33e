"""Worker processes that compute parts of a step in parallel, on weights and gradients in shared memory.

On a CPU, processes of one thread each are faster than one process of several threads, and much faster when other programs use the
cores (docs/experiments/2026-11-22-pretraining-step-time.md). Gradients are added in the order of the parts, so the result is, bit for
bit, that of one process that computes the parts one after another.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing  # registers how tensors in shared memory are sent through pipes
from torch import Tensor

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.step import PartResult, build_model, compute_part

_TIMEOUT_S = 5.0
_ALIGNMENT = 16  # numbers: torch aligns tensors to 64 bytes; matrix products of otherwise aligned ones may be rounded differently


class GradientWorkers:
    """One process for every part but the first, which the calling process computes itself.

    gradients: of the model in the calling process, as `flatten_gradients` has laid them out.
    """

    def __init__(self, model: SlmSam2, gradients: Tensor, recipe: Recipe) -> None:
        self.gradients = gradients
        self.worker_gradients: list[Tensor] = []
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")  # a forked process of a process with threads may hang
        weights = share_weights(model)
        for part in range(1, recipe.parts):
            shared: Tensor = torch.zeros(len(gradients)).share_memory_()  # type: ignore[no-untyped-call]
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker_main, args=(recipe, part, weights, shared, theirs), daemon=True)
            process.start()
            theirs.close()
            self.worker_gradients.append(shared)
            self.connections.append(ours)
            self.processes.append(process)

    def start(self, step: int, done: float) -> None:
        """Let every worker begin its part."""
        for connection in self.connections:
            connection.send((step, done))

    def collect(self) -> list[PartResult]:
        """Wait for all workers, add their gradients to those of this process, and return their results.

        Raises: TrainingError when a worker has failed or ended.
        """
        try:
            results = [connection.recv() for connection in self.connections]
        except (EOFError, OSError):
            raise TrainingError("a worker process ended unexpectedly. Resume with --continue --threads 1") from None
        if failed := [result for result in results if isinstance(result, str)]:
            raise TrainingError(f"a worker process failed: {failed[0]}. Resume with --continue --threads 1")
        for gradients in self.worker_gradients:
            self.gradients += gradients
        return results

    def close(self) -> None:
        """End all workers."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(_TIMEOUT_S)
            if process.is_alive():
                process.kill()


def _worker_main(recipe: Recipe, part: int, weights: Tensor, gradients: Tensor, connection: Connection) -> None:
    """Compute a part whenever the calling process asks for it, until that closes the connection."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the calling process finishes its step
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    model = build_model(recipe, torch.device("cpu"))
    model.train()
    share_weights(model, weights)
    flatten_gradients(model, gradients)
    while True:
        try:
            step, done = connection.recv()
        except (EOFError, OSError):
            return
        try:
            gradients.zero_()
            result: PartResult | str = compute_part(model, recipe, step, part, done)
        except Exception as error:  # noqa: BLE001  reported by the calling process
            result = f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(result)


def share_weights(model: SlmSam2, weights: Tensor | None = None) -> Tensor:
    """Move a model's weights into one flat tensor in shared memory and return it; or use the values that `weights` already holds."""
    tensors = [*model.parameters(), *model.buffers()]  # in the same order in all models of one recipe
    if weights is None:
        count = sum(-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
        weights = torch.zeros(count).share_memory_()  # type: ignore[no-untyped-call]
        for tensor, view in zip(tensors, _views(tensors, weights, _ALIGNMENT)):
            view.copy_(tensor.detach())
    for tensor, view in zip(tensors, _views(tensors, weights, _ALIGNMENT)):
        tensor.data = view
    return weights


def flatten_gradients(model: SlmSam2, gradients: Tensor | None = None) -> Tensor:
    """Give a model gradients that are views of one flat tensor, by default of zeros, and return it."""
    parameters = list(model.parameters())
    if gradients is None:
        gradients = torch.zeros(sum(p.numel() for p in parameters), device=model.device)
    for p, view in zip(parameters, _views(parameters, gradients)):
        p.grad = view
    return gradients


def _views(tensors: Iterable[Tensor], flat: Tensor, alignment: int = 1) -> Iterator[Tensor]:
    """Yield views of a flat tensor, one after another, with the shapes and strides of `tensors`. alignment: in numbers."""
    start = 0
    for tensor in tensors:
        yield torch.as_strided(flat, tensor.shape, tensor.stride(), start)
        start += -(-tensor.numel() // alignment) * alignment
