"""Every setting follows from the fingerprint and has a reason."""

from __future__ import annotations

import measured_cases
import pytest

from slmsam2_cli.errors import DatasetError, UsageError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Extent, Fingerprint, LabelFingerprint, Statistics
from slmsam2_cli.planning.modality import choose_modality, ct_window
from slmsam2_cli.planning.rules import (
    ROI_SCALE,
    choose_in_plane_mm,
    choose_inference,
    choose_input_size,
    choose_nsd_tolerance_mm,
    choose_slice_axis,
    choose_storage_mm,
    choose_storage_size,
    choose_through_plane_mm,
    choose_training,
    decide,
    propagated_slices,
    requested_axis,
    round_up,
    stack_length,
    training_for,
)


def values(low=0.0, median=300.0, high=1000.0):
    return Statistics(voxels=100, mean=median, median=median, std=1.0, min=low, max=high, p00_5=low, p99_5=high)


def case(name="a", shape=(20, 100, 100), spacing=(1.0, 1.0, 1.0), overlap=(0.5, 0.5, 0.5), whole=None, content=None, copied=None):
    axes = ("SI", "AP", "LR")
    label = LabelFingerprint(
        voxels=10, extents={}, overlap=dict(zip(axes, overlap, strict=True)), copied=dict(zip(axes, copied or (), strict=bool(copied)))
    )
    extent = tuple(n * mm for n, mm in zip(shape, spacing, strict=True))
    return CaseFingerprint(
        id=name,
        stored_shape=shape,
        orientation="LPS",
        shape=shape,
        spacing_mm=spacing,
        content_mm=content or extent,
        channels=(ChannelFingerprint(whole=whole or values(), foreground=values()),),
        labels={1: label},
    )


def fingerprint(*cases, channel="MRI", foreground=None):
    return Fingerprint(
        tool_version="1", dataset_name="d", channels=(channel,), labels={1: "organ"}, ignore=None, cases=cases, foreground=(foreground,)
    )


HU = values(-1000.0, 40.0, 1500.0)


@pytest.mark.parametrize(
    ("name", "whole", "modality", "reason"),
    [
        ("MRI", values(), "MR", "from the channel name"),
        ("T2", values(), "MR", "from the channel name"),
        ("FLAIR_0", values(), "MR", "from the channel name"),
        ("PET", values(0, 1, 20), "PET", "from the channel name"),
        ("CT", HU, "CT", "from the channel name"),
        ("CT", values(0, 90, 255), "unknown", "not in Hounsfield units"),
        ("MRI", HU, "MR", "from the channel name"),
        ("", HU, "CT", "channel name is blank; treated as CT"),
        ("CTA", HU, "CT", "is no known modality; treated as CT"),
        ("CBCT", values(0, 900, 4095), "unknown", "not in Hounsfield units"),
        ("0", values(-3.0, 0.0, 4.0), "unknown", "is no known modality"),
    ],
)
def test_the_modality_follows_the_channel_name_and_ct_is_checked_by_values(name, whole, modality, reason):
    decision = choose_modality(fingerprint(case(whole=whole), channel=name), 0)
    assert decision.value == modality
    assert reason in decision.reason


def test_slices_follow_the_coarse_axis_whatever_the_overlap():
    decision = choose_slice_axis(fingerprint(case(spacing=(1.0, 1.0, 4.0), overlap=(0.9, 0.9, 0.1))))
    assert decision.value == "LR"
    assert "coarsest axis" in decision.reason and "LR 4" in decision.reason


def test_without_a_coarse_axis_the_overlap_decides():
    assert choose_slice_axis(fingerprint(case(overlap=(0.6, 0.8, 0.7)))).value == "AP"


@pytest.mark.parametrize(
    ("overlap", "copied", "axis"),
    [
        ((0.68, 0.775, 0.758), (0.3, 0.31, 0.45), "LR"),  # AP and LR overlap similarly, and copying LR's middle slice scores higher
        ((0.775, 0.775, 0.744), (0.3, 0.31, 0.99), "AP"),  # LR overlaps less by 0.031, more than the margin
    ],
)
def test_among_axes_of_similar_overlap_the_one_with_the_best_middle_slice_copy_is_chosen(overlap, copied, axis):
    assert choose_slice_axis(fingerprint(case(overlap=overlap, copied=copied))).value == axis


