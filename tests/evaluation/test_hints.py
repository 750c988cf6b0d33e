"""Mistakes behind a low score are named; good and merely bad masks are left in peace."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.evaluation.hints import hints


def two_blocks():
    labels = np.zeros((6, 12, 12), dtype=np.uint8)
    labels[1:3, 2:5, 2:5] = 1
    labels[1:3, 6:11, 6:9] = 2
    return labels


def test_a_right_mask_needs_no_hint():
    assert hints(two_blocks(), two_blocks(), [1, 2]) == []


def test_exchanged_labels_are_named_with_both_values():
    swapped = np.array([0, 2, 1], dtype=np.uint8)[two_blocks()]
    (line,) = hints(two_blocks(), swapped, [1, 2])
    assert line.startswith("labels 1 and 2 look exchanged: Dice of 1 against the predicted 2 is 1.00")


def test_a_mask_turned_over_is_named_with_its_axis():
    (line,) = hints(two_blocks(), two_blocks()[::-1], [1, 2])
    assert line.startswith("the prediction looks mirrored along z")


def test_an_empty_mask_is_no_mirror_image():
    assert hints(two_blocks(), np.zeros_like(two_blocks()), [1, 2]) == []
    assert hints(np.zeros_like(two_blocks()), two_blocks(), [1, 2]) == []


def test_a_mask_of_something_else_gets_no_hint():
    elsewhere = np.zeros_like(two_blocks())
    elsewhere[3, 0, 0:3] = 1
    assert hints(two_blocks(), elsewhere, [1, 2]) == []


def test_values_nobody_asked_about_are_no_obstacle():
    other = two_blocks()
    other[5] = 200
    assert hints(two_blocks(), other, [1, 2]) == []


@settings(max_examples=50)
@given(arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 3)))
def test_no_mask_gets_a_hint_against_itself(labels):
    assert hints(labels, labels, [1, 2, 3]) == []
