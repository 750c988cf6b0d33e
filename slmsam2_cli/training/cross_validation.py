"""Cross-validation: short runs that hold cases out, to decide whether fine-tuning helps, for how many steps, and with a label U-Net or not.

With two cases or more, FOLDS runs each hold one out; with one case, a single run is trained on the upper part of it and scored on the
lower. Each run is scored at a few checkpoints as `predict` would segment: from the middle slice of each label, with Dice over all other
slices, empty ones included. Where the pretrained model scores higher than every checkpoint, it is kept.

Folds do not depend on each other. On a CPU each runs in a process of its own (side_by_side.py), as many at once as cores and memory
allow; the results are the same, bit for bit, as one after another.

FOLDER/validation.json     the Dice of every fold at every checkpoint, and which folds are done
FOLDER/fold_1.safetensors  the state of a fold that is running; an interrupted cross-validation resumes there
FOLDER/held_out_CASE.png   masks of the held-out case over its slices
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.errors import WeightsError
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.inference.load_model import matching_label_unet
from slmsam2_cli.inference.propagation import AnnotatedSlice, Propagation, PropagationOptions, propagate_stack
from slmsam2_cli.inference.segment import remove_loose_parts
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import HeldOutResult
from slmsam2_cli.model.roi import pad_to_square
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan, TrainingPlan, digest_of
from slmsam2_cli.planning.rules import CHECKPOINTS, FOLD_FRACTION, FOLDS, SINGLE_CASE_FRACTION
from slmsam2_cli.training.background import cores_of_each, pieces_at_once
from slmsam2_cli.training.learner import Progress, fraction_done
from slmsam2_cli.training.monitoring import draw_overlays
from slmsam2_cli.training.side_by_side import Results, Watch, run_side_by_side
from slmsam2_cli.training.state import Run, delete_state, load_state, save_state, training_images_of
from slmsam2_cli.training.trainer import Learner, RunControl, init_learner, run_training, training_data_of

FILE, STATES, FORMAT_VERSION = "validation.json", "fold*.safetensors", 2
FOLD_TIME_FRACTION = 0.3  # of a limit in minutes, for all folds together
MIN_STEPS = 20  # of a fold, below which its scores mean nothing
TIE_MARGIN = 0.005  # Dice; of checkpoints that differ by less the latest is chosen
STOP_MARGIN = 0.02  # Dice below the best checkpoint so far at which a fold is stopped

Array = np.ndarray[Any, Any]
CheckpointScore = tuple[float, ...]  # Dice with the label U-Net, where there is one, and without


@dataclass(frozen=True)
class Fold:
    """A short run. cases: for training; held_out: the case that is scored; end_slice: only slices below it are scored, None: all."""

    name: str
    cases: tuple[PreparedCase, ...]
    held_out: PreparedCase
    end_slice: int | None = None


def make_folds(cases: Sequence[PreparedCase], plan: Plan, known_images: Collection[str] = ()) -> tuple[Fold, ...]:
    """Choose which cases to hold out: those in the middle of the order by labelled voxels, of three cases the two smaller ones.

    known_images: SHA-256 of images on which the pretrained model was trained; such cases are not held out, as its score on them would be
    too high. A fold needs, in its held-out case and in a training case, a label on two slices without ignored pixels.
    """
    for case in cases:
        check_not_truncated(case)
    new = [case for case in cases if set(case.record.get("inputs", {}).values()).isdisjoint(known_images)]
    if len(cases) == 1:
        return _split_case(cases[0], plan) if new else ()
    voxels = {case.id: int(np.isin(case.labels, tuple(plan.labels)).sum()) for case in new if case.labels is not None}
    ordered = sorted(new, key=lambda case: (voxels[case.id], case.id))
    first = (len(ordered) - min(FOLDS, len(ordered))) // 2
    folds = (Fold(one.id, tuple(case for case in cases if case is not one), one) for one in ordered[first : first + FOLDS])
    return tuple(fold for fold in folds if _is_scorable(fold.held_out, plan) and any(_is_scorable(case, plan) for case in fold.cases))


def _is_scorable(case: PreparedCase, plan: Plan) -> bool:
    """Return whether some label lies on two slices without ignored pixels."""
    return any(np.count_nonzero(label_areas(case, value, plan.ignore)) >= 2 for value in plan.labels)


def _split_case(case: PreparedCase, plan: Plan) -> tuple[Fold, ...]:
    """Split a single case at the middle slice of its labels; no fold where a part has no label on two slices."""
    areas = [area for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()]
    if not areas:
        return ()
    cut = min(choose_slice(area, "middle") for area in areas)
    upper = replace(case, frames=case.frames[:, cut:], labels=None if case.labels is None else case.labels[cut:])
    enough = all(any(np.count_nonzero(part) >= 2 for part in parts) for parts in ([a[:cut] for a in areas], [a[cut:] for a in areas]))
    return (Fold(f"slices below {cut} of {case.id}", (upper,), case, cut),) if enough else ()


def label_areas(case: PreparedCase, value: int, ignore: int | None) -> Array:
    """Count the pixels of a label on every slice (T,); 0 on slices with ignored pixels."""
    if case.labels is None:
        return np.zeros(0, int)
    check_not_truncated(case)
    labels = np.asarray(case.labels)
    area: Array = (labels == value).sum(axis=(1, 2))
    return area if ignore is None else np.where((labels == ignore).any(axis=(1, 2)), 0, area)


def fold_settings(training: TrainingPlan, count: int) -> TrainingPlan | None:
    """Compute the settings of a fold of a run on `count` cases; None where it would be too short."""
    fraction = SINGLE_CASE_FRACTION if count == 1 else FOLD_FRACTION
    steps = round(training.steps * fraction)
    if steps < MIN_STEPS:
        return None
    minutes = training.minutes * FOLD_TIME_FRACTION / (1 if count == 1 else FOLDS) if training.minutes is not None else None
    return training.model_copy(update={"steps": steps, "warmup_steps": max(5, steps // 20), "minutes": minutes})


def settings_after_folds(training: TrainingPlan, folds: int, validation: HeldOutResult | None) -> TrainingPlan:
    """Compute the settings of the run on all cases: the steps that cross-validation chose, and a share of the minutes that are left."""
    left = 1 - FOLD_TIME_FRACTION if folds else 1.0
    fraction = validation.steps / training.steps if validation is not None and validation.steps else 1.0
    minutes = training.minutes * left * fraction if training.minutes is not None else None
    steps = validation.steps if validation is not None and validation.steps else training.steps
    return training.model_copy(update={"steps": steps, "minutes": minutes})


@dataclass(frozen=True)
class FoldScore:
    """score: mean Dice over the labels; labels: the prediction for the held-out case, (T, H, W)."""

    score: float
    labels: Array


def score_fold(model: SlmSam2, fold: Fold, plan: Plan, use_label_prior: bool) -> FoldScore:
    """Segment the held-out case as `predict` would, each label from its middle slice, and compute Dice on all other slices.

    use_label_prior: whether the model's label U-Net is used, where it has one. A label that is absent from the counted slices, and not
    predicted there, scores 1. Ignored pixels are not counted.
    """
    case = fold.held_out
    check_not_truncated(case)
    assert case.labels is not None
    truth = np.array(case.labels)  # read now, while the file is known to be complete
    annotated = {value: choose_slice(area, "middle") for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()}
    found = propagate_labels(model, np.asarray(case.frames), truth, annotated, plan, use_label_prior)
    labels = combine_labels(found, truth, annotated, plan.geometry.storage_size)
    if use_label_prior:
        prompts = np.zeros_like(truth)
        for value, t in annotated.items():
            prompts[t][truth[t] == value] = value
        labels = remove_loose_parts(labels, prompts, found, model)
    scores = []
    for value, t in annotated.items():
        counted = np.ones(truth.shape, bool) if plan.ignore is None else truth != plan.ignore
        counted[t] = False
        counted[len(truth) if fold.end_slice is None else fold.end_slice :] = False
        score = dice((truth == value) & counted, (labels == value) & counted)
        scores.append(1.0 if score is None else score)
    return FoldScore(float(np.mean(scores)), labels)


def propagate_labels(
    model: SlmSam2, frames: Array, truth: Array, annotated: Mapping[int, int], plan: Plan, use_label_prior: bool = True
) -> dict[int, Propagation]:
    """Propagate every label from one slice of the ground truth, with the plan's settings.

    frames: (C, T, H, W) in [0, 1]; truth: labels (T, H, W); annotated: label -> its slice.
    """
    size = plan.geometry.storage_size
    objects = {value: [AnnotatedSlice(t, pad_to_square(torch.from_numpy(truth[t] == value), size))] for value, t in annotated.items()}
    return propagate_stack(model, frames, objects, plan, PropagationOptions(use_label_prior=use_label_prior))


def combine_labels(found: Mapping[int, Propagation], truth: Array, annotated: Mapping[int, int], storage_size: int) -> Array:
    """Give every pixel the label with the largest logit above 0; annotated slices keep the annotation. Returns labels (T, H, W)."""
    labels, values = np.zeros_like(truth), np.array(list(found), dtype=truth.dtype)
    for t in range(len(truth)):
        logits = np.stack([one.plane(t, storage_size, *truth.shape[1:]).numpy() for one in found.values()])
        labels[t] = np.where(logits.max(axis=0) > 0, values[logits.argmax(axis=0)], 0)
    for value, t in annotated.items():
        labels[t][labels[t] == value] = 0
        labels[t][truth[t] == value] = value
    return labels


def stopped_early(checkpoints: Mapping[int, CheckpointScore]) -> bool:
    """Return whether a fold's last checkpoint is so much worse than its best that the fold is not continued."""
    after = [max(checkpoints[at]) for at in sorted(checkpoints) if at]
    return bool(after) and after[-1] < max(after) - STOP_MARGIN


