"""Grey values end between 0 and 1, whatever the scanner wrote."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.dataset.intensity import normalise, window_of

CT = SimpleNamespace(scheme="ct", lower=-100.0, upper=300.0)
MR = SimpleNamespace(scheme="percentile", lower=0.5, upper=99.5)


def row(*values):
    return np.array(values, dtype=np.float32).reshape(1, 1, 1, -1)


def test_a_ct_window_maps_its_ends_to_0_and_1_and_clips_the_rest():
    assert normalise(row(-1000, -100, 100, 300, 3000), [CT]).ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_percentiles_ignore_the_zeros_outside_the_scan():
    voxels = np.concatenate([np.zeros(9000), np.linspace(100, 200, 1001)])
    assert window_of(voxels, MR) == pytest.approx((100.5, 199.5))


@given(gain=st.sampled_from([112 / 255, 1.0, 1.7e6 / 255]), shift=st.sampled_from([0.0, 1.0]))
def test_scaling_an_mr_volume_does_not_change_its_normalised_values(gain, shift):
    grey = np.random.default_rng(0).uniform(1, 255, (1, 4, 5, 6))
    assert normalise(grey * gain, [MR]) == pytest.approx(normalise(grey, [MR]), abs=1e-6)


def test_one_hot_voxel_does_not_darken_the_rest():
    grey = np.linspace(1, 100, 10_000).reshape(1, 10, 10, 100)
    failed = grey.copy()
    failed[0, 0, 0, 0] = 1.7e6
    assert np.abs(normalise(failed, [MR]) - normalise(grey, [MR]))[0, 1:].max() < 0.01


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
@pytest.mark.parametrize("scheme", [MR, CT])
def test_a_constant_volume_is_finite(value, scheme):
    assert np.isfinite(normalise(np.full((1, 2, 3, 4), value), [scheme])).all()


def test_a_constant_mr_becomes_zeros():
    assert not normalise(np.full((1, 2, 3, 4), 7.0), [MR]).any()


def test_a_nearly_constant_volume_is_scaled_by_its_extremes():
    voxels = np.zeros((1, 1, 10, 200))
    voxels[0, 0, 0, 0] = 9
    assert normalise(voxels, [MR]).max() == 1


def test_extreme_values_do_not_overflow():
    assert np.isfinite(normalise(row(1, 2, 3e38), [MR])).all()


def test_channels_are_scaled_each_by_its_own_rule():
    both = normalise(np.concatenate([row(-100, 300), row(1, 2)]), [CT, MR])
    assert both.dtype == np.float32
    assert both.reshape(2, 2) == pytest.approx(np.array([[0, 1], [0, 1]]), abs=0.01)


def test_another_number_of_channels_than_planned_is_rejected():
    with pytest.raises(ValueError, match="1 channels of voxels but 2 in the plan"):
        normalise(row(1, 2), [CT, MR])
