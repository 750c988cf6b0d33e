"""Whether tuning helps where nothing was learned from, and for how long: short runs that leave something out, judged by propagation.

With two volumes or more, FOLDS runs each leave one out; with one, a single run learns from the upper part of it and is judged on the
lower. Each is looked at a few times on its way. What it is judged by is what predict would do: the middle slice of each label is
given, and Dice is over all other slices, empty ones included. Where the base does better than any of them, the base is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from slmsam2_cli.data.prepared import PreparedCase
from slmsam2_cli.data.prompts import choose_slice
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.inference.engine import Anchor, propagate
from slmsam2_cli.model.slices import framed, to_input
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.model.validation import Validation
from slmsam2_cli.planning.plan import Plan, TrainingPlan

FOLDS = 2
SHARE, SHARE_OF_ONE = 0.3, 0.2  # of a run's steps, for each fold; of one volume there is only one fold
SHARE_OF_MINUTES = 0.3  # where they are limited, all folds together
LEAST_STEPS = 20  # of a fold; fewer tell nothing
LOOKS = (1 / 3, 2 / 3, 1.0)  # shares of a fold at which it is judged
NEARLY = 0.005  # Dice; of looks that score alike the latest counts
WORSE = 0.02  # Dice below the best look so far at which a fold is given up

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fold:
    """cases: what is learned from; held: the volume that it is judged on; until: on slices below this one, None: on all of them."""

    name: str
    cases: tuple[PreparedCase, ...]
    held: PreparedCase
    until: int | None = None


def folds_of(cases: Sequence[PreparedCase], plan: Plan) -> tuple[Fold, ...]:
    """The volumes in the middle of the order by labelled voxels are left out, so that neither the largest nor the smallest decides.

    No fold where one volume cannot be divided: each part has to hold two slices of a label.
    """
    if len(cases) == 1:
        return _halves(cases[0], plan)
    held = sorted(cases, key=lambda case: (_voxels(case, plan), case.id))
    first = (len(held) - min(FOLDS, len(held))) // 2
    return tuple(Fold(one.id, tuple(case for case in cases if case is not one), one) for one in held[first : first + FOLDS])


def _voxels(case: PreparedCase, plan: Plan) -> int:
    assert case.labels is not None
    return int(np.isin(case.labels, tuple(plan.labels)).sum())


def _halves(case: PreparedCase, plan: Plan) -> tuple[Fold, ...]:
    areas = [area for value in plan.labels if (area := area_of(case, value, plan.ignore)).any()]
    if not areas:
        return ()
    cut = min(choose_slice(area, "middle") for area in areas)
    upper = replace(case, frames=case.frames[:, cut:], labels=None if case.labels is None else case.labels[cut:])
    enough = all(any(np.count_nonzero(part) >= 2 for part in parts) for parts in ([a[:cut] for a in areas], [a[cut:] for a in areas]))
    return (Fold(f"slices below {cut} of {case.id}", (upper,), case, cut),) if enough else ()


def area_of(case: PreparedCase, value: int, ignore: int | None) -> Array:
    """(T,): pixels of a label on every slice that was looked at as a whole."""
    if case.labels is None:
        return np.zeros(0, int)
    labels = np.asarray(case.labels)
    area: Array = (labels == value).sum(axis=(1, 2))
    return area if ignore is None else np.where((labels == ignore).any(axis=(1, 2)), 0, area)


def fold_training(training: TrainingPlan, count: int) -> TrainingPlan | None:
    """The settings of a fold of a run on `count` volumes; None where it would be too short to tell anything."""
    share = SHARE_OF_ONE if count == 1 else SHARE
    steps = round(training.steps * share)
    if steps < LEAST_STEPS:
        return None
    minutes = training.minutes * SHARE_OF_MINUTES / (1 if count == 1 else FOLDS) if training.minutes is not None else None
    return training.model_copy(update={"steps": steps, "warmup_steps": max(5, steps // 20), "minutes": minutes})


def after_folds(training: TrainingPlan, folds: int) -> TrainingPlan:
    """What is left for the run on everything, where minutes are limited."""
    if training.minutes is None or not folds:
        return training
    return training.model_copy(update={"minutes": training.minutes * (1 - SHARE_OF_MINUTES)})


@dataclass(frozen=True)
class Judged:
    """score: mean Dice over the labels, NaN where there is none; masks: label -> (T, H, W) bool of the volume that was left out."""

    score: float
    masks: Mapping[int, Array]


def judged(model: SlmSam2, fold: Fold, plan: Plan, tuned: bool) -> Judged:
    """What the model makes of what was left out, each label from its middle slice, which itself does not count.

    tuned: whether the model's recogniser is heeded, where it has one.
    """
    case = fold.held
    assert case.labels is not None
    labels, px = np.asarray(case.labels), plan.geometry.stack_px
    stack = framed(to_input(torch.from_numpy(np.asarray(case.frames, dtype=np.float32)), plan.geometry.neighbours), px)
    given = {value: choose_slice(area, "middle") for value in plan.labels if (area := area_of(case, value, plan.ignore)).any()}
    objects = {v: [Anchor(t, framed(torch.from_numpy(labels[t] == v), px))] for v, t in given.items()}
    focus, patience = plan.geometry.focus, plan.inference.patience
    found = propagate(model, stack, objects, focus=focus, recognise=tuned, patience=patience, batch=plan.inference.batch_slices)
    masks = {v: np.stack([(one.plane(t, px, *labels.shape[1:]) > 0).numpy() for t in range(len(labels))]) for v, one in found.items()}
    scores = [score for v, mask in masks.items() if (score := _dice(labels, v, mask, given[v], fold.until, plan.ignore)) is not None]
    return Judged(float(np.mean(scores)) if scores else math.nan, masks)


def _dice(labels: Array, value: int, mask: Array, given: int, until: int | None, ignore: int | None) -> float | None:
    """Of all slices below `until` but the given one; ignored pixels do not count. None where nothing is, nor was found."""
    counted = np.ones(labels.shape, bool) if ignore is None else labels != ignore
    counted[given] = False
    counted[len(labels) if until is None else until :] = False
    return dice((labels == value) & counted, mask & counted)


Look = tuple[float, ...]  # Dice with the recogniser, where there is one, and without


def concluded(looks: Mapping[str, Mapping[int, Look]], training: TrainingPlan, asked: bool) -> Validation | None:
    """From the Dice of every fold at every look, numbered from 1; 0 is the base's. None where nothing could be judged.

    asked: whether a person named the steps; then they are not fewer.
    """
    told = {name: found for name, found in looks.items() if not any(math.isnan(score) for look in found.values() for score in look)}
    shared = sorted(set.intersection(*(set(found) for found in told.values()))) if told else []
    if 0 not in shared or len(shared) < 2:
        return None
    means = {look: np.mean([found[look] for found in told.values()], axis=0) for look in shared}
    base, after = float(means[0][0]), {look: means[look] for look in shared if look}
    variants = len(next(iter(after.values())))
    tops = [max(float(mean[variant]) for mean in after.values()) for variant in range(variants)]
    chosen = next(variant for variant in range(variants) if tops[variant] >= max(tops) - NEARLY)
    best = max(look for look, mean in after.items() if mean[chosen] >= tops[chosen] - NEARLY)
    tuned = float(after[best][chosen])
    return Validation(
        left_out=tuple(told),
        base=round(base, 4),
        tuned=round(tuned, 4),
        steps=max(1, round(training.steps * (1.0 if asked else LOOKS[best - 1]))),
        recogniser=chosen == 0 if variants > 1 else None,
        kept="tuned" if tuned >= base else "base",
    )
