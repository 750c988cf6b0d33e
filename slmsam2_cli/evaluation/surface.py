"""How far two masks' borders lie apart, in millimetres.

Definition `surface=voxel`: a border voxel is a foreground voxel with a face neighbour outside the mask, outside the image
counts as background, distances run between voxel centres. An axis of a single voxel is no direction: one slice is scored
in 2-D. Borders are always those of the whole masks; slices that were given to the model are left out of the *lists* of
distances, never out of the masks, because cutting a mask open would invent a border on both sides of the cut.

How far each voxel of one set lies from the nearest voxel of another, in millimetres: exact, and quick when the sets lie close.

Most border voxels find the other border within a few voxels. So all of them look at their neighbours, the closest neighbour
first: the first one that belongs to the other set is the nearest, and nothing is estimated. Voxels that find nothing nearby
are left to a k-d tree, as soon as looking around has cost as much as the tree would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NEIGHBOURS = 4000  # how many are looked at before a voxel counts as far: about a ball 20 voxels across
MAX_STEPS_PER_AXIS = 200  # voxels along one axis, where voxels are needles or leaves
FEW = 2048  # so few voxels look at many neighbours in one step
LOOKS = 1 << 16  # that they take together in it, or a sixteenth of the volume's voxels if that is less
# What the tree costs, counted in looks at one neighbour (about 2 ns): per voxel it is built of, and per voxel it is asked about.
TREE_BUILD_COST, TREE_QUERY_COST = 100, 1000


def nearest_mm(voxels: np.ndarray, other: np.ndarray, other_voxels: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distances (n,) float64 from voxels (n,) to the nearest of other_voxels (m,), m > 0; spacing_mm (z, y, x).

    Voxels are flat indices into `other` (Z, Y, X) bool, which is True at other_voxels and nowhere else.
    """
    distances = np.zeros(len(voxels))
    left = np.flatnonzero(~other.ravel()[voxels])  # whatever both sets hold is 0 mm away
    if len(left):
        afford = TREE_BUILD_COST * len(other_voxels)
        left = _search_neighbours(distances, left, voxels, other, afford, tuple(float(s) for s in spacing_mm))
    if len(left):
        distances[left] = _query_tree(voxels[left], other_voxels, other.shape, spacing_mm)
    return distances


def _search_neighbours(
    distances: np.ndarray, left: np.ndarray, voxels: np.ndarray, other: np.ndarray, afford: int, spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Fill in the distances of those of voxels[left] that find a neighbour in `other`; -> those still left."""
    offsets, lengths_mm = _adjacent_rows(tuple(n == 1 for n in other.shape), spacing_mm)
    air = np.abs(offsets).max(axis=0, initial=0)
    padded = np.pad(other, [(n, n) for n in air])
    strides = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    at = (np.stack(np.unravel_index(voxels[left], other.shape), axis=1) + air) @ strides
    steps, flat, done, looks = offsets @ strides, padded.ravel(), 0, 0
    together = min(LOOKS, max(FEW, padded.size // 16))
    while len(left) and done < len(steps) and looks < afford + TREE_QUERY_COST * len(left):
        if len(left) < FEW:
            end = done + together // len(left)
            first, found = _first_of_many(flat, at, steps[done:end])
            distances[left[found]] = lengths_mm[done + first]
        else:
            end = int(np.searchsorted(lengths_mm, lengths_mm[done], side="right"))
            found = _any_at_one_distance(flat, at, steps[done:end])
            distances[left[found]] = lengths_mm[done]
        looks += len(left) * (end - done)
        missed = ~found
        left, at, done = left[missed], at[missed], end
    return left


def _any_at_one_distance(flat: np.ndarray, at: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Which of at (n,) find True at any of steps (k,), (n,) bool."""
    found = flat[at + steps[0]]
    for step in steps[1:]:
        found |= flat[at + step]
    return np.asarray(found)


def _first_of_many(flat: np.ndarray, at: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the first of steps (k,) at which True is found, for the f that find it; which of at (n,) do, bool)."""
    hits = flat[at[:, np.newaxis] + steps]
    first = hits.argmax(axis=1)
    found = hits[np.arange(len(at)), first]
    return first[found], found


@lru_cache(maxsize=8)
def _adjacent_rows(flat: tuple[bool, ...], spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (k, 3) to the voxels around a voxel and their lengths (k,) in mm, the closest first, none in between left out.

    flat: axes along which there is only one voxel, and so no neighbour.
    """
    radius_mm = (NEIGHBOURS * math.prod(spacing_mm) * 3 / (4 * math.pi)) ** (1 / 3)
    reach = [0 if only else min(int(radius_mm / s), MAX_STEPS_PER_AXIS) for only, s in zip(flat, spacing_mm, strict=True)]
    beyond_mm = min((s * (r + 1) for only, s, r in zip(flat, spacing_mm, reach, strict=True) if not only), default=0.0)
    squares = [(np.arange(-r, r + 1) * s) ** 2 for r, s in zip(reach, spacing_mm, strict=True)]
    lengths_mm = np.sqrt(squares[0][:, np.newaxis, np.newaxis] + squares[1][:, np.newaxis] + squares[2])
    order = np.argsort(lengths_mm, axis=None, kind="stable")[1 : NEIGHBOURS + 1]  # without the voxel itself
    ordered = lengths_mm.ravel()[order]
    near = ordered < beyond_mm
    places = np.unravel_index(order[near], lengths_mm.shape)
    return np.stack([(place - r).astype(np.int16) for place, r in zip(places, reach, strict=True)], axis=1), ordered[near]


def _query_tree(voxels: np.ndarray, others: np.ndarray, shape: tuple[int, ...], spacing_mm: Sequence[float]) -> np.ndarray:
    from scipy.spatial import cKDTree  # slow to import, and often not needed

    points, targets = (np.stack(np.unravel_index(v, shape), axis=1) * np.asarray(spacing_mm, np.float64) for v in (voxels, others))
    return np.asarray(cKDTree(targets, balanced_tree=False).query(points)[0])


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
