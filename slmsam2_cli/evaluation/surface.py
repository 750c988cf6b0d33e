"""Distances in mm between the borders of two masks: HD95, average surface distances, normalised surface distance (NSD).

Definition `surface=voxel`, as in MONAI and medpy: a border voxel is a foreground voxel with a face neighbour outside the mask, outside
the image counts as background, and distances are measured between voxel centres. DeepMind's surface-distance weights surface elements
between voxels instead, and its values differ slightly. Along an axis of a single voxel there are no neighbours, so a single slice is
scored in 2-D.

Borders are always those of the whole masks. To score unprompted slices only, border voxels on annotated slices are left out of the lists
of distances. Cutting these slices out of the masks would create a border on both sides of every cut.

Most border voxels are close to the other border. They check their neighbours in order of distance, all together, so that the first voxel
found in the other set is the exact nearest one. Voxels that find none are looked up in a k-d tree, as soon as searching has cost as much
as the tree would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DISTANCES = ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm")
NSD_SLACK_MM = 1e-6  # d <= t + this, so that 3 x 0.1 counts as within 0.3
NEIGHBOURS = 4000  # checked before the k-d tree is used: about a ball 20 voxels across
MAX_STEPS_PER_AXIS = 200  # voxels along one axis, for very anisotropic spacings
FEW = 2048  # fewer voxels than this check many neighbours in one step
LOOKUPS = 1 << 16  # neighbours that they check in one step, or a sixteenth of the volume's voxels if that is less
# Cost of the k-d tree in lookups of one neighbour (about 2 ns): per voxel that it is built from, and per voxel that it is queried for.
TREE_BUILD_COST, TREE_QUERY_COST = 100, 1000


def nearest_mm(voxels: np.ndarray, other: np.ndarray, other_voxels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Compute the distances (n,) float64 in mm from voxels (n,) to the nearest of other_voxels (m,), m > 0; spacing_mm is (z, y, x).

    Voxels are flat indices into `other` (Z, Y, X) bool, which is True exactly at other_voxels.
    """
    distances = np.zeros(len(voxels))
    left = np.flatnonzero(~other.ravel()[voxels])  # voxels of both sets are 0 mm apart
    if len(left):
        left = _search_neighbours(distances, left, voxels, other, len(other_voxels), tuple(float(s) for s in spacing_mm))
    if len(left):
        from scipy.spatial import cKDTree  # slow to import, and often not needed

        points, targets = (
            np.stack(np.unravel_index(found, other.shape), axis=1) * np.asarray(spacing_mm, np.float64)
            for found in (voxels[left], other_voxels)
        )
        distances[left] = np.asarray(cKDTree(targets, balanced_tree=False).query(points)[0])
    return distances


