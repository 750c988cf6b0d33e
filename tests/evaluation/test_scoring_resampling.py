"""Resampling a mask to another grid: every position keeps its label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.evaluation.scoring import onto
from slmsam2_cli.io.image import Grid

GRID = Grid((4, 6, 8), (3.0, 1.0, 1.0), (-5.0, 2.0, 10.0), np.eye(3))


def block():
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    labels[1:3, 2:4, 3:6] = 2
    return labels


def test_resampling_to_the_same_grid_changes_nothing():
    moved, outside = onto(GRID, block(), GRID)
    assert np.array_equal(moved, block())
    assert outside == 0


def test_a_mask_stored_in_reverse_slice_order_is_reversed():
    flipped = replace(GRID, origin_mm=(-5.0, 2.0, 10.0 + 3 * 3.0), direction=np.diag([1.0, 1.0, -1.0]))
    moved, _ = onto(GRID, block()[::-1], flipped)
    assert np.array_equal(moved, block())


def test_slices_of_twice_the_thickness_become_two_equal_slices():
    coarse = Grid((2, 6, 8), (6.0, 1.0, 1.0), (-5.0, 2.0, 10.0 + 1.5), np.eye(3))
    labels = np.zeros(coarse.shape, dtype=np.uint8)
    labels[1, 2, 3] = 1
    moved, _ = onto(GRID, labels, coarse)
    assert np.argwhere(moved).tolist() == [[2, 2, 3], [3, 2, 3]]


@given(st.integers(-3, 3), st.integers(-5, 5), st.integers(-7, 7))
def test_voxels_outside_the_grid_are_counted_and_the_others_kept(z, y, x):
    shifted = replace(GRID, origin_mm=(-5.0 + x, 2.0 + y, 10.0 + 3 * z))
    moved, outside = onto(GRID, np.ones(GRID.shape, dtype=np.uint8), shifted)
    kept = (4 - abs(z)) * (6 - abs(y)) * (8 - abs(x))
    assert np.count_nonzero(moved) == kept
    assert outside == 4 * 6 * 8 - kept
