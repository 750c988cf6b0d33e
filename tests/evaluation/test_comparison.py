"""Comparing two predictions of the same cases: differences that can be computed by hand."""

from __future__ import annotations

import pytest

from slmsam2_cli.evaluation.comparison import MACRO, compare


def summary(dice, *, held_out=True, hd95=None, failed=(), unknown=()):
    """A summary with Dice by case and label: {"a": {"1": 0.8}}; None: both masks are empty, but for `unknown` cases."""
    labels = {label: f"name {label}" for values in dice.values() for label in values}

    def record(case, label, value):
        status = None if case in unknown else "both_empty" if value is None else "ok"
        return {"status": status, "Dice": value, "HD95_penalised": (hd95 or {}).get(case), "assd_mm_penalised": None, "nsd@2": None}

    def entry(case, values):
        records = {label: record(case, label, value) for label, value in values.items()}
        status = "failed" if case in failed else "ok"
        return {"case": case, "status": status, "group": "held_out" if held_out else "training", "metrics": records, "unprompted": records}

    cases = [entry(case, values) for case, values in dice.items()]
    definitions = {"nsd_tolerance_mm": 2.0}
    return {"tool": "slmsam2", "tool_version": "1", "definitions": definitions, "labels": labels, "metric_per_case": cases}


def row(found, metric="Dice", label="1", part="all"):
    return next(r for r in found["pairs"] if (r["metric"], r["label"], r["part"]) == (metric, label, part))


def test_the_difference_is_second_minus_first_over_shared_cases():
    found = row(compare({"old": summary({"a": {"1": 0.5}, "b": {"1": 0.7}}), "new": summary({"a": {"1": 0.6}, "b": {"1": 0.9}})}))
    assert (found["n"], found["first_mean"], found["second_mean"]) == (2, pytest.approx(0.6), pytest.approx(0.75))
    assert found["difference"] == pytest.approx(0.15)
    assert (found["second_better"], found["first_better"], found["equal"]) == (2, 0, 0)


def test_the_interval_of_equal_differences_is_that_difference():
    cases = {name: {"1": 0.1 * i} for i, name in enumerate("abcde")}
    better = {name: {"1": values["1"] + 0.25} for name, values in cases.items()}
    assert row(compare({"old": summary(cases), "new": summary(better)}))["ci95"] == pytest.approx([0.25, 0.25])


def test_one_case_has_no_interval():
    assert row(compare({"old": summary({"a": {"1": 0.5}}), "new": summary({"a": {"1": 0.6}})}))["ci95"] is None


def test_a_smaller_distance_is_the_better_one():
    dice = {"a": {"1": 0.5}}
    found = row(compare({"old": summary(dice, hd95={"a": 9.0}), "new": summary(dice, hd95={"a": 4.0})}), "HD95_penalised")
    assert (found["difference"], found["second_better"], found["first_better"]) == (-5.0, 1, 0)


def test_cases_that_failed_in_one_prediction_are_listed_and_not_compared():
    found = compare({"old": summary({"a": {"1": 0.5}, "b": {"1": 0.1}}, failed="b"), "new": summary({"a": {"1": 0.6}, "b": {"1": 0.9}})})
    assert (found["cases"], found["not_compared"], row(found)["n"]) == (["a"], ["b"], 1)


def test_training_cases_are_not_compared():
    found = compare({"old": summary({"a": {"1": 0.5}}), "new": summary({"a": {"1": 0.6}}, held_out=False)})
    assert (found["cases"], row(found)["difference"]) == ([], None)


def test_a_label_with_unknown_status_in_one_prediction_is_not_compared():
    found = compare({"old": summary({"a": {"1": None}, "b": {"1": 0.5}}, unknown="a"), "new": summary({"a": {"1": 0.0}, "b": {"1": 0.5}})})
    assert (row(found)["n"], row(found)["difference"], row(found)["equal"]) == (1, 0.0, 1)


@pytest.mark.parametrize("correct", [{"1": 0.5, "2": None}, {"1": 0.5}])
def test_a_structure_that_does_not_exist_counts_against_the_prediction_that_has_it(correct):
    """Also where the other summary does not list the label, because it occurs nowhere."""
    found = compare({"clean": summary({"a": correct}), "wrong": summary({"a": {"1": 0.5, "2": 0.0}}, hd95={"a": 70.0})})
    assert (row(found, label="2")["difference"], row(found, label="2")["first_better"]) == (-1.0, 1)
    assert row(found, "HD95_penalised", label="2")["difference"] == 70.0
    assert row(found, label=MACRO)["difference"] == -0.5


def test_every_label_has_the_same_weight_in_the_foreground_difference():
    found = compare({"old": summary({"a": {"1": 0.5, "2": 0.5}}), "new": summary({"a": {"1": 0.7, "2": 0.5}})})
    assert row(found, label=MACRO)["difference"] == pytest.approx(0.1)


def test_every_pair_of_three_is_compared():
    found = compare({name: summary({"a": {"1": 0.5}}) for name in ("x", "y", "z")})
    assert sorted({(r["first"], r["second"]) for r in found["pairs"]}) == [("x", "y"), ("x", "z"), ("y", "z")]
