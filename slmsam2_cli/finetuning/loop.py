"""How it learns: draw clips, track them, sum the losses of the tracked slices, step; one screen.

From random weights the clips grow (2, 4, then all slices), because memory has nothing to say before a single slice can
be segmented; from trained weights they are long from the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slmsam2_cli.device import half_precision
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.finetuning import learner as learning
from slmsam2_cli.finetuning.beside import Beside, Later, beside
from slmsam2_cli.finetuning.clips import Clips
from slmsam2_cli.finetuning.feeding import Batch, Batches, Feed, Material, workers_for
from slmsam2_cli.finetuning.learner import PATIENCE, SKIPPED, Progress, average_of, descend, learning_rate, share_done
from slmsam2_cli.finetuning.log import RECOGNISED
from slmsam2_cli.finetuning.losses import NANO, SAM2, SliceLoss, Weights, object_counts, slice_loss
from slmsam2_cli.finetuning.recognising import recogniser_loss
from slmsam2_cli.finetuning.sharing import ALONE, Ranks
from slmsam2_cli.finetuning.strategies import parameter_groups
from slmsam2_cli.model.memory.policy import Moment
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import TrainingPlan

_EMA = 0.99
KEPT_PRESENCE = 3.0  # what presence counts where it is kept as it was; with 1 it drifted (docs/decisions.md)
_CURRICULUM = ((0.2, 2), (0.35, 4))  # share of the run up to which clips have at most so many slices
Track = Callable[[SliceFeatures, MemoryBank, int], SliceOutput]


@dataclass(kw_only=True)
class Learner(learning.Learner):
    """With whether it started from random weights, and by how much the presence score of those it started from had been lowered.

    teacher: the network as it was before the first step, whose belief about presence is kept; None: presence learns the truth.
    """

    from_scratch: bool
    lowered: float = 0.0
    teacher: SlmSam2 | None = None

    def networks(self) -> tuple[SlmSam2, ...]:
        return (*super().networks(), *([self.teacher] if self.teacher is not None else []))


def new_learner(model: SlmSam2, plan: TrainingPlan, from_scratch: bool, lowered: float = 0.0) -> Learner:
    """A learner at step 0 of what the model lets be trained (strategies.py); the seed is the plan's."""
    torch.manual_seed(plan.seed)  # dropout
    return Learner(
        model=model,
        average=average_of(model),
        optimiser=torch.optim.AdamW(parameter_groups(model, plan), lr=plan.learning_rate),
        from_scratch=from_scratch,
        lowered=lowered,
        teacher=_teacher(model) if plan.presence == "base" and not from_scratch else None,
    )


def _teacher(model: SlmSam2) -> SlmSam2:
    """The network as it is now, without a recogniser."""
    teacher = average_of(model)
    teacher.recogniser = None
    return teacher


def clip_slices(done: float, plan: TrainingPlan, from_scratch: bool) -> int:
    """Slices per clip at this share of the run."""
    limits = [limit for until, limit in _CURRICULUM if done < until] if from_scratch else []
    return min([plan.clip_slices, *limits])


