"""How far two masks' borders lie apart, in millimetres.

Definition `surface=voxel`: a border voxel is a foreground voxel with a face neighbour outside the mask, outside the image
counts as background, distances run between voxel centres. An axis of a single voxel is no direction: one slice is scored
in 2-D. Borders are always those of the whole masks; slices that were given to the model are left out of the *lists* of
distances, never out of the masks, because cutting a mask open would invent a border on both sides of the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmsam2_cli.evaluation.nearest import nearest_mm

NSD_SLACK_MM = 1e-6  # d <= t + this, so that 3 x 0.1 counts as within 0.3


@dataclass(frozen=True, eq=False)
class BorderDistances:
    """Distances of every border voxel to the other border, and the slice each border voxel lies on.

    from_reference_mm (n,), from_prediction_mm (m,): float64; reference_slice (n,), prediction_slice (m,): slice numbers.
    """

    from_reference_mm: np.ndarray
    from_prediction_mm: np.ndarray
    reference_slice: np.ndarray
    prediction_slice: np.ndarray

    def without_slices(self, given: Sequence[int]) -> BorderDistances:
        """The same distances, asked only of border voxels outside the given slices."""
        keep_r = ~np.isin(self.reference_slice, given)
        keep_p = ~np.isin(self.prediction_slice, given)
        return BorderDistances(
            self.from_reference_mm[keep_r], self.from_prediction_mm[keep_p], self.reference_slice[keep_r], self.prediction_slice[keep_p]
        )


def border(mask: np.ndarray, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Border voxels of a mask (Z, Y, X) bool, neighbours looked at along `axes`; -> (Z, Y, X) bool."""
    if not axes:
        return mask.copy()
    interior = mask.copy()
    for axis in axes:
        here, there = _neighbours(axis)
        interior[here] &= mask[there]
        interior[there] &= mask[here]
        interior[_end(axis, 0)] = False
        interior[_end(axis, -1)] = False
    return np.asarray(mask & ~interior)


def border_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], axes: Sequence[int], slice_axis: int, first_slice: int = 0
) -> BorderDistances:
    """Both directed lists of distances; reference and prediction (Z, Y, X) bool, neither empty, spacing_mm (z, y, x).

    first_slice: number of the array's first slice along slice_axis, when the arrays are a crop.
    """
    border_r, border_p = border(reference, axes), border(prediction, axes)
    voxels_r, voxels_p = np.flatnonzero(border_r), np.flatnonzero(border_p)
    return BorderDistances(
        nearest_mm(voxels_r, border_p, voxels_p, spacing_mm),
        nearest_mm(voxels_p, border_r, voxels_r, spacing_mm),
        np.unravel_index(voxels_r, border_r.shape)[slice_axis] + first_slice,
        np.unravel_index(voxels_p, border_p.shape)[slice_axis] + first_slice,
    )


def distance_measures(distances: BorderDistances, tolerances_mm: Sequence[float] = (2.0,)) -> dict[str, float | None]:
    """HD95 (the larger of the two directed 95th percentiles), hd95_pooled_mm, hd_mm, assd_mm, masd_mm, nsd@t; None without a border."""
    r, p = distances.from_reference_mm, distances.from_prediction_mm
    if not len(r) or not len(p):
        return undefined_distances(tolerances_mm)
    both = np.concatenate([r, p])
    return {
        "HD95": float(max(np.percentile(r, 95), np.percentile(p, 95))),
        "hd95_pooled_mm": float(np.percentile(both, 95)),
        "hd_mm": float(both.max()),
        "assd_mm": float(both.mean()),
        "masd_mm": float((r.mean() + p.mean()) / 2),
        **{nsd_key(t): float(np.mean(both <= t + NSD_SLACK_MM)) for t in tolerances_mm},
    }


def undefined_distances(tolerances_mm: Sequence[float] = (2.0,)) -> dict[str, float | None]:
    """The same keys with nothing known."""
    return dict.fromkeys([*DISTANCES, *map(nsd_key, tolerances_mm)])


def nsd_key(tolerance_mm: float) -> str:
    return f"nsd@{tolerance_mm:g}"


DISTANCES = ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm")


def _neighbours(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index pairs of voxels that share a face along the axis."""
    return tuple(slice(None, -1) if i == axis else slice(None) for i in range(3)), tuple(
        slice(1, None) if i == axis else slice(None) for i in range(3)
    )


def _end(axis: int, index: int) -> tuple[slice | int, ...]:
    return tuple(index if i == axis else slice(None) for i in range(3))
