"""Train a network from random weights: compute the parts of a step, here or in workers, add their gradients, update the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.step import build_model, compute_part
from slmsam2_cli.pretraining.workers import GradientWorkers, flatten_gradients
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
    """A learner without stored generators: every random draw follows from the recipe's seed and the step."""

    command: ClassVar[str] = "slmsam2 pretrain"
    settings: ClassVar[str] = "recipe or seed"


@dataclass(kw_only=True)
class Step(Progress):
    """What one step reports in addition: slices per clip (of its first part), clips, seconds."""

    length: int
    clips: int
    seconds: float


def new_learner(recipe: Recipe, device: torch.device, start: Checkpoint | None = None) -> Pretrainer:
    """Return a learner at step 0, with random weights drawn from the recipe's seed or with the weights of `start`.

    Raises: WeightsError when the weights do not fit the network.
    """
    model = build_model(recipe, device)
    if start is not None:
        load_weights(model, start)
    ema = copy_for_ema(model)
    if recipe.compile and device.type == "cuda":
        for name in _COMPILED:
            getattr(model, name).compile()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases, norms, gates
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return Pretrainer(model=model, ema=ema, optimiser=torch.optim.AdamW(groups, lr=recipe.learning_rate))


def train(learner: Pretrainer, recipe: Recipe, stop: Callable[[], bool], use_processes: bool = False) -> Iterator[Step]:
    """Train until the recipe's steps or minutes are used up or `stop` returns True; yield after every step.

    use_processes: compute each part in its own process, on a CPU only. A step without a finite loss and gradient changes nothing.

    Raises: TrainingError when a worker process fails, or after MAX_SKIPPED_STEPS steps in a row without a finite gradient.
    """
    skipped = 0
    learner.model.train()
    gradients = flatten_gradients(learner.model)
    with closing(GradientWorkers(learner.model, gradients, recipe)) if use_processes else nullcontext() as workers:
        while (done := fraction_done(learner, recipe)) < 1 and not stop():
            started = time.monotonic()
            rate = learning_rate(learner.step, done, recipe.learning_rate, recipe.warmup_steps)
            gradients.zero_()
            if workers is not None:
                workers.start(learner.step, done)
            own_parts = range(recipe.parts if workers is None else 1)
            parts = [compute_part(learner.model, recipe, learner.step, part, done) for part in own_parts]
            if workers is not None:
                parts += workers.collect()
            finite = all(part.losses for part in parts) and optimiser_step(learner, rate, recipe.ema_decay)
            skipped = 0 if finite else skipped + 1
            if skipped >= MAX_SKIPPED_STEPS:
                raise TrainingError(
                    f"training diverged at step {learner.step}. Lower learning_rate in the recipe (now {recipe.learning_rate:g})"
                )
            learner.step += 1
            seconds = time.monotonic() - started
            learner.seconds += seconds
            losses = {SKIPPED_KEY: 1.0}
            if finite:
                losses = {name: sum(part.losses[name] for part in parts) / len(parts) for name in parts[0].losses}
            clips = sum(part.clips for part in parts)
            yield Step(learner.step, fraction_done(learner, recipe), losses, rate, length=parts[0].length, clips=clips, seconds=seconds)