def train(
    learner: Learner,
    material: Material,
    plan: TrainingPlan,
    stop: Callable[[], bool],
    ranks: Ranks = ALONE,
    workers: int | None = None,
) -> Iterator[Progress]:
    """Train until the plan's steps or minutes are used up or `stop` says so; yields after every step.

    The model's recogniser, where it has one, learns beside it, step by step. ranks: the processes that share the steps; the first one's
    clock and `stop` count. workers: processes that draw ahead, None for as many as the device needs. A step without a finite loss and
    gradient changes nothing; after 20 such steps in a row TrainingError is raised. Between two steps torch may have half of the cores.
    """
    device, skipped, done = learner.model.device, 0, share_done(learner, plan)
    workers = workers_for(device, learner.from_scratch, ranks.count) if workers is None else workers
    feed = Feed(_batches(learner, material, plan, ranks), learner.step, lambda: clip_slices(done, plan, learner.from_scratch), workers)
    learner.model.train()
    try:
        with beside(device, _pays(learner, ranks)) as other:
            following: _Shown | TrainingError | None = None
            while True:
                done = share_done(learner, plan)
                going, done = ranks.agree(done < 1 and not stop(), done)
                if not going:
                    return
                started = time.monotonic()
                if isinstance(following, TrainingError):
                    raise following
                here = following or _next_shown(learner, feed, other)
                learner.optimiser.zero_grad(set_to_none=True)
                seen = other.begin(partial(_recogniser_losses, learner, here.batch.seen, ranks.count))
                ahead = other.present and not learner.from_scratch and learner.step + 1 < plan.steps
                following = _looked_ahead(learner, feed, other) if ahead else None
                rate = learning_rate(learner.step, done, plan.learning_rate, plan.warmup_steps)
                losses = descend(learner, _losses(learner, here, ranks), rate, _EMA, seen, ranks)
                skipped = skipped + 1 if SKIPPED in losses else 0
                if skipped >= PATIENCE:
                    raise TrainingError(
                        f"training diverged at step {learner.step}. Lower training.learning_rate in plan.json (now {plan.learning_rate:g})"
                    )
                learner.step += 1
                learner.seconds += time.monotonic() - started
                yield Progress(learner.step, share_done(learner, plan), losses, rate)
    except RuntimeError as error:
        raise feed.death(error) or ranks.death() or error from None


def _batches(learner: Learner, material: Material, plan: TrainingPlan, ranks: Ranks) -> Batches:
    recogniser = learner.model.recogniser if ranks.rank == 0 else None
    return Batches(material, plan, recogniser.px if recogniser is not None else None, ranks.rank, ranks.count)


@dataclass(frozen=True)
class _Shown:
    """What a step shows, and what the teacher believes of it: all that does not depend on the step before."""

    batch: Batch
    believed: Later[list[Tensor]] | None


def _pays(learner: Learner, ranks: Ranks) -> bool:
    """Whether there is work to do beside a step, and the network too small to use all cores by itself."""
    recognised = learner.model.recogniser is not None and ranks.rank == 0
    return learner.model.network.size == "nano" and (learner.teacher is not None or recognised)


def _looked_ahead(learner: Learner, feed: Feed, other: Beside) -> _Shown | TrainingError:
    """What the step after this one shows, or why it cannot be shown, which does not concern this one."""
    try:
        return _next_shown(learner, feed, other)
    except TrainingError as error:
        return error


def _next_shown(learner: Learner, feed: Feed, other: Beside) -> _Shown:
    started, device = time.monotonic(), learner.model.device
    batch = feed.next()
    learner.waited += time.monotonic() - started
    if learner.teacher is None:
        return _Shown(batch, None)
    batch = replace(batch, clips=batch.clips.to(device))
    believed = other.begin(partial(belief, learner.teacher, batch.clips))
    if not other.present:
        with half_precision(device):
            believed.result()
    return _Shown(batch, believed)


def _losses(learner: Learner, here: _Shown, ranks: Ranks) -> list[SliceLoss]:
    device, believed = learner.model.device, here.believed.result if here.believed is not None else None
    with half_precision(device):
        return clip_losses(learner.model, here.batch.clips, device, weights_of(learner), ranks.mean, believed)


def _recogniser_losses(learner: Learner, seen: tuple[Tensor, Tensor] | None, count: int) -> dict[str, Tensor]:
    """What it is wrong by, with its gradients; of `count` processes it learns in the first one alone."""
    recogniser, device = learner.model.recogniser, learner.model.device
    if seen is None or recogniser is None:
        return {}
    slices, truth = seen
    with half_precision(device) if device.type == "cuda" else nullcontext():  # it sets a flag that both threads would share
        loss = recogniser_loss(recogniser(slices.to(device)).float(), truth.to(device))
    (count * loss).backward()  # type: ignore[no-untyped-call]  # what is shared is the mean over all processes
    return {RECOGNISED: loss.detach()}


