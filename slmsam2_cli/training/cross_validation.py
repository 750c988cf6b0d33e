"""The folds of a run, one after the other; killed at any moment, they go on where they were.

FOLDER/validation.json            the Dice of every fold at every look, and which folds are done
FOLDER/fold.safetensors           the state of the fold that is under way
FOLDER/left_out_CASE.png          masks of the volume that was left out, over its slices

Whether tuning helps where nothing was learned from, and for how long: short runs that leave something out, judged by propagation.

With two volumes or more, FOLDS runs each leave one out; with one, a single run learns from the upper part of it and is judged on the
lower. Each is looked at a few times on its way. What it is judged by is what predict would do: the middle slice of each label is
given, and Dice is over all other slices, empty ones included. Where the base does better than each of these looks, the base is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from slmsam2_cli.inference.propagation import AnnotatedSlice, Propagation, propagate_stack
from slmsam2_cli.inference.segment import remove_loose_parts
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import HeldOutResult
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.roi import pad_to_square
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan, TrainingPlan, digest_of
from slmsam2_cli.planning.rules import CHECKPOINTS, FOLD_FRACTION, FOLDS, SINGLE_CASE_FRACTION
from slmsam2_cli.training.learner import Progress, fraction_done
from slmsam2_cli.training.monitoring import draw_overlays
from slmsam2_cli.training.state import Run, backup_path, load_state, save_state, training_images_of
from slmsam2_cli.training.trainer import Learner, follow, init_learner, training_data_of

FOLD_TIME_FRACTION = 0.3  # where they are limited, all folds together
MIN_STEPS = 20  # of a fold; fewer tell nothing
TIE_MARGIN = 0.005  # Dice; of looks that score alike the latest counts
STOP_MARGIN = 0.02  # Dice below the best look so far at which a fold is given up

Array = np.ndarray[Any, Any]
Look = tuple[float, ...]  # Dice with the label U-Net, where there is one, and without


@dataclass(frozen=True)
class Fold:
    """cases: what is learned from; held: the volume that it is judged on; until: on slices below this one, None: on all of them."""

    name: str
    cases: tuple[PreparedCase, ...]
    held: PreparedCase
    until: int | None = None


def make_folds(cases: Sequence[PreparedCase], plan: Plan, learned: Collection[str] = ()) -> tuple[Fold, ...]:
    """The volumes in the middle of the order by labelled voxels are left out, of three the two smaller ones.

    learned: SHA-256 of the images that the base has learned from; on these it cannot be compared with.
    No fold where what is left out cannot be judged, or what is left cannot be learned from: nothing on two slices that somebody looked at
    as a whole.
    """
    for case in cases:
        check_not_truncated(case)
    fresh = [case for case in cases if set(case.record.get("inputs", {}).values()).isdisjoint(learned)]
    if len(cases) == 1:
        return _split_case(cases[0], plan) if fresh else ()
    held = sorted(fresh, key=lambda case: (_voxels(case, plan), case.id))
    first = (len(held) - min(FOLDS, len(held))) // 2
    folds = (Fold(one.id, tuple(case for case in cases if case is not one), one) for one in held[first : first + FOLDS])
    return tuple(fold for fold in folds if _tells(fold.held, plan) and any(_tells(case, plan) for case in fold.cases))


def _voxels(case: PreparedCase, plan: Plan) -> int:
    assert case.labels is not None
    return int(np.isin(case.labels, tuple(plan.labels)).sum())


def _tells(case: PreparedCase, plan: Plan) -> bool:
    """Whether some label lies on two slices that were looked at as a whole."""
    return any(np.count_nonzero(label_areas(case, value, plan.ignore)) >= 2 for value in plan.labels)


def _split_case(case: PreparedCase, plan: Plan) -> tuple[Fold, ...]:
    areas = [area for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()]
    if not areas:
        return ()
    cut = min(choose_slice(area, "middle") for area in areas)
    upper = replace(case, frames=case.frames[:, cut:], labels=None if case.labels is None else case.labels[cut:])
    enough = all(any(np.count_nonzero(part) >= 2 for part in parts) for parts in ([a[:cut] for a in areas], [a[cut:] for a in areas]))
    return (Fold(f"slices below {cut} of {case.id}", (upper,), case, cut),) if enough else ()


def label_areas(case: PreparedCase, value: int, ignore: int | None) -> Array:
    """(T,): pixels of a label on every slice that was looked at as a whole."""
    if case.labels is None:
        return np.zeros(0, int)
    check_not_truncated(case)
    labels = np.asarray(case.labels)
    area: Array = (labels == value).sum(axis=(1, 2))
    return area if ignore is None else np.where((labels == ignore).any(axis=(1, 2)), 0, area)


def fold_settings(training: TrainingPlan, count: int) -> TrainingPlan | None:
    """The settings of a fold of a run on `count` volumes; None where it would be too short to tell anything."""
    share = SINGLE_CASE_FRACTION if count == 1 else FOLD_FRACTION
    steps = round(training.steps * share)
    if steps < MIN_STEPS:
        return None
    minutes = training.minutes * FOLD_TIME_FRACTION / (1 if count == 1 else FOLDS) if training.minutes is not None else None
    return training.model_copy(update={"steps": steps, "warmup_steps": max(5, steps // 20), "minutes": minutes})


def settings_after_folds(training: TrainingPlan, folds: int, validation: HeldOutResult | None) -> TrainingPlan:
    """The settings of the run on everything: the minutes that the folds left, and of steps and minutes the share they speak for."""
    left = 1 - FOLD_TIME_FRACTION if folds else 1.0
    share = validation.steps / training.steps if validation is not None and validation.steps else 1.0
    minutes = training.minutes * left * share if training.minutes is not None else None
    steps = validation.steps if validation is not None and validation.steps else training.steps
    return training.model_copy(update={"steps": steps, "minutes": minutes})


@dataclass(frozen=True)
class FoldScore:
    """score: mean Dice over the labels; labels: (T, H, W) of the volume that was left out, as the model has them."""

    score: float
    labels: Array


def judged(model: SlmSam2, fold: Fold, plan: Plan, weighted: bool) -> FoldScore:
    """What the model makes of what was left out, as predict would: each label from its middle slice, which itself does not count.

    weighted: whether the model's label U-Net is, where it has one. Where a label is rightly not found, that counts as 1.
    """
    case = fold.held
    check_not_truncated(case)
    assert case.labels is not None
    truth = np.array(case.labels)  # read now, while it is known to be whole
    given = {value: choose_slice(area, "middle") for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()}
    found = tracked(model, np.asarray(case.frames), truth, given, plan, weighted)
    labels = _labels(found, truth, given, plan.geometry.stack_size)
    if weighted:
        annotated = np.zeros_like(truth)
        for value, t in given.items():
            annotated[t][truth[t] == value] = value
        labels = remove_loose_parts(labels, annotated, found, model)
    return FoldScore(float(np.mean([_dice(truth, v, labels == v, t, fold.until, plan.ignore) for v, t in given.items()])), labels)


def tracked(
    model: SlmSam2, frames: Array, truth: Array, given: Mapping[int, int], plan: Plan, weighted: bool = True
) -> dict[int, Propagation]:
    """Every label from one slice of the truth, as the plan says that predict tracks; weighted as in `judged`.

    frames: (C, T, H, W) in [0, 1]; truth: labels (T, H, W); given: label -> its slice.
    """
    size = plan.geometry.stack_size
    objects = {value: [AnnotatedSlice(t, pad_to_square(torch.from_numpy(truth[t] == value), size))] for value, t in given.items()}
    return propagate_stack(model, frames, objects, plan, use_label_prior=weighted)


def _labels(found: Mapping[int, Propagation], truth: Array, given: Mapping[int, int], px: int) -> Array:
    """The label of the largest logit above 0 on every pixel, and what is given where it is."""
    labels, names = np.zeros_like(truth), np.array(list(found), dtype=truth.dtype)
    for t in range(len(truth)):
        planes = np.stack([one.plane(t, px, *truth.shape[1:]).numpy() for one in found.values()])
        labels[t] = np.where(planes.max(axis=0) > 0, names[planes.argmax(axis=0)], 0)
    for value, t in given.items():
        labels[t][labels[t] == value] = 0
        labels[t][truth[t] == value] = value
    return labels


def _dice(truth: Array, value: int, mask: Array, given: int, until: int | None, ignore: int | None) -> float:
    """Of all slices below `until` but the given one; ignored pixels do not count. 1 where nothing is, nor was found."""
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    counted[given] = False
    counted[len(truth) if until is None else until :] = False
    score = dice((truth == value) & counted, mask & counted)
    return 1.0 if score is None else score


def stopped_early(looks: Mapping[int, Look]) -> bool:
    """Whether the last look at a fold was so much worse than the best before it that it is not gone on with."""
    after = [max(looks[at]) for at in sorted(looks) if at]
    return bool(after) and after[-1] < max(after) - STOP_MARGIN


def conclude(looks: Mapping[str, Mapping[int, Look]], training: TrainingPlan, asked: bool) -> HeldOutResult | None:
    """From the Dice of every fold at every look, numbered from 1; 0 is the base's. None where there is no fold.

    Of looks and ways that score nearly as well as the best, and not worse than the base, the label U-Net's count first, then the latest.
    asked: whether a person named the steps; then they are not fewer, and the last look alone counts.
    """
    shared = sorted(set.intersection(*(set(found) for found in looks.values()))) if looks else []
    if 0 not in shared or len(shared) < 2:
        return None
    judged_at = shared[-1:] if asked else shared[1:]
    means = {look: [float(np.mean(way)) for way in zip(*(found[look] for found in looks.values()), strict=True)] for look in shared}
    base, after = means[0][0], [(mean, way, look) for look in judged_at for way, mean in enumerate(means[look])]
    top, ways = max(after)[0], len(means[shared[-1]])
    enough = [(way, -look) for mean, way, look in after if mean >= max(top - TIE_MARGIN, base)]
    way, look = (min(enough)[0], -min(enough)[1]) if enough else (max(after)[1], max(after)[2])
    steps = max(1, round(training.steps * (1.0 if asked else CHECKPOINTS[look - 1])))
    return HeldOutResult(
        held_out=tuple(looks),
        pretrained=round(base, 4),
        fine_tuned=round(means[look][way], 4),
        steps=steps if enough else 0,
        label_unet=way == 0 if ways > 1 else None,
        kept="fine_tuned" if enough else "pretrained",
    )


def print_validation(validation: HeldOutResult, count: int) -> None:
    """What the volumes that were left out said, and what follows from it for the `count` that are learned from."""
    where = (
        f"on {', '.join(validation.held_out)}, left out: Dice {validation.pretrained:.3f} before tuning, {validation.fine_tuned:.3f} after"
    )
    if validation.kept == "pretrained":
        console.warn(f"{where}. The base is kept as it is. Set training.validation to none in plan.json to tune it all the same")
    else:
        alone = ", without the label U-Net, which did not help there" if validation.label_unet is False else ""
        console.say(f"{where}. Tuning on {'all ' if count > 1 else ''}{count} for {validation.steps} steps{alone}")


FILE, STATE = "validation.json", "fold.safetensors"


@dataclass
class Record:
    """validation.json: fold -> look -> Dice with and without the label U-Net, and the folds that are done."""

    path: Path
    run: str
    looks: dict[str, dict[int, Look]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def write(self) -> None:
        atomic.write_json(self.path, {"format_version": 1, "run": self.run, "looks": self.looks, "done": self.done})


def read_record(path: Path, run: str) -> Record:
    """What there is of this very run; an empty one otherwise."""
    try:
        value: Any = atomic.read_json(path, "the validation") if path.exists() else {}
        if value.get("run") == run:
            looks = {name: {int(at): tuple(map(float, look)) for at, look in found.items()} for name, found in value["looks"].items()}
            return Record(path, run, looks, [name for name in value["done"] if name in looks])
    except (atomic.JsonError, AttributeError, KeyError, TypeError, ValueError):
        console.warn(f"{path.name} is damaged: the folds are run again")
    return Record(path, run)


def fold_state(folder: Path) -> Path:
    """Where the state of a fold that is under way is kept."""
    return folder / STATE


def delete_folds(folder: Path) -> None:
    """Nothing of the folds of an earlier run is gone on with."""
    state = fold_state(folder)
    for old in (folder / FILE, state, backup_path(state), *folder.glob("left_out_*.png")):
        old.unlink(missing_ok=True)


def plan_folds(run: Run, used: Sequence[PreparedCase]) -> tuple[tuple[Fold, ...], TrainingPlan | None]:
    """The folds, and the settings of each; none from random weights, which nothing could be kept of, nor where the plan wants none."""
    training = fold_settings(run.plan.training, len(used))
    if run.base is None or run.plan.training.validation == "none" or training is None:
        return (), None
    return make_folds(used, run.plan, training_images_of(run.base)), training


def pretrained_label_unet(run: Run) -> LabelUNet | None:
    """The base's own, where it knows the same labels."""
    return matching_label_unet(run.base, run.plan) if run.base is not None else None


