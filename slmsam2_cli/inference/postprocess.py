"""Remove connected components of a mask that touch no annotation, for structures that are known to be connected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation
from skimage import measure as untyped_measure

from slmsam2_cli.dataset.mask_measures import bounding_box

Array = np.ndarray[Any, Any]
measure: Any = untyped_measure
MIN_FRACTION = 0.99  # of a structure's voxels in one component, for the structure to count as connected
GAP = 2  # empty slices between two components that still count as connected


def is_one_piece(mask: Array) -> bool:
    """Return whether nearly all of a mask (T, H, W) is connected, corners included; True for an empty mask."""
    box = bounding_box(mask)
    if box is None:
        return True
    sizes = np.bincount(measure.label(mask[tuple(slice(*span) for span in box)], connectivity=3).ravel())[1:]
    return bool(sizes.max() >= MIN_FRACTION * sizes.sum())


def keep_connected(labels: Array, annotated: Array, values: Iterable[int], axis: int = 0) -> Array:
    """Copy labels (Z, Y, X) without components that touch no annotated voxel (Z, Y, X) of their value.

    values: the labels that are connected. Corners connect, and so do up to GAP empty slices along `axis`, where propagation may have
    missed the structure. Where no component touches the annotation, all stay.
    """
    kept = labels.copy()
    reach = -(-GAP // 2)
    line = np.ones([2 * reach + 1 if one == axis else 1 for one in range(3)], bool)  # closes a gap when both sides grow by it
    margin = [(GAP, GAP) if one == axis else (0, 0) for one in range(3)]
    for value in values:
        extent = bounding_box(labels == value)
        if extent is None:
            continue
        box = tuple(slice(*span) for span in extent)
        part, given = labels[box] == value, annotated[box] == value
        inner = tuple(slice(GAP, GAP + part.shape[axis]) if one == axis else slice(None) for one in range(3))
        components = np.where(part, measure.label(binary_dilation(np.pad(part, margin), line), connectivity=3)[inner], 0)
        touched = np.unique(components[given & part])
        if len(touched):
            kept[box][part & ~np.isin(components, touched)] = 0
    return kept