def with_channels(*names):
    """The fingerprint of one case with as many channels of the same values."""
    one = case()
    many = one.model_copy(update={"channels": one.channels * len(names)})
    return fingerprint(many).model_copy(update={"channels": names, "foreground": (None,) * len(names)})


def test_more_than_16_channels_are_rejected():
    many = [f"b{value}" for value in range(17)]
    with pytest.raises(DatasetError, match=r"17 channels \(b0, b1, .*, b16\), but at most 16 are supported"):
        decide(with_channels(*many))


def test_more_than_three_channels_are_projected_starting_from_means_of_neighbours():
    plan = decide(with_channels("FLAIR", "T1w", "t1gd", "T2w"))
    assert plan.channels == ("FLAIR", "T1w", "t1gd", "T2w") == tuple(channel.name for channel in plan.intensity)
    assert plan.modality == "MR" and plan.reasons["channels"].endswith("means of FLAIR + T1w | t1gd | T2w")


def test_three_channels_need_no_projection():
    assert "channels" not in decide(with_channels("T1", "T2", "PD")).reasons


def test_the_plan_takes_the_fuser_of_the_pretrained_weights():
    assert decide(fingerprint(case()), None, "sum").network.fuser == "sum"
    assert decide(fingerprint(case())).network.fuser == "gated"


def test_two_equally_coarse_axes_are_not_one_coarse_axis():
    assert choose_slice_axis(fingerprint(case(spacing=(3.0, 5.0, 5.0), overlap=(0.8, 0.6, 0.7)))).value == "SI"


@pytest.mark.parametrize(("overlap", "axis"), [((0.5, 0.5, 0.5), "SI"), ((0.4, 0.5, 0.5), "AP"), ((0.5004, 0.5, 0.5), "SI")])
def test_ties_go_to_si_then_ap_then_lr(overlap, axis):
    assert choose_slice_axis(fingerprint(case(overlap=overlap))).value == axis


def test_the_median_spacing_stands_for_a_mixed_data_set():
    cases = [case(str(n), overlap=(0.9, 0.5, 0.5)) for n in range(5)] + [case("odd", spacing=(0.5, 7.5, 0.5), overlap=(0.9, 0.1, 0.1))]
    assert choose_slice_axis(fingerprint(*cases)).value == "SI"


def test_single_slices_do_not_influence_the_axis_of_volumes():
    cases = [case("flat", shape=(100, 1, 100), spacing=(1.0, 9.0, 1.0)), case("deep", spacing=(3.0, 1.0, 1.0))]
    assert choose_slice_axis(fingerprint(*cases)).value == "SI"


def test_single_slices_alone_are_cut_along_their_singleton_axis():
    assert choose_slice_axis(fingerprint(case(shape=(100, 1, 100)))).value == "AP"


@pytest.mark.parametrize(
    ("fov", "spacing", "size", "input_size"),
    [
        (43.0, 1.0, "nano", 128),  # 43 * 4 / 1.5 = 114.7
        (57.0, 1.0, "nano", 160),  # 152
        (60.0, 1.0, "nano", 160),  # exactly 160
        (200.0, 1.0, "nano", 256),  # 533, but nano ends at 256
        (200.0, 1.0, "tiny", 544),
        (900.0, 1.0, "tiny", 1024),
        (1.0, 1.0, "nano", 128),
    ],
)
def test_the_input_is_large_enough_for_mask_pixels_of_1_5_voxels(fov, spacing, size, input_size):
    assert choose_input_size(fov, spacing, size).value == input_size


def test_the_largest_slice_fills_the_input():
    assert choose_in_plane_mm(200.0, 1.0, 256).value == pytest.approx(200 / 256, rel=1e-4)
    assert 200.0 / choose_in_plane_mm(200.0, 1.0, 256).value <= 256


def test_a_voxel_is_enlarged_to_at_most_four_input_pixels():
    assert choose_in_plane_mm(10.0, 1.0, 128).value == 0.25


