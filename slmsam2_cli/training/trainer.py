"""How it learns: draw clips, track them, sum the losses of the tracked slices, step; one screen.

From random weights the clips grow (2, 4, then all slices), because memory has nothing to say before a single slice can
be segmented; from trained weights they are long from the start.

One training run from its first step to its last: what it learns from, its learner, a bar to watch, states to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.device import half_precision
from slmsam2_cli.errors import PlanError, TrainingError
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import Plan, TrainingPlan
from slmsam2_cli.training import learner as learning
from slmsam2_cli.training.background import Beside, PendingResult, beside
from slmsam2_cli.training.clips import Clips, ClipSampler
from slmsam2_cli.training.dataloader import Batch, BatchDataset, BatchFeed, TrainingData, dataloader_workers
from slmsam2_cli.training.distributed import ALONE, ProcessGroup, shared
from slmsam2_cli.training.label_unet import SliceSampler, label_unet_loss, new_label_unet
from slmsam2_cli.training.learner import MAX_SKIPPED_STEPS, SKIPPED_KEY, Progress, copy_for_ema, fraction_done, learning_rate, training_step
from slmsam2_cli.training.losses import NANO, SAM2, SliceLoss, Weights, object_counts, slice_loss
from slmsam2_cli.training.monitoring import LABEL_UNET_COLUMN
from slmsam2_cli.training.state import save_state
from slmsam2_cli.training.trainable import parameter_groups, prepare

_EMA = 0.99
TEACHER_OBJECT_SCORE_WEIGHT = 3.0  # what object score counts where it is kept as it was; with 1 it drifted (docs/decisions.md)
_CURRICULUM = ((0.2, 2), (0.35, 4))  # share of the run up to which clips have at most so many slices
Track = Callable[[SliceFeatures, MemoryBank, int], SliceOutput]


@dataclass(kw_only=True)
class Learner(learning.Learner):
    """With whether it started from random weights, and by how much the object score of those it started from had been lowered.

    teacher: the network as it was before the first step, whose predicted object score is the target; None: object score learns the truth.
    """

    from_scratch: bool
    object_score_offset: float = 0.0
    teacher: SlmSam2 | None = None

    def networks(self) -> tuple[SlmSam2, ...]:
        return (*super().networks(), *([self.teacher] if self.teacher is not None else []))


def new_learner(model: SlmSam2, plan: TrainingPlan, from_scratch: bool, object_score_offset: float = 0.0) -> Learner:
    """A learner at step 0 of what the model lets be trained (strategies.py); the seed is the plan's."""
    torch.manual_seed(plan.seed)  # dropout
    return Learner(
        model=model,
        average=copy_for_ema(model),
        optimiser=torch.optim.AdamW(parameter_groups(model, plan), lr=plan.learning_rate),
        from_scratch=from_scratch,
        object_score_offset=object_score_offset,
        teacher=_teacher(model) if plan.object_score_target == "teacher" and not from_scratch else None,
    )


def _teacher(model: SlmSam2) -> SlmSam2:
    """The network as it is now, without a label U-Net."""
    teacher = copy_for_ema(model)
    teacher.label_unet = None
    return teacher


def clip_slices(done: float, plan: TrainingPlan, from_scratch: bool) -> int:
    """Slices per clip at this share of the run."""
    limits = [limit for until, limit in _CURRICULUM if done < until] if from_scratch else []
    return min([plan.clip_slices, *limits])


