"""Calibration of confidence: a monotone table from the model's raw confidence to the Dice that was measured at that confidence.

Numbers only, without torch. From 20 slices on: logistic, sigmoid(a logit(c) + b) (Platt, 1999). From 60 on: isotonic regression
(Zadrozny and Elkan, 2002) of the means of groups of at least ten slices. In both cases the result is a table of at most 33 knots with
linear interpolation between them. The expected calibration error is computed over groups of equally many slices: confidences are often
nearly equal and would all fall into one of ten intervals of equal width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

MIN_SLICES, MIN_ISOTONIC_SLICES = 20, 60
MAX_KNOTS = 33
ON_TRAINING = "fitted on training cases, so confidence may be optimistic"
_SHRINK = 0.1  # weight of the raw confidence in the logistic fit, in slices
_EDGE = 1e-3  # distance of a confidence from 0 and 1 before its logit is taken
Array = np.ndarray[Any, Any]


class Calibration(BaseModel):
    """A table from confidence to expected Dice; both ascend.

    slices: number of slices that it was fitted on. error_before, error_after: expected calibration error on them. note: which slices
    they were.

    Raises: pydantic's ValidationError when a value is out of range, or the table does not ascend.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["logistic", "isotonic"]
    confidence: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    dice: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    slices: int = Field(ge=MIN_SLICES)
    error_before: float = Field(ge=0, le=1)
    error_after: float = Field(ge=0, le=1)
    note: str = ON_TRAINING

    @model_validator(mode="after")
    def _monotone(self) -> Calibration:
        x, y = np.array(self.confidence), np.array(self.dice)
        if len(x) != len(y) or (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or min(*x, *y) < 0 or max(*x, *y) > 1:
            raise ValueError("confidence and dice must be ascending numbers from 0 to 1, as many of one as of the other")
        return self

    def __call__(self, confidence: Array | float) -> Array:
        """Look up the expected Dice of one raw confidence or of an array; outside the table, its first or last value."""
        return np.asarray(np.interp(confidence, self.confidence, self.dice))


def calibrate(confidence: Sequence[float] | Array, dice: Sequence[float] | Array, note: str = ON_TRAINING) -> Calibration | None:
    """Fit a table to the raw confidence and the measured Dice of every slice, 0 to 1.

    Returns None for fewer than 20 slices, and where the table would not reduce the calibration error.
    """
    raw, measured = np.clip(np.asarray(confidence, float), 0, 1), np.clip(np.asarray(dice, float), 0, 1)
    if len(raw) < MIN_SLICES:
        return None
    isotonic = len(raw) >= MIN_ISOTONIC_SLICES
    x, y = _isotonic_table(raw, measured) if isotonic else _logistic_table(raw, measured)
    before, after = calibration_error(raw, measured), calibration_error(np.interp(raw, x, y), measured)
    if after >= before:
        return None
    knots, expected = (tuple(round(float(value), 6) for value in np.clip(values, 0, 1)) for values in (x, y))
    return Calibration(
        method="isotonic" if isotonic else "logistic",
        confidence=knots,
        dice=expected,
        slices=len(raw),
        error_before=round(before, 4),
        error_after=round(after, 4),
        note=note,
    )


def calibration_error(confidence: Array, dice: Array, groups: int = 10) -> float:
    """Compute the expected calibration error: the mean of |mean confidence - mean Dice| over groups of equally many slices.

    Groups are formed by confidence. Slices of equal confidence all count with their mean Dice, so that their order does not matter
    (Nixon et al., arXiv:1904.01685).
    """
    values, where = np.unique(confidence, return_inverse=True)
    shared = (np.bincount(where, dice) / np.bincount(where))[where]
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(groups, len(order)))
    return float(sum(abs(values[where[p]].mean() - shared[p].mean()) * len(p) for p in parts) / len(order))


def _isotonic_table(raw: Array, measured: Array) -> tuple[Array, Array]:
    """Fit means of groups of equally many slices, so that no single slice makes a step."""
    from scipy.optimize import isotonic_regression  # slow to import; whoever reads a table does not need it

    order = np.argsort(raw, kind="stable")
    groups = np.array_split(order, min(MAX_KNOTS, len(raw) // 10))
    x, y = np.array([raw[g].mean() for g in groups]), np.array([measured[g].mean() for g in groups])
    size = np.array([len(g) for g in groups], float)
    knots, where = np.unique(np.round(x, 6), return_inverse=True)  # equal confidences become one knot
    weight = np.bincount(where, size)
    return knots, isotonic_regression(np.bincount(where, size * y) / weight, weights=weight).x


def _logistic_table(raw: Array, measured: Array, steps: int = 50) -> tuple[Array, Array]:
    """Fit sigmoid(slope x + offset) to x = logit(raw), slope at least 0, by Newton's method on the cross-entropy.

    A small penalty, in units of the spread of x, pulls towards slope 1 and offset 0.
    """
    from scipy.special import expit, logit  # slow to import, too

    x = logit(np.clip(raw, _EDGE, 1 - _EDGE))
    centre = float(x.mean())
    prior, shrink = np.array([1.0, centre]), _SHRINK * np.diag([x.var() + 1e-6, 1.0])
    found, features = prior.copy(), np.stack([x - centre, np.ones_like(x)])
    for _ in range(steps):
        share = expit(np.clip(found @ features, -30, 30))
        gradient = features @ (share - measured) + shrink @ (found - prior)
        curvature = (features * (share * (1 - share))) @ features.T + shrink
        step = np.linalg.solve(curvature, gradient)
        found = found - step / max(1.0, float(np.abs(step @ features).max()) / 2)
        if np.abs(step).max() < 1e-9:
            break
    slope, offset = (found[0], found[1] - found[0] * centre) if found[0] >= 0 else (0.0, logit(np.clip(measured.mean(), _EDGE, 1 - _EDGE)))
    knots = np.unique(np.round(np.linspace(raw.min(), raw.max(), MAX_KNOTS), 6))
    return knots, expit(slope * logit(np.clip(knots, _EDGE, 1 - _EDGE)) + offset)
