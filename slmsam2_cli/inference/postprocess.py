"""Pieces of a mask that hang on nothing anybody drew: false, where the structure is known to be one piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, label

Array = np.ndarray[Any, Any]
MIN_FRACTION = 0.99  # of a structure's voxels lie in one piece, where it is one
GAP = 2  # slices without the structure that do not part two pieces
_CORNERS = np.ones((3, 3, 3))


def is_one_piece(mask: Array) -> bool:
    """Whether nearly all of a mask (T, H, W) is connected, corners included; an empty one is."""
    if not mask.any():
        return True
    sizes = np.bincount(label(mask[_box(mask)], structure=_CORNERS)[0].ravel())[1:]
    return bool(sizes.max() >= MIN_FRACTION * sizes.sum())


def keep_connected(labels: Array, drawn: Array, values: Iterable[int], axis: int = 0) -> Array:
    """Labels (Z, Y, X) without pieces that touch nothing drawn (Z, Y, X) of the same value; a copy.

    values: the labels that are one piece. Corners connect, and so do up to GAP empty slices along `axis`, on which a mask may have been
    missed. Where no piece touches what was drawn, all stay.
    """
    kept = labels.copy()
    for value in values:
        mask = labels == value
        if not mask.any():
            continue
        box = _box(mask)
        part, given = mask[box], drawn[box] == value
        bridged = binary_dilation(np.pad(part, _along(axis, GAP)), _bridge(axis))
        pieces = np.where(part, label(bridged, structure=_CORNERS)[0][_inner(axis, part.shape[axis])], 0)
        touched = np.unique(pieces[given & part])
        if len(touched):
            kept[box][part & ~np.isin(pieces, touched)] = 0
    return kept


def _box(mask: Array) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty."""
    found = []
    for axis in range(mask.ndim):
        held = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        found.append(slice(int(held[0]), int(held[-1]) + 1))
    return tuple(found)


def _along(axis: int, count: int) -> list[tuple[int, int]]:
    return [(count, count) if one == axis else (0, 0) for one in range(3)]


def _inner(axis: int, count: int) -> tuple[slice, ...]:
    return tuple(slice(GAP, GAP + count) if one == axis else slice(None) for one in range(3))


def _bridge(axis: int) -> Array:
    """A line along the axis that closes a gap of GAP slices when both sides grow by it."""
    reach = -(-GAP // 2)
    return np.ones([2 * reach + 1 if one == axis else 1 for one in range(3)], bool)
