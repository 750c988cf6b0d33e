"""Grey values in numbers: what numpy finds in the whole array, found a piece at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.planning.intensity_stats import HELD, Greys, sample_evenly, statistics

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
WHOLE = st.integers(-(10**9), 10**9).map(np.float32).map(float)


def greys(values, length=None):
    """The values, cut into pieces of a length."""
    values = np.asarray(values)
    length = length or max(1, len(values))
    return Greys(lambda: (values[start : start + length] for start in range(0, len(values), length)))


def agrees_with_numpy(found, values):
    """To seven digits of the largest value: what is near zero has no more."""
    values = values.astype(np.float64)
    size = np.abs(values).max()
    wanted = [values.mean(), values.std(), *np.percentile(values, [0.5, 50, 99.5]), values.min(), values.max()]
    assert found.voxels == len(values)
    measured = [found.mean, found.std, found.p00_5, found.median, found.p99_5, found.min, found.max]
    assert measured == pytest.approx(wanted, rel=1e-6, abs=1e-6 * size)


def test_percentiles_of_a_thousand_and_one_numbers_across_the_borders_of_pieces():
    shuffled = np.random.default_rng(0).permutation(1001) - 500
    for kind in (np.int16, np.float32, np.float64):
        found = statistics(greys(shuffled.astype(kind), length=7))
        assert (found.p00_5, found.median, found.p99_5) == (-495, 0, 495)
        assert (found.voxels, found.min, found.max, found.mean) == (1001, -500, 500, 0)


def test_percentiles_between_two_values_are_interpolated():
    found = statistics(greys([0.0, 0.5]))
    assert (found.p00_5, found.median, found.p99_5) == (0.0025, 0.25, 0.4975)


def test_statistics_of_nothing_are_none():
    assert statistics(greys([])) is None


def test_a_constant_has_no_spread():
    found = statistics(greys(np.full(1000, 0.1, np.float32), length=64))
    assert (found.min, found.median, found.max) == (0.1, 0.1, 0.1)
    assert found.std == pytest.approx(0, abs=1e-9)


def test_statistics_survive_extreme_values():
    found = statistics(greys(np.array([3e38, 3e38, 1], np.float32)))
    assert found.max == pytest.approx(3e38) and found.mean == pytest.approx(2e38)


def test_the_farthest_values_of_a_type_do_not_overflow_it():
    found = statistics(greys(np.tile(np.array([-32768, 32767], np.int16), 50000), length=999))
    assert (found.min, found.median, found.max, found.std) == (-32768, -0.5, 32767, 32767.5)


def test_no_number_is_a_negative_zero():
    assert str(statistics(greys([-0.0])).median) == "0.0"


@pytest.mark.parametrize("scale", [1, 0.37])
def test_more_values_than_are_held_at_one_time_are_ranked_all_the_same(scale):
    values = np.float32(scale) * np.random.default_rng(0).permutation(HELD + 1001).astype(np.float32)
    found = greys(values, length=1 << 17)
    agrees_with_numpy(statistics(found), values)
    assert np.array_equal(sample_evenly(found, 10), np.sort(values)[((np.arange(10) + 0.5) * len(values) / 10).astype(int)])


def test_a_sample_is_evenly_spread_and_needs_no_chance():
    assert sample_evenly(greys(np.arange(100)[::-1], length=9), 4).tolist() == [12, 37, 62, 87]
    assert sample_evenly(greys([3, 1, 2]), 4).tolist() == [1, 2, 3]
    assert sample_evenly(greys([]), 4).tolist() == []


@given(arrays(np.float32, st.integers(1, 80), elements=FLOATS), st.integers(1, 30))
def test_floats_in_pieces_have_numpy_s_statistics(values, length):
    agrees_with_numpy(statistics(greys(values, length)), values)


@given(arrays(np.float32, st.integers(1, 80), elements=WHOLE), st.integers(1, 30))
def test_whole_numbers_of_a_huge_range_stored_as_floats_have_numpy_s_statistics(values, length):
    agrees_with_numpy(statistics(greys(values, length)), values)


@given(arrays(np.int16, st.integers(1, 80), elements=st.integers(-40, 40)), st.sampled_from([np.int16, np.float32]), st.integers(1, 30))
def test_whole_numbers_that_are_counted_have_numpy_s_statistics(values, kind, length):
    agrees_with_numpy(statistics(greys(values.astype(kind), length)), values)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 200), st.integers(1, 30))
def test_constants_have_numpy_s_statistics(value, count, length):
    values = np.full(count, value, np.float32)
    agrees_with_numpy(statistics(greys(values, length)), values)
