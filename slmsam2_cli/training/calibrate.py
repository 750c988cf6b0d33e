"""How sure the tuned model says it is, and how right it is: on the volumes it learned from, from one given slice a structure.

Those volumes flatter it, which the table's note says. Slices on which both the mask and the truth are empty count as
neither right nor wrong, and the given slice itself says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.dataset.masks import dice
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.model.calibration import Calibration, calibrate
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.training.cross_validation import label_areas, tracked

MAX_SLICES = 256  # tracked in all
MIN_SLICES = 16  # tracked for one structure


@dataclass(frozen=True)
class _Structure:
    """One label of one case, and the slices start…stop around the given one."""

    case: PreparedCase
    value: int
    given: int
    start: int
    stop: int


def calibrate_model(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False
) -> Calibration | None:
    """The table for a tuned model; None when there are too few slices to tell, or `stop` said so before all were seen."""
    pairs = confidence_and_dice(model, cases, plan, stop)
    return calibrate([said for said, _ in pairs], [true for _, true in pairs]) if not stop() else None


def confidence_and_dice(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False
) -> list[tuple[float, float]]:
    """(raw confidence, Dice) of slices of these cases, each structure propagated from its middle slice, until `stop` says so."""
    return [pair for structure in _structures(cases, plan) if not stop() for pair in _pairs(model, structure, plan)]


def _structures(cases: Sequence[PreparedCase], plan: Plan) -> list[_Structure]:
    """As many as the budget of slices allows, spread over the cases."""
    found = [(case, value, area) for case in cases for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()]
    each = max(MIN_SLICES, MAX_SLICES // max(len(found), 1))
    step = max(1, -(-len(found) * each // MAX_SLICES))
    return [_around(case, value, area, each) for case, value, area in found[::step]]


def _around(case: PreparedCase, value: int, area: np.ndarray, slices: int) -> _Structure:
    given = choose_slice(area, "middle")
    start = max(0, min(given - slices // 2, len(area) - slices))
    return _Structure(case, value, given, start, min(len(area), start + slices))


def _pairs(model: SlmSam2, one: _Structure, plan: Plan) -> Iterator[tuple[float, float]]:
    """(raw confidence, Dice) of every slice that holds the structure or its mask."""
    check_not_truncated(one.case)
    assert one.case.labels is not None
    labels = np.asarray(one.case.labels[one.start : one.stop])
    truth = torch.from_numpy(labels == one.value)
    looked = torch.from_numpy(labels != plan.ignore)
    px, given = plan.geometry.stack_size, one.given - one.start
    found = tracked(model, np.asarray(one.case.frames[:, one.start : one.stop]), labels, {one.value: given}, plan)[one.value]
    for t in range(len(truth)):
        mask = (found.plane(t, px, *truth.shape[1:]) > 0) & looked[t]
        pixels = int(mask.sum()), int(truth[t].sum())
        if t != given and any(pixels):
            yield float(found.confidence[t]), float(dice(int((mask & truth[t]).sum()), *pixels))
