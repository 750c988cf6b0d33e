"""Labels measured in their mask: where they lie, how much neighbouring slices share, how far one slice copied to all would get.

Masks are looked at as they are stored, a few planes at a time, so that nothing their size is made of them; an axis gets its anatomical
name only at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.dataset.slices import AXES, Box, Orientation, SliceAxis
from slmsam2_cli.planning.fingerprint import Extent, LabelFingerprint
from slmsam2_cli.planning.intensity_stats import CHUNK_VALUES, Array


def measure_labels(labels: Array, values: Iterable[int], orientation: Orientation) -> dict[int, LabelFingerprint]:
    """Those of the values that occur in labels (Z, Y, X)."""
    boxes = {value: box_of(labels.shape, partial(_holding, labels, value)) for value in values}
    return {value: _measure_label(labels, value, box, orientation) for value, box in boxes.items() if box}


def _holding(labels: Array, value: int, planes: slice) -> Array:
    return np.asarray(labels[planes] == value)


def box_of(shape: Sequence[int], held: Callable[[slice], Array]) -> Box | None:
    """The half-open ranges (z, y, x) that hold all voxels which held(planes) finds, (planes, Y, X) bool; None when there are none."""
    spans = [np.zeros(length, bool) for length in shape]
    for planes in runs(shape):
        mask = held(planes)
        spans[0][planes] = mask.any(axis=(1, 2))
        plane = np.asarray(mask.any(axis=0))
        spans[1] |= plane.any(axis=1)
        spans[2] |= plane.any(axis=0)
    if not spans[0].any():
        return None
    z, y, x = ((int(found[0]), int(found[-1]) + 1) for found in map(np.flatnonzero, spans))
    return z, y, x


def runs(shape: Sequence[int]) -> Iterator[slice]:
    """The planes (Z, of Y by X voxels), as many at a time as fit a processor's cache, one at least."""
    step = max(1, CHUNK_VALUES // (shape[1] * shape[2]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _measure_label(labels: Array, value: int, box: Box, orientation: Orientation) -> LabelFingerprint:
    cut = labels[tuple(slice(start, end) for start, end in box)]
    shadows, shared = _projected(cut, value)
    areas = shadows[1].sum(axis=1), shadows[0].sum(axis=1), shadows[0].sum(axis=0)
    extents: dict[SliceAxis, Extent] = {}
    overlap: dict[SliceAxis, float] = {}
    copied: dict[SliceAxis, float] = {}
    borders: dict[SliceAxis, int] = {}
    voxels = int(areas[0].sum())
    for axis, stored, back in zip(AXES, orientation.order, orientation.flipped, strict=True):
        slices, area, (start, end) = labels.shape[stored], areas[stored], box[stored]
        first = slices - end if back else start
        borders[axis] = 2 * (voxels - int(shared[stored].sum()))
        extents[axis] = Extent(first=first, last=first + end - start - 1, slices=int(np.count_nonzero(area)), gap=longest_gap(area))
        if slices > 1:
            overlap[axis] = round(adjacent_overlap(area, shared[stored], ends=(start > 0) + (end < slices)), 6)
            middle = len(area) - 1 - choose_slice(area[::-1], "middle") if back else choose_slice(area, "middle")
            covered = int(shadows[stored][cut.take(middle, axis=stored) == value].sum())
            copied[axis] = round(copy_overlap(area, int(area[middle]), covered, slices), 6)
    return LabelFingerprint(voxels=voxels, extents=extents, overlap=overlap, copied=copied, borders=borders)


def longest_gap(area: Array) -> int:
    """The most slices in a row without anything between two with something; area (T,)."""
    return int(np.diff(np.flatnonzero(area)).max(initial=1)) - 1


def _projected(cut: Array, value: int) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Of a label, along each axis of the mask (Z, Y, X): its voxels in every line of voxels, and those that neighbouring planes share.

    (Y, X), (Z, X), (Z, Y) and (Z - 1,), (Y - 1,), (X - 1,).
    """
    z, y, x = cut.shape
    shadows = np.zeros((y, x), np.int64), np.zeros((z, x), np.int64), np.zeros((z, y), np.int64)
    shared = np.zeros(z - 1, np.int64), np.zeros(y - 1, np.int64), np.zeros(x - 1, np.int64)
    for planes in runs(cut.shape):
        mask = cut[planes] == value
        shadows[0][:] += mask.sum(axis=0)
        shadows[1][planes] = mask.sum(axis=1)
        shadows[2][planes] = mask.sum(axis=2)
        second = max(planes.start, 1)
        above, here = slice(second - 1, planes.stop - 1), slice(second, planes.stop)
        shared[0][above] = ((cut[above] == value) & (cut[here] == value)).sum(axis=(1, 2))
        shared[1][:] += (mask[:, 1:] & mask[:, :-1]).sum(axis=(0, 2))
        shared[2][:] += (mask[:, :, 1:] & mask[:, :, :-1]).sum(axis=(0, 1))
    return shadows, shared


def adjacent_overlap(area: Array, shared: Array, ends: int) -> float:
    """Mean Dice of neighbouring slices of which at least one is not empty: area (T,) on each slice, shared (T - 1,) by neighbours.

    ends: how many of the stack's two ends border on an empty slice of the volume; such a pair overlaps by 0, so a label that often
    vanishes scores low.
    """
    both = area[1:] + area[:-1]
    pairs = int((both > 0).sum()) + ends
    return float((2 * shared[both > 0] / both[both > 0]).sum() / pairs) if pairs else 0.0


def copy_overlap(area: Array, middle: int, covered: int, slices: int) -> float:
    """Dice of a label with its middle slice copied to all `slices` slices of the volume.

    area: (T,) on each slice; middle: on the middle one; covered: voxels of the label that lie on the copies.
    """
    return 2 * covered / (int(area.sum()) + slices * middle)
