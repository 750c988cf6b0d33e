"""Scores in, summary.json out: nnU-Net's shape with a status, a distance and the doubt added.

`mean` and `foreground_mean` are the headline: held-out cases only. Cases the model has learned from are summarised apart under `training`,
slices that were given are left out under `unprompted`. Strict JSON: null, never NaN; paths are relative; nothing depends on the clock.

Limits that a result must reach, for use in continuous integration: `Dice=0.8`.
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
from slmsam2_cli.evaluation.metrics import DEFINITIONS, NSD_TOLERANCE_MM, LabelScore, empty_record, metric_names
from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.statistics import Case
from slmsam2_cli.evaluation.surface import nsd_key

FORMAT_VERSION = 1
TOOL = "slmsam2"
Part = Literal["all", "unprompted"]
Json = dict[str, Any]
_COUNTS = ("TP", "FP", "FN", "TN", "n_ref", "n_pred", "ref_ml", "pred_ml")


@dataclass(frozen=True)
class About:
    """Where the scores come from. labels: label value or region -> name; model, predicted_with: from the predictions' manifest."""

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
    """The whole of summary.json; every scored case must hold every label of `about`. Cases in any order."""
    ordered = sorted(scores, key=lambda s: (s.status != "failed", s.case))
    headline = _block(ordered, about, "held_out", "all")
    return {
        "tool": TOOL,
        "format_version": FORMAT_VERSION,
        "tool_version": about.tool_version,
        "predicted_with": about.predicted_with,
        "model": dict(about.model),
        "definitions": {**DEFINITIONS, "nsd_tolerance_mm": about.tolerance_mm, "ci95": _interval_description()},
        "labels": {str(value): name for value, name in about.labels.items()},
        "cases": _case_counts(ordered, about),
        **headline,
        "unprompted": _block(ordered, about, "held_out", "unprompted"),
        "training": {**_block(ordered, about, "training", "all"), "unprompted": _block(ordered, about, "training", "unprompted")},
        "slice_curve": {str(value): _curve(ordered, value) for value in about.labels},
        "warnings": [*about.warnings, *(line for score in ordered for line in score.warnings)],
        "metric_per_case": [_case(score, about) for score in ordered],
    }


def _interval_description() -> str:
    return f"95 % percentile bootstrap over cases, {statistics.RESAMPLES} resamples, seed {statistics.SEED}"


def _case_counts(scores: Sequence[CaseScore], about: About) -> Json:
    """How many cases of each kind, and by name those that are not simply scored."""
    return {
        "held_out": sum(s.group == "held_out" for s in scores),
        "training": sum(s.group == "training" for s in scores),
        "failed": [{"case": s.case, "problem": s.problem} for s in scores if s.status == "failed"],
        "pred_missing": [s.case for s in scores if s.status == "pred_missing"],
        "without_reference": list(about.without_reference),
        "training_not_predicted": list(about.not_requested),
        "resampled": [s.case for s in scores if s.resampled],
        "matched_by_affix": [{"case": case, "prediction": name} for case, name in about.renamed],
    }


def _case(score: CaseScore, about: About) -> Json:
    return {
        "case": score.case,
        "status": score.status,
        "group": score.group,
        "reference_file": score.reference_file,
        "prediction_file": score.prediction_file,
        "hints": list(score.hints),
        "metrics": {str(value): _record(score, value, about, "all") for value in about.labels},
        "unprompted": {str(value): _record(score, value, about, "unprompted") for value in about.labels},
    }


def _record(score: CaseScore, value: Structure, about: About, part: Part) -> Json:
    """The measures of one label with their status; all null when nothing is known."""
    label = score.labels.get(value)
    if label is None:
        return {**empty_record(about.tolerance_mm), "status": "failed"}
    record, status = (label.all, label.status) if part == "all" else (label.unprompted, label.unprompted_status)
    return {**(record or empty_record(about.tolerance_mm)), "status": status}


def _block(scores: Sequence[CaseScore], about: About, group: Group, part: Part) -> Json:
    """Means and what is behind them, for one group of cases and one part of their slices."""
    chosen = [s for s in scores if s.group == group]
    by_label: dict[str, list[Case]] = {str(v): [(s.case, _record(s, v, about, part)) for s in chosen] for v in about.labels}
    names = metric_names(about.tolerance_mm)
    described = [n for n in names if n not in _COUNTS and not n.endswith("_penalised")]
    means = {label: {n: statistics.mean_of(cases, n) for n in names} for label, cases in by_label.items()}
    return {
        "foreground_mean": {n: statistics.mean([value for m in means.values() if (value := m[n]) is not None]) for n in names},
        "mean": means,
        "foreground_statistics": {n: statistics.describe_macro(by_label, n) for n in described},
        "statistics": {label: {n: statistics.describe(cases, n) for n in described} for label, cases in by_label.items()},
        "status_counts": {label: _status_counts(cases) for label, cases in by_label.items()},
    }


def _status_counts(cases: Sequence[Case]) -> dict[str, int]:
    return dict(sorted(Counter(str(record["status"]) for _, record in cases if record["status"] is not None).items()))


def _curve(scores: Sequence[CaseScore], value: Structure) -> list[Json]:
    """Dice of held-out cases' slices against their distance from the nearest given slice, in slices."""
    by_distance: dict[int, list[float]] = {}
    for score in scores:
        label: LabelScore | None = score.labels.get(value) if score.group == "held_out" else None
        for row in label.slices if label is not None else ():
            if row["prompt_distance_slices"] is not None and row["Dice"] is not None:
                by_distance.setdefault(abs(int(row["prompt_distance_slices"])), []).append(row["Dice"])
    return [{"distance_slices": d, "n": len(found), **_percentiles(found)} for d, found in sorted(by_distance.items())]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (10, 50, 90)}


KNOWN = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall", "nsd": "nsd"}


@dataclass(frozen=True)
class Threshold:
    """The least that the foreground mean of a measure may be. metric: as in summary.json; "nsd" at whatever tolerance was used."""

    metric: str
    least: float


def parse_thresholds(asked: Iterable[str]) -> list[Threshold]:
    """Limits from "Dice=0.8" (upper or lower case), or "0.8" for Dice. UsageError."""
    return [_floor(text) for text in asked]


def failed_thresholds(summary: Mapping[str, Any], floors: Sequence[Threshold]) -> list[str]:
    """One line for each limit that the foreground mean of held-out cases does not reach; an undefined mean reaches none."""
    lines = []
    for floor in floors:
        key = nsd_key(summary["definitions"]["nsd_tolerance_mm"]) if floor.metric == "nsd" else floor.metric
        value = summary["foreground_mean"][key]
        if value is None or value < floor.least:
            lines.append(f"{key} {'is undefined' if value is None else f'{value:.4f}'}, the limit is {floor.least:g}")
    return lines


def _floor(text: str) -> Threshold:
    metric, _, number = text.rpartition("=")
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    name = KNOWN.get(metric.strip().lower() or "dice")
    if name is None or not 0 <= least <= 1:
        raise UsageError(f"{text!r} is no limit. Write Dice=0.8; known are {', '.join(KNOWN.values())}, from 0 to 1")
    return Threshold(name, least)