def train(
    learner: Learner,
    training_data: TrainingData,
    plan: TrainingPlan,
    stop: Callable[[], bool],
    ranks: ProcessGroup = ALONE,
    workers: int | None = None,
) -> Iterator[Progress]:
    """Train until the plan's steps or minutes are used up or `stop` says so; yields after every step.

    The model's label U-Net, where it has one, learns beside it, step by step. ranks: the processes that share the steps; the first one's
    clock and `stop` count. workers: processes that draw ahead, None for as many as the device needs. A step without a finite loss and
    gradient changes nothing; after 20 such steps in a row TrainingError is raised. Between two steps torch may have half of the cores.
    """
    device, skipped, done = learner.model.device, 0, fraction_done(learner, plan)
    workers = dataloader_workers(device, learner.from_scratch, ranks.count) if workers is None else workers
    feed = BatchFeed(
        _batches(learner, training_data, plan, ranks), learner.step, lambda: clip_slices(done, plan, learner.from_scratch), workers
    )
    learner.model.train()
    try:
        with beside(device, _thread_is_useful(learner, ranks)) as other:
            following: _PreparedStep | TrainingError | None = None
            while True:
                done = fraction_done(learner, plan)
                going, done = ranks.agree(done < 1 and not stop(), done)
                if not going:
                    return
                started = time.monotonic()
                if isinstance(following, TrainingError):
                    raise following
                here = following or _prepare_step(learner, feed, other)
                learner.optimiser.zero_grad(set_to_none=True)
                seen = other.begin(partial(_label_unet_losses, learner, here.batch.seen, ranks.count))
                ahead = other.present and not learner.from_scratch and learner.step + 1 < plan.steps
                following = _prepare_next(learner, feed, other) if ahead else None
                rate = learning_rate(learner.step, done, plan.learning_rate, plan.warmup_steps)
                losses = training_step(learner, _losses(learner, here, ranks), rate, _EMA, seen, ranks)
                skipped = skipped + 1 if SKIPPED_KEY in losses else 0
                if skipped >= MAX_SKIPPED_STEPS:
                    raise TrainingError(
                        f"training diverged at step {learner.step}. Lower training.learning_rate in plan.json (now {plan.learning_rate:g})"
                    )
                learner.step += 1
                learner.seconds += time.monotonic() - started
                yield Progress(learner.step, fraction_done(learner, plan), losses, rate)
    except RuntimeError as error:
        raise feed.worker_error(error) or ranks.worker_error() or error from None


def _batches(learner: Learner, training_data: TrainingData, plan: TrainingPlan, ranks: ProcessGroup) -> BatchDataset:
    label_unet = learner.model.label_unet if ranks.rank == 0 else None
    return BatchDataset(training_data, plan, label_unet.input_size if label_unet is not None else None, ranks.rank, ranks.count)


@dataclass(frozen=True)
class _PreparedStep:
    """What a step shows, and what the teacher believes of it: all that does not depend on the step before."""

    batch: Batch
    target_scores: PendingResult[list[Tensor]] | None


def _thread_is_useful(learner: Learner, ranks: ProcessGroup) -> bool:
    """Whether there is work to do beside a step, and the network too small to use all cores by itself."""
    recognised = learner.model.label_unet is not None and ranks.rank == 0
    return learner.model.network.size == "nano" and (learner.teacher is not None or recognised)


def _prepare_next(learner: Learner, feed: BatchFeed, other: Beside) -> _PreparedStep | TrainingError:
    """What the step after this one shows, or why it cannot be shown, which does not concern this one."""
    try:
        return _prepare_step(learner, feed, other)
    except TrainingError as error:
        return error


def _prepare_step(learner: Learner, feed: BatchFeed, other: Beside) -> _PreparedStep:
    started, device = time.monotonic(), learner.model.device
    batch = feed.next()
    learner.data_wait_s += time.monotonic() - started
    if learner.teacher is None:
        return _PreparedStep(batch, None)
    batch = replace(batch, clips=batch.clips.to(device))
    target_scores = other.begin(partial(teacher_scores, learner.teacher, batch.clips))
    if not other.present:
        with half_precision(device):
            target_scores.result()
    return _PreparedStep(batch, target_scores)


