"""Compare a reference mask and a predicted mask of one structure: overlap, volumes, surface distances, errors slice by slice.

Pure functions of arrays. Masks are (z, y, x), spacings (z, y, x) in mm, distances in mm, volumes in ml. A value that is undefined is None,
never NaN. Definitions and sources: docs/reference/metrics.md; which measures to report, and what to do with empty masks, follows Metrics
Reloaded (Maier-Hein, Reinke et al. 2024).

Slices are numbered along the axis of propagation. Annotated slices are left out of every unprompted count; extents always compare whole
masks, because an annotated slice cannot be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from slmsam2_cli.evaluation import surface

Status = Literal["ok", "pred_empty", "ref_empty", "both_empty", "pred_missing", "failed"]
Record = dict[str, float | int | None]

NSD_TOLERANCE_MM = 2.0
COUNTED = (
    *("Dice", "IoU", "precision", "recall", "TP", "FP", "FN", "TN", "n_ref", "n_pred"),
    *("ref_ml", "pred_ml", "volume_difference_ml", "volume_difference_percent", "volume_similarity"),
)
RATES = ("over_rate", "over_slices", "over_voxel_fraction", "under_rate", "under_slices", "slice_precision", "slice_recall", "slice_f1")
EXTENTS = ("over_extent_mm", "end_error_low_mm", "end_error_high_mm")
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
    "over_extent_mm": "how far the prediction extends beyond the reference's first and last slice, both ends added",
    "end_error_low_mm, end_error_high_mm": "per end: positive where the prediction extends too far, negative where it falls short",
    "unprompted": "without the label's annotated slices, in every count and list of distances; borders and extents are of whole masks",
}


@dataclass(frozen=True, eq=False)
class SliceCounts:
    """Pixels on each slice, (S,) int64: of the reference, of the prediction, of both masks, and of the slice as a whole."""

    reference: np.ndarray
    prediction: np.ndarray
    both: np.ndarray
    pixels: np.ndarray

    @property
    def status(self) -> Status:
        """Return which of the two masks are empty."""
        if self.reference.any():
            return "ok" if self.prediction.any() else "pred_empty"
        return "ref_empty" if self.prediction.any() else "both_empty"

    def without_slices(self, annotated: Sequence[int]) -> SliceCounts:
        """Return the counts of all slices except the annotated ones."""
        keep = ~np.isin(np.arange(len(self.pixels)), annotated)
        return SliceCounts(self.reference[keep], self.prediction[keep], self.both[keep], self.pixels[keep])


@dataclass(frozen=True, eq=False)
class Pair:
    """Two masks of one structure, cropped to the box that holds both.

    reference, prediction: (z, y, x) bool crops; first: index of their first voxel; shape, spacing_mm: of the whole volume;
    slice_axis: the array axis along which slices are numbered; scored: pixels that count on each slice, (S,).
    """

    reference: np.ndarray
    prediction: np.ndarray
    first: tuple[int, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    slice_axis: int
    scored: np.ndarray

    @classmethod
    def of(cls, reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], slice_axis: int = 0) -> Pair:
        """Crop two whole masks (z, y, x), in which every non-zero voxel is foreground.

        Raises: ValueError when the masks are not 3-D or differ in shape.
        """
        if reference.shape != prediction.shape or reference.ndim != 3 or len(spacing_mm) != 3:
            raise ValueError(
                f"masks must be 3-D and of one shape, got {reference.shape} and {prediction.shape} with spacing {tuple(spacing_mm)}"
            )
        box = box_of(reference, prediction)
        r, p = (np.ascontiguousarray(mask[box]).astype(bool) for mask in (reference, prediction))
        pixels = np.full(reference.shape[slice_axis], math.prod(reference.shape) // reference.shape[slice_axis], dtype=np.int64)
        return cls(r, p, tuple(b.start for b in box), reference.shape, tuple(map(float, spacing_mm)), slice_axis, pixels)

    @property
    def slice_mm(self) -> float:
        """Return the distance between slices."""
        return self.spacing_mm[self.slice_axis]

    def counts(self) -> SliceCounts:
        """Count the pixels on each slice of the whole volume."""
        across, start = tuple(i for i in range(3) if i != self.slice_axis), self.first[self.slice_axis]
        counts = []
        for mask in (self.reference, self.prediction, self.reference & self.prediction):
            # along axis 0 slices are contiguous, and counting them one by one is several times faster
            found = [np.count_nonzero(plane) for plane in mask] if self.slice_axis == 0 else np.count_nonzero(mask, axis=across)
            whole = np.zeros(self.shape[self.slice_axis], dtype=np.int64)
            whole[start : start + mask.shape[self.slice_axis]] = found
            counts.append(whole)
        reference, prediction, both = counts
        return SliceCounts(reference, prediction, both, self.scored)

    def distances(self) -> surface.BorderDistances:
        """Compute the distances between the borders; neither mask may be empty."""
        axes, first_slice = [i for i in range(3) if self.shape[i] > 1], self.first[self.slice_axis]
        return surface.border_distances(self.reference, self.prediction, self.spacing_mm, axes, self.slice_axis, first_slice)


@dataclass(frozen=True, eq=False)
class LabelScore:
    """The measures of one label of one case: on all slices, without annotated slices (None when these are unknown), slice by slice."""

    status: Status
    all: Record
    unprompted_status: Status | None
    unprompted: Record | None
    slices: list[Record]


def measure(pair: Pair, annotated: Sequence[int] | None = None, tolerance_mm: float = NSD_TOLERANCE_MM) -> LabelScore:
    """Compute every measure of one label. annotated: the label's annotated slices, None when they are unknown."""
    counts = pair.counts()
    distances = pair.distances() if counts.status == "ok" else None
    every = _measure_slices(pair, counts, counts, distances, counts.status, tolerance_mm)
    table = slice_table(pair, counts, annotated)
    if annotated is None:
        return LabelScore(counts.status, every, None, None, table)
    rest = counts.without_slices(annotated)
    rest_distances = distances.without_slices(annotated) if distances is not None and rest.status == "ok" else None
    unprompted = _measure_slices(pair, rest, counts, rest_distances, rest.status, tolerance_mm)
    return LabelScore(counts.status, every, rest.status, unprompted, table)


