"""How a base model learns from nothing: compute the parts of a step, here or in helpers, add their gradients, descend; one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.step import Part, build, compute
from slmsam2_cli.pretraining.workers import Helpers, gather_gradients, helpers
from slmsam2_cli.training.learner import (
    MAX_SKIPPED_STEPS,
    SKIPPED_KEY,
    Learner,
    Progress,
    copy_for_ema,
    fraction_done,
    learning_rate,
    optimiser_step,
)

_COMPILED = ("image_encoder", "memory_encoder", "sam_mask_decoder")


@dataclass(kw_only=True)
class Pretrainer(Learner):
    """A learner without generators of its own."""

    command: ClassVar[str] = "slmsam2 pretrain"
    settings: ClassVar[str] = "recipe or seed"


@dataclass(kw_only=True)
class Step(Progress):
    """What one step was besides: slices per clip (of its first part), clips, seconds."""

    length: int
    clips: int
    seconds: float


def new_learner(recipe: Recipe, device: torch.device, start: Checkpoint | None = None) -> Pretrainer:
    """A learner at step 0, with random weights drawn from the recipe's seed, or with those of `start`. WeightsError."""
    model = build(recipe, device)
    if start is not None:
        load_weights(model, start)
    average = copy_for_ema(model)
    if recipe.compile and device.type == "cuda":
        for name in _COMPILED:
            getattr(model, name).compile()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases, norms, gates
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return Pretrainer(model=model, average=average, optimiser=torch.optim.AdamW(groups, lr=recipe.learning_rate))


def train(learner: Pretrainer, recipe: Recipe, stop: Callable[[], bool], use_processes: bool = False) -> Iterator[Step]:
    """Train until the recipe's steps or minutes are used up or `stop` says so; yields after every step.

    use_processes: each part in a process of its own; on a CPU only. A step without a finite loss and gradient changes
    nothing; after 20 such steps in a row TrainingError is raised.
    """
    skipped = 0
    learner.model.train()
    gradients = gather_gradients(learner.model)
    with helpers(learner.model, gradients, recipe) if use_processes else nullcontext() as others:
        while (done := fraction_done(learner, recipe)) < 1 and not stop():
            started = time.monotonic()
            rate = learning_rate(learner.step, done, recipe.learning_rate, recipe.warmup_steps)
            gradients.zero_()
            parts = _parts(learner, recipe, done, others)
            finite = all(part.losses for part in parts) and optimiser_step(learner, rate, recipe.average)
            skipped = 0 if finite else skipped + 1
            if skipped >= MAX_SKIPPED_STEPS:
                raise TrainingError(
                    f"training diverged at step {learner.step}. Lower learning_rate in the recipe (now {recipe.learning_rate:g})"
                )
            learner.step += 1
            took = time.monotonic() - started
            learner.seconds += took
            losses = _mean(parts) if finite else {SKIPPED_KEY: 1.0}
            clips = sum(part.clips for part in parts)
            yield Step(learner.step, fraction_done(learner, recipe), losses, rate, length=parts[0].length, clips=clips, seconds=took)


def _parts(learner: Pretrainer, recipe: Recipe, done: float, others: Helpers | None) -> list[Part]:
    """All parts of a step, with their gradients added up."""
    if others is None:
        return [compute(learner.model, recipe, learner.step, part, done) for part in range(recipe.parts)]
    others.ask(learner.step, done)
    return [compute(learner.model, recipe, learner.step, 0, done), *others.answers()]


def _mean(parts: list[Part]) -> dict[str, float]:
    return {name: sum(part.losses[name] for part in parts) / len(parts) for name in parts[0].losses}
