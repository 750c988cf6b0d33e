"""Two measures of binary masks that the whole package shares: Dice and the bounding box.

`dice` takes counts, so that it serves Python numbers, numpy arrays and torch tensors alike.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Count = TypeVar("Count")


def dice(shared: Count, first: Count, second: Count) -> Any:
    """Compute Dice, 2 |A and B| / (|A| + |B|), from the voxels that two masks share and those that each holds.

    The counts are numbers, arrays or tensors of one shape. Two empty masks have no Dice: the caller says what holds for them.
    """
    return 2 * shared / (first + second)  # type: ignore[operator]


def bounding_box(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], ...] | None:
    """Find the half-open range (start, stop) of every axis that holds all of a mask of any shape; None for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        (held,) = np.nonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not held.size:
            return None
        box.append((int(held[0]), int(held[-1]) + 1))
    return tuple(box)