def validate(
    run: Run, used: Sequence[PreparedCase], device: torch.device, folder: Path, every_s: float, stopped: Callable[[], bool], asked: bool
) -> HeldOutResult | None:
    """Run what is left of the folds; None where there are none, nothing could be judged, or it was stopped before the end.

    asked: whether a person named the steps.
    """
    folds, training = plan_folds(run, used)
    if training is not None and not folds and make_folds(used, run.plan):
        console.say("the base has learned from these very volumes, so whether tuning makes it better cannot be told from them")
    record = read_record(folder / FILE, run.digest)
    for number, fold in enumerate(folds, start=1):
        if fold.name not in record.done and training is not None:
            with torch.random.fork_rng():  # so that the run itself goes as it would without
                _fold(run, fold, training, device, record, every_s, stopped, f"validating {number}/{len(folds)}")
        if stopped():
            return None
    state = fold_state(folder)
    for old in (state, backup_path(state)):
        old.unlink(missing_ok=True)
    return conclude({name: record.looks[name] for name in record.done if record.looks[name]}, run.plan.training, asked)


def _fold(
    run: Run,
    fold: Fold,
    training: TrainingPlan,
    device: torch.device,
    record: Record,
    every_s: float,
    stopped: Callable[[], bool],
    title: str,
) -> None:
    plan = run.plan.model_copy(update={"training": training})
    training_data = training_data_of(fold.cases, plan)
    learner = init_learner(plan, run.base, training_data, device)
    state, settings = record.path.with_name(STATE), digest_of({"run": run.digest, "fold": fold.name})
    looks, ways = record.looks.setdefault(fold.name, {}), (True, False) if training.label_unet else (False,)
    if not (0 in looks and _try_resume(learner, state, settings)):
        looks.clear()
        looks[0] = (_pretrained_score(run, learner, fold, plan),) * len(ways)
        record.write()
        save_state(state, learner, settings)
    looked = [fraction_done(learner, training)]

    def look(progress: Progress) -> str:
        for number, share in enumerate(CHECKPOINTS, start=1):
            if looked[0] < share <= progress.done:
                looks[number] = tuple(judged(learner.average, fold, plan, weighted=way).score for way in ways)
                record.write()
        looked[0] = progress.done
        return f"without {fold.name}: Dice {looks[0][0]:.3f}" + "".join(f", {max(looks[at]):.3f}" for at in sorted(looks) if at)

    if looked[0] < 1 and not stopped_early(looks) and not stopped():
        follow(
            learner,
            training_data,
            training,
            lambda: stopped() or stopped_early(looks),
            title=title,
            state=state,
            settings=settings,
            every_s=every_s,
            told=look,
        )
    if stopped():
        save_state(state, learner, settings)
        return
    if learner.step < MIN_STEPS and not stopped_early(looks):  # the minutes were over
        console.say(f"without {fold.name}: {learner.step} steps, too few to tell anything")
        looks.clear()
    else:
        _draw(learner, fold, plan, record)
    record.done.append(fold.name)
    record.write()
    for old in (state, backup_path(state)):
        old.unlink(missing_ok=True)