def _losses(learner: Learner, here: _PreparedStep, ranks: ProcessGroup) -> list[SliceLoss]:
    device, target_scores = learner.model.device, here.target_scores.result if here.target_scores is not None else None
    with half_precision(device):
        return clip_losses(learner.model, here.batch.clips, device, loss_weights(learner), ranks.mean, target_scores)


def _label_unet_losses(learner: Learner, seen: tuple[Tensor, Tensor] | None, count: int) -> dict[str, Tensor]:
    """What it is wrong by, with its gradients; of `count` processes it learns in the first one alone."""
    label_unet, device = learner.model.label_unet, learner.model.device
    if seen is None or label_unet is None:
        return {}
    slices, truth = seen
    with half_precision(device) if device.type == "cuda" else nullcontext():  # it sets a flag that both threads would share
        loss = label_unet_loss(label_unet(slices.to(device)).float(), truth.to(device))
    (count * loss).backward()  # type: ignore[no-untyped-call]  # what is shared is the mean over all processes
    return {LABEL_UNET_COLUMN: loss.detach()}


def loss_weights(learner: Learner) -> Weights:
    """What each part of the loss counts for this network."""
    if learner.teacher is not None:
        return replace(default_loss_weights(learner.model), object_score=TEACHER_OBJECT_SCORE_WEIGHT)
    return replace(default_loss_weights(learner.model), object_score_offset=learner.object_score_offset)


def default_loss_weights(model: SlmSam2) -> Weights:
    return NANO if model.network.size == "nano" else SAM2


def clip_losses(
    model: SlmSam2,
    clips: Clips,
    device: torch.device,
    weights: Weights | None = None,
    over: Callable[[Tensor], Tensor] = lambda counts: counts,
    target_scores: Callable[[], Sequence[Tensor]] | None = None,
) -> list[SliceLoss]:
    """Track M objects from their first slice; one loss per tracked slice, T - 1 in all.

    weights: None for the network's usual ones; over: the mean of (T, 3) counts of objects over the processes that share a step;
    target_scores: what object score learns, the teacher's prediction for the same clips.
    """
    weights = weights or default_loss_weights(model)
    clips = clips.to(device)
    counts = torch.stack([object_counts(masks, clips.known[t] if clips.known is not None else None) for t, masks in enumerate(clips.masks)])
    begun = _start_clip(model, clips)
    return followed(model, clips, *begun, len(clips.masks), weights, over(counts), target_scores() if target_scores is not None else None)


def _start_clip(model: SlmSam2, clips: Clips) -> tuple[SliceFeatures, MemoryBank, Track]:
    """All slices encoded, the first one remembered, and how the others are tracked."""
    features = model.encode(clips.frames.flatten(0, 1))
    bank, first = MemoryBank(), features.at(clips.feature_index(0))
    bank.conditioning[0] = model.remember(first, model.condition_on_mask(first, clips.masks[0]), clips.masks[0])

    def track(here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        return model.track(here, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, clips.slices))

    return features, bank, track


@torch.no_grad()
def teacher_scores(teacher: SlmSam2, clips: Clips) -> list[Tensor]:
    """For every slice, how probable a network thinks it that each object is there, (M,)."""
    clips = clips.to(teacher.device)
    features, bank, track = _start_clip(teacher, clips)
    length = len(clips.masks)
    said = [output.object_score for output in _track_slices(teacher, clips, features, bank, track, length)]
    return [torch.ones_like(said[0].squeeze(1)), *(logits.float().squeeze(1).sigmoid() for logits in said)]


def _track_slices(
    model: SlmSam2, clips: Clips, features: SliceFeatures, bank: MemoryBank, track: Track, until: int
) -> Iterator[SliceOutput]:
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
    target_scores: Sequence[Tensor] | None = None,
) -> list[SliceLoss]:
    """One loss per slice 1 ... until - 1, each tracked by `track`; its memory goes into the bank.

    features: of all T * W slices, as `Clips.feature_index` numbers them; counts: (T, 3); target_scores: T times (M,), as slice_loss takes.
    """
    losses = []
    for t, output in enumerate(_track_slices(model, clips, features, bank, track, until), start=1):
        known = clips.known[t] if clips.known is not None else None
        here = (counts[t] if counts is not None else None, target_scores[t] if target_scores is not None else None)
        losses.append(slice_loss(output, clips.masks[t], known, weights, *here))
    return losses


