"""Loading a case for its report: unreadable files are left out, and slices are turned as radiologists view them."""

from __future__ import annotations

import numpy as np
import pytest
from report.cases import LPS, block, grid, loaded_case, saved

from slmsam2_cli.report.case_files import CaseFiles, apply_window, choose_window, load_case

SAGITTAL = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])  # x runs back, y runs up, z runs left


def test_masks_image_and_geometry_are_loaded(tmp_path):
    mask, image = saved(tmp_path / "p.nii.gz", block()), saved(tmp_path / "i.nii.gz", block(value=9))
    found = load_case("a", CaseFiles(mask, (image,), mask, tmp_path))
    assert found.reference.sum() == found.prediction.sum() == block().sum() and found.image.max() == 9
    assert (found.slice_count, found.slice_mm, found.axis, found.box) == (8, 3.0, 0, ((2, 6), (5, 15), (8, 20)))


def test_unreadable_files_are_left_out_and_without_any_mask_there_is_no_case(tmp_path):
    mask, broken = saved(tmp_path / "p.nii.gz", block()), tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no volume")
    found = load_case("a", CaseFiles(mask, (broken,), broken, tmp_path))
    assert found.prediction is not None and found.reference is None and found.image is None
    assert load_case("a", CaseFiles(broken, (), tmp_path / "absent.nii.gz", tmp_path)) is None


def test_an_image_or_a_prediction_on_another_grid_is_not_shown(tmp_path):
    truth = saved(tmp_path / "t.nii.gz", block())
    far = saved(tmp_path / "far.nii.gz", block(), grid(origin=(50, 0, 0)))
    found = load_case("a", CaseFiles(far, (far,), truth, tmp_path))
    assert found.reference is not None and found.prediction is None and found.image is None


def test_ignored_voxels_are_not_shown(tmp_path):
    truth = saved(tmp_path / "t.nii.gz", block() + block(z=(0, 1), value=9))
    assert np.unique(load_case("a", CaseFiles(None, (), truth, tmp_path, ignore=9)).reference).tolist() == [0, 1]


def test_predictions_on_ignored_voxels_are_not_shown(tmp_path):
    truth, mask = saved(tmp_path / "t.nii.gz", block(value=9)), saved(tmp_path / "p.nii.gz", block(x=(8, 22)))
    assert np.argwhere(load_case("a", CaseFiles(mask, (), truth, tmp_path, ignore=9)).prediction).min(axis=0)[2] == 20


def test_a_prediction_on_another_grid_is_resampled_if_it_was_scored_so(tmp_path):
    truth, stored = block(), np.ascontiguousarray(block()[::-1])
    upside_down = grid(truth.shape, origin=(0, 0, 21), direction=np.diag([1.0, 1, -1]))
    files = saved(tmp_path / "p.nii.gz", stored, upside_down), (), saved(tmp_path / "t.nii.gz", truth), tmp_path
    assert load_case("a", CaseFiles(*files)).prediction is None
    assert np.array_equal(load_case("a", CaseFiles(*files, resample=True)).prediction, truth)


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
def test_displayed_slices_have_head_or_front_up_and_left_or_back_on_the_right(direction, axis, stored, shown):
    case = loaded_case(np.zeros((5, 6, 7), np.uint8), axis=axis, direction=direction)
    assert case.to_display(corner(stored))[shown] == 1


def test_a_slice_stored_by_columns_is_transposed_with_its_spacing():
    swapped = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])  # x runs back, y runs left
    case = loaded_case(np.zeros((5, 4, 6), np.uint8), direction=swapped, spacing=(3, 2, 1))
    assert case.to_display(corner((0, 0))).shape == (6, 4) and case.display_spacing_mm() == (1.0, 2.0)


@pytest.mark.parametrize(
    ("direction", "axis", "ends"),
    [
        (LPS, 0, ("feet", "head")),
        (np.diag([1.0, -1, -1]), 0, ("head", "feet")),
        (LPS, 1, ("front", "back")),
        (np.diag([-1.0, -1, 1]), 2, ("left", "right")),
    ],
)
def test_the_ends_of_the_slice_axis_are_named_in_patient_terms(direction, axis, ends):
    assert loaded_case(np.zeros((5, 6, 7), np.uint8), axis=axis, direction=direction).ends() == ends


def test_without_a_given_axis_slices_run_along_the_coarsest(tmp_path):
    for axis, spacing in enumerate([(1, 1, 1), (1, 3, 1), (1, 1, 5)]):
        mask = saved(tmp_path / f"{axis}.nii.gz", block(), grid(spacing=spacing))
        assert load_case("a", CaseFiles(mask, (), None, tmp_path)).axis == axis


def test_ct_window_contains_the_median_of_the_structure():
    ct = np.array([-1000, 0, 40, 900])
    assert choose_window(ct, np.array([50, 60])) == (-160, 240)
    assert choose_window(ct, np.array([-800])) == (-1350, 150)
    assert choose_window(ct, np.array([700])) == (-500, 1300)


def test_other_images_are_windowed_by_percentiles_of_non_zero_voxels():
    mr = np.concatenate([np.zeros(5000), np.arange(1, 1002)])
    assert choose_window(mr, np.zeros(0)) == pytest.approx((6.0, 996.0))
    assert choose_window(np.zeros(5), np.zeros(0)) == (0, 0) and choose_window(np.full(5, 7.0), np.zeros(0)) == (7, 7)


def test_intensities_are_scaled_and_clipped_to_the_window():
    assert apply_window(np.array([-5, 0, 50, 100, 300]), (0, 100)).tolist() == [0, 0, 128, 255, 255]
    assert apply_window(np.array([1, 2]), (3, 3)).tolist() == [0, 0]
