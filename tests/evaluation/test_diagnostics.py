"""Hints name mistakes that explain a low score, and only these."""

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


def test_a_correct_mask_gets_no_hint():
    assert hints(two_blocks(), two_blocks(), [1, 2]) == []


def test_exchanged_labels_are_named():
    swapped = np.array([0, 2, 1], dtype=np.uint8)[two_blocks()]
    (line,) = hints(two_blocks(), swapped, [1, 2])
    assert line.startswith("labels 1 and 2 appear to be exchanged: Dice of 1 against the predicted 2 is 1.00")


def test_masks_of_0_and_255_and_labels_in_another_order_are_named():
    reference = (two_blocks() == 1).astype(np.uint8)
    assert hints(reference, 255 * reference, [1]) == ["label 255 of the mask overlaps label 1 of the reference with Dice 1.000"]
    three = two_blocks()
    three[4:6, 1:5, 1:5] = 3
    lines = hints(three, np.array([0, 2, 3, 1], dtype=np.uint8)[three], [1, 2, 3])
    assert lines == [f"label {b} of the mask overlaps label {a} of the reference with Dice 1.000" for a, b in ((1, 2), (2, 3), (3, 1))]


def test_a_mirrored_mask_is_named_with_its_axis():
    (line,) = hints(two_blocks(), two_blocks()[::-1], [1, 2])
    assert line.startswith("the prediction appears to be mirrored along z")


def test_an_empty_mask_gets_no_hint():
    assert hints(two_blocks(), np.zeros_like(two_blocks()), [1, 2]) == []
    assert hints(np.zeros_like(two_blocks()), two_blocks(), [1, 2]) == []


def test_a_mask_of_something_else_gets_no_hint():
    elsewhere = np.zeros_like(two_blocks())
    elsewhere[3, 0, 0:3] = 1
    assert hints(two_blocks(), elsewhere, [1, 2]) == []


def test_values_that_are_not_compared_are_ignored():
    other = two_blocks()
    other[5] = 200
    assert hints(two_blocks(), other, [1, 2]) == []


@settings(max_examples=50)
@given(arrays(np.uint8, (3, 5, 5), elements=st.integers(0, 3)))
def test_no_mask_gets_a_hint_when_compared_with_itself(labels):
    assert hints(labels, labels, [1, 2, 3]) == []


blocks = st.lists(st.tuples(st.integers(0, 3), *[st.tuples(st.integers(0, 5), st.integers(1, 6))] * 3), max_size=4)


@settings(max_examples=200)
@given(blocks, st.sampled_from(["exchanged", "mirrored", "other"]), blocks)
def test_every_hint_is_among_those_that_the_dice_of_the_labels_allows(shapes, mistake, others):
    reference = draw(shapes)
    prediction = {"exchanged": np.array([0, 2, 1, 3], np.uint8)[reference], "mirrored": reference[:, ::-1], "other": draw(others)}[mistake]
    if hints(reference, prediction, [1, 2, 3]):
        assert may_have_hints(dice(reference == value, prediction == value) for value in (1, 2, 3))


def draw(shapes):
    labels = np.zeros((6, 6, 6), dtype=np.uint8)
    for value, *spans in shapes:
        labels[tuple(slice(start, start + length) for start, length in spans)] = value
    return labels
