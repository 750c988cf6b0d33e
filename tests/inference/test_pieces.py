"""What hangs on nothing that was drawn goes; whatever a person drew stays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.inference.pieces import attached


def volume(*boxes):
    labels = np.zeros((6, 8, 8), np.uint8)
    for value, z, y, x in boxes:
        labels[z, y : y + 2, x : x + 2] = value
    return labels


def test_a_piece_that_touches_nothing_drawn_is_taken_away():
    labels, drawn = volume((1, 2, 0, 0), (1, 3, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(attached(labels, drawn, [1]), volume((1, 2, 0, 0), (1, 3, 0, 0)))


def test_labels_that_may_be_in_several_pieces_stay():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0))
    assert np.array_equal(attached(labels, drawn, []), labels)


def test_every_piece_that_somebody_drew_on_stays():
    labels, drawn = volume((1, 2, 0, 0), (1, 5, 6, 6)), volume((1, 2, 0, 0), (1, 5, 6, 6))
    assert np.array_equal(attached(labels, drawn, [1]), labels)


def test_where_no_piece_touches_the_drawing_all_stay():
    labels, drawn = volume((1, 0, 0, 0), (1, 5, 6, 6)), volume((1, 2, 3, 3))
    assert np.array_equal(attached(labels, drawn, [1]), labels)


@given(arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)), arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 2)))
def test_nothing_is_added_and_other_labels_are_left_alone(labels, drawn):
    kept = attached(labels, drawn, [1])
    assert np.array_equal(kept[kept != 0], labels[kept != 0])
    assert np.array_equal(kept == 2, labels == 2)
    assert (kept[(labels == 1) & (drawn == 1)] == 1).all()
