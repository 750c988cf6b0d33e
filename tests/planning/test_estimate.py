"""What a run will need: answers by hand, from the constants that were measured."""

from __future__ import annotations

from inspect import signature

import pytest
from golden.data_sets import NAMES, golden_fingerprint, golden_plan
from measured_cases import case, known

from slmsam2_cli.inference import propagation
from slmsam2_cli.model import label_unet
from slmsam2_cli.planning import estimate
from slmsam2_cli.planning.estimate import (
    MIB,
    Estimate,
    estimate_finetuning,
    estimate_prediction,
    format_estimate,
    label_unet_size,
    longest_clip,
)
from slmsam2_cli.planning.rules import decide
from slmsam2_cli.training import cross_validation, dataloader
from slmsam2_cli.training import label_unet as label_unet_training


def test_predicting_needs_the_libraries_the_volume_and_what_is_kept_of_its_slices():
    small = known(case())
    # 440 MiB + 100,000 voxels of 11 + 8 bytes + 10 slices of 1.64 MiB
    assert estimate_prediction(decide(small), small.cases).memory_bytes == pytest.approx(456.4 * MIB + 1.9e6, rel=1e-6)


def test_the_largest_volume_decides_how_much_memory_predicting_needs():
    both = known(case(), case("b", shape=(200, 100, 100)))
    alone = known(case("b", shape=(200, 100, 100)))
    assert estimate_prediction(decide(both), both.cases).memory_bytes == estimate_prediction(decide(alone), alone.cases).memory_bytes


def test_what_is_kept_of_slices_is_bounded():
    endless = known(case(shape=(100_000, 10, 10)))
    # 440 MiB + 10 million voxels of 19 bytes + 2 GiB instead of 160
    assert estimate_prediction(decide(endless), endless.cases).memory_bytes == pytest.approx((440 + 2048) * MIB + 1.9e8, rel=1e-6)


def test_tuning_needs_what_every_slice_and_track_of_a_clip_keeps():
    small = known(case())
    # one label, so 2 tracks: 440 + 94 + 8 * 40 + 7 * 2 * 18 MiB, 80 to ask the base,
    # and 25 maps of 16 slices, 48 * 48 pixels and 32 channels of 4 bytes
    wanted = (440 + 94 + 320 + 252 + 80) * MIB + 25 * 4 * 16 * 48 * 48 * 32
    assert estimate_finetuning(decide(small), small, 1).memory_bytes == wanted


@pytest.mark.parametrize(("span", "px", "width"), [(10, 48, 32), (28, 64, 32), (40, 80, 16), (90, 128, 16)])
def test_the_label_unet_sees_twice_what_is_annotated(span, px, width):
    one = known(case(span=span))
    assert label_unet_size(decide(one), one.cases) == (px, width)  # 2 * span, in steps of 16, from 48 to 128


def test_a_shorter_clip_is_proposed_where_memory_is_short():
    small = known(case())
    plan, whole = decide(small), estimate_finetuning(decide(small), small, 1).memory_bytes
    assert longest_clip(plan, small, whole) == 8
    assert longest_clip(plan, small, whole - 1) == 7
    assert longest_clip(plan, small, whole - 3 * 76 * MIB) == 5  # a slice less: 40 + 2 * 18 MiB
    assert longest_clip(plan, small, 500 * MIB) is None


def test_a_slower_machine_takes_longer_in_proportion():
    small = known(case(), case("b"))
    plan = decide(small)
    at = [estimate_finetuning(plan, small, 1, pace).seconds for pace in (0.1, 0.2, 0.3)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0]) and at[1] > 1.9 * at[0] - 10


def test_more_volumes_take_more_steps():
    small = known(case(), case("b"))
    # 200 + 80 n steps, and before them a fifth of these once, or three tenths twice
    one, two = (estimate_finetuning(decide(small), small, n, 10.0).seconds for n in (1, 2))
    assert two / one == pytest.approx(360 * 1.6 / (280 * 1.2), rel=0.01)


def test_without_validation_its_time_is_saved():
    small = known(case())
    plan = decide(small)
    without = plan.model_copy(update={"training": plan.training.model_copy(update={"validation": "none"})})
    assert estimate_finetuning(plan, small, 1, 10.0).seconds / estimate_finetuning(without, small, 1, 10.0).seconds == pytest.approx(
        1.2, rel=0.01
    )


def test_no_more_time_is_estimated_than_the_plan_allows():
    small = known(case())
    plan = decide(small)
    short = plan.model_copy(update={"training": plan.training.model_copy(update={"minutes": 2.0})})
    assert estimate_finetuning(short, small, 1, 10.0).seconds == 120


def test_of_a_network_that_was_not_measured_nothing_is_estimated():
    small = known(case())
    assert estimate_prediction(decide(small, "tiny"), small.cases) is None and estimate_finetuning(decide(small, "tiny"), small, 1) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "-"), (3.4, "3 s"), (42.0, "40 s"), (90.0, "2 min"), (754.0, "13 min"), (7200.0, "2.0 h")]
)
def test_times_are_told_as_roughly_as_they_are_known(seconds, words):
    assert format_estimate(Estimate(1_540_000_000, seconds)) == (words, "1.5 GB")


def test_what_the_cost_knows_of_training_and_inference_is_what_they_do():
    assert (estimate.TRACKS, estimate.BATCH, estimate.LABEL_UNET_ROI_SCALE) == (
        dataloader.TRACKS_PER_WINDOW,
        label_unet_training.BATCH,
        label_unet.FOCUS,
    )
    assert (estimate.MIN_LABEL_UNET_SIZE, estimate.NARROW_LABEL_UNET_SIZE, estimate.MAX_LABEL_UNET_SIZE) == (
        label_unet_training._LEAST_PX,
        label_unet_training._FEW_PX,
        label_unet_training._MOST_PX,
    )
    assert (estimate.FOLDS, estimate.SHARE, estimate.SINGLE_CASE_FRACTION) == (
        cross_validation.FOLDS,
        cross_validation.SHARE,
        cross_validation.SINGLE_CASE_FRACTION,
    )
    assert 2 * len(cross_validation.LOOKS) + 2 == estimate.VALIDATION_PASSES
    assert signature(propagation.FeatureCache).parameters["keep_bytes"].default == estimate.MAX_CACHED_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_every_real_data_set_fits_a_laptop(name):
    assert estimate_finetuning(golden_plan(name), golden_fingerprint(name), 5).memory_bytes < 2e9
