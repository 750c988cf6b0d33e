"""Statistics from chunks equal those of numpy on the whole array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.planning.intensity_stats import MAX_HELD_VALUES, IntensityValues, sample_evenly, statistics, values_at_ranks

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
WHOLE = st.integers(-(10**9), 10**9).map(np.float32).map(float)


def intensities(values, length=None):
    """Return the values in chunks of a length."""
    values = np.asarray(values)
    length = length or max(1, len(values))
    return IntensityValues(lambda: (values[start : start + length] for start in range(0, len(values), length)))


def agrees_with_numpy(found, values):
    """Compare up to seven digits of the largest value."""
    values = values.astype(np.float64)
    size = np.abs(values).max()
    wanted = [values.mean(), values.std(), *np.percentile(values, [0.5, 50, 99.5]), values.min(), values.max()]
    assert found.voxels == len(values)
    measured = [found.mean, found.std, found.p00_5, found.median, found.p99_5, found.min, found.max]
    assert measured == pytest.approx(wanted, rel=1e-6, abs=1e-6 * size)


def test_percentiles_of_1001_numbers_do_not_depend_on_chunks():
    shuffled = np.random.default_rng(0).permutation(1001) - 500
    for kind in (np.int16, np.float32, np.float64):
        found = statistics(intensities(shuffled.astype(kind), length=7))
        assert (found.p00_5, found.median, found.p99_5) == (-495, 0, 495)
        assert (found.voxels, found.min, found.max, found.mean) == (1001, -500, 500, 0)


def test_percentiles_between_two_values_are_interpolated():
    found = statistics(intensities([0.0, 0.5]))
    assert (found.p00_5, found.median, found.p99_5) == (0.0025, 0.25, 0.4975)


def test_statistics_of_nothing_are_none():
    assert statistics(intensities([])) is None


def test_a_constant_has_no_spread():
    found = statistics(intensities(np.full(1000, 0.1, np.float32), length=64))
    assert (found.min, found.median, found.max) == (0.1, 0.1, 0.1)
    assert found.std == pytest.approx(0, abs=1e-9)


def test_statistics_survive_extreme_values():
    found = statistics(intensities(np.array([3e38, 3e38, 1], np.float32)))
    assert found.max == pytest.approx(3e38) and found.mean == pytest.approx(2e38)


def test_the_extreme_values_of_a_type_do_not_overflow():
    found = statistics(intensities(np.tile(np.array([-32768, 32767], np.int16), 50000), length=999))
    assert (found.min, found.median, found.max, found.std) == (-32768, -0.5, 32767, 32767.5)


def test_negative_zero_becomes_zero():
    assert str(statistics(intensities([-0.0])).median) == "0.0"


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.float64])
def test_more_values_than_are_held_in_memory_may_be_of_any_type(kind):
    values = np.random.default_rng(0).integers(0, 128, MAX_HELD_VALUES + 999).astype(kind)
    agrees_with_numpy(statistics(intensities(values, length=1 << 17)), values)


@pytest.mark.parametrize("scale", [1, 0.37])
def test_more_values_than_are_held_in_memory_have_numpy_s_statistics_and_sample(scale):
    values = np.float32(scale) * np.random.default_rng(0).permutation(MAX_HELD_VALUES + 1001).astype(np.float32)
    found = intensities(values, length=1 << 17)
    agrees_with_numpy(statistics(found), values)
    assert np.array_equal(sample_evenly(found, 10), np.sort(values)[((np.arange(10) + 0.5) * len(values) / 10).astype(int)])


def test_a_sample_is_evenly_spaced_in_ascending_order():
    assert sample_evenly(intensities(np.arange(100)[::-1], length=9), 4).tolist() == [12, 37, 62, 87]
    assert sample_evenly(intensities([3, 1, 2]), 4).tolist() == [1, 2, 3]
    assert sample_evenly(intensities([]), 4).tolist() == []


@given(arrays(np.float32, st.integers(1, 80), elements=FLOATS), st.integers(1, 30))
def test_floats_in_chunks_have_numpy_s_statistics(values, length):
    agrees_with_numpy(statistics(intensities(values, length)), values)


@given(arrays(np.float32, st.integers(1, 80), elements=WHOLE), st.integers(1, 30))
def test_whole_numbers_of_a_huge_range_stored_as_floats_have_numpy_s_statistics(values, length):
    agrees_with_numpy(statistics(intensities(values, length)), values)


@given(arrays(np.int16, st.integers(1, 80), elements=st.integers(-40, 40)), st.sampled_from([np.int16, np.float32]), st.integers(1, 30))
def test_small_whole_numbers_have_numpy_s_statistics(values, kind, length):
    agrees_with_numpy(statistics(intensities(values.astype(kind), length)), values)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 200), st.integers(1, 30))
def test_constants_have_numpy_s_statistics(value, count, length):
    values = np.full(count, value, np.float32)
    agrees_with_numpy(statistics(intensities(values, length)), values)


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
TYPES = [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def chunks_of(values, length):
    return lambda: (values[start : start + length] for start in range(0, len(values), length))


@pytest.mark.parametrize("kind", TYPES)
def test_values_at_ranks_are_found_among_shuffled_numbers(kind):
    shuffled = np.random.default_rng(0).permutation(np.arange(100).astype(kind))
    assert values_at_ranks(chunks_of(shuffled, 7), np.array([0, 1, 50, 98, 99]), max_held=3).tolist() == [0, 1, 50, 98, 99]


def test_negative_numbers_come_before_positive_ones():
    values = np.array([0.5, -3e38, 1e-40, -1e-40, 3e38, -0.5], np.float32)
    assert values_at_ranks(lambda: [values], np.arange(6), max_held=1).tolist() == np.sort(values).tolist()


def test_values_at_ranks_keep_their_type():
    assert values_at_ranks(lambda: [np.array([2, 1], np.int16)], np.array([0])).dtype == np.int16


@given(arrays(np.float32, st.integers(1, 60), elements=FINITE), st.integers(1, 20), st.integers(1, 60))
def test_floats_are_ranked_as_sorting_would_rank_them(values, length, held):
    assert values_at_ranks(chunks_of(values, length), np.arange(len(values)), held).tolist() == np.sort(values).tolist()


@given(st.sampled_from(TYPES[:6]), st.data(), st.integers(1, 20), st.integers(1, 60))
def test_whole_numbers_are_ranked_as_sorting_would_rank_them(kind, data, length, held):
    limits = np.iinfo(kind)
    values = data.draw(arrays(kind, st.integers(1, 60), elements=st.integers(int(limits.min), int(limits.max))))
    assert values_at_ranks(chunks_of(values, length), np.arange(len(values)), held).tolist() == np.sort(values).tolist()
