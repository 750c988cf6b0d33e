"""Processes that compute parts of a step beside this one, on weights and gradients in shared memory.

On a CPU, processes of one thread each finish sooner than one process of several threads, and by far when other programs keep
the cores busy (docs/explanation/pretraining.md). The gradients are added in the order of the parts, so that the result is,
bit for bit, that of one process which computes them one after another.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing  # lets tensors in shared memory go through pipes
from torch import Tensor

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.step import Part, build, compute

_TIMEOUT_S = 5.0
_LINE = 16  # numbers: where torch lets a tensor begin, 64 bytes apart; a matrix product may be rounded otherwise elsewhere


class Helpers:
    """One helper for every part but the first."""

    def __init__(self, model: SlmSam2, own: Tensor, recipe: Recipe) -> None:
        self.own = own
        self.gradients: list[Tensor] = []
        self.lines: list[Connection] = []
        self.processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")  # a copy of a process that has threads may hang
        weights = share(model)
        for part in range(1, recipe.parts):
            gradients, (ours, theirs) = _shared(len(own)), context.Pipe()
            process = context.Process(target=_help, args=(recipe, part, weights, gradients, theirs), daemon=True)
            process.start()
            theirs.close()
            self.gradients, self.lines, self.processes = [*self.gradients, gradients], [*self.lines, ours], [*self.processes, process]

    def ask(self, step: int, done: float) -> None:
        """Let every helper begin its part."""
        for line in self.lines:
            line.send((step, done))

    def answers(self) -> list[Part]:
        """What the parts were, once their gradients have been added to this process's. TrainingError when a helper has failed."""
        try:
            parts = [line.recv() for line in self.lines]
        except (EOFError, OSError):
            raise TrainingError("a process that computed a part of the step has ended. Resume with --continue --threads 1") from None
        if failed := [part for part in parts if isinstance(part, str)]:
            raise TrainingError(f"a process that computed a part of the step failed: {failed[0]}. Resume with --continue --threads 1")
        for gradients in self.gradients:
            self.own += gradients
        return parts

    def end(self) -> None:
        """Let the helpers end."""
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.join(_TIMEOUT_S)
            if process.is_alive():
                process.kill()


@contextmanager
def helpers(model: SlmSam2, own: Tensor, recipe: Recipe) -> Iterator[Helpers]:
    """Helpers for the time of a block. own: the model's gradients, as `gather_gradients` laid them out."""
    found = Helpers(model, own, recipe)
    try:
        yield found
    finally:
        found.end()


def _help(recipe: Recipe, part: int, weights: Tensor, gradients: Tensor, line: Connection) -> None:
    """A helper's life: compute a part whenever it is asked to, until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the process that asks finishes its step
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    model = build(recipe, torch.device("cpu"))
    model.train()
    place(_kept(model), weights)
    _place_gradients(model, gradients)
    while True:
        try:
            step, done = line.recv()
        except (EOFError, OSError):
            return
        try:
            gradients.zero_()
            answer: Part | str = compute(model, recipe, step, part, done)
        except Exception as error:  # noqa: BLE001  said by the process that asked
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        line.send(answer)


def _kept(model: SlmSam2) -> list[Tensor]:
    """All tensors that two models of one recipe have to share, in the same order in both."""
    return [*model.parameters(), *model.buffers()]


def _shared(count: int) -> Tensor:
    flat: Tensor = torch.zeros(count).share_memory_()  # type: ignore[no-untyped-call]
    return flat


def share(model: SlmSam2) -> Tensor:
    """Move a model's weights into one piece of shared memory, and return it."""
    kept = _kept(model)
    flat = _shared(sum(_room(t) for t in kept))
    values = [t.detach().clone() for t in kept]
    place(kept, flat)
    for tensor, value in zip(kept, values):
        tensor.data.copy_(value)
    return flat


def gather_gradients(model: SlmSam2) -> Tensor:
    """Give a model gradients of zero in one piece of memory, and return it."""
    flat = torch.zeros(sum(p.numel() for p in model.parameters()), device=model.device)
    _place_gradients(model, flat)
    return flat


def _place_gradients(model: SlmSam2, flat: Tensor) -> None:
    start = 0
    for p in model.parameters():
        p.grad = torch.as_strided(flat, p.shape, p.stride(), start)
        start += p.numel()


def place(tensors: list[Tensor], flat: Tensor) -> None:
    """Let tensors lie one behind the other in a flat one, with the strides that they have."""
    start = 0
    for tensor in tensors:
        tensor.data = torch.as_strided(flat, tensor.shape, tensor.stride(), start)
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    """Numbers from the beginning of a tensor to that of the next."""
    return -(-tensor.numel() // _LINE) * _LINE