@pytest.mark.parametrize(("value", "up"), [(0.770625, 0.77063), (0.25, 0.25), (123.456789, 123.46), (1.0, 1.0), (0.000123456, 0.00012346)])
def test_rounding_up_never_rounds_down(value, up):
    assert round_up(value) == up


@pytest.mark.parametrize(
    ("tissue", "window"),
    [((20.0, 180.0), (-100, 300)), ((-20.0, 134.0), (-143, 257)), ((-100.0, 300.0), (-300, 500)), ((-900.0, 2000.0), (-1024, 3071))],
)
def test_the_ct_window_is_widened_by_half_the_tissue_s_range_on_either_side(tissue, window):
    assert ct_window(*tissue) == window


def test_ct_is_windowed_and_never_cropped():
    plan = decide(fingerprint(case(whole=HU), channel="CT", foreground=values(20.0, 100.0, 180.0)))
    assert (plan.intensity[0].scheme, plan.intensity[0].lower, plan.intensity[0].upper) == ("ct", -100, 300)
    assert not plan.geometry.crop_to_nonzero


def test_mr_is_scaled_volume_by_volume_and_cropped():
    plan = decide(fingerprint(case()))
    assert (plan.intensity[0].scheme, plan.intensity[0].lower, plan.intensity[0].upper) == ("percentile", 0.5, 99.5)
    assert plan.geometry.crop_to_nonzero


def test_the_field_of_view_is_the_largest_after_the_crop():
    plan = decide(fingerprint(case(shape=(20, 300, 300), content=(20.0, 48.0, 30.0)), case("b", content=(20.0, 40.0, 60.0))))
    assert plan.geometry.storage_size == 64 and plan.geometry.in_plane_mm == 1.0
    plan = decide(fingerprint(case(shape=(20, 300, 300), content=(20.0, 48.0, 30.0)), case("b", content=(20.0, 40.0, 60.0))), "tiny")
    assert plan.geometry.input_size == 160
    assert plan.geometry.in_plane_mm == pytest.approx(60 / 160)


def test_nano_sees_roi_crops_and_the_other_networks_whole_slices():
    nano, tiny = (decide(fingerprint(case()), size).geometry for size in ("nano", "tiny"))
    assert (nano.roi_scale, nano.input_size, nano.storage_size, nano.in_plane_mm) == (ROI_SCALE, 128, 128, 1.0)  # 100 voxels of 1 mm
    assert (tiny.roi_scale, tiny.storage_size) == (None, tiny.input_size)


def test_slices_are_stored_as_finely_as_the_finest_case():
    plan = decide(fingerprint(case(), case("fine", spacing=(1.0, 0.5, 0.5)), case("b")))
    assert (plan.geometry.in_plane_mm, plan.geometry.storage_size) == (0.5, 224)  # 100 mm at 0.5 mm


def test_slices_larger_than_512_voxels_are_reduced():
    assert (choose_storage_size(1024.0, 1.0).value, choose_storage_size(512.0, 1.0).value, choose_storage_size(513.0, 2.0).value) == (
        512,
        512,
        288,
    )
    assert choose_storage_mm(1024.0, 1.0, 512).value == 2.0
    assert choose_storage_mm(300.0, 0.7, 448).value == 0.7


def test_every_decision_has_a_reason():
    reasons = decide(fingerprint(case())).reasons
    assert set(reasons) == {
        "modality",
        "geometry.slice_axis",
        "geometry.crop_to_nonzero",
        "geometry.roi_scale",
        "geometry.storage_size",
        "geometry.input_size",
        "geometry.in_plane_mm",
        "geometry.through_plane_mm",
        "intensity",
        "network.size",
        "training",
        "inference",
        "evaluation.nsd_tolerance_mm",
    }
    assert all(reasons.values())


def test_more_cases_mean_more_steps_up_to_a_limit():
    steps = [choose_training("nano", n).value.steps for n in (1, 5, 20, 500)]
    assert steps == sorted(steps)
    assert steps[2] == steps[3]
    assert choose_training("tiny", 1).value.steps == 100
    assert choose_training("tiny", 5).value.steps == 500


def test_pretrained_nano_learns_object_scores_from_the_teacher():
    assert {choose_training("nano", n).value.object_score_target for n in (1, 2, 5, 500)} == {"teacher"}
    assert choose_training("nano", 5, from_scratch=True).value.object_score_target == "ground_truth"
    assert choose_training("tiny", 5).value.object_score_target == "ground_truth"


