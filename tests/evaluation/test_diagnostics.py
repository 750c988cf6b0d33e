"""Mistakes behind a low score are named; good and merely bad masks are left in peace."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.evaluation.diagnostics import hints, may_have_hints
from slmsam2_cli.evaluation.metrics import dice


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


blocks = st.lists(st.tuples(st.integers(0, 3), *[st.tuples(st.integers(0, 5), st.integers(1, 6))] * 3), max_size=4)


@settings(max_examples=200)
@given(blocks, st.sampled_from(["exchanged", "mirrored", "other"]), blocks)
def test_where_the_labels_fit_no_hint_is_missed_by_not_looking(shapes, mistake, others):
    truth = painted(shapes)
    prediction = {"exchanged": np.array([0, 2, 1, 3], np.uint8)[truth], "mirrored": truth[:, ::-1], "other": painted(others)}[mistake]
    if hints(truth, prediction, [1, 2, 3]):
        assert may_have_hints(dice(truth == value, prediction == value) for value in (1, 2, 3))


def painted(shapes):
    labels = np.zeros((6, 6, 6), dtype=np.uint8)
    for value, *spans in shapes:
        labels[tuple(slice(start, start + length) for start, length in spans)] = value
    return labels