def _search_neighbours(
    distances: np.ndarray, left: np.ndarray, voxels: np.ndarray, other: np.ndarray, other_count: int, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Fill in the distances of those of voxels[left] that have a neighbour in `other`, which holds other_count voxels.

    Returns the indices, of `left`, of the voxels that found none before a k-d tree became cheaper.
    """
    offsets, lengths_mm = _neighbour_offsets(tuple(n == 1 for n in other.shape), spacing_mm)
    margin = np.abs(offsets).max(axis=0, initial=0)
    padded = np.pad(other, [(n, n) for n in margin])
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    at = (np.stack(np.unravel_index(voxels[left], other.shape), axis=1) + margin) @ strides
    steps, flat, done, lookups = offsets @ strides, padded.ravel(), 0, 0
    together = min(LOOKUPS, max(FEW, padded.size // 16))
    while len(left) and done < len(steps) and lookups < TREE_BUILD_COST * other_count + TREE_QUERY_COST * len(left):
        if len(left) < FEW:  # many neighbours in one step, of which the first hit counts
            end = done + together // len(left)
            hits = flat[at[:, np.newaxis] + steps[done:end]]
            first = hits.argmax(axis=1)
            found = hits[np.arange(len(at)), first]
            distances[left[found]] = lengths_mm[done + first[found]]
        else:  # all neighbours at one distance
            end = int(np.searchsorted(lengths_mm, lengths_mm[done], side="right"))
            found = flat[at + steps[done]]
            for step in steps[done + 1 : end]:
                found |= flat[at + step]
            distances[left[found]] = lengths_mm[done]
        lookups += len(left) * (end - done)
        left, at, done = left[~found], at[~found], end
    return left


@lru_cache(maxsize=8)
def _neighbour_offsets(single: tuple[bool, ...], spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """List the offsets (k, 3) to the voxels around a voxel and their lengths (k,) in mm, ascending and without gaps.

    single: the axes along which there is only one voxel, and so no neighbour.
    """
    radius_mm = (NEIGHBOURS * math.prod(spacing_mm) * 3 / (4 * math.pi)) ** (1 / 3)
    reach = [0 if only else min(int(radius_mm / s), MAX_STEPS_PER_AXIS) for only, s in zip(single, spacing_mm, strict=True)]
    beyond_mm = min((s * (r + 1) for only, s, r in zip(single, spacing_mm, reach, strict=True) if not only), default=0.0)
    squares = [(np.arange(-r, r + 1) * s) ** 2 for r, s in zip(reach, spacing_mm, strict=True)]
    lengths_mm = np.sqrt(squares[0][:, np.newaxis, np.newaxis] + squares[1][:, np.newaxis] + squares[2])
    order = np.argsort(lengths_mm, axis=None, kind="stable")[1 : NEIGHBOURS + 1]  # without the voxel itself
    ordered = lengths_mm.ravel()[order]
    near = ordered < beyond_mm
    places = np.unravel_index(order[near], lengths_mm.shape)
    return np.stack([(place - r).astype(np.int16) for place, r in zip(places, reach, strict=True)], axis=1), ordered[near]


@dataclass(frozen=True, eq=False)
class BorderDistances:
    """The distance of every border voxel to the other border, and the slice that each border voxel lies on.

    from_reference_mm (n,), from_prediction_mm (m,): float64; reference_slice (n,), prediction_slice (m,): slice numbers.
    """

    from_reference_mm: np.ndarray
    from_prediction_mm: np.ndarray
    reference_slice: np.ndarray
    prediction_slice: np.ndarray

    def without_slices(self, annotated: Sequence[int]) -> BorderDistances:
        """Return the distances of the border voxels outside the annotated slices, unchanged."""
        keep_r = ~np.isin(self.reference_slice, annotated)
        keep_p = ~np.isin(self.prediction_slice, annotated)
        return BorderDistances(
            self.from_reference_mm[keep_r], self.from_prediction_mm[keep_p], self.reference_slice[keep_r], self.prediction_slice[keep_p]
        )


def border(mask: np.ndarray, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Find the border voxels (Z, Y, X) bool of a mask (Z, Y, X) bool: those with a face neighbour along `axes` outside the mask."""
    interior = np.zeros_like(mask) if not axes else mask.copy()
    for axis in axes:
        inside, whole = np.moveaxis(interior, axis, 0), np.moveaxis(mask, axis, 0)  # views
        inside[:-1] &= whole[1:]
        inside[1:] &= whole[:-1]
        inside[[0, -1]] = False
    return np.asarray(mask & ~interior)


def border_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], axes: Sequence[int], slice_axis: int, first_slice: int = 0
) -> BorderDistances:
    """Compute the distances in mm from each border to the other.

    reference, prediction: (Z, Y, X) bool, neither empty; spacing_mm: (z, y, x); axes: along which voxels are neighbours; first_slice:
    number of the array's first slice along slice_axis, when the arrays are a crop.
    """
    border_r, border_p = border(reference, axes), border(prediction, axes)
    voxels_r, voxels_p = np.flatnonzero(border_r), np.flatnonzero(border_p)
    return BorderDistances(
        nearest_mm(voxels_r, border_p, voxels_p, spacing_mm),
        nearest_mm(voxels_p, border_r, voxels_r, spacing_mm),
        np.unravel_index(voxels_r, border_r.shape)[slice_axis] + first_slice,
        np.unravel_index(voxels_p, border_p.shape)[slice_axis] + first_slice,
    )


def distance_measures(distances: BorderDistances | None, tolerances_mm: Sequence[float] = (2.0,)) -> dict[str, float | None]:
    """Compute HD95, hd95_pooled_mm, hd_mm, assd_mm, masd_mm and nsd@t for each tolerance; all None without distances.

    HD95 is the larger of the two directed 95th percentiles, as in MONAI; hd95_pooled_mm is that of both lists together, as in medpy. NSD is
    the surface Dice of Nikolov et al. 2018, counted over border voxels.
    """
    if distances is None or not len(distances.from_reference_mm) or not len(distances.from_prediction_mm):
        return dict.fromkeys([*DISTANCES, *map(nsd_key, tolerances_mm)])
    r, p = distances.from_reference_mm, distances.from_prediction_mm
    both = np.concatenate([r, p])
    return {
        "HD95": float(max(np.percentile(r, 95), np.percentile(p, 95))),
        "hd95_pooled_mm": float(np.percentile(both, 95)),
        "hd_mm": float(both.max()),
        "assd_mm": float(both.mean()),
        "masd_mm": float((r.mean() + p.mean()) / 2),
        **{nsd_key(t): float(np.mean(both <= t + NSD_SLACK_MM)) for t in tolerances_mm},
    }


def nsd_key(tolerance_mm: float) -> str:
    """Return the name of NSD at a tolerance, such as nsd@2."""
    return f"nsd@{tolerance_mm:g}"
