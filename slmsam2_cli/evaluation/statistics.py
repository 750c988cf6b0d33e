"""Average a measure over cases, with the number of cases, spread, worst case and bootstrap interval.

Undefined values are None and left out; n says how many cases were counted. The penalised mean of a distance also counts missed
structures, with the volume's diagonal, because a set that misses an organ must not look better for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from slmsam2_cli.evaluation.metrics import Record
from slmsam2_cli.evaluation.surface import DISTANCES

RESAMPLES = 2000
SEED = 0
_CHUNK = 1_000_000  # resampled values held in memory at a time
_AGREEMENT = ("Dice", "IoU", "precision", "recall", "volume_similarity", "slice_precision", "slice_recall", "slice_f1")

Case = tuple[str, Record]


def describe(cases: Sequence[Case], metric: str) -> dict[str, Any]:
    """Compute n, mean, mean_penalised, sd (n - 1), quartiles, worst case and bootstrap interval of one metric of one label."""
    defined = [value for _, record in cases if (value := record[metric]) is not None]
    quartiles = [float(q) for q in np.percentile(defined, [25, 50, 75])] if defined else [None] * 3
    return {
        "n": len(defined),
        "mean": mean(defined),
        "mean_penalised": mean_of(cases, penalised(metric)),
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "median": quartiles[1],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "ci95": interval(np.array(defined, dtype=np.float64)[:, np.newaxis]),
        "worst": worst(cases, metric),
    }


def describe_macro(by_label: Mapping[str, Sequence[Case]], metric: str) -> dict[str, Any]:
    """Average the label means that exist, and give their number and the bootstrap interval over cases.

    by_label: label -> cases; every label lists the same cases in the same order.
    """
    means, with_penalty = (
        [value for cases in by_label.values() if (value := mean_of(cases, name)) is not None] for name in (metric, penalised(metric))
    )
    columns = [[np.nan if (value := record[metric]) is None else value for _, record in cases] for cases in by_label.values()]
    table = np.array(columns, dtype=np.float64, ndmin=2).T
    return {"labels": len(means), "mean": mean(means), "mean_penalised": mean(with_penalty), "ci95": interval(table)}


def mean_of(cases: Sequence[Case], metric: str) -> float | None:
    """Average a metric over the cases in which it is defined; None when there are none."""
    return mean([value for _, record in cases if (value := record[metric]) is not None])


def mean(values: Sequence[float]) -> float | None:
    """Average values; None when there are none."""
    return float(np.mean(values)) if len(values) else None


def penalised(metric: str) -> str:
    """Return the metric in which missed structures count: NAME_penalised of a distance; other metrics are 0 there already."""
    return f"{metric}_penalised" if metric in DISTANCES else metric


def worst(cases: Sequence[Case], metric: str) -> dict[str, Any] | None:
    """Find the case with the lowest agreement, or the largest error in either direction; distances penalised, ties by name."""
    valued = [(value, case) for case, record in cases if (value := record[penalised(metric)]) is not None]
    if not valued:
        return None
    agreement = metric in _AGREEMENT or metric.startswith("nsd@")
    value, case = min(valued, key=lambda found: (found[0] if agreement else -abs(found[0]), found[1]))
    return {"case": case, "value": value}


def interval(table: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> list[float] | None:
    """Compute the 95 % percentile bootstrap interval of the mean of the label means, resampling cases (Efron and Tibshirani 1993).

    table: (cases, labels) float64, NaN where undefined. None for fewer than two cases, from which no spread can be estimated.
    """
    table = table[~np.isnan(table).all(axis=1)] if table.size else table
    if len(table) < 2:
        return None
    defined, values = (~np.isnan(table)).astype(np.float64), np.nan_to_num(table)
    weights = _resampled(len(table), seed, resamples)
    rows, drawn = max(1, _CHUNK // len(table)), []
    for start in range(0, resamples, rows):
        chunk = weights[start : start + rows].astype(np.float64)
        sums, counts = (np.einsum("rc,cl->rl", chunk, summed) for summed in (values, defined))  # the same with any number of threads
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        drawn.append(means.sum(axis=1) / (counts > 0).sum(axis=1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]


@lru_cache(maxsize=8)
def _resampled(cases: int, seed: int, resamples: int) -> np.ndarray:
    """Draw how often each resample contains each case, (resamples, cases) uint16."""
    drawn = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    return np.asarray(drawn, dtype=np.uint16)
