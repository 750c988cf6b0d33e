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


def test_a_piece_that_touches_nothing_drawn_is_taken_away():
    labels, drawn = volume((1, 2, 0, 0), (1, 3, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(keep_connected(labels, drawn, [1]), volume((1, 2, 0, 0), (1, 3, 0, 0)))


def test_labels_that_may_be_in_several_pieces_stay():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(keep_connected(labels, drawn, []), labels)


def test_every_piece_that_somebody_drew_on_stays():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0), (1, 5, 6, 6))
    assert np.array_equal(keep_connected(labels, drawn, [1]), labels)


def test_where_no_piece_touches_the_drawing_all_stay():
    labels, drawn = volume((1, 0, 0, 0), (1, 5, 6, 6)), volume((1, 2, 3, 3))
    assert np.array_equal(keep_connected(labels, drawn, [1]), labels)


def test_up_to_two_empty_slices_part_nothing_and_three_do():
    near, far = volume((1, 0, 0, 0), (1, 3, 0, 0)), volume((1, 0, 0, 0), (1, 4, 0, 0))
    assert np.array_equal(keep_connected(near, volume((1, 0, 0, 0)), [1]), near)
    assert np.array_equal(keep_connected(far, volume((1, 0, 0, 0)), [1]), volume((1, 0, 0, 0)))
    assert np.array_equal(keep_connected(far.T, volume((1, 0, 0, 0)).T, [1], axis=2), volume((1, 0, 0, 0)).T)


def test_a_gap_counts_along_the_slices_alone():
    labels = volume((1, 2, 0, 0), (1, 2, 0, 4))
    assert np.array_equal(keep_connected(labels, volume((1, 2, 0, 0)), [1]), volume((1, 2, 0, 0)))


@given(arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)), arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)))
def test_nothing_is_added_and_other_labels_are_left_alone(labels, drawn):
    kept = keep_connected(labels, drawn, [1])
    assert np.array_equal(kept[kept != 0], labels[kept != 0])
    assert np.array_equal(kept == 2, labels == 2)
    assert (kept[(labels == 1) & (drawn == 1)] == 1).all()


@pytest.mark.parametrize(("apart", "expected"), [(0, True), (1, True), (20, False)])
def test_a_speck_apart_makes_no_second_piece(apart, expected):
    mask = np.zeros((4, 20, 20), bool)
    mask[:, :10, :10] = True  # 400 voxels, of which one percent may lie apart
    mask[0, 15, :apart] = True
    assert is_one_piece(mask) is expected


def test_an_empty_mask_is_one_piece_and_corners_connect():
    mask = np.zeros((2, 3, 3), bool)
    assert is_one_piece(mask)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert is_one_piece(mask)
