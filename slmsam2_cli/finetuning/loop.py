"""How it learns: draw clips, track them, sum the losses of the tracked slices, step; one screen.

From random weights the clips grow (2, 4, then all slices), because memory has nothing to say before a single slice can
be segmented; from trained weights they are long from the start.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.finetuning.augment import augment
from slmsam2_cli.finetuning.clips import Clips, ClipSampler
from slmsam2_cli.finetuning.losses import SliceLoss, slice_loss
from slmsam2_cli.finetuning.strategies import parameter_groups
from slmsam2_cli.model.memory.policy import Moment
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import TrainingPlan

TRACKS_PER_WINDOW = 4
_CLIP_NORM, _EMA, _PATIENCE = 1.0, 0.99, 20
_CURRICULUM = ((0.2, 2), (0.35, 4))  # share of the run up to which clips have at most so many slices


@dataclass
class Learner:
    """Everything a run needs to go on: model, its moving average, optimiser, generators, step and seconds so far."""

    model: SlmSam2
    average: SlmSam2
    optimiser: torch.optim.AdamW
    clip_rng: np.random.Generator
    augment_rng: torch.Generator
    from_scratch: bool
    step: int = 0
    seconds: float = 0.0


@dataclass
class Progress:
    """What one step reports: share of the run done, mean losses per tracked slice, learning rate."""

    step: int
    done: float
    losses: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0


def new_learner(model: SlmSam2, plan: TrainingPlan, from_scratch: bool) -> Learner:
    """A learner at step 0 of what the model lets be trained (strategies.py); the seed is the plan's."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    torch.manual_seed(plan.seed)  # dropout
    return Learner(
        model,
        average,
        torch.optim.AdamW(parameter_groups(model, plan), lr=plan.learning_rate),
        np.random.default_rng(plan.seed),
        torch.Generator().manual_seed(plan.seed),
        from_scratch,
    )


def share_done(learner: Learner, plan: TrainingPlan) -> float:
    """How much of the run is done, by steps or by minutes, whichever is further."""
    by_time = learner.seconds / (plan.minutes * 60) if plan.minutes else 0.0
    return min(1.0, max(learner.step / plan.steps, by_time))


def clip_slices(done: float, plan: TrainingPlan, from_scratch: bool) -> int:
    """Slices per clip at this share of the run."""
    limits = [limit for until, limit in _CURRICULUM if done < until] if from_scratch else []
    return min([plan.clip_slices, *limits])


def _learning_rate(step: int, done: float, plan: TrainingPlan) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / max(plan.warmup_steps, 1))
    return plan.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(learner: Learner, sampler: ClipSampler, plan: TrainingPlan, stop: Callable[[], bool]) -> Iterator[Progress]:
    """Train until the plan's steps or minutes are used up or `stop` says so; yields after every step.

    A step without a finite loss and gradient changes nothing; after 20 such steps in a row TrainingError is raised.
    """
    device, skipped = learner.model.device, 0
    learner.model.train()
    while (done := share_done(learner, plan)) < 1 and not stop():
        started = time.monotonic()
        length = clip_slices(done, plan, learner.from_scratch)
        windows = plan.clips_per_step * max(1, min(4, plan.clip_slices // (2 * length)))
        clips = augment(sampler.draw(learner.clip_rng, windows, length, windows * TRACKS_PER_WINDOW), learner.augment_rng)
        rate = _learning_rate(learner.step, done, plan)
        losses = _step(learner, clips, rate, device)
        skipped = skipped + 1 if "skipped" in losses else 0
        if skipped >= _PATIENCE:
            raise TrainingError(
                f"training diverged at step {learner.step}. Lower training.learning_rate in plan.json (now {plan.learning_rate:g})"
            )
        learner.step += 1
        learner.seconds += time.monotonic() - started
        yield Progress(learner.step, share_done(learner, plan), losses, rate)


def _step(learner: Learner, clips: Clips, rate: float, device: torch.device) -> dict[str, float]:
    for group in learner.optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    learner.optimiser.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = clip_losses(learner.model, clips, device)
    total = torch.stack([loss.total for loss in losses]).mean()
    if not torch.isfinite(total):
        return {"skipped": 1.0}
    total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), _CLIP_NORM)
    if not torch.isfinite(norm):  # one such step would make every weight NaN
        return {"skipped": 1.0}
    learner.optimiser.step()
    _average(learner)
    names = ("focal", "dice", "iou", "presence", "total")
    return {name: float(torch.stack([getattr(loss, name).detach() for loss in losses]).mean()) for name in names}


def clip_losses(model: SlmSam2, clips: Clips, device: torch.device) -> list[SliceLoss]:
    """Track M objects from their first slice; one loss per tracked slice, T - 1 in all."""
    frames, masks = clips.frames.to(device), clips.masks.to(device)
    known = clips.known.to(device) if clips.known is not None else None
    features = model.encode(frames.flatten(0, 1))
    bank, losses = MemoryBank(), []
    first = features.at(clips.feature_index(0).to(device))
    bank.anchors[0] = model.remember(first, model.anchor(first, masks[0]), masks[0])
    for t in range(1, len(masks)):
        here = features.at(clips.feature_index(t).to(device))
        output = model.track(here, bank, Moment(t, 1, bank.anchors, bank.tracked, clips.slices))
        losses.append(slice_loss(output, masks[t], known[t] if known is not None else None))
        if t + 1 < len(masks):
            bank.tracked[t] = model.remember(here, output)
    return losses


@torch.no_grad()
def _average(learner: Learner) -> None:
    """Move the average towards the model, where it is trained; a short memory at first."""
    keep = min(_EMA, (1 + learner.step) / (10 + learner.step))
    new: Tensor
    for old, new in zip(learner.average.parameters(), learner.model.parameters()):
        if new.requires_grad:
            old.lerp_(new, 1 - keep)
