"""What a person annotated is understood as meant and comes back untouched."""

from __future__ import annotations

import json

import numpy as np
import pytest

from slmsam2_cli.dataset.prompts import choose_slice, find_prompts, read_prompts, restore_annotated, simulate_prompts
from slmsam2_cli.dataset.slices import View, orient
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import Source, Volume, write_mask

LPS = np.eye(3)
DOWNWARDS = np.diag([1.0, 1.0, -1.0])  # the file's first slice is the head


def view_of(shape, direction=LPS, axis="SI"):
    grid = Grid(shape, (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction)
    oriented = orient(direction, axis).apply(np.empty(shape)).shape
    return View(grid, axis, tuple((0, n) for n in oriented), oriented)


def save(folder, mask, view, name="case"):
    like = Volume(mask[None], view.grid, Source(".nii.gz", ".nii.gz"))
    write_mask(folder / f"{name}.nii.gz", mask, like)


def listing(folder, value, name="case"):
    (folder / f"{name}.prompts.json").write_text(value if isinstance(value, str) else json.dumps(value))


def mask_with(shape, *painted):
    mask = np.zeros(shape, np.uint8)
    for place, value in painted:
        mask[place] = value
    return mask


@pytest.mark.parametrize(
    ("where", "area", "chosen"),
    [
        ("middle", [0, 1, 1, 1, 0], 2),
        ("middle", [1, 1, 0, 0], 0),  # halfway between 0 and 1: the lower
        ("middle", [0, 1, 0, 0, 1, 1], 4),  # 3 does not hold it; 4 is nearer than 1
        ("middle", [1, 0, 1], 0),  # both equally near: the lower
        ("quarter", [1, 1, 1, 1, 1, 1, 1, 1, 1], 2),
        ("quarter", [0, 0, 1, 1], 2),
        ("largest", [0, 2, 5, 5, 1], 2),
        ("middle", [0, 0, 3], 2),
    ],
)
def test_the_middle_quarter_or_largest_slice_is_chosen(where, area, chosen):
    assert choose_slice(np.array(area), where) == chosen


def test_ends_are_marked_on_the_slices_just_beyond_them():
    labels = mask_with((8, 4, 4), (np.s_[2:6, 0], 1), (np.s_[5:, 2], 2))
    found = simulate_prompts(labels, view_of((8, 4, 4)), (1, 2, 3), "middle", mark_ends=True)
    assert found.annotated == {1: (1, 3, 6), 2: (4, 6), 3: ()}  # label 2 ends where the volume does
    assert [int((found.labels == value).any(axis=(1, 2)).sum()) for value in (1, 2)] == [1, 1]


def test_end_marks_of_a_label_leave_other_labels_alone():
    labels = mask_with((8, 4, 4), (np.s_[2:6, 0], 1), (np.s_[5:, 2], 2))
    view = view_of((8, 4, 4))
    found = simulate_prompts(labels, view, (1, 2), "middle", mark_ends=True)
    whole = np.full((8, 4, 4), 2, np.uint8)
    imposed = restore_annotated(whole, found, view)
    assert (imposed[1] == 2).all() and (imposed[4] == 0).all()  # slice 1: beyond label 1; slice 4: before label 2


def test_two_labels_are_prompted_on_one_slice_without_disturbing_each_other():
    labels = mask_with((3, 4, 4), (np.s_[:, 0], 1), (np.s_[:, 2], 2))
    prompts = simulate_prompts(labels, view_of((3, 4, 4)), [1, 2, 3], "middle")
    assert prompts.annotated == {1: (1,), 2: (1,), 3: ()}
    assert prompts.exact_slices == ()
    assert np.array_equal(prompts.labels[1], labels[1])
    assert not prompts.labels[[0, 2]].any()


def test_a_simulated_prompt_is_the_same_slice_however_the_file_is_stored():
    labels = mask_with((4, 2, 2), (np.s_[0:2], 1))
    upright, upside_down = view_of((4, 2, 2)), view_of((4, 2, 2), DOWNWARDS)
    assert simulate_prompts(labels, upright, [1], "middle").annotated == {1: (0,)}
    assert simulate_prompts(labels, upside_down, [1], "middle").annotated == {1: (2,)}
    assert simulate_prompts(labels[::-1], upside_down, [1], "middle").annotated == {1: (0,)}


def test_a_simulated_prompt_is_exact_for_its_label_alone():
    labels = mask_with((1, 1, 6), (np.s_[0, 0, 0:2], 1), (np.s_[0, 0, 4:6], 2))
    view = view_of((1, 1, 6))
    prompts = simulate_prompts(labels, view, [1], "middle")
    predicted = np.array([[[2, 2, 1, 2, 0, 2]]], np.uint8)
    assert restore_annotated(predicted, prompts, view).ravel().tolist() == [1, 1, 0, 2, 0, 2]
    assert predicted.ravel().tolist() == [2, 2, 1, 2, 0, 2]


def test_one_label_is_not_wiped_out_by_another_prompted_on_the_same_slice():
    labels = mask_with((1, 1, 4), (np.s_[0, 0, 0:2], 1), (np.s_[0, 0, 2:4], 2))
    view = view_of((1, 1, 4))
    prompts = simulate_prompts(labels, view, [1, 2], "largest")
    swapped = np.array([[[2, 2, 1, 1]]], np.uint8)
    assert restore_annotated(swapped, prompts, view).ravel().tolist() == [1, 1, 2, 2]


def test_no_prompts_are_no_error(tmp_path):
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view_of((3, 4, 5)), [1]) is None