_WHOLE = 1000  # parts of a bar


def training_data_of(cases: Sequence[PreparedCase], plan: Plan) -> TrainingData:
    """DatasetError when none of the cases can be learned from, ArrayError when a file of one was cut short."""
    for case in cases:
        check_not_truncated(case)
    values, px = tuple(plan.labels), plan.geometry.stack_size
    clips = ClipSampler(cases, values, plan.geometry, plan.ignore)
    return TrainingData(clips, SliceSampler(cases, values, px, plan.ignore) if plan.training.label_unet else None)


def absent_labels(cases: Sequence[PreparedCase], plan: Plan) -> list[str]:
    """The plan's labels that none of the cases holds, by name and value."""
    held = {int(value) for case in cases if case.labels is not None for value in np.unique(case.labels)}
    return [f"{name} ({value})" for value, name in plan.labels.items() if value not in held]


def new_model(plan: Plan, base: Checkpoint | None, seed: int = 0) -> SlmSam2:
    """The plan's network with the base's weights, or with random ones drawn from the seed, ready for the plan's strategy.

    WeightsError when the weights do not fit; PlanError when there are none for the strategy to build on.
    """
    if base is None and plan.training.strategy != "full":
        raise PlanError(
            f"training.strategy is {plan.training.strategy}, which trains a part of the network, but --weights random has no other part. "
            "Start from trained weights, or set it to full in plan.json"
        )
    torch.manual_seed(seed)
    model = SlmSam2(plan.network, plan.geometry.input_size)
    if base is not None:
        load_weights(model, base)
    for note in prepare(model, plan.training, plan.modality, len(plan.channels)):
        console.detail(note)
    return model


def init_learner(plan: Plan, base: Checkpoint | None, training_data: TrainingData, device: torch.device) -> Learner:
    """A learner at step 0; the seed is the plan's."""
    model = new_model(plan, base, plan.training.seed)
    if training_data.slices is not None:
        model.label_unet = new_label_unet(training_data.slices, len(plan.channels), plan.training.seed)
        model.label_unet.can_add = plan.training.can_add is not False
    object_score_offset = base.provenance.object_score_offset if base is not None and base.provenance is not None else 0.0
    return new_learner(model.to(device), plan.training, base is None, object_score_offset)


def follow(
    learner: Learner,
    training_data: TrainingData,
    training: TrainingPlan,
    stopped: Callable[[], bool],
    *,
    title: str,
    state: Path,
    settings: str,
    every_s: float,
    told: Callable[[Progress], str],
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Train with a bar; every so many seconds the state is saved, and `saved` told. `told` sees each step, and says what the bar shows."""
    last, begun, at = time.monotonic(), learner.step, 0
    helping = partial(_train_in_worker, training_data, training)
    with console.progress(title, _WHOLE) as advance, shared(learner, training.workers, helping) as ranks:
        for progress in train(learner, training_data, training, stopped, ranks):
            said, now_at = told(progress), int(progress.done * _WHOLE)
            advance(now_at - at, said)
            at = now_at
            if time.monotonic() - last > every_s:
                save_state(state, learner, settings)
                saved()
                last = time.monotonic()
    if learner.step == begun:
        console.say("training already complete")


def _train_in_worker(training_data: TrainingData, training: TrainingPlan, learner: Learner, ranks: ProcessGroup) -> None:
    """What a process that shares the steps does: each of them, until the first one says that it is over."""
    for _ in train(learner, training_data, training, lambda: False, ranks):
        pass
