"""What hangs on nothing that was drawn goes; whatever a person drew stays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.inference.postprocess import is_one_piece, keep_connected


def volume(*boxes):
    labels = np.zeros((6, 8, 8), np.uint8)
    for value, z, y, x in boxes:
        labels[z, y : y + 2, x : x + 2] = value
    return labels


def test_a_component_that_touches_no_annotation_is_removed():
    labels, drawn = volume((1, 2, 0, 0), (1, 3, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(keep_connected(labels, drawn, [1]), volume((1, 2, 0, 0), (1, 3, 0, 0)))


def test_labels_with_several_components_in_training_are_left_alone():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(keep_connected(labels, drawn, []), labels)


def test_every_annotated_component_stays():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0), (1, 5, 6, 6))
    assert np.array_equal(keep_connected(labels, drawn, [1]), labels)


def test_where_no_component_touches_the_annotation_all_stay():
    labels, drawn = volume((1, 0, 0, 0), (1, 5, 6, 6)), volume((1, 2, 3, 3))
    assert np.array_equal(keep_connected(labels, drawn, [1]), labels)


def test_components_are_separated_by_three_empty_slices_and_not_by_two():
    near, far = volume((1, 0, 0, 0), (1, 3, 0, 0)), volume((1, 0, 0, 0), (1, 4, 0, 0))
    assert np.array_equal(keep_connected(near, volume((1, 0, 0, 0)), [1]), near)
    assert np.array_equal(keep_connected(far, volume((1, 0, 0, 0)), [1]), volume((1, 0, 0, 0)))
    assert np.array_equal(keep_connected(far.T, volume((1, 0, 0, 0)).T, [1], axis=2), volume((1, 0, 0, 0)).T)


def test_gaps_are_bridged_along_the_slice_axis_alone():
    labels = volume((1, 2, 0, 0), (1, 2, 0, 4))
    assert np.array_equal(keep_connected(labels, volume((1, 2, 0, 0)), [1]), volume((1, 2, 0, 0)))


@given(arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)), arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)))
def test_nothing_is_added_and_other_labels_do_not_change(labels, drawn):
    kept = keep_connected(labels, drawn, [1])
    assert np.array_equal(kept[kept != 0], labels[kept != 0])
    assert np.array_equal(kept == 2, labels == 2)
    assert (kept[(labels == 1) & (drawn == 1)] == 1).all()


@pytest.mark.parametrize(("apart", "expected"), [(0, True), (1, True), (20, False)])
def test_a_tiny_component_does_not_make_a_label_disconnected(apart, expected):
    mask = np.zeros((4, 20, 20), bool)
    mask[:, :10, :10] = True  # 400 voxels, of which one percent may lie apart
    mask[0, 15, :apart] = True
    assert is_one_piece(mask) is expected


def test_an_empty_mask_is_connected_and_corners_connect():
    mask = np.zeros((2, 3, 3), bool)
    assert is_one_piece(mask)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert is_one_piece(mask)