def _pretrained_score(run: Run, learner: Learner, fold: Fold, plan: Plan) -> float:
    """Of the base as predict would use it, before anything is learned."""
    average, new = learner.average, learner.average.label_unet
    known = pretrained_label_unet(run)
    average.label_unet = known.to(average.device) if known is not None else None
    score = judged(average, fold, plan, weighted=known is not None).score
    average.label_unet = new
    return score


def _try_resume(learner: Learner, state: Path, settings: str) -> bool:
    """Whether there is a state of this very fold to go on from."""
    try:
        load_state(state, learner, settings)
    except WeightsError:
        return False
    return True


def _draw(learner: Learner, fold: Fold, plan: Plan, record: Record) -> None:
    """A picture of what was left out, for people who would rather look; nothing about it may make a run fail but a volume cut short."""
    try:
        looks = record.looks[fold.name]
        weighted = len(looks[max(looks)]) > 1 and looks[max(looks)][0] >= looks[max(looks)][1]
        last = judged(learner.average, fold, plan, weighted)
        title = f"{fold.name}, left out: Dice {looks[0][0]:.3f} before, {last.score:.3f} after"
        draw_overlays(record.path.with_name(f"left_out_{fold.held.id}.png"), fold.held, last.labels, title)
    except atomic.ArrayError:
        raise
    except Exception as error:  # noqa: BLE001 - nothing about a picture may make a run fail
        console.warn(f"the picture of {fold.name} could not be drawn: {error or type(error).__name__}")
        console.trace(error)
