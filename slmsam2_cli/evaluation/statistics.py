"""One number for many cases, said honestly: which cases count, how many, how wide the doubt.

Undefined values are None and left out, and n says how many were left in. Distances are also averaged with the penalty
for missed structures in place, because a set that misses an organ must not look better for it.
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
_AT_ONCE = 1_000_000  # resampled values held in memory together
_AGREEMENT = ("Dice", "IoU", "precision", "recall", "volume_similarity", "slice_precision", "slice_recall", "slice_f1")

Case = tuple[str, Record]


def describe(cases: Sequence[Case], metric: str) -> dict[str, Any]:
    """n, mean, mean_penalised, sd, quartiles, worst case and bootstrap interval of one metric of one label."""
    defined = [value for _, record in cases if (value := record[metric]) is not None]
    quartiles = [float(q) for q in np.percentile(defined, [25, 50, 75])] if defined else [None] * 3
    return {
        "n": len(defined),
        "mean": mean(defined),
        "mean_penalised": mean([v for _, record in cases if (v := record[penalised(metric)]) is not None]),
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "median": quartiles[1],
        "q1": quartiles[0],
        "q3": quartiles[2],
        "ci95": interval(np.array(defined, dtype=np.float64)[:, np.newaxis]),
        "worst": worst(cases, metric),
    }


def describe_macro(by_label: Mapping[str, Sequence[Case]], metric: str) -> dict[str, Any]:
    """The mean of the label means that exist, how many those are, and its bootstrap interval over cases."""
    means = [m for m in (mean_of(cases, metric) for cases in by_label.values()) if m is not None]
    harsh = [m for m in (mean_of(cases, penalised(metric)) for cases in by_label.values()) if m is not None]
    return {"labels": len(means), "mean": mean(means), "mean_penalised": mean(harsh), "ci95": interval(_table(by_label, metric))}


def mean_of(cases: Sequence[Case], metric: str) -> float | None:
    """Mean over the cases in which the metric is defined."""
    return mean([value for _, record in cases if (value := record[metric]) is not None])


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def penalised(metric: str) -> str:
    """The metric that stands in where missed structures must count; shares are 0 there anyway and stand for themselves."""
    return f"{metric}_penalised" if metric in DISTANCES else metric


def worst(cases: Sequence[Case], metric: str) -> dict[str, Any] | None:
    """The case to look at first: lowest agreement, or largest error either way, distances penalised; the first by name among equals."""
    valued = [(value, case) for case, record in cases if (value := record[penalised(metric)]) is not None]
    if not valued:
        return None
    agreement = metric in _AGREEMENT or metric.startswith("nsd@")
    value, case = min(valued, key=lambda found: (found[0] if agreement else -abs(found[0]), found[1]))
    return {"case": case, "value": value}


def interval(table: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> list[float] | None:
    """95 % percentile bootstrap interval of the macro mean, cases resampled; table (cases, labels) float64, NaN where undefined.

    None below two cases: one value says nothing about its spread.
    """
    table = table[~np.isnan(table).all(axis=1)] if table.size else table
    if len(table) < 2:
        return None
    defined, values = (~np.isnan(table)).astype(np.float64), np.nan_to_num(table)
    weights = _resampled(len(table), seed, resamples)
    rows = max(1, _AT_ONCE // len(table))
    drawn = [_macro(_weighted(weights[i : i + rows], values), _weighted(weights[i : i + rows], defined)) for i in range(0, resamples, rows)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]


@lru_cache(maxsize=8)
def _resampled(cases: int, seed: int, resamples: int) -> np.ndarray:
    """How often each resample draws each case, (resamples, cases) uint16."""
    drawn = np.random.default_rng(seed).multinomial(cases, np.full(cases, 1 / cases), size=resamples)
    return np.asarray(drawn, dtype=np.uint16)


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(resamples, cases), (cases, labels) -> (resamples, labels), summed in one fixed order whatever the number of threads."""
    return np.asarray(np.einsum("rc,cl->rl", weights.astype(np.float64), values))


def _macro(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the label means that exist; sums, counts (resamples, labels) -> (resamples,)."""
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return np.asarray(means.sum(axis=1) / (counts > 0).sum(axis=1))


def _table(by_label: Mapping[str, Sequence[Case]], metric: str) -> np.ndarray:
    """Values (cases, labels), NaN where undefined; every label lists the same cases in the same order."""
    columns = [[np.nan if (value := record[metric]) is None else value for _, record in cases] for cases in by_label.values()]
    return np.array(columns, dtype=np.float64, ndmin=2).T
