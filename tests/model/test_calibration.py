"""Calibration: a known miscalibration is found again, on slices that were not fitted on, and nothing is made of too few."""

import numpy as np
import pytest
from pydantic import ValidationError

from slmsam2_cli.model.calibration import Calibration, calibrate, calibration_error, isotonic


def overconfident(slices, seed):
    """Says c where the Dice is c squared, give or take."""
    rng = np.random.default_rng(seed)
    said = rng.uniform(0.05, 1, slices)
    return said, np.clip(said**2 + rng.normal(0, 0.05, slices), 0, 1)


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
    said, true = overconfident(1000, seed=2)
    found = calibrate(*overconfident(slices, seed=3))
    before, after = calibration_error(said, true), calibration_error(found(said), true)
    assert before > 0.12 and after < before / 3
    assert found.error_after < found.error_before


@pytest.mark.parametrize("slices", [40, 80])
def test_confidences_that_are_nearly_alike_are_told_apart_where_the_dice_is(slices):
    """As after a short training: 0.33 to 0.36 everywhere, the surest third good, the rest bad."""
    said = np.linspace(0.33, 0.36, slices)
    true = np.where(said > 0.35, 0.9, 0.2)
    found = calibrate(said, true)
    assert found(np.array(0.335)) < 0.3 and found(np.array(0.359)) > 0.8
    assert found.error_before > 0.2 and found.error_after < 0.6 * found.error_before


def test_a_table_that_says_no_more_than_the_confidence_is_none():
    said = np.linspace(0.1, 0.9, 30)
    assert calibrate(said, said) is None


def test_what_is_calibrated_already_hardly_changes():
    rng = np.random.default_rng(4)
    said = rng.uniform(0, 1, 600)
    found = calibrate(said, np.clip(said + rng.normal(0, 0.03, 600), 0, 1))
    assert np.abs(found(said) - said).mean() < 0.02


def test_fewer_than_twenty_slices_say_nothing():
    assert calibrate(*overconfident(19, seed=1)) is None
    assert calibrate([], []) is None
    assert calibrate(*overconfident(20, seed=1)) is not None


@pytest.mark.parametrize("slices", [20, 300])
def test_one_confidence_for_all_slices_becomes_their_mean_dice(slices):
    found = calibrate(np.full(slices, 0.9), np.full(slices, 0.3))
    assert float(found(np.array(0.9))) == pytest.approx(0.3, abs=0.05)


def test_confidence_that_runs_the_wrong_way_becomes_flat_and_never_falls():
    said = np.linspace(0, 1, 400)
    for slices in (slice(None, None, 4), slice(None)):
        found = calibrate(said[slices], 1 - said[slices])
        assert np.ptp(found(said)) < 0.02 and (np.diff(found.dice) >= 0).all()


def test_adjacent_violators_are_pooled_to_their_weighted_mean():
    assert isotonic(np.array([1.0, 3.0, 2.0, 4.0]), np.ones(4)).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert isotonic(np.array([2.0, 1.0]), np.array([3.0, 1.0])).tolist() == [1.75, 1.75]
    assert isotonic(np.array([3.0, 2.0, 1.0]), np.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_pooling_is_scipys_isotonic_regression():
    regression = pytest.importorskip("scipy.optimize").isotonic_regression
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=200), rng.uniform(0.5, 2, 200)
    assert np.allclose(isotonic(values, weights), regression(values, weights=weights).x)


def test_the_error_of_a_constant_gap_is_the_gap():
    said = np.linspace(0.2, 0.9, 50)
    assert calibration_error(said, said - 0.1) == pytest.approx(0.1)


def test_it_survives_being_written_as_text():
    found = calibrate(*overconfident(300, seed=1))
    assert Calibration.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("table", [((0.0, 1.0), (0.9, 0.1)), ((1.0, 0.0), (0.1, 0.9)), ((0.0, 1.0), (0.5,)), ((0.0, 1.0), (0.0, 2.0))])
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(ValidationError):
        Calibration(method="logistic", confidence=table[0], dice=table[1], slices=30, error_before=0, error_after=0)