def measure_missing(pair: Pair, known: bool, tolerance_mm: float = NSD_TOLERANCE_MM) -> LabelScore:
    """Score a missing prediction: Dice 0 whatever the reference holds, and penalised distances.

    pair: the reference and an empty prediction; known: whether the annotated slices of other cases are known, so that this one also needs
    unprompted values.
    """
    counts = pair.counts()
    record = _measure_slices(pair, counts, counts, None, "pred_missing", tolerance_mm)
    unprompted_status: Status | None = "pred_missing" if known else None
    return LabelScore("pred_missing", record, unprompted_status, dict(record) if known else None, slice_table(pair, counts, None))


def slice_table(pair: Pair, counts: SliceCounts, annotated: Sequence[int] | None) -> list[Record]:
    """Make a row for each slice that is annotated or that either mask occupies.

    The distance from the nearest annotated slice is signed, the lower one counts among equals; None when there is none. Areas are in mm².
    """
    annotated = sorted(set(annotated or ()))
    pixel_mm2 = math.prod(s for i, s in enumerate(pair.spacing_mm) if i != pair.slice_axis)
    rows: list[Record] = []
    for k in sorted({*np.flatnonzero(counts.reference + counts.prediction).tolist(), *annotated}):
        r, p, both = (int(c[k]) for c in (counts.reference, counts.prediction, counts.both))
        away = min((k - other for other in annotated), key=lambda d: (abs(d), -d), default=None)
        rows.append(
            {
                "slice": k,
                "prompt_distance_slices": away,
                "prompt_distance_mm": None if away is None else away * pair.slice_mm,
                "reference_px": r,
                "prediction_px": p,
                "Dice": _ratio(2 * both, r + p),
                "area_error_mm2": (p - r) * pixel_mm2,
            }
        )
    return rows


def metric_names(tolerance_mm: float = NSD_TOLERANCE_MM) -> list[str]:
    """List every key of a record, in the order in which it is written."""
    penalised = [f"{name}_penalised" for name in surface.DISTANCES]
    return [*COUNTED, *surface.DISTANCES, *penalised, surface.nsd_key(tolerance_mm), *RATES, *EXTENTS]


