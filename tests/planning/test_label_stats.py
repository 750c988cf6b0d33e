"""What is measured of a label is what a person would count on its slices."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.dataset.slices import Orientation
from slmsam2_cli.planning import label_stats
from slmsam2_cli.planning.label_stats import box_of, measure_labels, runs

STRAIGHT = Orientation((0, 1, 2), (False, False, False))
ALL = [Orientation(order, flipped) for order in permutations(range(3)) for flipped in product([False, True], repeat=3)]


def measured(mask, slices=None):
    """The mask's own measurements, in a volume with room for more slices along the first axis."""
    volume = np.zeros((slices or len(mask), *mask.shape[1:]), np.uint8)
    volume[: len(mask)] = mask
    return measure_labels(volume, [1], STRAIGHT)[1]


def test_a_label_at_the_border_does_not_vanish_there():
    assert measured(np.ones((3, 2, 2))).overlap["SI"] == 1
    assert measured(np.ones((3, 2, 2)), slices=4).overlap["SI"] == pytest.approx(2 / 3, abs=1e-6)


def test_a_gap_counts_as_vanishing_twice():
    assert measured(np.array([1, 1, 0, 1]).reshape(4, 1, 1)).overlap["SI"] == pytest.approx(1 / 3, abs=1e-6)


def test_half_of_a_slice_that_goes_on_overlaps_by_two_thirds():
    assert measured(np.array([[[1, 1]], [[1, 0]]])).overlap["SI"] == pytest.approx(2 / 3, abs=1e-6)  # 2 * 1 / (2 + 1)


def test_copying_the_middle_slice_scores_what_it_covers():
    assert measured(np.ones((2, 3, 3))).copied["SI"] == 1
    assert measured(np.ones((2, 3, 3)), slices=6).copied["SI"] == 0.5  # 2 * 18 / (18 + 54)


@pytest.mark.parametrize(("held", "gap"), [("1", 0), ("0110", 0), ("101", 1), ("0100101000", 2), ("1000011", 4)])
def test_the_longest_gap_is_the_most_slices_in_a_row_without_the_label(held, gap):
    mask = np.array([int(one) for one in held]).reshape(-1, 1, 1)
    assert measured(mask).extents["SI"].gap == gap


def test_borders_are_the_faces_towards_something_else_or_the_rim():
    assert measured(np.ones((2, 3, 4))).borders == {"SI": 2 * 12, "AP": 2 * 8, "LR": 2 * 6}
    assert measured(np.array([1, 1, 0, 1]).reshape(4, 1, 1)).borders == {"SI": 4, "AP": 6, "LR": 6}


def test_an_empty_mask_has_no_measurements():
    assert measure_labels(np.zeros((2, 3, 4), np.uint8), [1], STRAIGHT) == {}


def test_a_single_slice_has_no_overlap_across_slices():
    found = measured(np.ones((1, 3, 4)))
    assert set(found.overlap) == set(found.copied) == {"AP", "LR"}


def test_each_label_is_measured_by_itself():
    labels = np.array([1, 1, 2, 700], np.uint16).reshape(4, 1, 1)
    assert {value: found.voxels for value, found in measure_labels(labels, [1, 2, 3, 700], STRAIGHT).items()} == {1: 2, 2: 1, 700: 1}


def test_a_box_holds_all_that_is_found():
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3] = labels[3, 2, 6] = 1
    assert box_of(labels.shape, lambda planes: labels[planes] == 1) == ((1, 4), (2, 3), (3, 7))
    assert box_of(labels.shape, lambda planes: labels[planes] == 2) is None


def test_every_plane_is_looked_at_once_however_large_it_is():
    for shape in ((5, 3, 3), (3, 400, 400), (7, 200, 300)):
        assert [z for planes in runs(shape) for z in range(shape[0])[planes]] == list(range(shape[0]))


@given(arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)), st.sampled_from(ALL))
def test_the_way_a_mask_is_stored_changes_nothing(stored, orientation):
    turned = np.ascontiguousarray(orientation.apply(stored))
    assert measure_labels(stored, [1, 2], orientation) == measure_labels(turned, [1, 2], STRAIGHT)


@given(arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)))
def test_the_number_of_planes_looked_at_at_a_time_changes_nothing(labels):
    at_once = measure_labels(labels, [1, 2], STRAIGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_stats, "PIECE", 1)
        assert measure_labels(labels, [1, 2], STRAIGHT) == at_once
