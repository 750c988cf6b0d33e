"""Several predictions of the same cases, side by side: who is better, by how much, and how sure that is.

Differences are paired: case by case, then averaged, with a bootstrap interval over cases. Only cases held-out to every prediction count,
and distances are the penalised ones, so that leaving out the hard cases is no way to win. Nor is inventing structures: whoever rightly
holds nothing is perfect beside one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from slmsam2_cli.evaluation import statistics
from slmsam2_cli.evaluation.surface import nsd_key

Json = Mapping[str, Any]
FORMAT_VERSION = 1
MACRO = "foreground"
PARTS = ("metrics", "unprompted")
DIFFERENCE = (
    "second minus first, mean over the cases in which both are defined; "
    "where one rightly holds nothing and the other holds something, nothing counts as 1, or as 0 mm"
)


def compare(summaries: Mapping[str, Json]) -> dict[str, Any]:
    """The whole of comparison.json; summaries by the name of the prediction, in the order in which they are shown."""
    first = next(iter(summaries.values()))
    metrics = compared_metrics(first)
    labels = {key: name for summary in summaries.values() for key, name in summary["labels"].items()}
    cases = _shared_cases(summaries)
    pairs = [
        {"first": one, "second": other, "label": label, "part": _part_name(part), "metric": metric, **_paired(found, metric)}
        for one, other in combinations(summaries, 2)
        for part in PARTS
        for label, found in _differences(summaries[one], summaries[other], labels, cases, part, metrics)
        for metric in metrics
    ]
    return {
        "tool": first["tool"],
        "format_version": FORMAT_VERSION,
        "tool_version": first["tool_version"],
        "predictions": list(summaries),
        "definitions": {**first["definitions"], "difference": DIFFERENCE},
        "labels": labels,
        "cases": cases,
        "not_compared": sorted({case["case"] for s in summaries.values() for case in s["metric_per_case"]} - set(cases)),
        "pairs": pairs,
    }


def compared_metrics(summary: Json) -> tuple[str, ...]:
    """Agreement, and distances with missed structures counted."""
    return "Dice", "HD95_penalised", "assd_mm_penalised", nsd_key(summary["definitions"]["nsd_tolerance_mm"])


def higher_is_better(metric: str) -> bool:
    return metric == "Dice" or metric.startswith("nsd@")


def _part_name(part: str) -> str:
    return "all" if part == "metrics" else part


def _shared_cases(summaries: Mapping[str, Json]) -> list[str]:
    """Cases that every prediction was scored on and no model had seen."""
    usable = [
        {case["case"] for case in summary["metric_per_case"] if case["group"] == "held_out" and case["status"] != "failed"}
        for summary in summaries.values()
    ]
    return sorted(set.intersection(*usable))


Values = Mapping[str, np.ndarray]  # metric -> (cases, labels, 2), NaN where undefined


def _differences(
    one: Json, other: Json, labels: Mapping[str, str], cases: Sequence[str], part: str, metrics: Sequence[str]
) -> list[tuple[str, Values]]:
    """For every label, then for all of them together: both predictions' values."""
    right = np.stack([_correctly_empty(s, labels, cases, part) for s in (one, other)], axis=-1)
    tables = {
        metric: _fill_perfect(np.stack([_table(s, labels, cases, part, metric) for s in (one, other)], axis=-1), right, metric)
        for metric in metrics
    }
    every: list[tuple[str, Values]] = [
        (label, {metric: table[:, i : i + 1] for metric, table in tables.items()}) for i, label in enumerate(labels)
    ]
    return [*every, (MACRO, tables)] if len(labels) > 1 else every


def _table(summary: Json, labels: Mapping[str, str], cases: Sequence[str], part: str, metric: str) -> np.ndarray:
    records = {case["case"]: case[part] for case in summary["metric_per_case"]}
    found = [[records[case].get(label, {}).get(metric) for label in labels] for case in cases]
    return np.array([[np.nan if value is None else value for value in row] for row in found], dtype=np.float64).reshape(-1, len(labels))


def _correctly_empty(summary: Json, labels: Mapping[str, str], cases: Sequence[str], part: str) -> np.ndarray:
    """(cases, labels) bool: neither the reference nor the prediction holds the label, which some summaries then do not even list."""
    records = {case["case"]: case for case in summary["metric_per_case"]}
    unlisted = {"status": "both_empty"}
    found = [[records[c]["status"] == "ok" and records[c][part].get(v, unlisted)["status"] == "both_empty" for v in labels] for c in cases]
    return np.array(found, dtype=bool).reshape(-1, len(labels))


def _fill_perfect(table: np.ndarray, right: np.ndarray, metric: str) -> np.ndarray:
    """(cases, labels, 2), what one rightly left empty as perfect where the other has a value."""
    beside = ~np.isnan(table[..., ::-1])
    return np.where(np.isnan(table) & right & beside, 1.0 if higher_is_better(metric) else 0.0, table)


def _paired(values: Values, metric: str) -> dict[str, Any]:
    """Means of both over the pairs that exist, their difference and its interval, and in how many cases which is better."""
    table = values[metric]
    table = np.where(np.isnan(table).any(axis=-1, keepdims=True), np.nan, table)
    used = ~np.isnan(table[..., 0]).all(axis=1)
    difference = table[..., 1] - table[..., 0]
    gain = difference[used] if higher_is_better(metric) else -difference[used]
    by_case = [float(np.nanmean(row)) for row in gain]
    means = [_macro(table[..., i]) for i in (0, 1)]
    return {
        "n": int(used.sum()),
        "first_mean": means[0],
        "second_mean": means[1],
        "difference": None if means[0] is None or means[1] is None else means[1] - means[0],
        "ci95": statistics.interval(difference),
        "second_better": sum(g > _EQUAL for g in by_case),
        "first_better": sum(g < -_EQUAL for g in by_case),
        "equal": sum(abs(g) <= _EQUAL for g in by_case),
    }


_EQUAL = 1e-9


def _macro(table: np.ndarray) -> float | None:
    """Mean of the label means that exist; (cases, labels)."""
    means = [float(column[~np.isnan(column)].mean()) for column in table.T if not np.isnan(column).all()]
    return statistics.mean(means)