def test_an_empty_mask_is_no_prompt(tmp_path):
    save(tmp_path, np.zeros((3, 4, 5), np.uint8), view_of((3, 4, 5)))
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view_of((3, 4, 5)), [1]) is None


def test_an_annotated_slice_holds_for_every_label_and_comes_back_bit_exact(tmp_path):
    view = view_of((3, 4, 5))
    mask = mask_with((3, 4, 5), (np.s_[1, 2, 2:4], 2))
    save(tmp_path, mask, view)
    prompts = read_prompts(find_prompts(tmp_path, "case"), "case", view, [1, 2])
    assert prompts.annotated == {1: (1,), 2: (1,)}
    assert prompts.exact_slices == (1,)
    imposed = restore_annotated(np.ones((3, 4, 5), np.uint8), prompts, view)
    assert np.array_equal(imposed[1], mask[1])
    assert (imposed[[0, 2]] == 1).all()


def test_a_listed_slice_may_be_empty(tmp_path):
    view = view_of((5, 2, 2))
    save(tmp_path, mask_with((5, 2, 2), (np.s_[2], 1)), view)
    listing(tmp_path, {"axis": "SI", "annotated_slices": [4, 2]})
    prompts = read_prompts(find_prompts(tmp_path, "case"), "case", view, [1])
    assert prompts.annotated == {1: (2, 4)}
    assert not restore_annotated(np.ones((5, 2, 2), np.uint8), prompts, view)[4].any()


def test_listed_slices_count_as_the_file_counts_them(tmp_path):
    view = view_of((5, 2, 2), DOWNWARDS)
    save(tmp_path, mask_with((5, 2, 2), (np.s_[1], 1)), view)
    listing(tmp_path, {"axis": "SI", "annotated_slices": [0]})
    prompts = read_prompts(find_prompts(tmp_path, "case"), "case", view, [1])
    assert prompts.exact_slices == (3, 4)
    assert not restore_annotated(np.ones((5, 2, 2), np.uint8), prompts, view)[0].any()


def test_slices_are_counted_along_the_axis_of_propagation(tmp_path):
    view = view_of((3, 4, 5), axis="LR")
    save(tmp_path, mask_with((3, 4, 5), (np.s_[:, 1:3, 4], 1)), view)
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view, [1]).exact_slices == (4,)


SAGITTAL, CORONAL = np.s_[2:10, 3:12, 4], np.s_[2:10, 4, 3:12]


@pytest.mark.parametrize(
    ("paint", "axis", "named"),
    [
        (SAGITTAL, "SI", r"annotated along LR, but the slice axis is SI \(mask covers 8 SI slices\)"),
        (CORONAL, "SI", "annotated along AP, but the slice axis is SI"),
        (np.s_[2:10, 3:12, [4, 8, 13]], "SI", "annotated along LR, but the slice axis is SI"),
        (np.s_[6, 2:12, 3:12], "AP", r"annotated along SI, but the slice axis is AP \(mask covers 10 AP slices\)"),
        (np.s_[2:10, 3:6, 4], "SI", "along LR, but"),  # a small structure
    ],
)
def test_slices_annotated_along_another_axis_are_rejected_and_both_axes_named(tmp_path, paint, axis, named):
    view = view_of((12, 14, 16), axis=axis)
    save(tmp_path, mask_with((12, 14, 16), (paint, 1)), view)
    with pytest.raises(CaseError, match=f"{named}.*Annotate slices along {axis}, or edit slice_axis in plan.json.*case.prompts.json"):
        read_prompts(find_prompts(tmp_path, "case"), "case", view, [1])


def test_the_axis_of_one_annotated_slice_among_ignored_ones_is_recognised(tmp_path):
    view, mask = view_of((12, 14, 16)), np.full((12, 14, 16), 9, np.uint8)
    mask[:, :, 4] = 0
    mask[SAGITTAL] = 1
    save(tmp_path, mask, view)
    with pytest.raises(CaseError, match="along LR, but"):
        read_prompts(find_prompts(tmp_path, "case"), "case", view, [1], ignore=9)


