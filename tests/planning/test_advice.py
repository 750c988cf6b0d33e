"""Which slices to annotate, and warnings about cases that differ from the others."""

from __future__ import annotations

import pytest

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.advice import annotation_advice, dataset_warnings
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Extent, Fingerprint, LabelFingerprint, Statistics


def case(name, first, last, *, held=None, slices=40, apart_mm=2.0, shape=None):
    """Return a case with one label on slices first to last of `slices` along SI, with a spacing of `apart_mm`."""
    extent = Extent(first=first, last=last, slices=held or last - first + 1)
    label = LabelFingerprint(voxels=10, extents=dict.fromkeys(AXES, extent), overlap={}, copied={})
    return CaseFingerprint(
        id=name,
        stored_shape=(slices, 9, 9),
        orientation="LPS",
        shape=shape or (slices, 9, 9),
        spacing_mm=(apart_mm, 1.0, 1.0),
        content_mm=(1.0, 1.0, 1.0),
        channels=(ChannelFingerprint(whole=None, foreground=None),),
        labels={1: label},
    )


def advice(*cases):
    whole = Fingerprint(
        tool_version="1",
        dataset_name="d",
        channels=("CT",),
        labels={1: "organ", 2: "nowhere"},
        ignore=None,
        cases=cases,
        foreground=(None,),
    )
    (one,) = annotation_advice(whole, "SI")
    return one


def test_the_middle_slice_is_advised_with_the_label_s_usual_length():
    one = advice(case("a", 10, 19), case("b", 10, 29), case("c", 20, 33))
    assert (one.slices, one.shortest, one.longest, one.length_mm) == (14, 10, 20, 28.0)
    assert "annotate the middle slice" in one.describe("SI") and "14 slices (10 to 20), 28 mm" in one.describe("SI")


def test_the_position_of_the_middle_is_given_from_the_inferior_end():
    assert advice(case("a", 8, 11)).position == 0.25  # slices 8 to 11 of 40: from 0.2 to 0.3
    assert "about 25% of the way from the inferior end" in advice(case("a", 8, 11)).describe("SI")


def test_the_distance_of_end_marks_is_half_the_usual_and_half_the_longest_extent():
    text = advice(case("a", 10, 19), case("b", 10, 19), case("c", 5, 34)).describe("SI")
    assert "inferior and superior ends, usually 6, at most 16 slices away" in text


def test_an_end_outside_the_volume_needs_no_mark():
    text = advice(case("a", 20, 39), case("b", 25, 39), case("c", 20, 30)).describe("SI")
    assert "beyond the inferior end," in text and "superior" not in text


def test_a_structure_through_the_whole_volume_needs_no_end_marks():
    assert "no end marks are needed" in advice(case("a", 0, 39)).describe("SI")


def test_a_label_with_gaps_needs_an_annotated_slice_in_each_part():
    assert "one slice of each part" in advice(case("a", 10, 29, held=8)).describe("SI")
    assert "each part" not in advice(case("a", 10, 29, held=8), case("b", 10, 29), case("c", 10, 29)).describe("SI")


def test_a_label_on_one_slice_has_nothing_to_propagate():
    assert advice(case("a", 7, 7)).describe("SI") == "is on one slice: annotate this slice"


@pytest.mark.parametrize(("axis", "side"), [("SI", "inferior"), ("AP", "anterior"), ("LR", "right")])
def test_the_end_is_named_after_the_axis(axis, side):
    assert f"from the {side} end" in advice(case("a", 10, 20)).describe(axis)


def test_a_single_slice_in_a_set_of_stacks_is_cut_along_its_own_axis():
    one = advice(case("a", 0, 0, slices=30, shape=(30, 1, 30)))
    assert one.open_ends == (1.0, 1.0)


def test_a_label_longer_than_one_slice_in_any_case_is_propagated():
    assert "annotate the middle slice" in advice(case("a", 7, 7), case("b", 7, 7), case("c", 3, 17)).describe("SI")


def test_single_slices_do_not_count_as_open_ends():
    text = advice(case("a", 10, 20), case("b", 0, 0, slices=1)).describe("SI")
    assert "inferior and superior ends" in text


