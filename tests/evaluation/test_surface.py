"""Nearest distances equal those of an exhaustive search, whichever way they were found."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slmsam2_cli.evaluation import surface
from slmsam2_cli.evaluation.surface import nearest_mm

WAYS = {
    "as it is": {"FEW": surface.FEW},
    "all at one distance": {"FEW": 0},
    "many neighbours in one step": {"FEW": 10**9, "LOOKUPS": 10**4},
    "few neighbours, then the tree": {"NEIGHBOURS": 7},
    "the tree alone": {"TREE_BUILD_COST": 0, "TREE_QUERY_COST": 0},
}
SPACINGS = ((1.0, 1.0, 1.0), (2.5, 0.8, 0.8), (0.5, 3.0, 1.25), (100.0, 0.1, 0.1), (1e3, 1e3, 1e-3))


@st.composite
def pairs(draw):
    """Two masks (z, y, x) of one shape, neither empty; flat ones included."""
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3))
    masks = [draw(hnp.arrays(bool, shape)) for _ in range(2)]
    for mask in masks:
        mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return masks


def found(mask, other, spacing_mm, **changed):
    surface._neighbour_offsets.cache_clear()
    with mock.patch.multiple(surface, **(changed or WAYS["as it is"])):
        distances = nearest_mm(np.flatnonzero(mask), other, np.flatnonzero(other), spacing_mm)
    surface._neighbour_offsets.cache_clear()
    return distances


def by_comparing_all(mask, other, spacing_mm):
    points, others = (np.argwhere(m) * np.asarray(spacing_mm) for m in (mask, other))
    return np.linalg.norm(points[:, np.newaxis] - others[np.newaxis], axis=2).min(axis=1)


def assert_exact(mask, other, spacing_mm, **changed):
    np.testing.assert_allclose(found(mask, other, spacing_mm, **changed), by_comparing_all(mask, other, spacing_mm), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@given(masks=pairs(), spacing_mm=st.sampled_from(SPACINGS))
def test_every_way_finds_the_nearest_of_random_voxels(way, masks, spacing_mm):
    assert_exact(*masks, spacing_mm, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize("shape", [(30, 6, 6), (1, 40, 40), (1, 1, 60)])
def test_every_way_finds_single_voxels_in_opposite_corners(way, spacing_mm, shape):
    one, other = np.zeros(shape, bool), np.zeros(shape, bool)
    one[0, 0, 0] = other[-1, -1, -1] = True
    assert_exact(one, other, spacing_mm, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_finds_sets_that_lie_far_apart_or_fill_the_array(way):
    near, far, full = np.zeros((4, 6, 300), bool), np.zeros((4, 6, 300), bool), np.ones((4, 6, 300), bool)
    near[:, :, :3] = far[1:3, ::2, -2:] = True
    for mask, other in ((near, far), (far, near), (full, near), (near, full), (full, full)):
        assert_exact(mask, other, (2.5, 0.8, 0.8), **WAYS[way])


def test_the_distance_of_a_voxel_in_both_sets_is_zero():
    mask = np.ones((3, 3, 3), bool)
    assert found(mask, mask, (1.0, 1.0, 1.0)).tolist() == [0.0] * 27


def test_an_array_of_one_voxel_has_no_neighbours():
    assert found(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool), (1.0, 1.0, 1.0)).tolist() == [0.0]


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_neighbours_are_sorted_by_distance_without_gaps(spacing_mm):
    offsets, lengths = surface._neighbour_offsets((False, False, False), spacing_mm)
    assert np.all(np.diff(lengths) >= 0) and 0 < len(offsets) <= surface.NEIGHBOURS
    reach = [int(lengths[-1] / s) + 1 for s in spacing_mm]
    inside = sum(  # every offset that is shorter than the last
        int(
            np.count_nonzero((z * spacing_mm[0]) ** 2 + (y * spacing_mm[1]) ** 2 + (x * spacing_mm[2]) ** 2 < lengths[-1] ** 2 * (1 - 1e-9))
        )
        for z in range(-reach[0], reach[0] + 1)
        for y in range(-reach[1], reach[1] + 1)
        for x in [np.arange(-reach[2], reach[2] + 1)]
    )
    assert np.count_nonzero(lengths < lengths[-1] * (1 - 1e-9)) == inside - 1  # the voxel itself is no neighbour
