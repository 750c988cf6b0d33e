"""ROI crops: their place, cropping, and pasting back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.model.roi import MIN_EDGE, RoiCrop, mask_box, roi_around

PX = 96


def mask(top, left, bottom, right, px=PX):
    drawn = torch.zeros(px, px, dtype=torch.bool)
    drawn[top:bottom, left:right] = True
    return drawn


boxes = st.tuples(*[st.integers(0, PX - 1)] * 4).map(lambda e: (min(e[0], e[2]), min(e[1], e[3]), max(e[0], e[2]) + 1, max(e[1], e[3]) + 1))


@pytest.mark.parametrize(
    ("box", "times", "roi"),
    [
        ((40, 40, 60, 60), 2.0, RoiCrop(30, 30, 40)),
        ((40, 45, 60, 55), 2.0, RoiCrop(30, 30, 40)),  # by the longer side
        ((0, 40, 20, 60), 2.0, RoiCrop(0, 30, 40)),  # moved down to lie in the slice
        ((76, 76, 96, 96), 2.0, RoiCrop(56, 56, 40)),
        ((50, 50, 51, 51), 2.0, RoiCrop(42, 42, MIN_EDGE)),  # not smaller than MIN_EDGE
        ((0, 0, 96, 90), 2.0, RoiCrop(0, 0, 96)),  # no larger than the slice
    ],
)
def test_a_crop_is_scale_times_as_wide_as_the_box(box, times, roi):
    assert roi_around(box, times, PX) == roi


@given(boxes, st.floats(1.1, 6.0))
def test_a_crop_lies_in_the_slice_and_contains_the_box(box, times):
    roi, (top, left, bottom, right) = roi_around(box, times, PX), box
    assert 0 <= roi.row <= top and 0 <= roi.column <= left
    assert bottom <= roi.row + roi.edge <= PX and right <= roi.column + roi.edge <= PX


@given(boxes)
def test_the_box_of_a_rectangular_mask_is_the_rectangle(box):
    assert mask_box([mask(*box)]) == box


def test_several_masks_have_one_box():
    assert mask_box([mask(10, 20, 30, 40), mask(0, 0, 0, 0), mask(5, 30, 20, 60)]) == (5, 20, 30, 60)


def test_a_crop_of_the_input_size_is_not_resampled():
    slices = torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    roi = RoiCrop(10, 20, 32)
    assert torch.equal(roi.crop(slices, 32), slices[:, :, 10:42, 20:52])
    assert torch.equal(roi.crop_masks(mask(12, 22, 20, 30), 32), mask(2, 2, 10, 10, 32))


@given(boxes, st.floats(1.1, 4.0))
def test_a_cropped_mask_is_never_empty(box, times):
    roi = roi_around(box, times, PX)
    assert roi.crop_masks(mask(*box), 32).any() and roi.crop_masks(mask(*box), 128).any()


@given(boxes, st.floats(1.5, 4.0))
def test_a_mask_that_is_cropped_and_pasted_is_the_same(box, times):
    roi = roi_around(box, times, PX)
    drawn = mask(*box)
    back = roi.paste(roi.crop_masks(drawn, 4 * roi.edge).float() * 2 - 1, PX, -20.0) > 0
    assert torch.equal(back, drawn)


def test_outside_the_crop_pasted_logits_are_absent():
    pasted = RoiCrop(32, 32, 32).paste(torch.ones(2, 8, 8), PX, -20.0)
    assert pasted.shape == (2, PX, PX)
    assert (pasted[:, 32:64, 32:64] == 1).all() and (pasted[:, :32] == -20).all() and (pasted[:, :, 64:] == -20).all()
