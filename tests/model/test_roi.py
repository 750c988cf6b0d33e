"""Squares of slices: where they lie, what is cut from them, and that nothing is lost on the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.model.roi import MIN_EDGE, RoiCrop, around, box_of

PX = 96


def mask(top, left, bottom, right, px=PX):
    drawn = torch.zeros(px, px, dtype=torch.bool)
    drawn[top:bottom, left:right] = True
    return drawn


boxes = st.tuples(*[st.integers(0, PX - 1)] * 4).map(lambda e: (min(e[0], e[2]), min(e[1], e[3]), max(e[0], e[2]) + 1, max(e[1], e[3]) + 1))


@pytest.mark.parametrize(
    ("box", "times", "square"),
    [
        ((40, 40, 60, 60), 2.0, RoiCrop(30, 30, 40)),
        ((40, 45, 60, 55), 2.0, RoiCrop(30, 30, 40)),  # by the longer side
        ((0, 40, 20, 60), 2.0, RoiCrop(0, 30, 40)),  # moved down, so as to lie in the slice
        ((76, 76, 96, 96), 2.0, RoiCrop(56, 56, 40)),
        ((50, 50, 51, 51), 2.0, RoiCrop(42, 42, MIN_EDGE)),  # a dot still has surroundings
        ((0, 0, 96, 90), 2.0, RoiCrop(0, 0, 96)),  # no larger than the slice
    ],
)
def test_a_square_is_so_many_times_as_wide_as_what_it_is_about(box, times, square):
    assert around(box, times, PX) == square


@given(boxes, st.floats(1.1, 6.0))
def test_a_square_lies_in_the_slice_and_holds_what_it_is_about(box, times):
    square, (top, left, bottom, right) = around(box, times, PX), box
    assert 0 <= square.row <= top and 0 <= square.column <= left
    assert bottom <= square.row + square.edge <= PX and right <= square.column + square.edge <= PX


@given(boxes)
def test_the_box_of_a_rectangle_is_the_rectangle(box):
    assert box_of([mask(*box)]) == box


def test_several_masks_have_one_box():
    assert box_of([mask(10, 20, 30, 40), mask(0, 0, 0, 0), mask(5, 30, 20, 60)]) == (5, 20, 30, 60)


def test_a_square_as_large_as_the_frame_is_cut_and_not_resampled():
    slices = torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    square = RoiCrop(10, 20, 32)
    assert torch.equal(square.cut(slices, 32), slices[:, :, 10:42, 20:52])
    assert torch.equal(square.crop_masks(mask(12, 22, 20, 30), 32), mask(2, 2, 10, 10, 32))


@given(boxes, st.floats(1.1, 4.0))
def test_no_mask_is_lost_in_its_square_however_thin(box, times):
    square = around(box, times, PX)
    assert square.crop_masks(mask(*box), 32).any() and square.crop_masks(mask(*box), 128).any()


@given(boxes, st.floats(1.5, 4.0))
def test_a_mask_comes_back_to_where_it_was_cut_from(box, times):
    square = around(box, times, PX)
    drawn = mask(*box)
    back = square.paste(square.crop_masks(drawn, 4 * square.edge).float() * 2 - 1, PX, -20.0) > 0
    assert torch.equal(back, drawn)


def test_around_the_square_nothing_is_said_to_be_there():
    pasted = RoiCrop(32, 32, 32).paste(torch.ones(2, 8, 8), PX, -20.0)
    assert pasted.shape == (2, PX, PX)
    assert (pasted[:, 32:64, 32:64] == 1).all() and (pasted[:, :32] == -20).all() and (pasted[:, :, 64:] == -20).all()