def test_nano_s_label_unet_may_add_structures_from_three_cases_on_unless_the_plan_says_otherwise():
    many = decide(fingerprint(*(case(str(number)) for number in range(9))))
    assert [training_for(many, n).can_add for n in (1, 2, 3, 20)] == [False, False, True, True]
    assert training_for(many, 1, from_scratch=True).can_add
    assert training_for(decide(fingerprint(case()), "tiny"), 1).can_add
    for can_add in (True, False):
        own = many.model_copy(update={"training": many.training.model_copy(update={"can_add": can_add})})
        assert [training_for(own, n).can_add for n in (1, 20)] == [can_add, can_add]
    longer = many.model_copy(update={"training": many.training.model_copy(update={"steps": 7})})
    assert [training_for(longer, n).can_add for n in (1, 20)] == [False, True]


def test_the_requested_network_is_used_and_unknown_ones_are_rejected():
    assert decide(fingerprint(case()), "tiny").network.size == "tiny"
    with pytest.raises(UsageError, match=r"--network huge: unknown network. Choose one of nano, tiny"):
        decide(fingerprint(case()), "huge")


def test_nothing_can_be_planned_without_a_case():
    with pytest.raises(DatasetError, match="no training case is usable"):
        decide(fingerprint())


def test_the_same_fingerprint_gives_the_same_plan():
    assert decide(fingerprint(case())) == decide(fingerprint(case()))


@pytest.mark.parametrize(
    ("radius_px", "pixel_mm", "tolerance"),
    [(30, 1.0, 2.0), (3, 1.0, 1.0), (4.5, 1.0, 1.5), (3, 0.5, 0.5), (1, 1.5, 1.5), (30, 3.0, 3.0)],
)
def test_the_tolerance_of_nsd_is_2_mm_and_less_for_thin_structures_but_never_below_a_pixel(radius_px, pixel_mm, tolerance):
    axes = ("SI", "AP", "LR")
    disc = round(3.14159265 * radius_px**2 * 10)
    tube = LabelFingerprint(voxels=disc, extents={"SI": Extent(first=0, last=9, slices=10)}, overlap=dict.fromkeys(axes, 0.5), copied={})
    measured = fingerprint(case(spacing=(2.0, pixel_mm, pixel_mm)).model_copy(update={"labels": {1: tube}}))
    assert choose_nsd_tolerance_mm(measured, "SI", pixel_mm).value == pytest.approx(tolerance, abs=0.01)


def test_without_a_measured_label_the_tolerance_is_2_mm():
    assert choose_nsd_tolerance_mm(fingerprint(case()), "SI", 1.0).value == 2.0


def test_all_other_settings_follow_the_requested_axis():
    wide = fingerprint(case(shape=(20, 100, 300), spacing=(3.0, 1.0, 1.0)))
    assert (decide(wide).geometry.slice_axis, decide(wide).geometry.storage_size) == ("SI", 320)  # 300 mm of 1 mm
    turned = decide(wide, axis=requested_axis(wide, "LR"), overrides=("geometry.slice_axis",))
    assert (turned.geometry.slice_axis, turned.geometry.storage_size) == ("LR", 128)  # 100 mm of 1 mm


def test_the_reason_for_a_requested_axis_names_the_one_that_the_data_suggest():
    thick = fingerprint(case(spacing=(3.0, 1.0, 1.0)))
    assert requested_axis(thick, "SI").reason == "set by the user; the data suggest the same axis"
    assert requested_axis(thick, "AP").reason.startswith("set by the user; the data suggest SI: coarsest axis")


def test_overrides_do_not_change_the_digest():
    plain = fingerprint(case())
    assert decide(plain, overrides=("geometry.slice_axis",)).digest == decide(plain).digest
    assert "overrides" not in decide(plain).model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("X-Ray", "XR"), ("CR chest", "XR"), ("red", "RGB"), ("PT", "PET"), ("us", "US"), ("T2_FLAIR", "MR"), ("dose", "unknown")],
)
def test_words_of_the_channel_name_determine_the_modality(name, kind):
    assert choose_modality(fingerprint(case(), channel=name), 0).value == kind