def test_an_end_outside_half_of_the_volumes_still_needs_a_mark():
    assert "inferior and superior ends" in advice(case("a", 0, 39), case("b", 10, 20)).describe("SI")


def scan(name, mean=None, *, shape=(20, 30, 40), spacing=(3.0, 1.0, 1.0), orientation="LPS", labels=(1,), voxels=10):
    mean = float(sum(map(ord, name))) if mean is None else mean  # another one for every case
    whole = Statistics(voxels=100, mean=mean, median=1.0, std=1.0, min=0.0, max=2.0, p00_5=0.0, p99_5=2.0)
    return CaseFingerprint(
        id=name,
        stored_shape=shape,
        orientation=orientation,
        shape=shape,
        spacing_mm=spacing,
        content_mm=(1.0, 1.0, 1.0),
        channels=(ChannelFingerprint(whole=whole, foreground=None),),
        labels={value: LabelFingerprint(voxels=voxels, extents={}, overlap={}, copied={}) for value in labels},
    )


def warnings(*cases):
    whole = Fingerprint(
        tool_version="1", dataset_name="d", channels=("CT",), labels={1: "organ"}, ignore=None, cases=cases, foreground=(None,)
    )
    return dataset_warnings(whole)


def test_of_an_ordinary_data_set_nothing_is_warnings():
    assert warnings(scan("a"), scan("b"), scan("c")) == ()


def test_duplicate_images_are_found_even_when_stored_in_another_orientation():
    (line,) = warnings(scan("a", 5.0), scan("b"), scan("c", 5.0, shape=(40, 30, 20)))
    assert line.startswith("cases a, c: duplicate images and masks")


def test_duplicate_images_with_different_masks_are_distinguished():
    (line,) = warnings(scan("a", 5.0), scan("c", 5.0, voxels=11))
    assert "duplicate images with different masks" in line


def test_images_of_different_size_are_no_duplicates():
    assert warnings(scan("a", 5.0), scan("c", 5.0, shape=(20, 30, 41))) == ()


def test_cases_with_an_unusual_orientation_are_named():
    (line,) = warnings(scan("a"), scan("b"), scan("c", orientation="RAS"))
    assert line.startswith("case c: orientation is RAS, most cases are LPS")


def test_without_a_majority_no_orientation_is_unusual():
    assert (
        warnings(scan("a", orientation="LPS"), scan("b", orientation="RAS"), scan("c", orientation="LAS"), scan("d", orientation="RPS"))
        == ()
    )


def test_a_spacing_far_from_the_others_is_named_in_mm():
    lines = warnings(scan("a"), scan("b"), scan("c"), scan("d", spacing=(3.0, 0.1, 1.0)))
    assert "case d: spacing along AP is 0.1 mm, median 1 mm. Check the image header" in lines


def test_two_cases_are_not_compared():
    assert warnings(scan("a"), scan("b", spacing=(300.0, 1.0, 1.0), orientation="RAS")) == ()


def test_a_label_that_is_in_no_case_cannot_be_learned():
    (line,) = warnings(scan("a", labels=()), scan("b", labels=()))
    assert line == "label 1 (organ) is in no case, so it cannot be learned"


def test_the_first_five_cases_without_a_label_are_named():
    lines = warnings(scan("z"), *(scan(name, labels=()) for name in "abcdefg"))
    assert lines == ("label 1 (organ) is absent in cases a, b, c, d, e and 2 more. Ignore this if the structure is not present",)


def test_cases_with_the_same_deviation_are_named_in_one_line():
    usual = [scan(name) for name in "abcdef"]
    lines = warnings(*usual, scan("y", spacing=(3.0, 0.1, 1.0)), scan("z", spacing=(3.0, 0.2, 1.0)))
    assert "cases y, z: spacing along AP is 0.1 to 0.2 mm, median 1 mm. Check the image header" in lines


def test_of_two_groups_of_equal_size_neither_is_unusual():
    assert warnings(scan("a"), scan("b"), scan("y", spacing=(30.0, 9.0, 9.0)), scan("z", spacing=(30.0, 9.0, 9.0))) == ()
