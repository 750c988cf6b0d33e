"""What the model's own confidence is worth: a monotone table from what it says to the Dice that was found where it says so.

Numbers only, without torch. Few slices (from 20): logistic, two parameters, sigmoid(a logit(c) + b) (Platt, 1999); many
(from 60): isotonic, by pooling adjacent violators (Zadrozny and Elkan, 2002) among the means of ten slices or more. Either
way what is kept is a table of at most 33 knots, read with straight lines in between. Errors are taken over groups of equally
many slices: confidences that are nearly alike would all fall into one of ten equal intervals, which then hides everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

FEWEST, MANY = 20, 60  # slices
KNOTS = 33
ON_TRAINING = "fitted on volumes it learned from, so it may still promise too much"
_SHRINK = 0.1  # slices' worth of weight for what the model says itself
_EDGE = 1e-3  # a confidence closer than this to 0 or 1 counts as this close
Array = np.ndarray[Any, Any]


class Calibration(BaseModel):
    """A table from confidence to expected Dice; both ascend. slices: it was fitted on; error_before, error_after: expected
    calibration error on those slices; note: which slices they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["logistic", "isotonic"]
    confidence: tuple[float, ...] = Field(min_length=1, max_length=KNOTS)
    dice: tuple[float, ...] = Field(min_length=1, max_length=KNOTS)
    slices: int = Field(ge=FEWEST)
    error_before: float = Field(ge=0, le=1)
    error_after: float = Field(ge=0, le=1)
    note: str = ON_TRAINING

    @model_validator(mode="after")
    def _a_monotone_table(self) -> Calibration:
        x, y = np.array(self.confidence), np.array(self.dice)
        if len(x) != len(y) or (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or min(*x, *y) < 0 or max(*x, *y) > 1:
            raise ValueError("confidence and dice must be ascending numbers from 0 to 1, as many of one as of the other")
        return self

    def __call__(self, confidence: Array) -> Array:
        """Expected Dice of raw confidences, any shape; beyond the table its ends."""
        return np.interp(confidence, self.confidence, self.dice)

    def of(self, confidence: float) -> float:
        """Expected Dice of one raw confidence."""
        return float(np.interp(confidence, self.confidence, self.dice))


def calibrate(confidence: Sequence[float] | Array, dice: Sequence[float] | Array, note: str = ON_TRAINING) -> Calibration | None:
    """Fit on as many raw confidences as true Dice, one a slice, all from 0 to 1.

    None for fewer than 20 slices, and where no table says more than the confidence itself.
    """
    said, true = np.clip(np.asarray(confidence, float), 0, 1), np.clip(np.asarray(dice, float), 0, 1)
    if len(said) < FEWEST:
        return None
    x, y = _isotonic_table(said, true) if len(said) >= MANY else _logistic_table(said, true)
    before, after = calibration_error(said, true), calibration_error(np.interp(said, x, y), true)
    if after >= before:
        return None
    return Calibration(
        method="isotonic" if len(said) >= MANY else "logistic",
        confidence=_rounded(x),
        dice=_rounded(y),
        slices=len(said),
        error_before=round(before, 4),
        error_after=round(after, 4),
        note=note,
    )


def calibration_error(confidence: Array, dice: Array, groups: int = 10) -> float:
    """Expected calibration error: mean of |mean confidence - mean Dice| over groups of equally many slices, ordered by confidence.

    Slices of the same confidence share their mean Dice, so that their order plays no part (Nixon et al., arXiv:1904.01685).
    """
    values, where = np.unique(confidence, return_inverse=True)
    shared = (np.bincount(where, dice) / np.bincount(where))[where]
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(groups, len(order)))
    return float(sum(abs(values[where[p]].mean() - shared[p].mean()) * len(p) for p in parts) / len(order))


def isotonic(values: Array, weights: Array) -> Array:
    """The ascending sequence closest to `values` in weighted squares: pool adjacent violators."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        mean, heavy, length = float(value), float(weight), 1
        while blocks and blocks[-1][0] >= mean:
            before, other, more = blocks.pop()
            mean, heavy, length = (before * other + mean * heavy) / (other + heavy), other + heavy, length + more
        blocks.append((mean, heavy, length))
    return np.concatenate([np.full(length, mean) for mean, _, length in blocks])


def _isotonic_table(said: Array, true: Array) -> tuple[Array, Array]:
    """Means of equally large groups by confidence, made ascending; so no single slice makes a step."""
    order = np.argsort(said, kind="stable")
    groups = np.array_split(order, min(KNOTS, len(said) // 10))
    x, y = np.array([said[g].mean() for g in groups]), np.array([true[g].mean() for g in groups])
    weight = np.array([len(g) for g in groups], float)
    knots, where = np.unique(np.round(x, 6), return_inverse=True)  # equal confidences are one knot
    mass = np.bincount(where, weight)
    return knots, isotonic(np.bincount(where, weight * y) / mass, mass)


def _logistic_table(said: Array, true: Array) -> tuple[Array, Array]:
    slope, offset = _logistic(_logit(said), true)
    x = np.unique(np.round(np.linspace(said.min(), said.max(), KNOTS), 6))
    return x, 1 / (1 + np.exp(-(slope * _logit(x) + offset)))


def _logit(share: Array) -> Array:
    inside = np.clip(share, _EDGE, 1 - _EDGE)
    logit: Array = np.log(inside / (1 - inside))
    return logit


def _logistic(x: Array, y: Array, steps: int = 50) -> tuple[float, float]:
    """Slope (not below 0) and offset of least cross-entropy, by Newton's method; shrunk a little, in units of x's own spread,
    towards slope 1 and offset 0.
    """
    centre = float(x.mean())
    wanted, shrink = np.array([1.0, centre]), _SHRINK * np.diag([x.var() + 1e-6, 1.0])
    found, features = wanted.copy(), np.stack([x - centre, np.ones_like(x)])
    for _ in range(steps):
        share = 1 / (1 + np.exp(-np.clip(found @ features, -30, 30)))
        gradient = features @ (share - y) + shrink @ (found - wanted)
        curvature = (features * (share * (1 - share))) @ features.T + shrink
        step = np.linalg.solve(curvature, gradient)
        found = found - step / max(1.0, float(np.abs(step @ features).max()) / 2)
        if np.abs(step).max() < 1e-9:
            break
    if found[0] < 0:
        return 0.0, float(_logit(y.mean(keepdims=True))[0])
    return float(found[0]), float(found[1] - found[0] * centre)


def _rounded(values: Array) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in np.clip(values, 0, 1))
