"""Train the network on clips: draw clips, track objects through them, sum the losses of the tracked slices, step.

Clips (T slices) --encode--> features --track slice by slice, with memory--> masks and object scores --> one loss per slice and term

From random weights the clips grow (2, 4, then all slices), because memory is of no use before a single slice can be segmented; from
pretrained weights they are long from the start. `run_training` adds a progress bar and saves states from which a run is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.device import half_precision, needs_one_thread
from slmsam2_cli.errors import PlanError, TrainingError
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights
from slmsam2_cli.model.cpu_ops import optimise_for_cpu
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.parallel import available_cpus
from slmsam2_cli.planning.plan import Plan, TrainingPlan
from slmsam2_cli.training import learner as learning
from slmsam2_cli.training.background import background_thread, submit
from slmsam2_cli.training.clips import Clips, ClipSampler
from slmsam2_cli.training.dataloader import Batch, BatchDataset, BatchFeed, TrainingData, dataloader_workers
from slmsam2_cli.training.distributed import SINGLE_PROCESS, ProcessGroup, start_processes
from slmsam2_cli.training.label_unet import SliceSampler, label_unet_loss, new_label_unet
from slmsam2_cli.training.learner import MAX_SKIPPED_STEPS, SKIPPED_KEY, Progress, copy_for_ema, fraction_done, learning_rate, training_step
from slmsam2_cli.training.losses import NANO, SAM2, LossWeights, SliceLoss, object_counts, slice_loss
from slmsam2_cli.training.monitoring import LABEL_UNET_COLUMN
from slmsam2_cli.training.state import save_state
from slmsam2_cli.training.trainable import parameter_groups, prepare

_EMA_DECAY = 0.99
TEACHER_OBJECT_SCORE_WEIGHT = 3.0  # of the object score with the teacher as target; 1 let it drift (docs/experiments)
_CURRICULUM = ((0.2, 2), (0.35, 4))  # fraction of the run up to which clips have at most so many slices
_BAR_PARTS = 1000
Track = Callable[[SliceFeatures, MemoryBank, int], SliceOutput]


@dataclass(kw_only=True)
class Learner(learning.Learner):
    """A learner for fine-tuning.

    from_scratch: whether it started from random weights. object_score_offset: by how much the object score of its initial weights was
    lowered after their training. teacher: the network before the first step, whose object score is the target; None: the target is the
    ground truth.
    """

    from_scratch: bool
    object_score_offset: float = 0.0
    teacher: SlmSam2 | None = None

    def networks(self) -> tuple[SlmSam2, ...]:
        return (*super().networks(), *([self.teacher] if self.teacher is not None else []))


def new_model(plan: Plan, pretrained: Checkpoint | None, seed: int = 0) -> SlmSam2:
    """Build the plan's network with pretrained weights, or random ones drawn from the seed, ready for the plan's strategy.

    Raises: WeightsError when the weights do not fit; PlanError when the strategy needs pretrained weights and there are none.
    """
    if pretrained is None and plan.training.strategy != "full":
        raise PlanError(
            f"training.strategy is {plan.training.strategy}, which trains a part of the network only, so it needs pretrained weights. "
            "Leave out --weights random, or set training.strategy to full in plan.json"
        )
    torch.manual_seed(seed)
    model = SlmSam2(plan.network, plan.geometry.input_size)
    if pretrained is not None:
        load_weights(model, pretrained)
    for note in prepare(model, plan.training, plan.modality, len(plan.channels)):
        console.detail(note)
    return model


def init_learner(plan: Plan, pretrained: Checkpoint | None, training_data: TrainingData, device: torch.device) -> Learner:
    """Build a learner at step 0, with a new label U-Net where the data have slices for it; the seed is the plan's."""
    model = new_model(plan, pretrained, plan.training.seed)
    if needs_one_thread(plan.network.size, device):
        optimise_for_cpu(model)
    if training_data.slices is not None:
        model.label_unet = new_label_unet(training_data.slices, len(plan.channels), plan.training.seed)
        model.label_unet.can_add = plan.training.can_add is not False
    provenance = pretrained.provenance if pretrained is not None else None
    offset = provenance.object_score_offset if provenance is not None else 0.0
    return new_learner(model.to(device), plan.training, pretrained is None, offset)


