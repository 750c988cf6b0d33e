"""Averages and intervals that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from slmsam2_cli.evaluation.statistics import describe, describe_macro, interval, worst


def cases(metric, *values, **others):
    """Cases a, b, c, … with one value each of `metric`, and of others."""
    columns = {metric: values, **others}
    return [(chr(97 + i), {name: column[i] for name, column in columns.items()}) for i in range(len(values))]


def test_undefined_values_are_left_out_and_not_counted_in_n():
    found = describe(cases("Dice", 0.5, None, 0.9), "Dice")
    assert (found["n"], found["mean"], found["median"]) == (2, pytest.approx(0.7), pytest.approx(0.7))
    assert found["sd"] == pytest.approx(0.4 / np.sqrt(2))


def test_statistics_of_undefined_values_are_none_and_not_zero():
    found = describe(cases("Dice", None, None), "Dice")
    assert found == {
        "n": 0,
        "mean": None,
        "mean_penalised": None,
        "sd": None,
        "median": None,
        "q1": None,
        "q3": None,
        "ci95": None,
        "worst": None,
    }


def test_quartiles_of_one_to_five():
    found = describe(cases("Dice", 1, 2, 3, 4, 5), "Dice")
    assert (found["q1"], found["median"], found["q3"]) == (2, 3, 4)


def test_a_missed_organ_raises_only_the_penalised_mean():
    found = describe(cases("HD95", 2.0, None, HD95_penalised=(2.0, 100.0)), "HD95")
    assert (found["n"], found["mean"], found["mean_penalised"]) == (1, 2.0, 51.0)
    assert found["worst"] == {"case": "b", "value": 100.0}


def test_the_worst_case_is_the_lowest_agreement_or_the_largest_error_either_way():
    assert worst(cases("Dice", 0.9, 0.4, 0.8), "Dice") == {"case": "b", "value": 0.4}
    assert worst(cases("nsd@2", 0.9, 0.4, 0.2), "nsd@2") == {"case": "c", "value": 0.2}
    assert worst(cases("over_rate", 0.1, 0.4, 0.2), "over_rate") == {"case": "b", "value": 0.4}
    assert worst(cases("end_error_low_mm", 3.0, -6.0, 5.0), "end_error_low_mm") == {"case": "b", "value": -6.0}


def test_among_equal_cases_the_worst_is_the_first_by_name():
    assert worst(list(reversed(cases("Dice", 0.0, 0.0))), "Dice") == {"case": "a", "value": 0.0}


def test_the_interval_of_equal_values_is_that_value():
    assert interval(np.full((7, 1), 0.25)) == [0.25, 0.25]


def test_one_case_has_no_interval():
    assert interval(np.array([[0.5]])) is None


def test_the_interval_of_two_values_reaches_from_one_to_the_other():
    assert interval(np.array([[0.0], [1.0]])) == [0.0, 1.0]  # a quarter of all resamples draws one case twice


def test_the_interval_of_many_normal_values_is_the_theoretical_one():
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_the_interval_is_reproducible():
    values = np.random.default_rng(2).random((9, 3))
    assert interval(values) == interval(values.copy())


def test_every_label_has_the_same_weight_in_the_macro_mean():
    by_label = {"1": cases("Dice", 0.8, 0.6, 0.7), "2": cases("Dice", None, None, 0.1), "3": cases("Dice", None, None, None)}
    found = describe_macro(by_label, "Dice")
    assert (found["labels"], found["mean"]) == (2, pytest.approx(0.4))
    assert found["ci95"][0] < 0.4 < found["ci95"][1]


def test_statistics_without_cases_are_none():
    assert describe_macro({"1": [], "2": []}, "Dice") == {"labels": 0, "mean": None, "mean_penalised": None, "ci95": None}
    assert describe_macro({}, "Dice")["mean"] is None
