"""Compare the confidence of a fine-tuned model with its Dice: on its training cases, from one annotated slice per structure.

On these cases confidence is optimistic, which the table's note says. Slices on which both the mask and the ground truth are empty are
not counted, nor is the annotated slice itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.model.calibration import Calibration, calibrate
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.training.cross_validation import label_areas, propagate_labels

MAX_SLICES = 256  # propagated in all
MIN_SLICES = 16  # propagated per structure


@dataclass(frozen=True)
class _Structure:
    """One label of one case, its annotated slice, and the slices start ... stop around it."""

    case: PreparedCase
    value: int
    annotated: int
    start: int
    stop: int


def calibrate_model(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False
) -> Calibration | None:
    """Fit the calibration of a fine-tuned model; None when there are too few slices, or `stop` became true before all were propagated."""
    pairs = confidence_and_dice(model, cases, plan, stop)
    return calibrate([confidence for confidence, _ in pairs], [score for _, score in pairs]) if not stop() else None


def confidence_and_dice(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False
) -> list[tuple[float, float]]:
    """Return (raw confidence, Dice) of slices of these cases, each structure propagated from its middle slice, until `stop` is true."""
    return [pair for structure in _choose_structures(cases, plan) if not stop() for pair in _pairs(model, structure, plan)]


def _choose_structures(cases: Sequence[PreparedCase], plan: Plan) -> list[_Structure]:
    """Choose as many structures as MAX_SLICES allows, spread over the cases."""
    areas = [(case, value, area) for case in cases for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()]
    slices = max(MIN_SLICES, MAX_SLICES // max(len(areas), 1))
    step = max(1, -(-len(areas) * slices // MAX_SLICES))
    structures = []
    for case, value, area in areas[::step]:
        annotated = choose_slice(area, "middle")
        start = max(0, min(annotated - slices // 2, len(area) - slices))
        structures.append(_Structure(case, value, annotated, start, min(len(area), start + slices)))
    return structures


def _pairs(model: SlmSam2, structure: _Structure, plan: Plan) -> Iterator[tuple[float, float]]:
    """Yield (raw confidence, Dice) of every slice that holds the structure or its mask."""
    case, value = structure.case, structure.value
    check_not_truncated(case)
    assert case.labels is not None
    labels = np.asarray(case.labels[structure.start : structure.stop])
    truth, counted = torch.from_numpy(labels == value), torch.from_numpy(labels != plan.ignore)
    size, annotated = plan.geometry.storage_size, structure.annotated - structure.start
    frames = np.asarray(case.frames[:, structure.start : structure.stop])
    found = propagate_labels(model, frames, labels, {value: annotated}, plan)[value]
    for t in range(len(truth)):
        mask = (found.plane(t, size, *truth.shape[1:]) > 0) & counted[t]
        pixels = int(mask.sum()), int(truth[t].sum())
        if t != annotated and any(pixels):
            yield float(found.confidence[t]), float(dice(int((mask & truth[t]).sum()), *pixels))