def new_learner(model: SlmSam2, plan: TrainingPlan, from_scratch: bool, object_score_offset: float = 0.0) -> Learner:
    """Build a learner at step 0 that trains the model's trainable parameters (trainable.py); the seed is the plan's."""
    torch.manual_seed(plan.seed)  # for dropout
    return Learner(
        model=model,
        ema=copy_for_ema(model),
        optimiser=torch.optim.AdamW(parameter_groups(model, plan), lr=plan.learning_rate),
        from_scratch=from_scratch,
        object_score_offset=object_score_offset,
        teacher=_teacher(model) if plan.object_score_target == "teacher" and not from_scratch else None,
    )


def _teacher(model: SlmSam2) -> SlmSam2:
    """Copy the network as it is now, without a label U-Net."""
    teacher = copy_for_ema(model)
    teacher.label_unet = None
    return teacher


def training_data_of(cases: Sequence[PreparedCase], plan: Plan) -> TrainingData:
    """Build the samplers of a plan's clips and slices.

    Raises: DatasetError when no case can be trained on; ArrayError when a file of a case was cut short.
    """
    for case in cases:
        check_not_truncated(case)
    values, size = tuple(plan.labels), plan.geometry.storage_size
    clips = ClipSampler(cases, values, plan.geometry, plan.ignore)
    return TrainingData(clips, SliceSampler(cases, values, size, plan.ignore) if plan.training.label_unet else None)


def absent_labels(cases: Sequence[PreparedCase], plan: Plan) -> list[str]:
    """List the plan's labels that are in none of the cases, by name and value."""
    present = {int(value) for case in cases if case.labels is not None for value in np.unique(case.labels)}
    return [f"{name} ({value})" for value, name in plan.labels.items() if value not in present]


def clip_slices(done: float, plan: TrainingPlan, from_scratch: bool) -> int:
    """Compute the slices per clip at this fraction of the run."""
    limits = [limit for until, limit in _CURRICULUM if done < until] if from_scratch else []
    return min([plan.clip_slices, *limits])


@dataclass(frozen=True)
class RunControl:
    """How a run is shown and saved. title: of the progress bar.

    state: the file to which the state is saved every `save_every_s` seconds. settings: the digest of everything that must not change
    before it is resumed. on_step: called after each step; returns the text next to the bar. on_save: called after each save. progress:
    shows the bar. cores: CPU cores that the run has for itself.
    """

    title: str
    state: Path
    settings: str
    save_every_s: float
    on_step: Callable[[Progress], str]
    on_save: Callable[[], None] = lambda: None
    progress: Callable[[str, int], AbstractContextManager[console.Advance]] = field(default=console.progress)
    cores: int = field(default_factory=available_cpus)


def run_training(
    learner: Learner, training_data: TrainingData, plan: TrainingPlan, stopped: Callable[[], bool], control: RunControl
) -> None:
    """Train to the end of the plan, or until `stopped` is true, with a progress bar; saves the state from time to time."""
    last_save, first_step, shown = time.monotonic(), learner.step, 0
    worker = partial(_train_in_worker, training_data, plan)
    processes = start_processes(learner, plan.workers, worker, control.cores)
    with control.progress(control.title, _BAR_PARTS) as advance, processes as process_group:
        for progress in train(learner, training_data, plan, stopped, process_group):
            text, done = control.on_step(progress), int(progress.done * _BAR_PARTS)
            advance(done - shown, text)
            shown = done
            if time.monotonic() - last_save > control.save_every_s:
                save_state(control.state, learner, control.settings)
                control.on_save()
                last_save = time.monotonic()
    if learner.step == first_step:
        console.say("training already complete")


def _train_in_worker(training_data: TrainingData, plan: TrainingPlan, learner: Learner, process_group: ProcessGroup) -> None:
    """Take part in every step, in a process that shares the steps, until process 0 says that the run is over."""
    for _ in train(learner, training_data, plan, lambda: False, process_group):
        pass


@dataclass(frozen=True)
class _PreparedStep:
    """What does not depend on the step before: the batch, and the teacher's object scores for it."""

    batch: Batch
    target_scores: Future[list[Tensor]] | None