def dice(reference: np.ndarray, prediction: np.ndarray) -> float | None:
    """Compute 2 |R and P| / (|R| + |P|) of two masks of any one shape; None when both are empty."""
    r, p = reference.astype(bool), prediction.astype(bool)
    return _ratio(2 * int(np.count_nonzero(r & p)), int(np.count_nonzero(r)) + int(np.count_nonzero(p)))


def hd95(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> float | None:
    """Compute the larger of the two directed 95th percentiles in mm of two masks (z, y, x); None when either is empty."""
    pair = Pair.of(reference, prediction, spacing_mm)
    return surface.distance_measures(pair.distances())["HD95"] if pair.counts().status == "ok" else None


def coarsest_axis(spacing_mm: Sequence[float]) -> int:
    """Find the axis with the thickest slices; the first among equals (within 0.1 %), so z for isotropic volumes."""
    return next(i for i, s in enumerate(spacing_mm) if s >= max(spacing_mm) * 0.999)


def box_of(*masks: np.ndarray) -> tuple[slice, ...]:
    """Find the smallest box outside which every mask (z, y, x) is zero; an empty box when all masks are empty."""
    box: tuple[slice, ...] = (slice(None),) * 3
    for axis in range(3):  # each axis is searched only within the box of the axes before it
        across = tuple(i for i in range(3) if i != axis)
        held = np.flatnonzero(np.logical_or.reduce([mask[box].max(axis=across, initial=0) != 0 for mask in masks]))  # twice as fast as any
        if not len(held):
            return (slice(0, 0),) * 3
        box = (*box[:axis], slice(int(held[0]), int(held[-1]) + 1), *box[axis + 1 :])
    return box


def _measure_slices(
    pair: Pair, counts: SliceCounts, whole: SliceCounts, distances: surface.BorderDistances | None, status: Status, tolerance_mm: float
) -> Record:
    """Compute the record of the counted slices: overlap, volumes, distances, slice rates; and the extents of the whole masks.

    A measure whose denominator is empty is None. Where one mask is empty or missing, overlap and NSD are 0, and a penalised distance is the
    length of the volume's diagonal.
    """
    n_r, n_p, tp, n = (int(c.sum()) for c in (counts.reference, counts.prediction, counts.both, counts.pixels))
    in_r, in_p = counts.reference > 0, counts.prediction > 0
    over, under, hit = (int(np.count_nonzero(x)) for x in (in_p & ~in_r, in_r & ~in_p, in_r & in_p))
    voxel_ml = math.prod(pair.spacing_mm) / 1000
    record: Record = {
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
        "over_rate": _ratio(over, int(np.count_nonzero(~in_r))),
        "over_slices": over,
        "over_voxel_fraction": _ratio(int(counts.prediction[~in_r].sum()), n_p),
        "under_rate": _ratio(under, hit + under),
        "under_slices": under,
        "slice_precision": _ratio(hit, hit + over),
        "slice_recall": _ratio(hit, hit + under),
        "slice_f1": _ratio(2 * hit, 2 * hit + over + under),
    }
    record |= surface.distance_measures(distances, (tolerance_mm,)) | _extents(pair, whole)
    penalty = None
    if status in ("pred_empty", "ref_empty", "pred_missing"):
        record |= dict.fromkeys(["Dice", "IoU", surface.nsd_key(tolerance_mm)], 0.0)
        penalty = math.hypot(*(count * mm for count, mm in zip(pair.shape, pair.spacing_mm, strict=True)))
    record |= {f"{name}_penalised": record[name] if penalty is None else penalty for name in surface.DISTANCES}
    return {name: record[name] for name in metric_names(tolerance_mm)}


def _extents(pair: Pair, counts: SliceCounts) -> Record:
    """Compute how far, in mm, the prediction extends beyond either end of the reference (positive) or falls short of it (negative)."""
    r, p = np.flatnonzero(counts.reference), np.flatnonzero(counts.prediction)
    if not len(r) or not len(p):
        return dict.fromkeys(EXTENTS)
    low, high = float(r[0] - p[0]) * pair.slice_mm, float(p[-1] - r[-1]) * pair.slice_mm
    return {"over_extent_mm": max(0.0, low) + max(0.0, high), "end_error_low_mm": low, "end_error_high_mm": high}


def _ratio(part: int, whole: int) -> float | None:
    """Divide counts; None when the denominator is 0."""
    return part / whole if whole else None
