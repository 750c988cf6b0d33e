"""Calibration: a known miscalibration is recovered on other slices, and too few slices give no table."""

import numpy as np
import pytest
from pydantic import ValidationError

from slmsam2_cli.model.calibration import Calibration, calibrate, calibration_error


def overconfident(slices, seed):
    """Confidence c where the Dice is c squared with some noise."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.05, 1, slices)
    return raw, np.clip(raw**2 + rng.normal(0, 0.05, slices), 0, 1)


@pytest.mark.parametrize(
    ("slices", "method", "close"), [(30, "logistic", 0.12), (59, "logistic", 0.08), (60, "isotonic", 0.16), (2000, "isotonic", 0.03)]
)
def test_a_known_monotone_miscalibration_is_recovered(slices, method, close):
    found = calibrate(*overconfident(slices, seed=1))
    assert found.method == method and found.slices == slices
    probe = np.linspace(0.1, 0.98, 45)
    assert np.abs(found(probe) - probe**2).max() < close


@pytest.mark.parametrize("slices", [40, 60, 400])
def test_the_calibration_error_falls_on_slices_that_were_not_fitted_on(slices):
    raw, measured = overconfident(1000, seed=2)
    found = calibrate(*overconfident(slices, seed=3))
    before, after = calibration_error(raw, measured), calibration_error(found(raw), measured)
    assert before > 0.12 and after < before / 3
    assert found.error_after < found.error_before


@pytest.mark.parametrize("slices", [40, 80])
def test_nearly_equal_confidences_are_separated_where_their_dice_differs(slices):
    """As after a short training: confidence is 0.33 to 0.36, the highest third of it has a Dice of 0.9, the rest 0.2."""
    raw = np.linspace(0.33, 0.36, slices)
    measured = np.where(raw > 0.35, 0.9, 0.2)
    found = calibrate(raw, measured)
    assert found(np.array(0.335)) < 0.3 and found(np.array(0.359)) > 0.8
    assert found.error_before > 0.2 and found.error_after < 0.6 * found.error_before


def test_confidence_that_equals_the_dice_gives_no_table():
    raw = np.linspace(0.1, 0.9, 30)
    assert calibrate(raw, raw) is None


def test_calibrated_confidence_changes_by_less_than_0_02():
    rng = np.random.default_rng(4)
    raw = rng.uniform(0, 1, 600)
    found = calibrate(raw, np.clip(raw + rng.normal(0, 0.03, 600), 0, 1))
    assert np.abs(found(raw) - raw).mean() < 0.02


def test_fewer_than_twenty_slices_give_no_table():
    assert calibrate(*overconfident(19, seed=1)) is None
    assert calibrate([], []) is None
    assert calibrate(*overconfident(20, seed=1)) is not None


@pytest.mark.parametrize("slices", [20, 300])
def test_one_confidence_for_all_slices_becomes_their_mean_dice(slices):
    found = calibrate(np.full(slices, 0.9), np.full(slices, 0.3))
    assert float(found(np.array(0.9))) == pytest.approx(0.3, abs=0.05)


def test_a_dice_that_falls_with_confidence_gives_a_flat_table():
    raw = np.linspace(0, 1, 400)
    for slices in (slice(None, None, 4), slice(None)):
        found = calibrate(raw[slices], 1 - raw[slices])
        assert np.ptp(found(raw)) < 0.02 and (np.diff(found.dice) >= 0).all()


def test_groups_whose_dice_falls_with_confidence_are_pooled_to_their_mean():
    """Six groups of ten slices; the third has a lower Dice than the second, so both get the mean of 0.6 and 0.4."""
    raw = np.repeat([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 10)
    found = calibrate(raw, np.repeat([0.3, 0.6, 0.4, 0.7, 0.8, 0.9], 10))
    assert found.confidence == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6) and found.dice == (0.3, 0.5, 0.5, 0.7, 0.8, 0.9)


def test_the_error_of_a_constant_gap_is_the_gap():
    raw = np.linspace(0.2, 0.9, 50)
    assert calibration_error(raw, raw - 0.1) == pytest.approx(0.1)


def test_a_calibration_is_the_same_after_json():
    found = calibrate(*overconfident(300, seed=1))
    assert Calibration.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("table", [((0.0, 1.0), (0.9, 0.1)), ((1.0, 0.0), (0.1, 0.9)), ((0.0, 1.0), (0.5,)), ((0.0, 1.0), (0.0, 2.0))])
def test_a_table_that_does_not_ascend_from_0_to_1_is_rejected(table):
    with pytest.raises(ValidationError):
        Calibration(method="logistic", confidence=table[0], dice=table[1], slices=30, error_before=0, error_after=0)
