"""Measurements of a label are what one counts on its slices."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.dataset.slices import Orientation
from slmsam2_cli.planning import label_stats
from slmsam2_cli.planning.label_stats import bounding_box_of_planes, measure_labels, plane_chunks

STRAIGHT = Orientation((0, 1, 2), (False, False, False))
ALL = [Orientation(order, flipped) for order in permutations(range(3)) for flipped in product([False, True], repeat=3)]


def measured(mask, slices=None):
    """Measure a mask in a volume with empty slices beyond it along the first axis."""
    volume = np.zeros((slices or len(mask), *mask.shape[1:]), np.uint8)
    volume[: len(mask)] = mask
    return measure_labels(volume, [1], STRAIGHT)[1]


def test_the_end_of_the_volume_does_not_count_as_an_end_of_the_label():
    assert measured(np.ones((3, 2, 2))).overlap["SI"] == 1
    assert measured(np.ones((3, 2, 2)), slices=4).overlap["SI"] == pytest.approx(2 / 3, abs=1e-6)


def test_a_gap_counts_as_two_ends_of_the_label():
    assert measured(np.array([1, 1, 0, 1]).reshape(4, 1, 1)).overlap["SI"] == pytest.approx(1 / 3, abs=1e-6)


def test_a_slice_that_shrinks_to_half_overlaps_by_two_thirds():
    assert measured(np.array([[[1, 1]], [[1, 0]]])).overlap["SI"] == pytest.approx(2 / 3, abs=1e-6)  # 2 * 1 / (2 + 1)


def test_copying_the_middle_slice_scores_the_dice_of_the_copies():
    assert measured(np.ones((2, 3, 3))).copied["SI"] == 1
    assert measured(np.ones((2, 3, 3)), slices=6).copied["SI"] == 0.5  # 2 * 18 / (18 + 54)


@pytest.mark.parametrize(("held", "gap"), [("1", 0), ("0110", 0), ("101", 1), ("0100101000", 2), ("1000011", 4)])
def test_the_gap_is_the_longest_run_of_slices_without_the_label(held, gap):
    mask = np.array([int(one) for one in held]).reshape(-1, 1, 1)
    assert measured(mask).extents["SI"].gap == gap


def test_borders_are_voxel_faces_towards_other_voxels_or_the_end_of_the_volume():
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


def test_the_bounding_box_holds_all_voxels():
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3] = labels[3, 2, 6] = 1
    assert bounding_box_of_planes(labels.shape, lambda planes: labels[planes] == 1) == ((1, 4), (2, 3), (3, 7))
    assert bounding_box_of_planes(labels.shape, lambda planes: labels[planes] == 2) is None


def test_chunks_contain_every_plane_once():
    for shape in ((5, 3, 3), (3, 400, 400), (7, 200, 300)):
        assert [z for planes in plane_chunks(shape) for z in range(shape[0])[planes]] == list(range(shape[0]))


@given(arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)), st.sampled_from(ALL))
def test_measurements_do_not_depend_on_the_stored_orientation(stored, orientation):
    turned = np.ascontiguousarray(orientation.apply(stored))
    assert measure_labels(stored, [1, 2], orientation) == measure_labels(turned, [1, 2], STRAIGHT)


@given(arrays(np.uint8, (4, 3, 5), elements=st.integers(0, 2)))
def test_measurements_do_not_depend_on_the_number_of_planes_per_chunk(labels):
    at_once = measure_labels(labels, [1, 2], STRAIGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_stats, "CHUNK_VALUES", 1)
        assert measure_labels(labels, [1, 2], STRAIGHT) == at_once
