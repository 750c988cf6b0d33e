"""Compare arms of benchmarks/accuracy.py on the cases that they share: differences and their confidence intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slmsam2_cli.evaluation.statistics import interval

Row = dict[str, Any]


def cases_of(arms: Sequence[Sequence[Row]]) -> list[tuple[str, int]]:
    """Return every (case, label) that all arms have scored with some seed."""
    each = [{(score["case"], score["label"]) for row in found for score in row["scores"]} for found in arms]
    return sorted(set.intersection(*each))


def values(found: Sequence[Row], shared: Sequence[tuple[str, int]], key: str) -> np.ndarray:
    """Return scores (cases, labels), means over seeds; NaN where a case lacks the label."""
    cases, labels = sorted({case for case, _ in shared}), sorted({label for _, label in shared})
    grid: dict[tuple[str, int], list[float]] = {}
    for row in found:
        for score in row["scores"]:
            if score[key] is not None:
                grid.setdefault((score["case"], score["label"]), []).append(score[key])
    return np.array([[np.mean(grid[case, label]) if (case, label) in grid else np.nan for label in labels] for case in cases])


def gained(mine: np.ndarray, theirs: np.ndarray) -> str:
    """Format the mean difference and its 95 % interval."""
    gain = mine - theirs
    bounds = interval(gain)
    return f"{np.nanmean(np.nanmean(gain, axis=0)):+.3f}" + (f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else "")


def patient_of(case: str) -> str:
    """Return the patient of a case: STS_012_MR_T1 and STS_012_CT are scans of one, and phantoms of one number have one shape."""
    return "_".join(case.split("_")[:2])


def bounds_of(gains: Sequence[dict[str, float]], draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap the 95 % interval of the mean over sets: resample patients among those of the same sets. gains: one dict per set."""
    rng, holders = np.random.default_rng(0), dict[tuple[int, ...], list[str]]()
    for patient in sorted({patient for own in gains for patient in own}):
        holders.setdefault(tuple(i for i, own in enumerate(gains) if patient in own), []).append(patient)
    sums, counts = np.zeros((2, len(gains), draws))
    for sets, patients in holders.items():
        drawn = rng.integers(len(patients), size=(draws, len(patients)))
        for i in sets:
            sums[i] += np.array([gains[i][patient] for patient in patients])[drawn].sum(axis=1)
            counts[i] += len(patients)
    low, high = np.percentile((sums / counts).mean(axis=0), [2.5, 97.5])
    return float(low), float(high)
