"""A look at each training case: which slice, how large, in which colours, and which grey values."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report.planning import case_of, dataset, plan_of

from slmsam2_cli.report.contact_sheet import COLOURS, SAMPLE, Gap, Look, evenly_chosen, middle_of_largest, montage, paint, shown_size, some


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def rgb(place):
    return tuple(COLOURS[place].to_bytes(3, "big"))


def test_the_slice_shown_is_the_middle_of_the_largest_label():
    labels = np.zeros((9, 4, 4), np.uint8)
    labels[1:4, :3] = 2
    labels[6:9, 0] = 1
    assert middle_of_largest(labels, (1, 2)) == (2, 2)


def test_a_mask_that_holds_nothing_shows_the_middle_slice():
    assert middle_of_largest(np.zeros((9, 4, 4), np.uint8), (1,)) == (4, None)


def test_a_label_that_means_not_annotated_is_not_the_largest():
    labels = np.full((9, 4, 4), 3, np.uint8)
    labels[7, 0, 0] = 1
    assert middle_of_largest(labels, (1,)) == (7, 1)


def test_a_picture_is_as_wide_and_high_as_its_slice_in_mm():
    assert shown_size((50, 50), (2.0, 1.0)) == (120, 240)
    assert shown_size((50, 100), (1.0, 1.0)) == (200, 100)


def test_a_border_is_drawn_inside_its_label_in_the_label_s_colour():
    canvas = np.zeros((20, 20, 3), np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    labels[4:16, 4:10], labels[4:16, 10:16] = 5, 7
    paint(canvas, labels, (5, 7))
    assert tuple(canvas[10, 4]) == rgb(0) and tuple(canvas[10, 15]) == rgb(1)
    assert tuple(canvas[10, 7]) == tuple(canvas[2, 2]) == (0, 0, 0)


def test_of_many_cases_some_from_everywhere_are_shown():
    assert evenly_chosen(range(100), 4) == (12, 37, 62, 87)
    assert evenly_chosen("abc", 4) == ("a", "b", "c")


def test_a_sample_takes_no_row_of_voxels_for_the_whole():
    columns = np.tile(np.arange(1000), 1000)
    sample = some(columns)
    assert sample.size == SAMPLE
    assert np.histogram(sample, 10, (0, 1000))[0] == pytest.approx(SAMPLE / 10, rel=0.02)


def test_few_values_are_all_taken():
    assert some(np.arange(3)).tolist() == [0, 1, 2]


def test_a_case_is_shown_in_its_window_with_its_own_sizes(tmp_path):
    data, fingerprint = dataset(tmp_path, case_of("a", spacing=(5.0, 2.0, 1.0)))
    (look,) = montage(data, plan_of(fingerprint, axis="SI"))
    assert isinstance(look, Look)
    assert (look.case, look.axis, look.slice, look.label) == ("a", "SI", 4, 1)
    assert (look.size, look.spacing_mm) == ((24, 20, 8), (1.0, 2.0, 5.0))
    assert look.width * 40 == pytest.approx(look.height * 24, rel=0.01)
    shown = pixels(look.pictures[0])
    assert shown.shape == (2 * look.height, 2 * look.width, 3)
    assert shown[:4].max() < 40 and shown[len(shown) // 2, shown.shape[1] // 2].min() > 215  # 100 and 300 of a window from 100 to 300
    assert look.greys[0].window == pytest.approx((100, 300))
    assert set(look.greys[0].labelled) == {300.0}


def test_the_head_is_up_in_a_slice_from_the_side(tmp_path):
    case = case_of("a")
    case.image[4:] = 100  # S increases with the slice as stored: the lower half is bright where labelled
    case.image[:4] = 300
    data, fingerprint = dataset(tmp_path, case)
    (look,) = montage(data, plan_of(fingerprint, axis="LR"))
    shown = pixels(look.pictures[0]).mean(axis=(1, 2))
    assert shown[: len(shown) // 4].mean() < shown[-len(shown) // 4 :].mean()


def test_a_case_that_cannot_be_read_leaves_a_gap_and_the_others_are_shown(tmp_path):
    data, fingerprint = dataset(tmp_path, case_of("a"), case_of("b"))
    (tmp_path / "imagesTr" / "a.nii.gz").unlink()
    told = []
    gap, look = montage(data, plan_of(fingerprint), lambda steps, note: told.append(note))
    assert isinstance(gap, Gap) and gap.case == "a" and "imagesTr/a.nii.gz" in gap.problem
    assert isinstance(look, Look) and look.case == "b"
    assert told == ["a", "b"]