@pytest.mark.parametrize(
    "paint",
    [
        np.s_[1:11, 3:12, 3:13],  # a volume annotated on every slice
        np.s_[[1, 4, 7, 10], 3:12, 3:13],  # on many single ones
        np.s_[5, 3:12, 4],  # a sliver on one slice
        np.s_[4:7, 3:12, 4],  # on three
        np.s_[1:11, 4:6, 4:6],  # a vessel along the slices
        np.s_[1:11, 4, 4],  # a line
        np.s_[4:8, 3:12, 4:6],  # four slices are not more than twice two
    ],
)
def test_masks_annotated_along_the_planned_axis_are_accepted(tmp_path, paint):
    view = view_of((12, 14, 16))
    mask = mask_with((12, 14, 16), (paint, 1))
    save(tmp_path, mask, view)
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view, [1]).exact_slices == tuple(
        np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    )


def test_an_axis_of_few_slices_is_not_taken_for_the_annotated_one(tmp_path):
    view = view_of((12, 14, 3))
    save(tmp_path, mask_with((12, 14, 3), (np.s_[1:11, 3:12], 1)), view)
    assert len(read_prompts(find_prompts(tmp_path, "case"), "case", view, [1]).exact_slices) == 10


def test_with_a_list_of_slices_a_thin_mask_is_accepted_as_it_is(tmp_path):
    view = view_of((12, 14, 16))
    save(tmp_path, mask_with((12, 14, 16), (SAGITTAL, 1)), view)
    listing(tmp_path, {"axis": "SI", "annotated_slices": [0]})
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view, [1]).exact_slices == (0, *range(2, 10))


def test_with_an_ignore_label_everything_else_is_annotated(tmp_path):
    view = view_of((3, 1, 4))
    mask = np.full((3, 1, 4), 9, np.uint8)
    mask[1, 0] = [9, 0, 1, 9]
    mask[2] = 0
    save(tmp_path, mask, view)
    prompts = read_prompts(find_prompts(tmp_path, "case"), "case", view, [1], ignore=9)
    assert prompts.annotated == {1: (1, 2)}
    imposed = restore_annotated(np.ones((3, 1, 4), np.uint8), prompts, view)
    assert imposed[:, 0].tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]]


def test_an_ignore_label_that_is_not_used_changes_nothing(tmp_path):
    view = view_of((3, 2, 2))
    save(tmp_path, mask_with((3, 2, 2), (np.s_[1], 1)), view)
    assert read_prompts(find_prompts(tmp_path, "case"), "case", view, [1], ignore=9).exact_slices == (1,)


def test_a_prompt_on_another_grid_is_rejected(tmp_path):
    save(tmp_path, mask_with((3, 4, 5), (1, 1)), view_of((3, 4, 5)))
    with pytest.raises(CaseError, match=r"case case: case.nii.gz: .*grid differs.*shape"):
        read_prompts(find_prompts(tmp_path, "case"), "case", view_of((4, 4, 5)), [1])


def test_an_undeclared_label_is_rejected_with_its_count(tmp_path):
    view = view_of((3, 4, 5))
    save(tmp_path, mask_with((3, 4, 5), (np.s_[0, 0, :3], 7)), view)
    with pytest.raises(CaseError, match=r"undeclared label values 7 \(3 voxels\); the plan has 1, 2"):
        read_prompts(find_prompts(tmp_path, "case"), "case", view, [1, 2])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "not valid JSON"),
        ([1], "must have the keys"),
        ({"annotated_slices": [1]}, "must have the keys"),
        ({"axis": "SI", "annotated_slices": [1], "extra": 1}, "must have the keys"),
        ({"axis": "AP", "annotated_slices": [1]}, "the slice axis is SI"),
        ({"axis": "SI", "annotated_slices": 1}, "list of whole numbers"),
        ({"axis": "SI", "annotated_slices": [True]}, "list of whole numbers"),
        ({"axis": "SI", "annotated_slices": [1.0]}, "list of whole numbers"),
        ({"axis": "SI", "annotated_slices": [3]}, "slice 3 does not exist; the volume has slices 0 to 2"),
        ({"axis": "SI", "annotated_slices": [-1]}, "slice -1 does not exist"),
    ],
)
def test_an_invalid_list_of_slices_is_rejected(tmp_path, value, said):
    view = view_of((3, 4, 5))
    save(tmp_path, mask_with((3, 4, 5), (1, 1)), view)
    listing(tmp_path, value)
    with pytest.raises(CaseError, match=said):
        read_prompts(find_prompts(tmp_path, "case"), "case", view, [1])


def test_a_list_of_slices_without_a_mask_is_rejected(tmp_path):
    listing(tmp_path, {"axis": "SI", "annotated_slices": [0]})
    with pytest.raises(CaseError, match="no mask of the same name"):
        read_prompts(find_prompts(tmp_path, "case"), "case", view_of((3, 4, 5)), [1])