def conclude(folds: Mapping[str, Mapping[int, CheckpointScore]], training: TrainingPlan, steps_fixed: bool) -> HeldOutResult | None:
    """Choose model, steps and use of the label U-Net from the Dice of every fold at every checkpoint; None without a fold.

    Checkpoints are numbered from 1; 0 is the pretrained model. Of those that score nearly as well as the best, and not worse than the
    pretrained model, the ones with the label U-Net come first, then the latest. steps_fixed: the user set the number of steps; then it is
    not reduced, and only the last checkpoint is used.
    """
    shared = sorted(set.intersection(*(set(scores) for scores in folds.values()))) if folds else []
    if 0 not in shared or len(shared) < 2:
        return None
    usable = shared[-1:] if steps_fixed else shared[1:]
    means = {at: [float(np.mean(way)) for way in zip(*(scores[at] for scores in folds.values()), strict=True)] for at in shared}
    pretrained, after = means[0][0], [(mean, way, at) for at in usable for way, mean in enumerate(means[at])]
    best, ways = max(after)[0], len(means[shared[-1]])
    good = [(way, -at) for mean, way, at in after if mean >= max(best - TIE_MARGIN, pretrained)]
    way, at = (min(good)[0], -min(good)[1]) if good else (max(after)[1], max(after)[2])
    steps = max(1, round(training.steps * (1.0 if steps_fixed else CHECKPOINTS[at - 1])))
    return HeldOutResult(
        held_out=tuple(folds),
        pretrained=round(pretrained, 4),
        fine_tuned=round(means[at][way], 4),
        steps=steps if good else 0,
        label_unet=way == 0 if ways > 1 else None,
        kept="fine_tuned" if good else "pretrained",
    )


