"""Which slices a person is told to annotate."""

from __future__ import annotations

import pytest

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.advice import annotation_advice
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Extent, Fingerprint, LabelFingerprint


def case(name, first, last, *, held=None, slices=40, apart_mm=2.0, shape=None):
    """One label on slices first to last of `slices` along SI, `apart_mm` apart."""
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
    assert "annotate its middle slice" in one.words("SI") and "14 slices (10 to 20), 28 mm" in one.words("SI")


def test_the_middle_is_told_from_the_inferior_side():
    assert advice(case("a", 8, 11)).place == 0.25  # slices 8 to 11 of 40: from 0.2 to 0.3
    assert "about 25% of the way from the inferior side" in advice(case("a", 8, 11)).words("SI")


def test_an_end_mark_is_as_far_as_half_the_usual_and_half_the_longest_extent():
    words = advice(case("a", 10, 19), case("b", 10, 19), case("c", 5, 34)).words("SI")
    assert "inferior and superior ends, usually 6, at most 16 slices away" in words


def test_an_end_that_runs_out_of_the_volume_needs_no_mark():
    words = advice(case("a", 20, 39), case("b", 25, 39), case("c", 20, 30)).words("SI")
    assert "beyond its inferior end," in words and "superior" not in words


def test_what_runs_through_the_whole_volume_needs_no_mark_at_all():
    assert "no end needs a mark" in advice(case("a", 0, 39)).words("SI")


def test_a_label_in_pieces_wants_a_slice_in_each():
    assert "one slice in each of its pieces" in advice(case("a", 10, 29, held=8)).words("SI")
    assert "pieces" not in advice(case("a", 10, 29, held=8), case("b", 10, 29), case("c", 10, 29)).words("SI")


def test_a_label_on_one_slice_has_nothing_to_propagate():
    assert advice(case("a", 7, 7)).words("SI") == "lies on one slice: annotate that one"


@pytest.mark.parametrize(("axis", "side"), [("SI", "inferior"), ("AP", "anterior"), ("LR", "right")])
def test_the_side_is_named_after_the_axis(axis, side):
    assert f"from the {side} side" in advice(case("a", 10, 20)).words(axis)


def test_a_single_slice_in_a_set_of_stacks_is_cut_along_its_own_axis():
    one = advice(case("a", 0, 0, slices=30, shape=(30, 1, 30)))
    assert one.open_ == (1.0, 1.0)


def test_where_one_case_of_several_is_longer_than_a_slice_there_is_something_to_propagate():
    assert "annotate its middle slice" in advice(case("a", 7, 7), case("b", 7, 7), case("c", 3, 17)).words("SI")


def test_a_single_slice_among_stacks_tells_nothing_of_ends():
    words = advice(case("a", 10, 20), case("b", 0, 0, slices=1)).words("SI")
    assert "inferior and superior ends" in words


def test_what_reaches_the_rim_in_half_of_the_volumes_wants_a_mark():
    assert "inferior and superior ends" in advice(case("a", 0, 39), case("b", 10, 20)).words("SI")
