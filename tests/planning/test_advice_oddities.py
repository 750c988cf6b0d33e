"""What a person is told to look at, and that nothing is said of an ordinary data set."""

from __future__ import annotations

from slmsam2_cli.planning.advice import dataset_warnings
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint, LabelFingerprint, Statistics


def case(name, mean=None, *, shape=(20, 30, 40), spacing=(3.0, 1.0, 1.0), orientation="LPS", labels=(1,), voxels=10):
    mean = float(sum(map(ord, name))) if mean is None else mean  # its own for every case
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


def said(*cases):
    whole = Fingerprint(
        tool_version="1", dataset_name="d", channels=("CT",), labels={1: "organ"}, ignore=None, cases=cases, foreground=(None,)
    )
    return dataset_warnings(whole)


def test_of_an_ordinary_data_set_nothing_is_said():
    assert said(case("a"), case("b"), case("c")) == ()


def test_the_same_image_twice_is_said_even_when_it_is_stored_in_another_order():
    (line,) = said(case("a", 5.0), case("b"), case("c", 5.0, shape=(40, 30, 20)))
    assert line.startswith("cases a, c: the same image, and their masks")


def test_the_same_image_with_other_masks_is_told_apart():
    (line,) = said(case("a", 5.0), case("c", 5.0, voxels=11))
    assert "but their masks differ" in line


def test_images_of_other_sizes_are_not_the_same_for_one_number():
    assert said(case("a", 5.0), case("c", 5.0, shape=(20, 30, 41))) == ()


def test_cases_stored_another_way_round_than_most_are_named():
    (line,) = said(case("a"), case("b"), case("c", orientation="RAS"))
    assert line.startswith("case c: stored as RAS, most as LPS")


def test_without_a_majority_no_orientation_is_odd():
    assert (
        said(case("a", orientation="LPS"), case("b", orientation="RAS"), case("c", orientation="LAS"), case("d", orientation="RPS")) == ()
    )


def test_a_spacing_far_from_the_others_is_named_in_mm():
    lines = said(case("a"), case("b"), case("c"), case("d", spacing=(3.0, 0.1, 1.0)))
    assert "case d: slices along AP are apart 0.1 mm, in most cases 1. See that the header is right" in lines


def test_two_cases_have_no_rest_to_differ_from():
    assert said(case("a"), case("b", spacing=(300.0, 1.0, 1.0), orientation="RAS")) == ()


def test_a_label_that_is_in_no_case_cannot_be_learned():
    (line,) = said(case("a", labels=()), case("b", labels=()))
    assert line == "label 1 (organ) is in no case: it cannot be learned"


def test_cases_that_lack_a_label_are_named_the_first_five_at_least():
    lines = said(case("z"), *(case(name, labels=()) for name in "abcdefg"))
    assert lines == ("label 1 (organ) is missing in cases a, b, c, d, e and 2 more. Fine where the structure is not there",)


def test_cases_that_differ_alike_are_named_in_one_line():
    usual = [case(name) for name in "abcdef"]
    lines = said(*usual, case("y", spacing=(3.0, 0.1, 1.0)), case("z", spacing=(3.0, 0.2, 1.0)))
    assert "cases y, z: slices along AP are apart 0.1 to 0.2 mm, in most cases 1. See that the header is right" in lines


def test_of_two_kinds_in_equal_number_neither_is_odd():
    assert said(case("a"), case("b"), case("y", spacing=(30.0, 9.0, 9.0)), case("z", spacing=(30.0, 9.0, 9.0))) == ()
