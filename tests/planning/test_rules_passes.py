"""How far apart slices are, how many are encoded at a time, when a pass gives up: answers by hand."""

from __future__ import annotations

import pytest
from measured_cases import case

from slmsam2_cli.planning.fingerprint import Extent
from slmsam2_cli.planning.rules import choose_inference, choose_through_plane_mm, propagated_slices, stack_length


def running(first, last, gap=0, through_mm=1.0, slices=400):
    """A case whose label lies on slices `first` to `last`, but for one gap."""
    one = case(shape=(slices, 100, 100))
    extents = one.labels[1].extents | {"SI": Extent(first=first, last=last, slices=last - first + 1 - gap, gap=gap)}
    label = one.labels[1].model_copy(update={"extents": extents})
    return one.model_copy(update={"labels": {1: label}, "spacing_mm": (through_mm, 1.0, 1.0)})


def test_slices_are_left_as_stored_where_structures_are_short():
    assert choose_through_plane_mm([running(0, 47)], "SI").value is None


def test_slices_of_long_structures_are_joined_until_they_run_over_few():
    decision = choose_through_plane_mm([running(0, 99, through_mm=0.5)], "SI")  # 100 slices: 34 of three
    assert decision.value == 1.5 and "100 slices, more than 48: about 3 slices each are joined" in decision.reason


def test_the_median_case_decides_how_long_structures_are():
    assert choose_through_plane_mm([running(0, 19), running(0, 29), running(0, 299)], "SI").value is None


def test_no_case_is_cut_finer_than_it_is_stored():
    decision = choose_through_plane_mm([running(0, 99), running(0, 99), running(0, 99, through_mm=7.5)], "SI")
    assert decision.value is None and "the slices of some case are 7.5 mm apart" in decision.reason


def test_a_pass_waits_six_slices_and_longer_where_labels_have_gaps():
    assert choose_inference([running(10, 30)], "SI", 128).value.max_empty_slices == 6
    assert choose_inference([running(10, 30), running(10, 30, gap=10)], "SI", 128).value.max_empty_slices == 20


def test_every_slice_is_tracked_where_no_label_was_measured():
    assert choose_inference([running(10, 30).model_copy(update={"labels": {}})], "SI", 128).value.max_empty_slices is None


@pytest.mark.parametrize(("px", "batch"), [(64, 8), (128, 8), (256, 8), (512, 2), (1024, 1)])
def test_as_many_slices_are_encoded_at_a_time_as_eight_of_256_pixels_are_large(px, batch):
    assert choose_inference([running(10, 30)], "SI", px).value.batch_slices == batch


def test_a_pass_walks_over_the_label_and_as_far_beyond_as_its_max_empty_slices():
    assert propagated_slices(running(10, 30), 1, "SI", 6) == 21 + 12
    assert propagated_slices(running(2, 30), 1, "SI", 6) == 31 + 6  # two slices to the rim
    assert propagated_slices(running(10, 395), 1, "SI", 6) == 386 + 6 + 4
    assert propagated_slices(running(10, 30), 1, "SI", None) == 400


def test_single_slices_decide_nothing():
    one = running(0, 0, slices=1)
    assert choose_through_plane_mm([one], "SI").value is None
    assert choose_inference([one], "SI", 128).value.max_empty_slices is None


def test_joined_slices_are_fewer_to_walk_through():
    one = running(10, 309, through_mm=0.5)
    assert stack_length(one, "SI", None) == 400 and stack_length(one, "SI", 1.0) == 200
    assert propagated_slices(one, 1, "SI", 6, 1.0) == 150 + 5 + 6  # from the fifth of them on
