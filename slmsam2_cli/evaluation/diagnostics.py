"""Mistakes that a low score may come from, and that a person can fix: labels exchanged, a mask stored mirrored.

A hint changes no number. It is given only where the mended mask would be far better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np

from slmsam2_cli.dataset.masks import dice
from slmsam2_cli.evaluation.metrics import box_of

GOOD = 0.5  # the mended Dice must be at least this
GAIN = 0.3  # and better than the Dice as it is by this
MOST_LABELS = 64  # beyond, labels are not compared with each other
AXES = ("z", "y", "x")


def hints(truth: np.ndarray, prediction: np.ndarray, values: Sequence[int]) -> list[str]:
    """What may have gone wrong; truth and prediction (Z, Y, X) whole label masks, values: the labels to look at."""
    present = sorted(values)
    if not present or len(present) > MOST_LABELS:
        return []
    joint = _joint_counts(truth, prediction, present)
    return [*_swapped_labels(joint, present), *_mirrored(truth, prediction, joint)]


def may_have_hints(dice: Iterable[float | None]) -> bool:
    """Whether there can be a hint at all, given the Dice of every label: where all fit, nothing mended is better by GAIN."""
    return any(value is not None and value <= 1 - GAIN for value in dice)


def _joint_counts(truth: np.ndarray, prediction: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """(K + 1, K + 1): voxels of each label of the truth (rows) that carry each label in the prediction; 0 is everything else near."""
    box = box_of(truth, prediction)
    truth, prediction = truth[box], prediction[box]
    size = len(values) + 1
    rank = np.zeros(max(*values, int(truth.max(initial=0)), int(prediction.max(initial=0))) + 1, dtype=np.int64)
    rank[list(values)] = np.arange(1, size)
    counts = np.zeros(size * size, dtype=np.int64)
    for true_plane, predicted_plane in zip(truth, prediction, strict=True):
        if true_plane.any() or predicted_plane.any():
            counts += np.bincount((rank[true_plane] * size + rank[predicted_plane]).ravel(), minlength=size * size)
    return counts.reshape(size, size)


def _swapped_labels(joint: np.ndarray, values: Sequence[int]) -> Iterator[str]:
    reference, predicted = joint.sum(axis=1), joint.sum(axis=0)

    def dice_of(row: int, column: int) -> float:
        counts = int(reference[row]), int(predicted[column])
        return float(dice(int(joint[row, column]), *counts)) if sum(counts) else 0.0

    for a, b in combinations(range(1, len(values) + 1), 2):
        crossed = (dice_of(a, b), dice_of(b, a))
        if min(crossed) >= GOOD and min(crossed) - max(dice_of(a, a), dice_of(b, b)) >= GAIN:
            one, other = values[a - 1], values[b - 1]
            yield (
                f"labels {one} and {other} look exchanged: Dice of {one} against the predicted {other} is {crossed[0]:.2f}, "
                f"of {other} against the predicted {one} {crossed[1]:.2f}"
            )


def _mirrored(truth: np.ndarray, prediction: np.ndarray, joint: np.ndarray) -> Iterator[str]:
    """The axis along which the prediction, turned round, would fit; looked for only where it does not fit as it is."""
    sizes = int(joint[1:].sum()), int(joint[:, 1:].sum())
    now = float(dice(int(np.trace(joint[1:, 1:])), *sizes)) if sum(sizes) else 1.0
    if now > GOOD - GAIN / 2 or not joint[1:].any() or not joint[:, 1:].any():
        return
    for axis, name in enumerate(AXES):
        turned = np.flip(prediction, axis)
        hit = sum(int(np.count_nonzero((plane == other) & (plane > 0))) for plane, other in zip(truth, turned, strict=True))
        then = float(dice(hit, *sizes))
        if then >= max(GOOD, now + GAIN):
            yield f"the prediction looks mirrored along {name}: turned round its Dice over all labels is {then:.2f}, not {now:.2f}"