def print_validation(validation: HeldOutResult, count: int) -> None:
    """Print the result of cross-validation, and what it means for the run on `count` cases."""
    scores = f"Dice {validation.pretrained:.3f} pretrained, {validation.fine_tuned:.3f} fine-tuned"
    line = f"cross-validation on {', '.join(validation.held_out)}: {scores}"
    if validation.kept == "pretrained":
        console.warn(f"{line}. Keeping the pretrained model; to fine-tune anyway set training.validation to none in plan.json")
    else:
        without = ", without the label U-Net, which did not improve Dice" if validation.label_unet is False else ""
        console.say(f"{line}. Fine-tuning on {f'all {count} cases' if count > 1 else '1 case'} for {validation.steps} steps{without}")


@dataclass
class FoldRecord:
    """The content of validation.json: fold -> checkpoint -> Dice with and without the label U-Net, and the folds that are done."""

    path: Path
    run: str
    checkpoints: dict[str, dict[int, CheckpointScore]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def store(self, fold: str, scores: Mapping[int, CheckpointScore]) -> None:
        """Write validation.json with the scores of a fold so far. Raises OutputError when it cannot be written."""
        self.checkpoints[fold] = dict(scores)
        self.write()

    def end(self, fold: str) -> None:
        """Write validation.json with this fold as done; done ones are in the order of the folds, whichever ended first."""
        self.done = [name for name in self.checkpoints if name in {*self.done, fold}]
        self.write()

    def write(self) -> None:
        """Write validation.json. Raises OutputError when it cannot be written."""
        value = {"format_version": FORMAT_VERSION, "run": self.run, "checkpoints": self.checkpoints, "done": self.done}
        atomic.write_json(self.path, value)


def read_record(path: Path, run: str) -> FoldRecord:
    """Read validation.json; an empty record where it is of another run, damaged or of another format_version."""
    try:
        value: Any = atomic.read_json(path, "the validation") if path.exists() else {}
        if value.get("run") == run and value.get("format_version") == FORMAT_VERSION:
            folds = {name: {int(at): tuple(map(float, s)) for at, s in scores.items()} for name, scores in value["checkpoints"].items()}
            return FoldRecord(path, run, folds, [name for name in value["done"] if name in folds])
    except (atomic.JsonError, AttributeError, KeyError, TypeError, ValueError):
        console.warn(f"{path.name} is damaged; cross-validation starts again")
    return FoldRecord(path, run)


def delete_folds(folder: Path) -> None:
    """Delete the files of an earlier cross-validation, so that it is not resumed."""
    (folder / FILE).unlink(missing_ok=True)
    _delete_states(folder)
    for picture in folder.glob("held_out_*.png"):
        picture.unlink(missing_ok=True)


def _delete_states(folder: Path) -> None:
    """Delete the states of all folds, also of versions that kept one only."""
    for state in folder.glob(STATES):
        state.unlink(missing_ok=True)


def plan_folds(run: Run, used: Sequence[PreparedCase]) -> tuple[tuple[Fold, ...], TrainingPlan | None]:
    """Return the folds and their settings; none from random weights, in a short run, or where the plan has no cross-validation."""
    training = fold_settings(run.plan.training, len(used))
    if run.pretrained is None or run.plan.training.validation == "none" or training is None:
        return (), None
    return make_folds(used, run.plan, training_images_of(run.pretrained)), training


@dataclass(frozen=True)
class CrossValidation:
    """Where and how the folds of a run are run. steps_fixed: the user set the number of steps. stopped: whether the user stops the run.

    fold_bytes: the memory that a fold needs; None where it is unknown, then folds are run one after another.
    """

    run: Run
    device: torch.device
    folder: Path
    save_every_s: float
    steps_fixed: bool
    stopped: Callable[[], bool]
    fold_bytes: int | None = None


@dataclass(frozen=True)
class FoldJob:
    """What a fold needs to run in any process. scores: of its checkpoints so far; cores: CPU cores that it has for itself."""

    fold: Fold
    run: Run
    training: TrainingPlan
    device: torch.device
    state: Path
    save_every_s: float
    scores: Mapping[int, CheckpointScore]
    title: str
    cores: int

    @property
    def plan(self) -> Plan:
        """The plan of the run, with the settings of the fold."""
        return self.run.plan.model_copy(update={"training": self.training})

    @property
    def settings(self) -> str:
        """The digest of everything that must not change before the fold is resumed."""
        return digest_of({"run": self.run.digest, "fold": self.fold.name})


def validate(job: CrossValidation, used: Sequence[PreparedCase]) -> HeldOutResult | None:
    """Run the folds that are not done yet; None where there are none, none could be scored, or the user stopped the run."""
    run = job.run
    folds, training = plan_folds(run, used)
    if training is not None and not folds and make_folds(used, run.plan):
        console.say("skipping cross-validation: the pretrained model was trained on these cases")
    record = read_record(job.folder / FILE, run.digest)
    record.checkpoints = {fold.name: record.checkpoints.get(fold.name, {}) for fold in folds}
    if training is not None:
        _run_folds(job, folds, training, record)
    if job.stopped() and folds:
        return None
    _delete_states(job.folder)
    scores = {name: record.checkpoints[name] for name in record.done if record.checkpoints[name]}
    return conclude(scores, run.plan.training, job.steps_fixed)


def _run_folds(job: CrossValidation, folds: Sequence[Fold], training: TrainingPlan, record: FoldRecord) -> None:
    """Run the folds that are not done yet, side by side where that is possible, else one after another."""
    share = pieces_at_once(job.run.plan, job.device, job.fold_bytes, len(folds))  # also of a fold that is resumed alone
    minutes = training.minutes * share if training.minutes is not None else None
    shared, processes, jobs = training.model_copy(update={"minutes": minutes}), min(share, len(folds) - len(record.done)), {}
    for number, fold in enumerate(folds, start=1):
        if fold.name not in record.done:
            title, cores = f"cross-validation {number}/{len(folds)}", cores_of_each(processes)
            state, scores = job.folder / f"fold_{number}.safetensors", record.checkpoints[fold.name]
            jobs[fold.name] = FoldJob(fold, job.run, shared, job.device, state, job.save_every_s, scores, title, cores)

    def end(name: str, scores: Mapping[int, CheckpointScore] | None) -> None:
        if scores is not None:
            record.store(name, scores)
            record.end(name)
            delete_state(jobs[name].state)

    titles = {f"{one.title}, held out {name}": name for name, one in jobs.items()}
    results = Results(lambda title, scores: record.store(titles[title], scores), lambda title, scores: end(titles[title], scores))
    named = {title: jobs[name] for title, name in titles.items()}
    if processes > 1:
        if run_side_by_side(run_fold_in_process, named, "cross-validation", job.stopped, results):
            return
        jobs = {name: replace(one, training=training) for name, one in jobs.items()}
    for name, one in jobs.items():
        if job.stopped():
            return
        with torch.random.fork_rng():  # the run itself draws the same numbers as without cross-validation
            end(name, run_fold(replace(one, cores=cores_of_each(1)), Watch(job.stopped, partial(record.store, name))))


def run_fold_in_process(job: FoldJob, watch: Watch) -> dict[int, CheckpointScore] | None:
    """Run a fold in a process of its own."""
    torch.set_num_threads(1)
    return run_fold(job, watch)


def run_fold(job: FoldJob, watch: Watch) -> dict[int, CheckpointScore] | None:
    """Train and score a fold, or resume it. Returns the Dice of its checkpoints; None where the user stops the run before its end.

    The scores are stored before any state that is further, so that none is missing after an interruption.
    """
    plan, fold, training, state = job.plan, job.fold, job.training, job.state
    training_data = training_data_of(fold.cases, plan)
    learner = init_learner(plan, job.run.pretrained, training_data, job.device)
    scores, ways = dict(job.scores), (True, False) if training.label_unet else (False,)
    resumed = False
    if 0 in scores:
        with suppress(WeightsError):
            load_state(state, learner, job.settings)
            resumed = True
    if not resumed:
        scores = {0: (_pretrained_score(job.run, learner, fold, plan),) * len(ways)}
        watch.store(scores)
        save_state(state, learner, job.settings)
    scored_at = [fraction_done(learner, training)]

    def on_step(progress: Progress) -> str:
        for number, fraction in enumerate(CHECKPOINTS, start=1):
            if scored_at[0] < fraction <= progress.done:
                scores[number] = tuple(score_fold(learner.ema, fold, plan, use_label_prior=way).score for way in ways)
                watch.store(scores)
        scored_at[0] = progress.done
        return f"held out {fold.name}: Dice {' → '.join(f'{max(scores[at]):.3f}' for at in sorted(scores))}"

    if scored_at[0] < 1 and not stopped_early(scores) and not watch.stopped():
        control = RunControl(job.title, state, job.settings, job.save_every_s, on_step, progress=watch.progress, cores=job.cores)
        run_training(learner, training_data, training, lambda: watch.stopped() or stopped_early(scores), control)
    if watch.stopped():
        save_state(state, learner, job.settings)
        return None
    if learner.step < MIN_STEPS and not stopped_early(scores):  # the time limit was reached
        console.say(f"held out {fold.name}: only {learner.step} steps, result ignored")
        return {}
    _draw_overlay(learner, job, scores)
    return scores


def _pretrained_score(run: Run, learner: Learner, fold: Fold, plan: Plan) -> float:
    """Score the pretrained model, with its own label U-Net, before the first step."""
    model, new = learner.ema, learner.ema.label_unet
    assert run.pretrained is not None
    own = matching_label_unet(run.pretrained, plan)
    model.label_unet = own.to(model.device) if own is not None else None
    score = score_fold(model, fold, plan, use_label_prior=own is not None).score
    model.label_unet = new
    return score


def _draw_overlay(learner: Learner, job: FoldJob, scores: Mapping[int, CheckpointScore]) -> None:
    """Draw the final masks of the held-out case. An error becomes a warning, unless a file of the case was cut short."""
    fold = job.fold
    try:
        last = scores[max(scores)]
        with_prior = len(last) > 1 and last[0] >= last[1]
        final = score_fold(learner.ema, fold, job.plan, with_prior)
        title = f"{fold.name}, held out: Dice {scores[0][0]:.3f} pretrained, {final.score:.3f} fine-tuned"
        draw_overlays(job.state.with_name(f"held_out_{fold.held_out.id}.png"), fold.held_out, final.labels, title)
    except atomic.ArrayError:
        raise
    except Exception as error:  # noqa: BLE001 - nothing about a picture may make a run fail
        console.warn(f"the picture of {fold.name} could not be drawn: {error or type(error).__name__}")
        console.trace(error)
