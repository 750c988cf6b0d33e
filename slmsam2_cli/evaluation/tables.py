"""Make tables of a summary: a row per case and label (cases.csv), per slice (slices.csv) and per label (console, summary.md)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slmsam2_cli.console import printable
from slmsam2_cli.evaluation.metrics import metric_names
from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.surface import DISTANCES, nsd_key

Json = Mapping[str, Any]
DEFINITION = (
    "HD95: larger of the two directed 95th percentiles, border voxels, mm; penalised: missed structures count as the volume's diagonal"
)
TRAINING_TITLE = "training cases (used for training; scores are optimistic)"
CASE_KEYS = ("case", "group", "label", "name", "status")
SLICE_KEYS = (
    "case",
    "group",
    "label",
    "slice",
    "prompt_distance_slices",
    "prompt_distance_mm",
    "reference_px",
    "prediction_px",
    "Dice",
    "area_error_mm2",
)
COMPARISON = "# Comparison"
COMPARISON_KEYS = ("case", "label", "name")
COMPARISON_COLUMNS = ("predictions", "slices", "label", "measure", "n", "means", "difference [95 %]", "better : worse : equal")
DIFFERENCE = (
    "Differences are second minus first, over the held-out cases of both; the interval is a bootstrap over cases; "
    "where only one is correctly empty, it counts as perfect"
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cases_csv(summary: Json) -> str:
    """Make cases.csv: a row per case and label. The header names unit and definition; undefined cells are empty."""
    tolerance = summary["definitions"]["nsd_tolerance_mm"]
    names = metric_names(tolerance)
    short = ["status", "Dice", "HD95", "HD95_penalised", nsd_key(tolerance)]
    header = [*CASE_KEYS, *(column(n) for n in names), *(f"unprompted_{column(n)}" for n in short)]
    rows = []
    for case in summary["metric_per_case"]:
        for label, name in summary["labels"].items():
            record, rest = case["metrics"][label], case["unprompted"][label]
            first = [case["case"], case["group"], label, name, record["status"]]
            rows.append([*first, *(record[n] for n in names), *(rest[n] for n in short)])
    return _csv(header, rows)


def slices_csv(scores: Iterable[CaseScore]) -> str:
    """Make slices.csv: a row per annotated slice and slice with a label in either mask, numbered from 0 along the slice axis."""
    ordered = sorted(scores, key=lambda s: s.case)
    rows = [[s.case, s.group, value, *row.values()] for s in ordered for value, label in s.labels.items() for row in label.slices]
    return _csv(SLICE_KEYS, rows)


def column(metric: str) -> str:
    """Return the column name of a metric, with its definition and unit: HD95 -> HD95_max_directed_voxel_mm."""
    stem = metric.removesuffix("_penalised")
    suffix = metric.removeprefix(stem)
    if stem == "HD95":
        return f"HD95_max_directed_voxel{suffix}_mm"
    if stem.startswith("nsd@"):
        return f"nsd_voxel_{stem.removeprefix('nsd@')}mm"
    if stem in ("hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm"):
        return f"{stem.removesuffix('_mm')}_voxel{suffix}_mm"
    return metric


def groups(summary: Json) -> list[tuple[str, Json, int]]:
    """Return (title, part of the summary, number of cases) of the held-out and of the training cases, where there are any."""
    cases = summary["cases"]
    found = [("held-out cases", summary, cases["held_out"]), (TRAINING_TITLE, summary["training"], cases["training"])]
    return [group for group in found if group[2]]


def comparison_rows(comparison: Json) -> list[list[str]]:
    """Make a row per pair of predictions, part of the slices, label and metric that is defined for any case; better: the second is."""
    rows = []
    for pair in comparison["pairs"]:
        if pair["n"]:
            digits = 2 if pair["metric"].removesuffix("_penalised") in DISTANCES else 3
            low, high = pair["ci95"] or (None, None)
            means = f"{_number(pair['first_mean'], digits)} → {_number(pair['second_mean'], digits)}"
            interval = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if low is not None else ""
            name = comparison["labels"].get(pair["label"], "")
            rows.append(
                [
                    f"{pair['first']} → {pair['second']}",
                    pair["part"],
                    f"{pair['label']} {name}".strip(),
                    pair["metric"],
                    str(pair["n"]),
                    means,
                    f"{pair['difference']:+.{digits}f}{interval}",
                    f"{pair['second_better']} : {pair['first_better']} : {pair['equal']}",
                ]
            )
    return rows


def comparison_markdown(comparison: Json) -> str:
    """Make comparison.md."""
    others = ", ".join(map(_escape, comparison["not_compared"]))
    table = _markdown_table(COMPARISON_COLUMNS, comparison_rows(comparison))
    return f"{COMPARISON}\n\n{DEFINITION}. {DIFFERENCE}\n\n{table}" + (f"\nNot compared: {others}.\n" if others else "")


def comparison_csv(summaries: Mapping[str, Json], comparison: Json, metrics: Sequence[str]) -> str:
    """Make comparison.csv: a row per compared case and label, a column per prediction and metric."""
    records = {name: {case["case"]: case["metrics"] for case in summary["metric_per_case"]} for name, summary in summaries.items()}
    header = [*COMPARISON_KEYS, *(f"{name} {column(metric)}" for metric in metrics for name in summaries)]
    rows = [
        [case, label, name, *(records[one][case].get(label, {}).get(metric) for metric in metrics for one in summaries)]
        for case in comparison["cases"]
        for label, name in comparison["labels"].items()
    ]
    return _csv(header, rows)


def label_columns(summary: Json) -> list[str]:
    """Return the columns of the table of labels."""
    nsd = f"NSD {summary['definitions']['nsd_tolerance_mm']:g} mm"
    return ["label", "n", "Dice [95 %]", "unprompted", "HD95 mm", "penalised", nsd, "over mm", "worst case"]


def label_rows(summary: Json, block: Json) -> list[list[str]]:
    """Make a row per label, and one of their mean where there are several. block: a part of the summary, see groups."""
    nsd = nsd_key(summary["definitions"]["nsd_tolerance_mm"])
    every, rest = block["statistics"], block["unprompted"]["statistics"]
    entries = [(f"{label} {name}".strip(), every[label], rest[label]) for label, name in summary["labels"].items()]
    if len(entries) > 1:
        entries.append(("mean of labels", block["foreground_statistics"], block["unprompted"]["foreground_statistics"]))
    rows = []
    for name, described, unprompted in entries:
        dice, hd95, worst = described["Dice"], described["HD95"], described["Dice"].get("worst")
        n, n_unprompted, n_hd95 = (found.get("n") for found in (dice, unprompted["Dice"], hd95))  # None in the row of the mean
        rows.append(
            [
                name,
                "" if n is None else str(n),
                _number(dice["mean"], 3) + (f" [{dice['ci95'][0]:.3f}, {dice['ci95'][1]:.3f}]" if dice["ci95"] else ""),
                _number(unprompted["Dice"]["mean"], 3) + (f" (n={n_unprompted})" if n_unprompted and n_unprompted != n else ""),
                _number(hd95["mean"], 2) + (f" (n={n_hd95})" if n_hd95 != n else ""),
                _number(hd95["mean_penalised"], 2),
                _number(described[nsd]["mean"], 3),
                _number(described["over_extent_mm"]["mean"], 1),
                f"{worst['case']} ({worst['value']:.3f})" if worst else "",
            ]
        )
    return rows


def markdown(summary: Json) -> str:
    """Make summary.md: the tables of the console, warnings, and the cases that failed or are missing."""
    cases = summary["cases"]
    parts = [f"# Evaluation\n\n{DEFINITION}.\n", *(f"Warning: {_escape(warning)}\n" for warning in summary["warnings"])]
    for title, block, n in groups(summary):
        parts.append(f"## {title.capitalize()}: {n}\n\n{_markdown_table(label_columns(summary), label_rows(summary, block))}")
    troubled = [[f["case"], f["problem"]] for f in cases["failed"]] + [[case, "no prediction"] for case in cases["pred_missing"]]
    if troubled:
        parts.append(f"## Cases that failed or are missing ({len(troubled)})\n\n{_markdown_table(['case', 'why'], troubled)}")
    return "\n".join(parts)


def _number(value: float | None, digits: int) -> str:
    """Format a number; "-" when it is undefined."""
    return "-" if value is None else f"{value:.{digits}f}"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_escape(str(cell)) for cell in line)} |\n" for line in lines)


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it unchanged."""
    return "".join("\\" + c if c in "\\|`*_<>[]" else c for c in printable(text))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a CSV file in which None is an empty cell, and text that a spreadsheet would run as a formula starts with a quote."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["'" * cell.startswith(_FORMULA) + printable(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()
