"""Convert a volume to a stack of slices, and masks of the stack back to the volume's grid.

Steps: orient (closest LPS), move the slice axis to the front, crop, scale intensities (intensity.py), resample.
Pixel sizes follow the rule that the edges of the field of view coincide before and after resampling (align_corners=False).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from slmsam2_cli.dataset.intensity import ChannelIntensityLike, normalise
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.io.volume import Grid, Volume

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SliceAxis = Literal["SI", "AP", "LR"]
AXES: tuple[SliceAxis, ...] = ("SI", "AP", "LR")
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Shape = tuple[int, int, int]
Array = np.ndarray[Any, Any]


class GeometryPlanLike(Protocol):
    """The settings of a plan that this module uses; spacings in mm, storage_size in pixels."""

    slice_axis: SliceAxis
    in_plane_mm: float
    through_plane_mm: float | None
    crop_to_nonzero: bool
    storage_size: int


@dataclass(frozen=True)
class Orientation:
    """The stored axis of each oriented axis (slice, row, column), and whether it is flipped."""

    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, array: Array) -> Array:
        """(..., Z, Y, X) -> (..., T0, R0, C0), a view."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.order))
        steps: tuple[Any, ...] = tuple(slice(None, None, -1) if back else slice(None) for back in self.flipped)
        return turned[(Ellipsis, *steps)]


def orient(direction: Array, slice_axis: SliceAxis | None = None) -> Orientation:
    """Find the permutation and flips that bring an array closest to S, P, L increasing, then move the slice axis to the front.

    direction: (3, 3), columns are the LPS unit vectors of the x, y, z array axes. Each anatomical axis gets the array axis so that the
    sum of the absolute cosines is largest. Ties (45 degrees) are decided by the vectors themselves, never by the order in which the array
    was stored.
    """
    world = np.asarray(direction, dtype=np.float64)[::-1, ::-1].T  # row a: the (S, P, L) vector of array axis z, y, x
    signed = np.array([row * _sign(row) for row in world])

    def merit(order: tuple[int, ...]) -> tuple[float, ...]:
        closeness = sum(abs(world[axis, anatomy]) for anatomy, axis in enumerate(order))
        return (round(closeness, 6), *np.round(signed[list(order)], 6).ravel())

    best = max(permutations(range(3)), key=merit)
    front = AXES.index(slice_axis) if slice_axis else 0
    anatomies = (front, *(a for a in range(3) if a != front))
    order = tuple(best[a] for a in anatomies)
    flipped = tuple(bool((world[axis, a] or _sign(world[axis])) < 0) for axis, a in zip(order, anatomies, strict=True))
    return Orientation(order, flipped)  # type: ignore[arg-type]


def _sign(vector: Array) -> float:
    """Return the sign (+1 or -1) of the first component above 1e-6 in size; +1 when there is none."""
    clear = vector[np.abs(vector) > 1e-6]
    return 1.0 if clear.size == 0 or clear[0] > 0 else -1.0


def oriented_size(grid: Grid) -> tuple[Shape, tuple[float, float, float]]:
    """Return the shape in voxels and the spacing in mm along (S, P, L)."""
    order = orient(grid.direction).order
    return tuple(grid.shape[a] for a in order), tuple(float(grid.spacing_mm[a]) for a in order)  # type: ignore[return-value]


def slice_axis_of(grid: Grid, planned: SliceAxis) -> SliceAxis:
    """Return the slice axis of a volume: the planned one, but the singleton axis where the volume is a single slice."""
    shape, _ = oriented_size(grid)
    if 1 not in shape or shape[AXES.index(planned)] == 1:
        return planned
    return AXES[shape.index(1)]


def nonzero_box(stack: Array) -> Box:
    """Find the box of all voxels (C, T, R, C) that are not 0 in some channel, as half-open ranges; the whole array when all are 0."""
    full = tuple((0, n) for n in stack.shape[1:])
    return bounding_box((stack != 0).any(axis=0)) or full  # type: ignore[return-value]


