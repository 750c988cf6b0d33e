"""Estimates of memory and time: answers by hand, from the measured constants."""

from __future__ import annotations

import pytest
from golden.data_sets import NAMES, golden_fingerprint, golden_plan
from measured_cases import case, known

from slmsam2_cli.dataset.cache import PreprocessSettings, open_prepared, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.planning.estimate import (
    MIB,
    STARTUP_SECONDS,
    Estimate,
    estimate_finetuning,
    estimate_prediction,
    format_estimate,
    label_unet_size,
    longest_clip,
)
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.rules import decide
from slmsam2_cli.training.label_unet import SliceSampler


def test_prediction_memory_is_libraries_plus_volume_plus_cached_slices():
    small = known(case())
    # 440 MiB + 100,000 voxels of 11 + 8 bytes + 10 slices of 1.64 MiB
    assert estimate_prediction(decide(small), small.cases).memory_bytes == pytest.approx(456.4 * MIB + 1.9e6, rel=1e-6)


def test_the_largest_volume_determines_the_memory_of_prediction():
    both = known(case(), case("b", shape=(200, 100, 100)))
    alone = known(case("b", shape=(200, 100, 100)))
    assert estimate_prediction(decide(both), both.cases).memory_bytes == estimate_prediction(decide(alone), alone.cases).memory_bytes


def test_the_cache_of_slices_is_limited_to_2_gib():
    endless = known(case(shape=(100_000, 10, 10)))
    # 440 MiB + 10 million voxels of 19 bytes + 2 GiB instead of 160
    assert estimate_prediction(decide(endless), endless.cases).memory_bytes == pytest.approx((440 + 2048) * MIB + 1.9e8, rel=1e-6)


def test_finetuning_memory_grows_with_slices_and_passes_of_a_clip():
    small = known(case())
    # one label, so 2 tracks: 440 + 94 + 8 * 40 + 7 * 2 * 18 MiB, 80 for the teacher,
    # and 25 maps of 16 slices, 48 * 48 pixels and 32 channels of 4 bytes
    wanted = (440 + 94 + 320 + 252 + 80) * MIB + 25 * 4 * 16 * 48 * 48 * 32
    assert estimate_finetuning(decide(small), small, 1).memory_bytes == wanted


@pytest.mark.parametrize(("span", "px", "width"), [(10, 48, 32), (28, 64, 32), (40, 80, 16), (90, 128, 16)])
def test_the_label_unet_sees_twice_the_extent_of_the_labels(span, px, width):
    one = known(case(span=span))
    assert label_unet_size(decide(one), one.cases) == (px, width)  # 2 * span, in steps of 16, from 48 to 128


def test_the_longest_clip_that_fits_in_memory_is_found():
    small = known(case())
    plan, whole = decide(small), estimate_finetuning(decide(small), small, 1).memory_bytes
    assert longest_clip(plan, small, whole) == 8
    assert longest_clip(plan, small, whole - 1) == 7
    assert longest_clip(plan, small, whole - 3 * 76 * MIB) == 5  # a slice less: 40 + 2 * 18 MiB
    assert longest_clip(plan, small, 500 * MIB) is None


def test_a_slower_machine_takes_longer_in_proportion():
    small = known(case(), case("b"))
    plan = decide(small)
    at = [estimate_finetuning(plan, small, 1, seconds).seconds for seconds in (0.1, 0.2, 0.3)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0]) and at[1] > 1.9 * at[0] - 10


def test_more_volumes_take_more_steps():
    small = known(case(), case("b"))
    # 200 + 80 n steps, and before them a fifth of these once, or three tenths twice
    one, two = (estimate_finetuning(decide(small), small, n, 10.0).seconds for n in (1, 2))
    assert two / one == pytest.approx(360 * 1.6 / (280 * 1.2), rel=0.01)


def test_two_workers_halve_the_time_of_two_cases_but_not_of_one():
    small = known(case(), case("b"))
    one, two = (estimate_prediction(decide(small), small.cases, 10.0, workers).seconds - STARTUP_SECONDS for workers in (1, 2))
    assert one / two == pytest.approx(2)
    alone = known(case())
    one, two = (estimate_prediction(decide(alone), alone.cases, 10.0, workers).seconds for workers in (1, 2))
    assert one == two


def test_two_workers_train_two_folds_at_a_time():
    small = known(case(), case("b"))
    one, two = (estimate_finetuning(decide(small), small, 2, 10.0, workers).seconds for workers in (1, 2))
    assert two / one == pytest.approx(1.3 / 1.6, rel=0.01)  # the run, and three tenths of it twice, or once


def test_finetuning_without_cross_validation_takes_a_sixth_less_time():
    small = known(case())
    plan = decide(small)
    without = plan.model_copy(update={"training": plan.training.model_copy(update={"validation": "none"})})
    assert estimate_finetuning(plan, small, 1, 10.0).seconds / estimate_finetuning(without, small, 1, 10.0).seconds == pytest.approx(
        1.2, rel=0.01
    )


def test_the_estimate_is_at_most_the_plan_s_time_limit():
    small = known(case())
    plan = decide(small)
    short = plan.model_copy(update={"training": plan.training.model_copy(update={"minutes": 2.0})})
    assert estimate_finetuning(short, small, 1, 10.0).seconds == 120


def test_only_nano_has_estimates():
    small = known(case())
    assert estimate_prediction(decide(small, "tiny"), small.cases) is None and estimate_finetuning(decide(small, "tiny"), small, 1) is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "-"), (3.4, "3 s"), (42.0, "40 s"), (90.0, "2 min"), (754.0, "13 min"), (7200.0, "2.0 h")]
)
def test_times_are_rounded(seconds, words):
    assert format_estimate(Estimate(1_540_000_000, seconds)) == (words, "1.5 GB")


def test_the_estimated_input_of_the_label_unet_is_the_one_it_is_trained_with(tmp_path):
    write_phantom_dataset(tmp_path, cases=2, test_cases=0, shape=(8, 48, 48))
    data = read_dataset(tmp_path)
    fingerprint, _ = measure(data)
    plan = decide(fingerprint)
    prepare_all(data, PreprocessSettings(plan.geometry, plan.intensity), tmp_path / "prepared")
    cases = [open_prepared(tmp_path / "prepared", case.id) for case in data.training]
    trained = SliceSampler(cases, tuple(plan.labels), plan.geometry.storage_size).input_size
    estimated, _ = label_unet_size(plan, fingerprint.cases)
    assert estimated - 16 <= trained <= estimated  # single slices may be smaller than all of them together


@pytest.mark.parametrize("name", NAMES)
def test_every_real_dataset_can_be_finetuned_with_2_gb(name):
    assert estimate_finetuning(golden_plan(name), golden_fingerprint(name), 5).memory_bytes < 2e9
