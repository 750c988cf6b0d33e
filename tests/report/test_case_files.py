"""Reading a case back for looking at it: what is missing leaves a gap, and slices face the reader."""

from __future__ import annotations

import numpy as np
import pytest
from report.cases import LPS, block, grid, opened, saved

from slmsam2_cli.report.case_files import Sources, coarsest, grey, load_case, window_of

SAGITTAL = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])  # x runs back, y runs up, z runs left


def test_everything_that_can_be_read_is_there(tmp_path):
    mask, image = saved(tmp_path / "p.nii.gz", block()), saved(tmp_path / "i.nii.gz", block(value=9))
    found = load_case("a", Sources(mask, (image,), mask, tmp_path))
    assert found.truth.sum() == found.prediction.sum() == block().sum() and found.image.max() == 9
    assert (found.slice_count, found.slice_mm, found.axis, found.box) == (8, 3.0, 0, ((2, 6), (5, 15), (8, 20)))


def test_a_broken_file_leaves_a_gap_and_no_mask_at_all_leaves_nothing(tmp_path):
    mask, broken = saved(tmp_path / "p.nii.gz", block()), tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no volume")
    found = load_case("a", Sources(mask, (broken,), broken, tmp_path))
    assert found.prediction is not None and found.truth is None and found.image is None
    assert load_case("a", Sources(broken, (), tmp_path / "absent.nii.gz", tmp_path)) is None


def test_an_image_or_a_prediction_on_another_grid_is_not_shown(tmp_path):
    truth = saved(tmp_path / "t.nii.gz", block())
    far = saved(tmp_path / "far.nii.gz", block(), grid(origin=(50, 0, 0)))
    found = load_case("a", Sources(far, (far,), truth, tmp_path))
    assert found.truth is not None and found.prediction is None and found.image is None


def test_voxels_to_ignore_are_not_shown(tmp_path):
    truth = saved(tmp_path / "t.nii.gz", block() + block(z=(0, 1), value=9))
    assert np.unique(load_case("a", Sources(None, (), truth, tmp_path, ignore=9)).truth).tolist() == [0, 1]


def test_nothing_is_shown_as_predicted_where_nothing_is_scored(tmp_path):
    truth, mask = saved(tmp_path / "t.nii.gz", block(value=9)), saved(tmp_path / "p.nii.gz", block(x=(8, 22)))
    assert np.argwhere(load_case("a", Sources(mask, (), truth, tmp_path, ignore=9)).prediction).min(axis=0)[2] == 20


def test_a_prediction_that_was_resampled_is_shown_as_it_was_scored(tmp_path):
    truth, stored = block(), np.ascontiguousarray(block()[::-1])
    upside_down = grid(truth.shape, origin=(0, 0, 21), direction=np.diag([1.0, 1, -1]))
    files = saved(tmp_path / "p.nii.gz", stored, upside_down), (), saved(tmp_path / "t.nii.gz", truth), tmp_path
    assert load_case("a", Sources(*files)).prediction is None
    assert np.array_equal(load_case("a", Sources(*files, resample=True)).prediction, truth)


def corner(at):
    plane = np.zeros((4, 6), np.uint8)
    plane[at] = 1
    return plane


@pytest.mark.parametrize(
    ("direction", "axis", "stored", "shown"),
    [
        (LPS, 0, (0, 0), (0, 0)),  # axial, stored front to back and right to left: as it is
        (np.diag([-1.0, -1, 1]), 0, (0, 0), (-1, -1)),  # axial, stored back to front and left to right
        (LPS, 1, (-1, 0), (0, 0)),  # coronal, stored feet to head: the head is up
        (LPS, 2, (-1, 0), (0, 0)),  # sagittal, the same, the front on the left
        (SAGITTAL, 0, (-1, 0), (0, 0)),  # stored as sagittal slices
    ],
)
def test_the_head_or_the_front_is_up_and_the_left_or_the_back_on_the_right(direction, axis, stored, shown):
    case = opened(np.zeros((5, 6, 7), np.uint8), axis=axis, direction=direction)
    assert case.facing(corner(stored))[shown] == 1


def test_a_slice_stored_by_columns_is_turned_and_its_spacing_with_it():
    swapped = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])  # x runs back, y runs left
    case = opened(np.zeros((5, 4, 6), np.uint8), direction=swapped, spacing=(3, 2, 1))
    assert case.facing(corner((0, 0))).shape == (6, 4) and case.display_spacing_mm() == (1.0, 2.0)


@pytest.mark.parametrize(
    ("direction", "axis", "ends"),
    [
        (LPS, 0, ("feet", "head")),
        (np.diag([1.0, -1, -1]), 0, ("head", "feet")),
        (LPS, 1, ("front", "back")),
        (np.diag([-1.0, -1, 1]), 2, ("left", "right")),
    ],
)
def test_both_ends_of_the_slices_have_a_name_in_the_patient(direction, axis, ends):
    assert opened(np.zeros((5, 6, 7), np.uint8), axis=axis, direction=direction).ends() == ends


def test_the_slices_are_the_thickest_ones_when_nobody_says():
    assert (coarsest((1, 1, 1)), coarsest((1, 3, 1)), coarsest((1, 1, 5))) == (0, 1, 2)


def test_ct_is_shown_in_the_window_that_holds_the_structure():
    ct = np.array([-1000, 0, 40, 900])
    assert window_of(ct, np.array([50, 60])) == (-160, 240)
    assert window_of(ct, np.array([-800])) == (-1350, 150)
    assert window_of(ct, np.array([700])) == (-500, 1300)


def test_other_images_are_shown_from_their_own_percentiles_without_the_zeros_around():
    mr = np.concatenate([np.zeros(5000), np.arange(1, 1002)])
    assert window_of(mr, np.zeros(0)) == pytest.approx((6.0, 996.0))
    assert window_of(np.zeros(5), np.zeros(0)) == (0, 0) and window_of(np.full(5, 7.0), np.zeros(0)) == (7, 7)


def test_grey_values_are_clipped_to_the_window():
    assert grey(np.array([-5, 0, 50, 100, 300]), (0, 100)).tolist() == [0, 0, 128, 255, 255]
    assert grey(np.array([1, 2]), (3, 3)).tolist() == [0, 0]
