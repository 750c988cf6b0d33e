"""Recognise mistakes that explain a low score and that the user can fix: exchanged labels, a mask stored mirrored.

A hint changes no number. It is given only where the corrected mask would score far better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.evaluation.metrics import box_of

GOOD = 0.5  # Dice that the corrected mask must reach
GAIN = 0.3  # and the least by which it must be better than the present one
MOST_LABELS = 64  # with more, labels are not compared with each other
AXES = ("z", "y", "x")


def hints(reference: np.ndarray, prediction: np.ndarray, values: Sequence[int]) -> list[str]:
    """Describe what may be wrong with a prediction; reference, prediction: label masks (Z, Y, X), values: the labels to compare."""
    present = sorted({*values, *(np.unique(prediction).tolist() if values else [])} - {0})
    if not present or len(present) > MOST_LABELS:
        return []
    joint = _joint_counts(reference, prediction, present)
    return [*_exchanged_labels(joint, present), *_mirrored(reference, prediction, joint)]


def may_have_hints(dice: Iterable[float | None]) -> bool:
    """Return whether a hint is possible at all, given the Dice of every label: no correction gains GAIN where all of them are high."""
    return any(value is not None and value <= 1 - GAIN for value in dice)


def _joint_counts(reference: np.ndarray, prediction: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Count the voxels of each label in the reference (rows) that carry each label in the prediction (columns), (K + 1, K + 1) int64.

    Index 0 stands for background and all other values, within the box that holds both masks.
    """
    box = box_of(reference, prediction)
    reference, prediction = reference[box], prediction[box]
    size = len(values) + 1
    index = np.zeros(max(*values, int(reference.max(initial=0)), int(prediction.max(initial=0))) + 1, dtype=np.int64)
    index[list(values)] = np.arange(1, size)
    counts = np.zeros(size * size, dtype=np.int64)
    for expected, predicted in zip(reference, prediction, strict=True):
        if expected.any() or predicted.any():
            counts += np.bincount((index[expected] * size + index[predicted]).ravel(), minlength=size * size)
    return counts.reshape(size, size)


def _exchanged_labels(joint: np.ndarray, values: Sequence[int]) -> Iterator[str]:
    """Name labels that another label of the prediction fits far better than their own, as in pairs that were exchanged, in masks of 0
    and 255, or with numbers in another order. joint: see _joint_counts.
    """
    rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    with np.errstate(invalid="ignore"):
        table = np.nan_to_num(dice(joint, rows, columns)).tolist()  # 0 where both labels are empty
    pairs = set[int]()
    for a, b in combinations(range(1, len(values) + 1), 2):
        crossed = (table[a][b], table[b][a])
        if min(crossed) >= GOOD and min(crossed) - max(table[a][a], table[b][b]) >= GAIN:
            one, other = values[a - 1], values[b - 1]
            pairs |= {a, b}
            yield (
                f"labels {one} and {other} appear to be exchanged: Dice of {one} against the predicted {other} is {crossed[0]:.2f}, "
                f"of {other} against the predicted {one} {crossed[1]:.2f}"
            )

    for a in set(range(1, len(values) + 1)) - pairs:
        b = max((b for b in range(1, len(values) + 1) if b != a), key=lambda b: table[a][b], default=a)
        if table[a][b] >= max(GOOD, table[a][a] + GAIN):
            yield f"label {values[b - 1]} of the mask overlaps label {values[a - 1]} of the reference with Dice {table[a][b]:.3f}"


def _mirrored(reference: np.ndarray, prediction: np.ndarray, joint: np.ndarray) -> Iterator[str]:
    """Name the axes along which the flipped prediction fits; tested only where it does not fit as it is. joint: see _joint_counts."""
    sizes = int(joint[1:].sum()), int(joint[:, 1:].sum())
    now = float(dice(int(np.trace(joint[1:, 1:])), *sizes)) if sum(sizes) else 1.0
    if now > GOOD - GAIN / 2 or not joint[1:].any() or not joint[:, 1:].any():
        return
    for axis, name in enumerate(AXES):
        flipped = np.flip(prediction, axis)
        hit = sum(int(np.count_nonzero((plane == other) & (plane > 0))) for plane, other in zip(reference, flipped, strict=True))
        then = float(dice(hit, *sizes))
        if then >= max(GOOD, now + GAIN):
            yield f"the prediction appears to be mirrored along {name}: flipped, its Dice over all labels is {then:.2f}, not {now:.2f}"