def interpolation_matrix(size_in: int, size_out: int, antialias: bool = True) -> csr_matrix:
    """Build the sparse matrix (size_out, size_in) of linear interpolation; its rows sum to 1.

    antialias: when shrinking, widen the triangle filter by the factor of the reduction.
    """
    from scipy.sparse import csr_matrix  # slow to import, and a plan can be read without

    scale = size_in / size_out
    reach = max(1.0, scale) if antialias else 1.0
    centres = (np.arange(size_out) + 0.5) * scale - 0.5
    taps = np.floor(centres - reach).astype(int)[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = np.maximum(0.0, 1.0 - np.abs(taps - centres[:, None]) / reach)
    weight[(taps < 0) | (taps >= size_in)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    rows = np.broadcast_to(np.arange(size_out)[:, None], taps.shape)
    keep = weight > 0
    return csr_matrix((weight[keep].astype(np.float32), (rows[keep], taps[keep])), shape=(size_out, size_in))


def resample_plane(plane: Array, rows: csr_matrix, columns: csr_matrix) -> Array:
    """Resample a plane (R, C) to (H, W) float32: rows, then columns."""
    return np.ascontiguousarray((columns @ (rows @ plane.astype(np.float32)).T).T)


def nearest_indices(size_in: int, size_out: int) -> Array:
    """Return the indices (size_out,) of the input pixels nearest to the centres of the output pixels."""
    picks: Array = ((np.arange(size_out) + 0.5) * size_in / size_out).astype(int)
    return picks.clip(max=size_in - 1)


@dataclass(frozen=True, eq=False)
class View:
    """The mapping between one volume and its stack of slices.

    box: ((t0, t1), (r0, r1), (c0, c1)), the crop in the oriented array. stack_shape: (T, H, W) after resampling.
    scale: 1, or the factor below 1 by which the slices were reduced below the planned size to fit into storage_size pixels.
    """

    grid: Grid
    axis: SliceAxis
    box: Box
    stack_shape: Shape
    scale: float = 1.0

    @classmethod
    def fit(cls, volume: Volume, geometry: GeometryPlanLike) -> View:
        """Choose the crop (the non-zero voxels if the plan sets crop_to_nonzero) and the size of the stack."""
        axis = slice_axis_of(volume.grid, geometry.slice_axis)
        orientation = orient(volume.grid.direction, axis)
        oriented = orientation.apply(volume.voxels)
        full: Box = tuple((0, n) for n in oriented.shape[1:])  # type: ignore[assignment]
        box = nonzero_box(oriented) if geometry.crop_to_nonzero else full
        spacing = [float(volume.grid.spacing_mm[a]) for a in orientation.order]
        extent_mm = [(end - start) * mm for (start, end), mm in zip(box, spacing, strict=True)]
        room = geometry.storage_size * geometry.in_plane_mm / max(extent_mm[1:])
        scale = room if room < 1 - 1e-4 else 1.0  # less than that is rounding
        height, width = (min(geometry.storage_size, max(1, round(mm / geometry.in_plane_mm * scale))) for mm in extent_mm[1:])
        through = geometry.through_plane_mm
        slices = box[0][1] - box[0][0] if through is None else max(1, round(extent_mm[0] / through))
        return cls(volume.grid, axis, box, (slices, height, width), scale)

    @cached_property
    def orientation(self) -> Orientation:
        return orient(self.grid.direction, self.axis)

    def oriented(self, array: Array) -> Array:
        """Orient an array (Z, Y, X) to (T0, R0, C0) without crop or resampling; a view, so writing to it writes to the array."""
        return self.orientation.apply(array)

    def native_slices(self) -> int:
        """Count the slices of the oriented, uncropped array."""
        return self.grid.shape[self.orientation.order[0]]

    def file_index(self, native_slice: int) -> int:
        """Convert a native slice index to the voxel index along the stored axis, or back (the mapping is its own inverse)."""
        return self.native_slices() - 1 - native_slice if self.orientation.flipped[0] else native_slice

    def slices_with(self, mask: Array, axis: SliceAxis) -> Array:
        """Return for every native slice along an anatomical axis whether the mask (Z, Y, X) is non-zero on it, (T0,) bool."""
        held: Array = (orient(self.grid.direction, axis).apply(mask) != 0).any(axis=(1, 2))
        return held

    def to_stack(self, native_slice: int) -> int:
        """Return the stack slice of a native slice; slices outside the crop map to its nearest end."""
        start, end = self.box[0]
        inside = min(max(native_slice, start), end - 1) - start
        return min(int((inside + 0.5) * self.stack_shape[0] / (end - start)), self.stack_shape[0] - 1)

    def project_slices(self, labels: Array, value: int, native_slices: Sequence[int]) -> dict[int, tuple[int, Array, Array]]:
        """Bring native slices of one label of a mask (Z, Y, X) to the stack.

        Returns native slice -> (stack slice, mask (H, W) bool, the whole native slice of the mask (R0, C0)). Slices outside the crop are
        left out. A structure too thin for the stack's pixels keeps those that it covers best.
        """
        (start, end), cut, (_, height, width) = self.box[0], self.cropped(labels), self.stack_shape
        planes = self.oriented(labels)
        rows, columns = interpolation_matrix(cut.shape[1], height), interpolation_matrix(cut.shape[2], width)
        found = {}
        for native_slice in (t for t in native_slices if start <= t < end):
            cover = resample_plane((cut[native_slice - start] == value).astype(np.float32), rows, columns)
            mask = np.asarray(cover >= min(0.5, float(cover.max()))) & (cover > 0)
            found[native_slice] = self.to_stack(native_slice), mask, planes[native_slice]
        return found

    def by_file_slice(self, values: Array) -> dict[int, float]:
        """Give every slice of the file inside the crop the value (T,) of the stack slice that shows it: file slice -> value."""
        return {self.file_index(t): float(values[self.to_stack(t)]) for t in range(*self.box[0])}

    def cropped(self, array: Array) -> Array:
        """Orient and crop an array (..., Z, Y, X) to (..., T', R', C'); a view."""
        ranges: tuple[Any, ...] = tuple(slice(start, end) for start, end in self.box)
        return self.orientation.apply(array)[(Ellipsis, *ranges)]

    def frames(self, voxels: Array) -> Array:
        """Resample images (C, Z, Y, X) to (C, T, H, W) float32 by linear interpolation with antialiasing."""
        cut = self.cropped(voxels)
        count, height, width = self.stack_shape
        rows, columns, through = (
            interpolation_matrix(cut.shape[2], height),
            interpolation_matrix(cut.shape[3], width),
            interpolation_matrix(cut.shape[1], count),
        )
        planes = np.empty((cut.shape[0], cut.shape[1], height, width), dtype=np.float32)
        for channel, t in np.ndindex(*cut.shape[:2]):
            planes[channel, t] = resample_plane(cut[channel, t], rows, columns)
        if count == cut.shape[1]:
            return planes
        mixed = [(through @ plane.reshape(cut.shape[1], -1)).reshape(self.stack_shape) for plane in planes]
        return np.stack(mixed)

    def labels(self, labels: Array) -> Array:
        """Resample a mask (Z, Y, X) to (T, H, W) of the same dtype by nearest neighbour."""
        cut = self.cropped(labels)
        picks = [nearest_indices(before, after) for before, after in zip(cut.shape, self.stack_shape, strict=True)]
        return np.ascontiguousarray(cut[np.ix_(*picks)])

    def restore(self, logits: Callable[[int], Array], values: Sequence[int]) -> Array:
        """Convert logits of the stack to labels (Z, Y, X), uint8 or uint16, on the volume's grid.

        logits(t): (K, H, W) float32 of stack slice t; values: the K labels. Each native slice is interpolated between its neighbours in the
        stack and resized bilinearly; a voxel gets the label with the largest logit above 0, the first on a tie; 0 elsewhere and outside
        the crop.
        """
        result = np.zeros(self.grid.shape, dtype=np.uint8 if max(values, default=0) < 256 else np.uint16)
        cut = self.cropped(result)
        sizes = zip(self.stack_shape, cut.shape, strict=True)
        through, rows, columns = (interpolation_matrix(before, after, antialias=False) for before, after in sizes)
        names = np.asarray(values, dtype=result.dtype)
        known: dict[int, Array] = {}
        for t in range(cut.shape[0]):
            taps = through[t]
            known = {int(s): known[int(s)] if int(s) in known else logits(int(s)) for s in taps.indices}
            mixed = sum(float(w) * known[int(s)] for s, w in zip(taps.indices, taps.data, strict=True))
            planes = np.stack([resample_plane(plane, rows, columns) for plane in np.asarray(mixed)])
            best = planes.argmax(axis=0)
            cut[t] = np.where(planes.max(axis=0) > 0, names[best], 0)
        return result

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        grid = self.grid
        return {
            "grid": {
                "shape": list(grid.shape),
                "spacing_mm": list(map(float, grid.spacing_mm)),
                "origin_mm": list(map(float, grid.origin_mm)),
                "direction": np.asarray(grid.direction, dtype=float).tolist(),
            },
            "axis": self.axis,
            "box": [list(span) for span in self.box],
            "stack_shape": list(self.stack_shape),
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> View:
        """Restore a view from the result of to_json.

        Raises: KeyError, TypeError or ValueError when the value is no such result.
        """
        stored = value["grid"]
        grid = Grid(
            shape=tuple(stored["shape"]),
            spacing_mm=tuple(stored["spacing_mm"]),
            origin_mm=tuple(stored["origin_mm"]),
            direction=np.asarray(stored["direction"], dtype=np.float64).reshape(3, 3),
        )
        if value["axis"] not in AXES:
            raise ValueError(f"axis {value['axis']!r}")
        box = tuple((int(start), int(end)) for start, end in value["box"])
        return cls(grid, value["axis"], box, tuple(value["stack_shape"]), float(value["scale"]))  # type: ignore[arg-type]


def make_frames(volume: Volume, geometry: GeometryPlanLike, channels: Sequence[ChannelIntensityLike]) -> tuple[View, Array]:
    """Convert a volume to its view and the normalised slices (C, T, H, W) float32 in [0, 1]."""
    view = View.fit(volume, geometry)
    return view, view.frames(normalise(volume.voxels, channels))