def weights_of(learner: Learner) -> Weights:
    """What each part of the loss counts for this network."""
    if learner.teacher is not None:
        return replace(usual_weights(learner.model), presence=KEPT_PRESENCE)
    return replace(usual_weights(learner.model), lowered=learner.lowered)


def usual_weights(model: SlmSam2) -> Weights:
    return NANO if model.network.size == "nano" else SAM2


def clip_losses(
    model: SlmSam2,
    clips: Clips,
    device: torch.device,
    weights: Weights | None = None,
    over: Callable[[Tensor], Tensor] = lambda counts: counts,
    believed: Callable[[], Sequence[Tensor]] | None = None,
) -> list[SliceLoss]:
    """Track M objects from their first slice; one loss per tracked slice, T - 1 in all.

    weights: None for the network's usual ones; over: the mean of (T, 3) counts of objects over the processes that share a step;
    believed: what presence learns, another network's `belief` about the same clips.
    """
    weights = weights or usual_weights(model)
    clips = clips.to(device)
    counts = torch.stack([object_counts(masks, clips.known[t] if clips.known is not None else None) for t, masks in enumerate(clips.masks)])
    begun = _begun(model, clips)
    return followed(model, clips, *begun, len(clips.masks), weights, over(counts), believed() if believed is not None else None)


def _begun(model: SlmSam2, clips: Clips) -> tuple[SliceFeatures, MemoryBank, Track]:
    """All slices encoded, the first one remembered, and how the others are tracked."""
    features = model.encode(clips.frames.flatten(0, 1))
    bank, first = MemoryBank(), features.at(clips.feature_index(0))
    bank.anchors[0] = model.remember(first, model.anchor(first, clips.masks[0]), clips.masks[0])

    def track(here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        return model.track(here, bank, Moment(t, 1, bank.anchors, bank.tracked, clips.slices))

    return features, bank, track


@torch.no_grad()
def belief(teacher: SlmSam2, clips: Clips) -> list[Tensor]:
    """For every slice, how probable a network thinks it that each object is there, (M,)."""
    clips = clips.to(teacher.device)
    features, bank, track = _begun(teacher, clips)
    length = len(clips.masks)
    said = [output.presence for output in _walked(teacher, clips, features, bank, track, length)]
    return [torch.ones_like(said[0].squeeze(1)), *(logits.float().squeeze(1).sigmoid() for logits in said)]


def _walked(model: SlmSam2, clips: Clips, features: SliceFeatures, bank: MemoryBank, track: Track, until: int) -> Iterator[SliceOutput]:
    """Slices 1 ... until - 1, each tracked by `track`; its memory goes into the bank."""
    for t in range(1, until):
        here = features.at(clips.feature_index(t))
        output = track(here, bank, t)
        yield output
        if t + 1 < until:
            bank.tracked[t] = model.remember(here, output)


def followed(
    model: SlmSam2,
    clips: Clips,
    features: SliceFeatures,
    bank: MemoryBank,
    track: Track,
    until: int,
    weights: Weights = SAM2,
    counts: Tensor | None = None,
    believed: Sequence[Tensor] | None = None,
) -> list[SliceLoss]:
    """One loss per slice 1 ... until - 1, each tracked by `track`; its memory goes into the bank.

    features: of all T * W slices, as `Clips.feature_index` numbers them; counts: (T, 3), believed: T times (M,), as slice_loss takes them.
    """
    losses = []
    for t, output in enumerate(_walked(model, clips, features, bank, track, until), start=1):
        known = clips.known[t] if clips.known is not None else None
        here = (counts[t] if counts is not None else None, believed[t] if believed is not None else None)
        losses.append(slice_loss(output, clips.masks[t], known, weights, *here))
    return losses