def hot(name, above):
    """A case whose labelled voxels reach 100, or 10 more, while 99.5 % of all voxels lie below 100."""
    return case(name).model_copy(
        update={"channels": (ChannelFingerprint(whole=values(high=100.0), foreground=values(high=110.0 if above else 100.0)),)}
    )


@pytest.mark.parametrize(
    ("channel", "cases", "upper"),
    [("PET", (True, True, False), 100.0), ("PET", (True, False), 100.0), ("PET", (True, False, False), 99.5), ("MRI", (True, True), 99.5)],
)
def test_pet_is_not_clipped_above_where_this_would_affect_labelled_voxels(channel, cases, upper):
    plan = decide(fingerprint(*(hot(f"c{i}", above) for i, above in enumerate(cases)), channel=channel))
    assert plan.intensity[0].upper == upper


def running(first, last, gap=0, through_mm=1.0, slices=400):
    """Return a case with the label on slices `first` to `last` except for one gap."""
    one = measured_cases.case(shape=(slices, 100, 100))
    extents = one.labels[1].extents | {"SI": Extent(first=first, last=last, slices=last - first + 1 - gap, gap=gap)}
    label = one.labels[1].model_copy(update={"extents": extents})
    return one.model_copy(update={"labels": {1: label}, "spacing_mm": (through_mm, 1.0, 1.0)})


def test_slice_spacing_is_kept_for_short_structures():
    assert choose_through_plane_mm([running(0, 47)], "SI").value is None


def test_slices_are_merged_for_long_structures():
    decision = choose_through_plane_mm([running(0, 99, through_mm=0.5)], "SI")  # 100 slices: 34 of three
    assert decision.value == 1.5 and "100 slices (median), more than 48: about 3 slices are merged into one" in decision.reason


def test_the_median_case_determines_the_length_of_structures():
    assert choose_through_plane_mm([running(0, 19), running(0, 29), running(0, 299)], "SI").value is None


def test_slices_are_not_merged_below_the_largest_spacing_of_any_case():
    decision = choose_through_plane_mm([running(0, 99), running(0, 99), running(0, 99, through_mm=7.5)], "SI")
    assert decision.value is None and "some cases have a slice spacing of 7.5 mm" in decision.reason


def test_propagation_stops_after_six_empty_slices_and_later_where_labels_have_gaps():
    assert choose_inference([running(10, 30)], "SI", 128).value.max_empty_slices == 6
    assert choose_inference([running(10, 30), running(10, 30, gap=10)], "SI", 128).value.max_empty_slices == 20


def test_propagation_never_stops_early_where_no_label_was_measured():
    assert choose_inference([running(10, 30).model_copy(update={"labels": {}})], "SI", 128).value.max_empty_slices is None


@pytest.mark.parametrize(("px", "batch"), [(64, 8), (128, 8), (256, 8), (512, 2), (1024, 1)])
def test_the_batch_has_at_most_the_pixels_of_eight_slices_of_256_pixels(px, batch):
    assert choose_inference([running(10, 30)], "SI", px).value.batch_slices == batch


def test_propagation_covers_the_label_and_max_empty_slices_beyond():
    assert propagated_slices(running(10, 30), 1, "SI", 6) == 21 + 12
    assert propagated_slices(running(2, 30), 1, "SI", 6) == 31 + 6  # two slices to the end of the volume
    assert propagated_slices(running(10, 395), 1, "SI", 6) == 386 + 6 + 4
    assert propagated_slices(running(10, 30), 1, "SI", None) == 400


def test_single_slices_do_not_influence_slice_spacing_or_max_empty_slices():
    one = running(0, 0, slices=1)
    assert choose_through_plane_mm([one], "SI").value is None
    assert choose_inference([one], "SI", 128).value.max_empty_slices is None


def test_merged_slices_shorten_propagation():
    one = running(10, 309, through_mm=0.5)
    assert stack_length(one, "SI", None) == 400 and stack_length(one, "SI", 1.0) == 200
    assert propagated_slices(one, 1, "SI", 6, 1.0) == 150 + 5 + 6  # from the fifth of them on