def train(
    learner: Learner,
    training_data: TrainingData,
    plan: TrainingPlan,
    stop: Callable[[], bool],
    process_group: ProcessGroup = SINGLE_PROCESS,
    workers: int | None = None,
) -> Iterator[Progress]:
    """Train until the plan's steps or minutes are used up or `stop` is true; yields after every step.

    The model's label U-Net, where it has one, is trained in the same steps. process_group: the processes that share the steps; clock and
    `stop` of process 0 count. workers: processes that draw batches ahead, None for as many as the device needs. Between two steps torch
    may have one thread only.

    Raises: TrainingError after 20 steps in a row without a finite loss and gradient, which change nothing.
    """
    device = learner.model.device
    workers = dataloader_workers(device, learner.from_scratch, process_group.count) if workers is None else workers
    label_unet = learner.model.label_unet if process_group.rank == 0 else None
    input_size = label_unet.input_size if label_unet is not None else None
    batches = BatchDataset(training_data, plan, input_size, process_group.rank, process_group.count)
    feed = BatchFeed(batches, learner.step, clip_slices(fraction_done(learner, plan), plan, learner.from_scratch), workers)
    learner.model.train()
    try:
        with background_thread(device, process_group.cores, _thread_is_useful(learner, process_group)) as thread:
            yield from _steps(learner, feed, plan, stop, process_group, thread)
    except RuntimeError as error:
        raise feed.worker_error(error) or process_group.worker_error() or error from None


def _steps(
    learner: Learner, feed: BatchFeed, plan: TrainingPlan, stop: Callable[[], bool], group: ProcessGroup, thread: ThreadPoolExecutor | None
) -> Iterator[Progress]:
    """Do one step after the other; where there is a second thread, it prepares the next step meanwhile."""
    skipped = 0
    following: _PreparedStep | TrainingError | None = None
    while True:
        done = fraction_done(learner, plan)
        going, done = group.broadcast_progress(done < 1 and not stop(), done)
        if not going:
            return
        started = time.monotonic()
        if isinstance(following, TrainingError):
            raise following
        feed.length = clip_slices(done, plan, learner.from_scratch)
        step, following = following or _prepare_step(learner, feed, thread), None
        learner.optimiser.zero_grad(set_to_none=True)
        label_unet_losses = submit(thread, partial(_label_unet_losses, learner, step.batch.slices, group.count))
        if thread is not None and not learner.from_scratch and learner.step + 1 < plan.steps:
            try:
                following = _prepare_step(learner, feed, thread)
            except TrainingError as error:  # raised in the step that it concerns
                following = error
        rate = learning_rate(learner.step, done, plan.learning_rate, plan.warmup_steps)
        losses = training_step(learner, _losses(learner, step, group), rate, _EMA_DECAY, label_unet_losses, group)
        skipped = skipped + 1 if SKIPPED_KEY in losses else 0
        if skipped >= MAX_SKIPPED_STEPS:
            raise TrainingError(
                f"training diverged at step {learner.step}. Lower training.learning_rate in plan.json (now {plan.learning_rate:g})"
            )
        learner.step += 1
        learner.seconds += time.monotonic() - started
        yield Progress(learner.step, fraction_done(learner, plan), losses, rate)


def _thread_is_useful(learner: Learner, process_group: ProcessGroup) -> bool:
    """Return whether there is work for a second thread, and the network is too small to use all cores by itself."""
    trains_label_unet = learner.model.label_unet is not None and process_group.rank == 0
    return learner.model.network.size == "nano" and (learner.teacher is not None or trains_label_unet)


def _prepare_step(learner: Learner, feed: BatchFeed, thread: ThreadPoolExecutor | None) -> _PreparedStep:
    """Read a batch, and let the teacher predict the object scores of its clips."""
    started, device = time.monotonic(), learner.model.device
    batch = feed.next()
    learner.data_wait_s += time.monotonic() - started
    if learner.teacher is None:
        return _PreparedStep(batch, None)
    batch = replace(batch, clips=batch.clips.to(device))
    target_scores = submit(thread, partial(teacher_scores, learner.teacher, batch.clips))
    if thread is None:
        with half_precision(device):
            target_scores.result()
    return _PreparedStep(batch, target_scores)


def _losses(learner: Learner, step: _PreparedStep, process_group: ProcessGroup) -> list[SliceLoss]:
    """Compute the losses of a step's clips. The weight of the object score depends on its target."""
    weights, target_scores = default_loss_weights(learner.model), None
    if learner.teacher is not None:
        weights = replace(weights, object_score=TEACHER_OBJECT_SCORE_WEIGHT)
    else:
        weights = replace(weights, object_score_offset=learner.object_score_offset)
    if step.target_scores is not None:
        target_scores = step.target_scores.result
    with half_precision(learner.model.device):
        return clip_losses(learner.model, step.batch.clips, learner.model.device, weights, process_group.mean, target_scores)


