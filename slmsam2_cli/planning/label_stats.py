"""Measure labels in their mask: extent, overlap of adjacent slices, Dice of the middle slice copied to all slices, borders.

Masks are read as stored, a few planes at a time, so that no copy of a mask is made. Axes get their anatomical names at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from slmsam2_cli.dataset.mask_measures import bounding_box, dice
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.dataset.slices import AXES, Box, Orientation, SliceAxis
from slmsam2_cli.planning.fingerprint import Extent, LabelFingerprint
from slmsam2_cli.planning.intensity_stats import CHUNK_VALUES, Array


def measure_labels(labels: Array, values: Iterable[int], orientation: Orientation) -> dict[int, LabelFingerprint]:
    """Measure those of the label values that occur in labels (Z, Y, X)."""
    found = {}
    for value in values:
        box = bounding_box_of_planes(labels.shape, lambda planes: np.asarray(labels[planes] == value))  # noqa: B023
        if box is not None:
            found[value] = _measure_label(labels, value, box, orientation)
    return found


def bounding_box_of_planes(shape: Sequence[int], mask_of: Callable[[slice], Array]) -> Box | None:
    """Find the half-open ranges (z, y, x) that hold a mask of a shape, reading a few planes at a time; None for an empty mask.

    mask_of: returns the mask of a range of planes, (planes, Y, X) bool.
    """
    boxes = [(planes.start, box) for planes in plane_chunks(shape) if (box := bounding_box(mask_of(planes)))]
    if not boxes:
        return None
    z = boxes[0][0] + boxes[0][1][0][0], boxes[-1][0] + boxes[-1][1][0][1]
    y, x = ((min(box[axis][0] for _, box in boxes), max(box[axis][1] for _, box in boxes)) for axis in (1, 2))
    return z, y, x


def plane_chunks(shape: Sequence[int]) -> Iterator[slice]:
    """Split the planes of a volume (Z, Y, X) into ranges that fit the processor's cache, of at least one plane."""
    step = max(1, CHUNK_VALUES // (shape[1] * shape[2]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _measure_label(labels: Array, value: int, box: Box, orientation: Orientation) -> LabelFingerprint:
    """Measure one label, given its bounding box, along all three anatomical axes."""
    cut = labels[tuple(slice(start, end) for start, end in box)]
    projections, shared = _project(cut, value)
    areas = projections[1].sum(axis=1), projections[0].sum(axis=1), projections[0].sum(axis=0)
    voxels = int(areas[0].sum())
    extents: dict[SliceAxis, Extent] = {}
    overlap: dict[SliceAxis, float] = {}
    copied: dict[SliceAxis, float] = {}
    borders: dict[SliceAxis, int] = {}
    for axis, stored, back in zip(AXES, orientation.order, orientation.flipped, strict=True):
        slices, area, (start, end) = labels.shape[stored], areas[stored], box[stored]
        first = slices - end if back else start
        longest_gap = int(np.diff(np.flatnonzero(area)).max(initial=1)) - 1
        extents[axis] = Extent(first=first, last=first + end - start - 1, slices=int(np.count_nonzero(area)), gap=longest_gap)
        borders[axis] = 2 * (voxels - int(shared[stored].sum()))
        if slices > 1:
            overlap[axis] = round(adjacent_overlap(area, shared[stored], ends=(start > 0) + (end < slices)), 6)
            middle = len(area) - 1 - choose_slice(area[::-1], "middle") if back else choose_slice(area, "middle")
            covered = int(projections[stored][cut.take(middle, axis=stored) == value].sum())
            copied[axis] = round(dice(covered, voxels, slices * int(area[middle])), 6)
    return LabelFingerprint(voxels=voxels, extents=extents, overlap=overlap, copied=copied, borders=borders)


def _project(cut: Array, value: int) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """Count a label's voxels along each axis of the mask (Z, Y, X), and those that adjacent planes share.

    Returns projections (Y, X), (Z, X), (Z, Y) and shared voxels (Z - 1,), (Y - 1,), (X - 1,).
    """
    z, y, x = cut.shape
    projections = np.zeros((y, x), np.int64), np.zeros((z, x), np.int64), np.zeros((z, y), np.int64)
    shared = np.zeros(z - 1, np.int64), np.zeros(y - 1, np.int64), np.zeros(x - 1, np.int64)
    for planes in plane_chunks(cut.shape):
        mask = cut[planes] == value
        projections[0][:] += mask.sum(axis=0)
        projections[1][planes] = mask.sum(axis=1)
        projections[2][planes] = mask.sum(axis=2)
        second = max(planes.start, 1)
        before, here = slice(second - 1, planes.stop - 1), slice(second, planes.stop)
        shared[0][before] = ((cut[before] == value) & (cut[here] == value)).sum(axis=(1, 2))
        shared[1][:] += (mask[:, 1:] & mask[:, :-1]).sum(axis=(0, 2))
        shared[2][:] += (mask[:, :, 1:] & mask[:, :, :-1]).sum(axis=(0, 1))
    return projections, shared


def adjacent_overlap(area: Array, shared: Array, ends: int) -> float:
    """Compute the mean Dice of adjacent slices of which at least one contains the label.

    area: (T,) label voxels per slice; shared: (T - 1,) per pair of slices; ends: number of ends of the label (0 to 2) with an empty slice
    beyond. Such a pair counts with a Dice of 0, so a label that often disappears scores low.
    """
    held = area[1:] + area[:-1] > 0
    pairs = int(held.sum()) + ends
    return float(dice(shared[held], area[1:][held], area[:-1][held]).sum() / pairs) if pairs else 0.0
