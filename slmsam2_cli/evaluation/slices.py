"""What happens slice by slice along the propagation axis: where a mask goes on too long, or stops too early.

R and P are the slices that hold the label in the reference and in the prediction. Slices given to the model are left out
of every count; the extents always compare whole masks, since a given slice cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Row = dict[str, float | int | None]


@dataclass(frozen=True, eq=False)
class SliceCounts:
    """Pixels per slice, each (S,) int64: in the reference, in the prediction, in both, and in the slice as a whole."""

    reference: np.ndarray
    prediction: np.ndarray
    both: np.ndarray
    pixels: np.ndarray

    def without_slices(self, given: Sequence[int]) -> SliceCounts:
        """The counts with the given slices taken out."""
        keep = ~np.isin(np.arange(len(self.pixels)), given)
        return SliceCounts(self.reference[keep], self.prediction[keep], self.both[keep], self.pixels[keep])


def pixels(mask: np.ndarray, slice_axis: int) -> np.ndarray:
    """Foreground pixels on each slice of a mask (Z, Y, X) bool; -> (S,) int64."""
    if slice_axis == 0:  # whole slices lie together in memory and are counted several times faster one by one
        return np.array([np.count_nonzero(plane) for plane in mask], dtype=np.int64)
    return np.asarray(np.count_nonzero(mask, axis=tuple(i for i in range(3) if i != slice_axis)), dtype=np.int64)


def rates(counts: SliceCounts) -> dict[str, float | int | None]:
    """Shares and numbers of slices; None where the denominator is empty."""
    in_r, in_p = counts.reference > 0, counts.prediction > 0
    over, under, hit = (int(np.count_nonzero(x)) for x in (in_p & ~in_r, in_r & ~in_p, in_r & in_p))
    return {
        "over_rate": _ratio(over, int(np.count_nonzero(~in_r))),
        "over_slices": over,
        "over_voxel_fraction": _ratio(int(counts.prediction[~in_r].sum()), int(counts.prediction.sum())),
        "under_rate": _ratio(under, hit + under),
        "under_slices": under,
        "slice_precision": _ratio(hit, hit + over),
        "slice_recall": _ratio(hit, hit + under),
        "slice_f1": _ratio(2 * hit, 2 * hit + over + under),
    }


def extents(counts: SliceCounts, slice_mm: float) -> dict[str, float | int | None]:
    """How far the prediction reaches past either end of the reference (positive) or falls short of it (negative), in mm."""
    r, p = np.flatnonzero(counts.reference), np.flatnonzero(counts.prediction)
    if not len(r) or not len(p):
        return dict.fromkeys(EXTENTS)
    low, high = float(r[0] - p[0]) * slice_mm, float(p[-1] - r[-1]) * slice_mm
    return {"over_extent_mm": max(0.0, low) + max(0.0, high), "end_error_low_mm": low, "end_error_high_mm": high}


def slice_table(counts: SliceCounts, prompted: Sequence[int] | None, slice_mm: float, pixel_mm2: float) -> list[Row]:
    """One row per slice that holds the label in either mask or was given; distances are None when no prompt is known."""
    given = sorted(set(prompted or ()))
    wanted = sorted({*np.flatnonzero(counts.reference + counts.prediction).tolist(), *given})
    return [_row(counts, k, given, slice_mm, pixel_mm2) for k in wanted]


EXTENTS = ("over_extent_mm", "end_error_low_mm", "end_error_high_mm")
RATES = ("over_rate", "over_slices", "over_voxel_fraction", "under_rate", "under_slices", "slice_precision", "slice_recall", "slice_f1")


def _row(counts: SliceCounts, k: int, given: Sequence[int], slice_mm: float, pixel_mm2: float) -> Row:
    r, p, both = (int(c[k]) for c in (counts.reference, counts.prediction, counts.both))
    away = min((k - g for g in given), key=lambda d: (abs(d), -d), default=None)
    return {
        "slice": k,
        "prompt_distance_slices": away,
        "prompt_distance_mm": None if away is None else away * slice_mm,
        "reference_px": r,
        "prediction_px": p,
        "Dice": _ratio(2 * both, r + p),
        "area_error_mm2": (p - r) * pixel_mm2,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