def _label_unet_losses(learner: Learner, slices: tuple[Tensor, Tensor] | None, count: int) -> Mapping[str, Tensor]:
    """Compute the loss of the label U-Net and its gradients; of `count` processes, process 0 alone trains it."""
    label_unet, device = learner.model.label_unet, learner.model.device
    if slices is None or label_unet is None:
        return {}
    inputs, target = slices
    with half_precision(device) if device.type == "cuda" else nullcontext():  # it sets a flag that both threads would share
        loss = label_unet_loss(label_unet(inputs.to(device)).float(), target.to(device))
    (count * loss).backward()  # type: ignore[no-untyped-call]  # gradients are averaged over all processes
    return {LABEL_UNET_COLUMN: loss.detach()}


def default_loss_weights(model: SlmSam2) -> LossWeights:
    """Return the weights of the loss terms for a network of this size."""
    return NANO if model.network.size == "nano" else SAM2


@dataclass(frozen=True)
class ClipState:
    """A clip while it is tracked: encoded features, memory bank, and how a slice is tracked.

    features: of all T * W slices, as `Clips.feature_index` numbers them. bank: holds at least the first slice. end: slices 1 ... end - 1
    are tracked.
    """

    clips: Clips
    features: SliceFeatures
    bank: MemoryBank
    track: Track
    end: int


def clip_losses(
    model: SlmSam2,
    clips: Clips,
    device: torch.device,
    weights: LossWeights | None = None,
    over: Callable[[Tensor], Tensor] = lambda counts: counts,
    target_scores: Callable[[], Sequence[Tensor]] | None = None,
) -> list[SliceLoss]:
    """Track M objects from their first slice; returns one loss per tracked slice, T - 1 in all.

    weights: None for the network's default; over: averages (T, 3) counts of objects over the processes that share a step;
    target_scores: returns the teacher's object scores for the same clips, the target of the object score.
    """
    clips = clips.to(device)
    counts = torch.stack([object_counts(masks, clips.valid[t] if clips.valid is not None else None) for t, masks in enumerate(clips.masks)])
    state = _start_clip(model, clips)
    scores = target_scores() if target_scores is not None else None
    return track_losses(model, state, weights or default_loss_weights(model), over(counts), scores)


def _start_clip(model: SlmSam2, clips: Clips) -> ClipState:
    """Encode all slices, and store the first one in memory as a conditioning slice."""
    features = model.encode(clips.frames.flatten(0, 1))
    bank, first = MemoryBank(), features.at(clips.feature_index(0))
    bank.conditioning[0] = model.remember(first, model.condition_on_mask(first, clips.masks[0]), clips.masks[0])

    def track(here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        return model.track(here, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, clips.slices))

    return ClipState(clips, features, bank, track, len(clips.masks))


def _track_slices(model: SlmSam2, state: ClipState) -> Iterator[SliceOutput]:
    """Track slices 1 ... end - 1; all but the last are stored in memory."""
    for t in range(1, state.end):
        here = state.features.at(state.clips.feature_index(t))
        output = state.track(here, state.bank, t)
        yield output
        if t + 1 < state.end:
            state.bank.tracked[t] = model.remember(here, output)


def track_losses(
    model: SlmSam2,
    state: ClipState,
    weights: LossWeights = SAM2,
    counts: Tensor | None = None,
    target_scores: Sequence[Tensor] | None = None,
) -> list[SliceLoss]:
    """Track slices 1 ... end - 1; returns one loss for each. counts (T, 3) and target_scores, T times (M,), as `slice_loss` takes them."""
    losses, clips = [], state.clips
    for t, output in enumerate(_track_slices(model, state), start=1):
        valid = clips.valid[t] if clips.valid is not None else None
        count, scores = counts[t] if counts is not None else None, target_scores[t] if target_scores is not None else None
        losses.append(slice_loss(output, clips.masks[t], valid, weights, count, scores))
    return losses


@torch.no_grad()
def teacher_scores(teacher: SlmSam2, clips: Clips) -> list[Tensor]:
    """Predict for every slice the probability that each object is present, (M,); 1 on the annotated slice."""
    state = _start_clip(teacher, clips.to(teacher.device))
    scores = [output.object_score for output in _track_slices(teacher, state)]
    return [torch.ones_like(scores[0].squeeze(1)), *(logits.float().squeeze(1).sigmoid() for logits in scores)]
