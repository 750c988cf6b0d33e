"""From annotated slices to anchors: which slices, which labels, and structures thinner than a network pixel."""

import numpy as np
import pytest

from slmsam2_cli.dataset.prompts import Prompts
from slmsam2_cli.dataset.slices import View
from slmsam2_cli.inference.segment import annotated_slices_of
from slmsam2_cli.io.image import Grid


def view(box=((0, 6), (0, 32), (0, 32)), size=(32, 32)):
    grid = Grid((6, 32, 32), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    return View(grid, "SI", box, (box[0][1] - box[0][0], *size))


def prompts(labels, annotated):
    return Prompts(labels, annotated, ())


def drawn(slice_=2, value=1, rows=slice(8, 16)):
    labels = np.zeros((6, 32, 32), np.uint8)
    labels[slice_, rows, 8:16] = value
    return labels


def test_a_label_is_annotated_on_the_slice_of_its_mask():
    found = annotated_slices_of(prompts(drawn(), {1: (2,), 2: ()}), view(), [1, 2], 32)
    assert set(found) == {1}
    (anchor,) = found[1]
    assert anchor.slice == 2 and np.array_equal(anchor.mask.numpy(), drawn()[2] == 1)


def test_an_empty_annotated_slice_is_an_end_mark():
    stop, anchor = annotated_slices_of(prompts(drawn(), {1: (0, 2)}), view(), [1], 32)[1]
    assert (stop.slice, bool(stop.mask.any())) == (0, False)
    assert (anchor.slice, bool(anchor.mask.any())) == (2, True)


def test_a_slice_annotated_for_another_label_stops_passes_but_is_no_end_mark():
    labels = drawn() + drawn(slice_=4, value=2)
    first, second = annotated_slices_of(prompts(labels, {1: (0, 2, 4), 2: (0, 2, 4)}), view(), [1, 2], 32).values()
    assert [(anchor.slice, anchor.end) for anchor in first if not anchor.mask.any()] == [(0, True), (4, False)]
    assert [(anchor.slice, anchor.end) for anchor in second if not anchor.mask.any()] == [(0, True), (2, False)]


IGNORE = 9


@pytest.mark.parametrize(("ignored", "anchored"), [(slice(0, 1), [2]), (slice(0, 0), [2, 4])])
def test_a_slice_with_ignored_voxels_is_no_end_mark(ignored, anchored):
    labels = drawn()
    labels[4, ignored] = IGNORE
    found = annotated_slices_of(Prompts(labels, {1: (2, 4)}, (2, 4), IGNORE), view(), [1], 32)[1]
    assert [anchor.slice for anchor in found] == anchored


def test_a_partly_ignored_slice_with_the_label_counts_as_annotated():
    labels = drawn()
    labels[2, 20:] = IGNORE
    (anchor,) = annotated_slices_of(Prompts(labels, {1: (2,)}, (2,), IGNORE), view(), [1], 32)[1]
    assert anchor.slice == 2 and np.array_equal(anchor.mask.numpy(), labels[2] == 1)


@pytest.mark.parametrize("annotated", [(2, 3), (3, 2)])
def test_of_two_slices_merged_in_the_stack_the_one_with_the_label_counts(annotated):
    halved = View(view().grid, "SI", ((0, 6), (0, 32), (0, 32)), (3, 32, 32))
    for slice_ in annotated:
        (anchor,) = annotated_slices_of(prompts(drawn(slice_), {1: annotated}), halved, [1], 32)[1]
        assert anchor.slice == 1 and anchor.mask.any()


def test_a_label_with_end_marks_alone_has_no_annotated_slices():
    assert annotated_slices_of(prompts(drawn(), {2: (1, 2)}), view(), [2], 32) == {}


def test_slices_are_counted_from_the_crop():
    (anchor,) = annotated_slices_of(prompts(drawn(slice_=4), {1: (4,)}), view(box=((3, 6), (0, 32), (0, 32))), [1], 32)[1]
    assert anchor.slice == 1


def test_an_annotated_slice_outside_the_crop_is_left_out():
    assert annotated_slices_of(prompts(drawn(slice_=0), {1: (0,)}), view(box=((3, 6), (0, 32), (0, 32))), [1], 32) == {}


@pytest.mark.parametrize("row", range(8))
def test_a_line_one_voxel_thin_survives_a_fourfold_smaller_stack(row):
    (anchor,) = annotated_slices_of(prompts(drawn(rows=slice(row, row + 1)), {1: (2,)}), view(size=(8, 8)), [1], 32)[1]
    assert anchor.mask.any()


def test_slices_are_padded_at_the_bottom_and_right():
    (anchor,) = annotated_slices_of(prompts(drawn(), {1: (2,)}), view(), [1], 64)[1]
    assert anchor.mask.shape == (64, 64) and not anchor.mask[32:].any() and not anchor.mask[:, 32:].any()
