"""Compare several predictions of the same cases in pairs: differences, their intervals, and how often either is better.

Differences are computed case by case and averaged, with a bootstrap interval over cases. Only cases held out by every prediction count.
Distances are the penalised ones, so that leaving out hard cases is no advantage. Nor is predicting structures that do not exist: where one
prediction is correctly empty and the other is not, the empty one counts as perfect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from slmsam2_cli.evaluation import statistics
from slmsam2_cli.evaluation.summary import FORMAT_VERSION
from slmsam2_cli.evaluation.surface import nsd_key

Json = Mapping[str, Any]
MACRO = "foreground"
PARTS = {"metrics": "all", "unprompted": "unprompted"}  # key in summary.json -> name in comparison.json
DIFFERENCE = (
    "second minus first, mean over the cases in which both are defined; "
    "where one is correctly empty and the other is not, the empty one counts as 1, or as 0 mm"
)
_EQUAL = 1e-9


def compare(summaries: Mapping[str, Json]) -> dict[str, Any]:
    """Make the content of comparison.json. summaries: by the name of the prediction, in the order in which they are shown."""
    first = next(iter(summaries.values()))
    labels = {key: name for summary in summaries.values() for key, name in summary["labels"].items()}
    usable = [
        {case["case"] for case in summary["metric_per_case"] if case["group"] == "held_out" and case["status"] != "failed"}
        for summary in summaries.values()
    ]
    cases = sorted(set.intersection(*usable))
    pairs = [
        {"first": one, "second": other, "label": label, "part": part, "metric": metric, **_compare_values(table, metric)}
        for one, other in combinations(summaries, 2)
        for key, part in PARTS.items()
        for label, metric, table in _values((summaries[one], summaries[other]), list(labels), cases, key)
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
    """List the metrics that are compared: overlap, best at 1, and penalised distances, best at 0, in which missed structures count."""
    return "Dice", "HD95_penalised", "assd_mm_penalised", nsd_key(summary["definitions"]["nsd_tolerance_mm"])


def _values(pair: Sequence[Json], labels: Sequence[str], cases: Sequence[str], part: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (label, metric, values (cases, labels, 2), NaN where undefined) for each label, then for all labels together.

    Where one of the two is correctly empty (so is the reference) and the other has a value, the empty one is perfect. Some summaries do not
    even list a label that occurs nowhere.
    """
    correct = np.zeros((len(cases), len(labels), 2), dtype=bool)
    tables = {metric: np.full(correct.shape, np.nan) for metric in compared_metrics(pair[0])}
    for k, summary in enumerate(pair):
        by_case = {case["case"]: case for case in summary["metric_per_case"]}
        for i, case in enumerate(cases):
            for j, label in enumerate(labels):
                record = by_case[case][part].get(label, {"status": "both_empty"})
                correct[i, j, k] = by_case[case]["status"] == "ok" and record["status"] == "both_empty"
                for metric, table in tables.items():
                    table[i, j, k] = np.nan if record.get(metric) is None else record[metric]
    for metric, table in tables.items():
        one_is_empty = np.isnan(table) & correct & ~np.isnan(table[..., ::-1])
        table[one_is_empty] = 0.0 if metric.endswith("_penalised") else 1.0
    for i, label in enumerate(labels):
        yield from ((label, metric, table[:, i : i + 1]) for metric, table in tables.items())
    if len(labels) > 1:
        yield from ((MACRO, metric, table) for metric, table in tables.items())


def _compare_values(table: np.ndarray, metric: str) -> dict[str, Any]:
    """Compute both means over the cases in which both are defined, the difference, its interval, and how often either is better.

    table: (cases, labels, 2), NaN where undefined. Means are the mean of the label means that exist.
    """
    table = np.where(np.isnan(table).any(axis=-1, keepdims=True), np.nan, table)
    used = ~np.isnan(table[..., 0]).all(axis=1)
    difference = table[..., 1] - table[..., 0]
    gain = -difference[used] if metric.endswith("_penalised") else difference[used]
    by_case = [float(np.nanmean(row)) for row in gain]
    first, second = (
        statistics.mean([float(column[~np.isnan(column)].mean()) for column in table[..., i].T if not np.isnan(column).all()])
        for i in (0, 1)
    )
    return {
        "n": int(used.sum()),
        "first_mean": first,
        "second_mean": second,
        "difference": None if first is None or second is None else second - first,
        "ci95": statistics.interval(difference),
        "second_better": sum(g > _EQUAL for g in by_case),
        "first_better": sum(g < -_EQUAL for g in by_case),
        "equal": sum(abs(g) <= _EQUAL for g in by_case),
    }
