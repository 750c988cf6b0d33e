"""What a reference mask and a predicted mask of one structure say about each other; pure functions of arrays.

Masks are (z, y, x), spacing is (z, y, x) in mm, distances are mm in float64, volumes ml. Undefined is None, never NaN.
Every number is defined in docs/reference/metrics.md.

What happens slice by slice along the propagation axis: where a mask goes on too long, or stops too early.

R and P are the slices that hold the label in the reference and in the prediction. Slices given to the model are left out
of every count; the extents always compare whole masks, since a given slice cannot be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slmsam2_cli.evaluation import surface

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
        "over_rate": _rate_of(over, int(np.count_nonzero(~in_r))),
        "over_slices": over,
        "over_voxel_fraction": _rate_of(int(counts.prediction[~in_r].sum()), int(counts.prediction.sum())),
        "under_rate": _rate_of(under, hit + under),
        "under_slices": under,
        "slice_precision": _rate_of(hit, hit + over),
        "slice_recall": _rate_of(hit, hit + under),
        "slice_f1": _rate_of(2 * hit, 2 * hit + over + under),
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
        "Dice": _rate_of(2 * both, r + p),
        "area_error_mm2": (p - r) * pixel_mm2,
    }


def _rate_of(part: int, whole: int) -> float | None:
    return part / whole if whole else None


Status = Literal["ok", "pred_empty", "ref_empty", "both_empty", "pred_missing", "failed"]
Record = dict[str, float | int | None]

NSD_TOLERANCE_MM = 2.0
COUNTED = (
    *("Dice", "IoU", "precision", "recall", "TP", "FP", "FN", "TN", "n_ref", "n_pred"),
    *("ref_ml", "pred_ml", "volume_difference_ml", "volume_difference_percent", "volume_similarity"),
)
DEFINITIONS = {
    "surface": "voxel",
    "HD95": "the larger of the two directed 95th percentiles (linear interpolation) of distances between border voxel centres, in mm",
    "border": "foreground voxels with a face neighbour outside the mask; outside the image is background; one slice is scored in 2-D",
    "hd95_pooled_mm": "95th percentile of both directed lists together",
    "hd_mm": "largest distance",
    "assd_mm": "mean over both borders together",
    "masd_mm": "mean of the two directed means",
    "nsd@t": "share of both borders within t mm of the other border (d <= t + 1e-6)",
    "*_penalised": "the distance, or the volume's physical diagonal when one of the two masks is empty or the prediction is missing",
    "volume_similarity": "1 - |Vp - Vr| / (Vp + Vr)",
    "over_rate": "slices predicted where the reference has none / slices where the reference has none",
    "over_extent_mm": "how far the prediction goes on past the reference's first and last slice, both ends added",
    "end_error_low_mm, end_error_high_mm": "positive where the prediction goes on too long, negative where it stops too early",
    "unprompted": "slices given for the label are left out of every count and list of distances; borders and extents are of whole masks",
}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two masks of one structure, cropped to the box that holds both.

    reference, prediction: (z, y, x) bool crops; first: index of their first voxel; shape, spacing_mm: of the whole volume;
    slice_axis: the array axis along which slices are numbered; scored: pixels that count per slice, (S,).
    """

    reference: np.ndarray
    prediction: np.ndarray
    first: tuple[int, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    slice_axis: int
    scored: np.ndarray

    @classmethod
    def of(
        cls,
        reference: np.ndarray,
        prediction: np.ndarray,
        spacing_mm: Sequence[float],
        slice_axis: int = 0,
        scored: np.ndarray | None = None,
    ) -> Pair:
        """Two whole masks (z, y, x). Anything non-zero is foreground."""
        if reference.shape != prediction.shape or reference.ndim != 3 or len(spacing_mm) != 3:
            raise ValueError(f"masks must be 3-D and alike, got {reference.shape} and {prediction.shape} with spacing {tuple(spacing_mm)}")
        box = box_of(reference, prediction)
        crop = [np.ascontiguousarray(mask[box]).astype(bool) for mask in (reference, prediction)]
        first = tuple(b.start for b in box)
        every = _full_slices(reference.shape, slice_axis) if scored is None else scored
        return cls(crop[0], crop[1], first, reference.shape, tuple(map(float, spacing_mm)), slice_axis, every)

    def counts(self) -> SliceCounts:
        """Pixels per slice of the whole volume."""
        masks = (self.reference, self.prediction, self.reference & self.prediction)
        reference, prediction, both = (self._on_all_slices(pixels(m, self.slice_axis)) for m in masks)
        return SliceCounts(reference, prediction, both, self.scored)

    def distances(self) -> surface.BorderDistances:
        """Border to border; both masks must hold something."""
        axes = [i for i in range(3) if self.shape[i] > 1]
        return surface.border_distances(
            self.reference, self.prediction, self.spacing_mm, axes, self.slice_axis, self.first[self.slice_axis]
        )

    def _on_all_slices(self, counts: np.ndarray) -> np.ndarray:
        whole = np.zeros(self.shape[self.slice_axis], dtype=np.int64)
        start = self.first[self.slice_axis]
        whole[start : start + len(counts)] = counts
        return whole


@dataclass(frozen=True, eq=False)
class LabelScore:
    """One label of one case: measured on everything, on the slices that were not given (None when unknown), and slice by slice."""

    status: Status
    all: Record
    unprompted_status: Status | None
    unprompted: Record | None
    slices: list[Row]


def measure(pair: Pair, prompted: Sequence[int] | None = None, tolerance_mm: float = NSD_TOLERANCE_MM) -> LabelScore:
    """Every measure of one label. prompted: slice numbers given for this label; None when nobody knows."""
    counts = pair.counts()
    status = status_of(counts)
    distances = pair.distances() if status == "ok" else None
    every = _record(pair, counts, counts, distances, status, tolerance_mm)
    table = slice_table(counts, prompted, *_slice_mm_and_pixel_mm2(pair))
    if prompted is None:
        return LabelScore(status, every, None, None, table)
    rest = counts.without_slices(prompted)
    rest_status = status_of(rest)
    rest_distances = distances.without_slices(prompted) if distances is not None and rest_status == "ok" else None
    unprompted = _record(pair, rest, counts, rest_distances, rest_status, tolerance_mm)
    return LabelScore(status, every, rest_status, unprompted, table)


def measure_missing(pair: Pair, known: bool, tolerance_mm: float = NSD_TOLERANCE_MM) -> LabelScore:
    """The score of a prediction that was never written: nothing found, whatever was there to find.

    pair: the reference beside an empty prediction; known: whether unprompted values are asked for.
    """
    counts = pair.counts()
    record = _record(pair, counts, counts, None, "pred_missing", tolerance_mm)
    table = slice_table(counts, None, *_slice_mm_and_pixel_mm2(pair))
    return LabelScore("pred_missing", record, "pred_missing" if known else None, dict(record) if known else None, table)


def empty_record(tolerance_mm: float = NSD_TOLERANCE_MM) -> Record:
    """A record in which nothing is known: the case could not be read."""
    return dict.fromkeys(metric_names(tolerance_mm))


def status_of(counts: SliceCounts) -> Status:
    """Which of the two masks hold anything at all."""
    match bool(counts.reference.any()), bool(counts.prediction.any()):
        case True, True:
            return "ok"
        case True, False:
            return "pred_empty"
        case False, True:
            return "ref_empty"
    return "both_empty"


def metric_names(tolerance_mm: float = NSD_TOLERANCE_MM) -> list[str]:
    """Every key of a record, in the order in which it is written."""
    penalised = [f"{name}_penalised" for name in surface.DISTANCES]
    return [*COUNTED, *surface.DISTANCES, *penalised, surface.nsd_key(tolerance_mm), *RATES, *EXTENTS]


def dice(reference: np.ndarray, prediction: np.ndarray) -> float | None:
    """2 |R and P| / (|R| + |P|) of two masks of any one shape; None when both are empty."""
    r, p = reference.astype(bool), prediction.astype(bool)
    return _ratio(2 * int(np.count_nonzero(r & p)), int(np.count_nonzero(r)) + int(np.count_nonzero(p)))


def hd95(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> float | None:
    """The larger of the two directed 95th percentiles in mm, masks (z, y, x); None when either is empty."""
    pair = Pair.of(reference, prediction, spacing_mm)
    return surface.distance_measures(pair.distances())["HD95"] if status_of(pair.counts()) == "ok" else None


def diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Length of the volume's diagonal, corner to corner of its outermost voxels."""
    return math.hypot(*(n * s for n, s in zip(shape, spacing_mm, strict=True)))


def coarsest_axis(spacing_mm: Sequence[float]) -> int:
    """The axis along which slices are thickest; the first of equals (within 0.1 %), so z on isotropic data."""
    return next(i for i, s in enumerate(spacing_mm) if s >= max(spacing_mm) * 0.999)


def box_of(*masks: np.ndarray) -> tuple[slice, ...]:
    """The smallest box outside which every mask (z, y, x) is zero; an empty one when there is nothing to hold."""
    box: tuple[slice, ...] = (slice(None),) * 3
    for axis in range(3):  # each axis looks only at what the axes before it have left
        across = tuple(i for i in range(3) if i != axis)
        held = np.flatnonzero(np.logical_or.reduce([mask[box].max(axis=across, initial=0) != 0 for mask in masks]))  # twice as fast as any
        if not len(held):
            return (slice(0, 0),) * 3
        box = (*box[:axis], slice(int(held[0]), int(held[-1]) + 1), *box[axis + 1 :])
    return box


def overlap_measures(counts: SliceCounts, voxel_ml: float) -> Record:
    """Overlap, confusion counts and volumes; None where the denominator is empty."""
    n_r, n_p, tp, n = (int(c.sum()) for c in (counts.reference, counts.prediction, counts.both, counts.pixels))
    return {
        "Dice": _ratio(2 * tp, n_r + n_p),
        "IoU": _ratio(tp, n_r + n_p - tp),
        "precision": _ratio(tp, n_p),
        "recall": _ratio(tp, n_r),
        "TP": tp,
        "FP": n_p - tp,
        "FN": n_r - tp,
        "TN": n - n_r - n_p + tp,
        "n_ref": n_r,
        "n_pred": n_p,
        "ref_ml": n_r * voxel_ml,
        "pred_ml": n_p * voxel_ml,
        "volume_difference_ml": (n_p - n_r) * voxel_ml,
        "volume_difference_percent": 100 * (n_p - n_r) / n_r if n_r else None,
        "volume_similarity": 1 - abs(n_p - n_r) / (n_p + n_r) if n_r + n_p else None,
    }


def _record(
    pair: Pair, counts: SliceCounts, whole: SliceCounts, distances: surface.BorderDistances | None, status: Status, tolerance_mm: float
) -> Record:
    """All measures of the counted slices; extents of the whole masks."""
    found = surface.undefined_distances((tolerance_mm,)) if distances is None else surface.distance_measures(distances, (tolerance_mm,))
    record: Record = {
        **overlap_measures(counts, math.prod(pair.spacing_mm) / 1000),
        **found,
        **rates(counts),
        **extents(whole, pair.spacing_mm[pair.slice_axis]),
    }
    if status in ("pred_empty", "ref_empty", "pred_missing"):
        record |= dict.fromkeys(["Dice", "IoU", surface.nsd_key(tolerance_mm)], 0.0)
    record |= {f"{name}_penalised": _penalised(record[name], pair, status) for name in surface.DISTANCES}
    return {name: record[name] for name in metric_names(tolerance_mm)}


def _penalised(distance: float | None, pair: Pair, status: Status) -> float | None:
    if status in ("pred_empty", "ref_empty", "pred_missing"):
        return diagonal_mm(pair.shape, pair.spacing_mm)
    return distance


def _full_slices(shape: Sequence[int], slice_axis: int) -> np.ndarray:
    return np.full(shape[slice_axis], math.prod(shape) // shape[slice_axis], dtype=np.int64)


def _slice_mm_and_pixel_mm2(pair: Pair) -> tuple[float, float]:
    return pair.spacing_mm[pair.slice_axis], math.prod(s for i, s in enumerate(pair.spacing_mm) if i != pair.slice_axis)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
