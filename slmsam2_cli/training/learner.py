"""What learns, and one step of it: the same for fine-tuning and for training from nothing.

A step without a finite loss and gradient changes nothing. The moving average has a short memory at first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from slmsam2_cli.model.label_unet import PREFIX as LABEL_UNET_PREFIX
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.training.background import PendingResult
from slmsam2_cli.training.losses import SliceLoss

MAX_SKIPPED_STEPS = 20  # steps in a row without a finite gradient after which a run has diverged
SKIPPED_KEY = "skipped"
_CLIP_NORM = 1.0


class Budget(Protocol):
    """How long a run is."""

    @property
    def steps(self) -> int:
        """At most so many optimiser steps."""
        ...

    @property
    def minutes(self) -> float | None:
        """At most so many minutes of training."""
        ...


@dataclass(kw_only=True)
class Learner:
    """Everything a run needs to go on: model, its moving average, optimiser, step and seconds so far, and how many of these the
    device waited for data.

    A kind of training that draws from generators of its own says how they are stored (`draws`, `redraw`), and what to do
    about a state that does not fit (`command`, `settings`).
    """

    command: ClassVar[str] = "slmsam2 finetune"
    settings: ClassVar[str] = "plan, split, seed or base"

    model: SlmSam2
    average: SlmSam2
    optimiser: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    def to(self, device: torch.device) -> None:
        """Move it to a device; its optimiser goes on."""
        for network in self.networks():
            network.to(device)
        for slot in self.optimiser.state.values():
            for key, value in slot.items():
                if isinstance(value, Tensor) and key != "step":  # which AdamW keeps on the CPU
                    slot[key] = value.to(device)

    def networks(self) -> tuple[SlmSam2, ...]:
        """All that have weights."""
        return self.model, self.average

    def draws(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state of its own generators, as tensors and as text."""
        return {}, {}

    def set_generator_state(self, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
        """Bring its own generators to where `draws` found them."""


@dataclass
class Progress:
    """What one step reports: share of the run done, mean losses per tracked slice, learning rate."""

    step: int
    done: float
    losses: dict[str, float]
    learning_rate: float = 0.0


def copy_for_ema(model: SlmSam2) -> SlmSam2:
    """The average before the first step."""
    average = copy.deepcopy(model)
    average.eval().requires_grad_(False)
    return average


def fraction_done(learner: Learner, budget: Budget) -> float:
    """How much of the run is done, by steps or by minutes, whichever is further."""
    by_time = learner.seconds / (budget.minutes * 60) if budget.minutes else 0.0
    return min(1.0, max(learner.step / budget.steps, by_time))


def learning_rate(step: int, done: float, peak: float, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


class Sharing(Protocol):
    """The processes that share a step."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all of them."""
        ...

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give every one the mean of all gradients."""
        ...


def training_step(
    learner: Learner, losses: Sequence[SliceLoss], rate: float, ema_decay: float, apart: PendingResult[Mapping[str, Tensor]], ranks: Sharing
) -> dict[str, float]:
    """One optimiser step on the mean of the losses; returns each of their means, or that the step was skipped.

    The gradients have to be cleared before. apart: other losses, by name, of which the gradients are there when it has been waited for;
    they are not part of the total that is returned, and the first process alone has them.
    """
    total = total_loss(losses)
    finite = bool(torch.isfinite(ranks.mean(total)))
    if finite:
        total.backward()  # type: ignore[no-untyped-call]
    others = apart.result()
    if not finite:
        return {SKIPPED_KEY: 1.0}
    ranks.average_gradients(list(learner.model.parameters()))
    if not optimiser_step(learner, rate, ema_decay):
        return {SKIPPED_KEY: 1.0}
    return means(losses, ranks.mean) | {name: float(loss) for name, loss in others.items()}


def total_loss(losses: Sequence[SliceLoss]) -> Tensor:
    """What is minimised: the mean over slices of the weighted sum."""
    return torch.stack([loss.total for loss in losses]).mean()


def means(losses: Sequence[SliceLoss], over: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
    """Every part of the loss and their weighted sum, as means over slices, and over all processes."""
    names = ("pixels", "dice", "iou", "object_score", "total")
    found = torch.stack([torch.stack([getattr(loss, name).detach() for loss in losses]).mean() for name in names])
    return dict(zip(names, over(found).tolist()))


def optimiser_step(learner: Learner, rate: float, ema_decay: float) -> bool:
    """Follow the gradient and let the average follow; False, and nothing is changed, when the gradient is not finite."""
    for group in learner.optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    named = list(learner.model.named_parameters())
    for own in (True, False):  # apart: a loss that shares no weights shall not shorten the other's step
        norm = torch.nn.utils.clip_grad_norm_([p for n, p in named if n.startswith(LABEL_UNET_PREFIX) == own], _CLIP_NORM)
        if not torch.isfinite(norm):  # one such step would make every weight NaN
            return False
    learner.optimiser.step()
    _average(learner, ema_decay)
    return True


@torch.no_grad()
def _average(learner: Learner, most: float) -> None:
    """Move the average towards the model, where it is trained."""
    keep = min(most, (1 + learner.step) / (10 + learner.step))
    new: Tensor
    for old, new in zip(learner.average.parameters(), learner.model.parameters()):
        if new.requires_grad:
            old.lerp_(new, 1 - keep)
