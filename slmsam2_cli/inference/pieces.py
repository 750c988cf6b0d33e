"""Pieces of a mask that hang on nothing anybody drew: false, where the structure is known to be one piece."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.ndimage import label


def attached(labels: np.ndarray, drawn: np.ndarray, values: Iterable[int]) -> np.ndarray:
    """Labels (Z, Y, X) without pieces that touch nothing drawn (Z, Y, X) of the same value; a copy.

    values: the labels that are one piece. Corners connect. Where no piece touches what was drawn, all stay.
    """
    kept = labels.copy()
    for value in values:
        mask = labels == value
        pieces, count = label(mask, structure=np.ones((3, 3, 3)))
        touched = np.unique(pieces[(drawn == value) & mask])
        if count > 1 and len(touched):
            kept[mask & ~np.isin(pieces, touched)] = 0
    return kept
