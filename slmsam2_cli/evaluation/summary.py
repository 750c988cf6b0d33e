"""Make summary.json from scores: nnU-Net's layout, with status, distances, statistics and definitions added.

`mean` and `foreground_mean` are the main result, over held-out cases only. Cases used for training are summarised separately under
`training`, and slices without an annotation under `unprompted`. The JSON is strict: null, never NaN; paths are relative; nothing depends on
the time or the machine.

Thresholds such as `Dice=0.8` are the least that a result must reach, for use in continuous integration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.errors import UsageError
from slmsam2_cli.evaluation import statistics
from slmsam2_cli.evaluation.matching import Group
from slmsam2_cli.evaluation.metrics import DEFINITIONS, NSD_TOLERANCE_MM, Record, metric_names
from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.statistics import Case
from slmsam2_cli.evaluation.surface import nsd_key

FORMAT_VERSION = 2  # of summary.json and comparison.json
TOOL = "slmsam2"
Part = Literal["all", "unprompted"]
Json = dict[str, Any]
THRESHOLDS = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall", "nsd": "nsd"}
_COUNTS = ("TP", "FP", "FN", "TN", "n_ref", "n_pred", "ref_ml", "pred_ml")


@dataclass(frozen=True)
class About:
    """Where the scores come from.

    labels: label value or region -> name; model, predicted_with: from the predictions' manifest; without_reference, not_requested, renamed:
    as in matching.Pairing.
    """

    tool_version: str
    labels: Mapping[Structure, str]
    model: Mapping[str, Any] = field(default_factory=dict)
    predicted_with: str = ""
    without_reference: Sequence[str] = ()
    not_requested: Sequence[str] = ()
    renamed: Sequence[tuple[str, str]] = ()
    tolerance_mm: float = NSD_TOLERANCE_MM
    warnings: Sequence[str] = ()


def summarise(scores: Sequence[CaseScore], about: About) -> Json:
    """Make the content of summary.json. scores: in any order; every scored case must hold every label of `about`."""
    ordered = sorted(scores, key=lambda s: (s.status != "failed", s.case))
    interval = f"95 % percentile bootstrap over cases, {statistics.RESAMPLES} resamples, seed {statistics.SEED}"
    return {
        "tool": TOOL,
        "format_version": FORMAT_VERSION,
        "tool_version": about.tool_version,
        "predicted_with": about.predicted_with,
        "model": dict(about.model),
        "definitions": {**DEFINITIONS, "nsd_tolerance_mm": about.tolerance_mm, "ci95": interval},
        "labels": {str(value): name for value, name in about.labels.items()},
        "cases": {
            "held_out": sum(s.group == "held_out" for s in ordered),
            "training": sum(s.group == "training" for s in ordered),
            "failed": [{"case": s.case, "problem": s.problem} for s in ordered if s.status == "failed"],
            "pred_missing": [s.case for s in ordered if s.status == "pred_missing"],
            "without_reference": list(about.without_reference),
            "training_not_predicted": list(about.not_requested),
            "resampled": [s.case for s in ordered if s.resampled],
            "matched_by_affix": [{"case": case, "prediction": name} for case, name in about.renamed],
        },
        **_summarise_group(ordered, about, "held_out", "all"),
        "unprompted": _summarise_group(ordered, about, "held_out", "unprompted"),
        "training": {
            **_summarise_group(ordered, about, "training", "all"),
            "unprompted": _summarise_group(ordered, about, "training", "unprompted"),
        },
        "slice_curve": {str(value): _slice_curve(ordered, value) for value in about.labels},
        "warnings": [*about.warnings, *(line for score in ordered for line in score.warnings)],
        "metric_per_case": [
            {
                "case": score.case,
                "status": score.status,
                "group": score.group,
                "reference_file": score.reference_file,
                "prediction_file": score.prediction_file,
                "hints": list(score.hints),
                "metrics": {str(value): _record(score, value, about, "all") for value in about.labels},
                "unprompted": {str(value): _record(score, value, about, "unprompted") for value in about.labels},
            }
            for score in ordered
        ],
    }


def _record(score: CaseScore, value: Structure, about: About, part: Part) -> Json:
    """Return the measures of one label with their status; all null when the case failed."""
    label = score.labels.get(value)
    record: Record | None = None
    status: str | None = "failed"
    if label is not None:
        record, status = (label.all, label.status) if part == "all" else (label.unprompted, label.unprompted_status)
    return {**(record or dict.fromkeys(metric_names(about.tolerance_mm))), "status": status}


def _summarise_group(scores: Sequence[CaseScore], about: About, group: Group, part: Part) -> Json:
    """Compute means, statistics and counts of statuses for one group of cases and one part of their slices."""
    chosen = [s for s in scores if s.group == group]
    by_label: dict[str, list[Case]] = {str(v): [(s.case, _record(s, v, about, part)) for s in chosen] for v in about.labels}
    names = metric_names(about.tolerance_mm)
    described = [n for n in names if n not in _COUNTS and not n.endswith("_penalised")]
    means = {label: {n: statistics.mean_of(cases, n) for n in names} for label, cases in by_label.items()}
    statuses = {label: Counter(str(r["status"]) for _, r in cases if r["status"] is not None) for label, cases in by_label.items()}
    return {
        "foreground_mean": {n: statistics.mean([value for m in means.values() if (value := m[n]) is not None]) for n in names},
        "mean": means,
        "foreground_statistics": {n: statistics.describe_macro(by_label, n) for n in described},
        "statistics": {label: {n: statistics.describe(cases, n) for n in described} for label, cases in by_label.items()},
        "status_counts": {label: dict(sorted(counts.items())) for label, counts in statuses.items()},
    }


def _slice_curve(scores: Sequence[CaseScore], value: Structure) -> list[Json]:
    """Compute percentiles of Dice on slices of held-out cases by distance from the nearest annotated slice, in slices."""
    by_distance: dict[int, list[float]] = {}
    for score in scores:
        label = score.labels.get(value) if score.group == "held_out" else None
        for row in label.slices if label is not None else ():
            if row["prompt_distance_slices"] is not None and row["Dice"] is not None:
                by_distance.setdefault(abs(int(row["prompt_distance_slices"])), []).append(row["Dice"])
    return [
        {"distance_slices": distance, "n": len(found), **{f"p{q}": float(np.percentile(found, q)) for q in (10, 50, 90)}}
        for distance, found in sorted(by_distance.items())
    ]


@dataclass(frozen=True)
class Threshold:
    """The least foreground mean of a metric. metric: as in summary.json, or "nsd" at whatever tolerance is used."""

    metric: str
    least: float


def parse_thresholds(texts: Iterable[str]) -> list[Threshold]:
    """Read thresholds such as "Dice=0.8" (in upper or lower case), or "0.8" for Dice.

    Raises: UsageError when a metric is unknown or its value is not between 0 and 1.
    """
    thresholds = []
    for text in texts:
        metric, _, number = text.rpartition("=")
        try:
            least = float(number)
        except ValueError:
            least = -1.0
        name = THRESHOLDS.get(metric.strip().lower() or "dice")
        if name is None or not 0 <= least <= 1:
            known = ", ".join(THRESHOLDS.values())
            raise UsageError(
                f"--fail-under {text!r}: not a threshold. Write METRIC=X such as dice=0.8, X from 0 to 1, METRIC one of {known}"
            )
        thresholds.append(Threshold(name, least))
    return thresholds


def failed_thresholds(summary: Mapping[str, Any], thresholds: Sequence[Threshold]) -> list[str]:
    """Describe each threshold that the foreground mean of held-out cases does not reach; an undefined mean reaches none."""
    lines = []
    for threshold in thresholds:
        key = nsd_key(summary["definitions"]["nsd_tolerance_mm"]) if threshold.metric == "nsd" else threshold.metric
        value = summary["foreground_mean"][key]
        if value is None or value < threshold.least:
            found = "is undefined" if value is None else f"{value:.4f} is below the threshold"
            lines.append(f"mean {key} {found} (--fail-under {threshold.least:g})")
    return lines
