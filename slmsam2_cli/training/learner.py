"""What is trained, and one optimiser step of it, for fine-tuning and for pretraining.

A step without a finite loss and gradient changes nothing. The moving average of the weights has a short memory at first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from slmsam2_cli.model.label_unet import PREFIX as LABEL_UNET_PREFIX
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.training.distributed import SINGLE_PROCESS, ProcessGroup
from slmsam2_cli.training.losses import SliceLoss

MAX_SKIPPED_STEPS = 20  # steps in a row without a finite gradient after which training has diverged
SKIPPED_KEY = "skipped"
_CLIP_NORM = 1.0


class Budget(Protocol):
    """How long a run is: its number of optimiser steps and, unless it is None, its limit in minutes."""

    steps: int
    minutes: float | None


@dataclass(kw_only=True)
class Learner:
    """The state of a run: the model, the moving average of its weights, the optimiser and the progress.

    step: optimiser steps so far. seconds: training time so far, of which `data_wait_s` were spent waiting for data. command, settings:
    name the command and what must not change between its runs, for messages about a state that does not fit.
    """

    command: ClassVar[str] = "slmsam2 finetune"
    settings: ClassVar[str] = "plan, split, seed or pretrained model"

    model: SlmSam2
    ema: SlmSam2
    optimiser: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    def networks(self) -> tuple[SlmSam2, ...]:
        """Return everything that has weights."""
        return self.model, self.ema

    def to(self, device: torch.device) -> None:
        """Move all networks and the optimiser's state to a device."""
        for network in self.networks():
            network.to(device)
        for slot in self.optimiser.state.values():
            for key, value in slot.items():
                if isinstance(value, Tensor) and key != "step":  # which AdamW keeps on the CPU
                    slot[key] = value.to(device)


@dataclass
class Progress:
    """Report of one step: the fraction of the run that is done, mean losses per tracked slice, the learning rate."""

    step: int
    done: float
    losses: dict[str, float]
    learning_rate: float = 0.0


def copy_for_ema(model: SlmSam2) -> SlmSam2:
    """Copy a model without gradients and in evaluation mode, as the moving average before the first step."""
    ema = copy.deepcopy(model)
    ema.eval().requires_grad_(False)
    return ema


def fraction_done(learner: Learner, budget: Budget) -> float:
    """Compute how much of the run is done, from 0 to 1: by steps or by minutes, whichever is further."""
    by_time = learner.seconds / (budget.minutes * 60) if budget.minutes else 0.0
    return min(1.0, max(learner.step / budget.steps, by_time))


def learning_rate(step: int, done: float, peak: float, warmup_steps: int) -> float:
    """Compute the learning rate: linear warm-up, then a cosine down to a twentieth of the peak."""
    warm = min(1.0, (step + 1) / max(warmup_steps, 1))
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def training_step(
    learner: Learner,
    losses: Sequence[SliceLoss],
    rate: float,
    ema_decay: float,
    extra_losses: Future[Mapping[str, Tensor]],
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Do one optimiser step on the mean of the losses; returns the mean of each, or {SKIPPED_KEY: 1} when the step was skipped.

    The gradients must have been cleared before. extra_losses: other losses by name, of process 0 alone, whose gradients are there once
    the result is. They are not part of the total that is returned.
    """
    total = total_loss(losses)
    finite = bool(torch.isfinite(process_group.mean(total)))
    if finite:
        total.backward()  # type: ignore[no-untyped-call]
    extra = extra_losses.result()
    if not finite:
        return {SKIPPED_KEY: 1.0}
    process_group.average_gradients(list(learner.model.parameters()))
    if not optimiser_step(learner, rate, ema_decay):
        return {SKIPPED_KEY: 1.0}
    return means(losses, process_group.mean) | {name: float(loss) for name, loss in extra.items()}


def total_loss(losses: Sequence[SliceLoss]) -> Tensor:
    """Compute what is minimised: the mean over slices of the weighted sum of the terms."""
    return torch.stack([loss.total for loss in losses]).mean()


def means(losses: Sequence[SliceLoss], over: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
    """Average every term of the loss and the weighted sum over slices, and by `over` over processes."""
    names = ("pixels", "dice", "iou", "object_score", "total")
    averages = torch.stack([torch.stack([getattr(loss, name).detach() for loss in losses]).mean() for name in names])
    return dict(zip(names, over(averages).tolist()))


def optimiser_step(learner: Learner, rate: float, ema_decay: float) -> bool:
    """Update weights and moving average; returns False, and changes nothing, when the gradient is not finite."""
    for group in learner.optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    named = list(learner.model.named_parameters())
    for label_unet in (True, False):  # clipped apart: it shares no weights, so its gradient must not shorten the other's step
        norm = torch.nn.utils.clip_grad_norm_([p for n, p in named if n.startswith(LABEL_UNET_PREFIX) == label_unet], _CLIP_NORM)
        if not torch.isfinite(norm):  # one such step would make every weight NaN
            return False
    learner.optimiser.step()
    decay = min(ema_decay, (1 + learner.step) / (10 + learner.step))
    with torch.no_grad():
        weight: Tensor
        for average, weight in zip(learner.ema.parameters(), learner.model.parameters()):
            if weight.requires_grad:
                average.lerp_(weight, 1 - decay)
    return True
