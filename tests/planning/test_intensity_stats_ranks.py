"""What is the n-th in the order of size does not depend on how much is looked at at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli.planning.intensity_stats import at_ranks

FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
TYPES = [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def pieces_of(values, length):
    return lambda: (values[start : start + length] for start in range(0, len(values), length))


@pytest.mark.parametrize("kind", TYPES)
def test_a_hundred_numbers_shuffled_into_pieces_are_found_in_order(kind):
    shuffled = np.random.default_rng(0).permutation(np.arange(100).astype(kind))
    assert at_ranks(pieces_of(shuffled, 7), np.array([0, 1, 50, 98, 99]), held=3).tolist() == [0, 1, 50, 98, 99]


def test_negative_numbers_come_before_positive_ones():
    values = np.array([0.5, -3e38, 1e-40, -1e-40, 3e38, -0.5], np.float32)
    assert at_ranks(lambda: [values], np.arange(6), held=1).tolist() == np.sort(values).tolist()


def test_the_type_is_kept():
    assert at_ranks(lambda: [np.array([2, 1], np.int16)], np.array([0])).dtype == np.int16


@given(arrays(np.float32, st.integers(1, 60), elements=FLOATS), st.integers(1, 20), st.integers(1, 60))
def test_floats_are_ranked_as_sorting_would_rank_them(values, length, held):
    assert at_ranks(pieces_of(values, length), np.arange(len(values)), held).tolist() == np.sort(values).tolist()


@given(st.sampled_from(TYPES[:6]), st.data(), st.integers(1, 20), st.integers(1, 60))
def test_whole_numbers_are_ranked_as_sorting_would_rank_them(kind, data, length, held):
    limits = np.iinfo(kind)
    values = data.draw(arrays(kind, st.integers(1, 60), elements=st.integers(int(limits.min), int(limits.max))))
    assert at_ranks(pieces_of(values, length), np.arange(len(values)), held).tolist() == np.sort(values).tolist()
