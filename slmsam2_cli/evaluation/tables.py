"""The summary as tables: one row per case and label (cases.csv), one row per slice (slices.csv), one row per label (console, Markdown)."""

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
DIFFERENCE = (
    "Differences are second minus first, over held-out cases that both have; the interval is a bootstrap over cases; "
    "beside an invented structure, rightly nothing counts as perfect"
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cases_csv(summary: Json) -> str:
    """One row per case and label; the header carries unit and definition, undefined cells are empty."""
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
    """One row per slice that holds a label in either mask, or was given; slices counted from 0 along the propagation axis."""
    ordered = sorted(scores, key=lambda s: s.case)
    rows = [[s.case, s.group, value, *row.values()] for s in ordered for value, label in s.labels.items() for row in label.slices]
    return _csv(SLICE_KEYS, rows)


def column(metric: str) -> str:
    """A metric's name as a header cell that says what it is: HD95 -> HD95_max_directed_voxel_mm."""
    stem, harsh = (metric.removesuffix("_penalised"), "_penalised") if metric.endswith("_penalised") else (metric, "")
    if stem == "HD95":
        return f"HD95_max_directed_voxel{harsh}_mm"
    if stem.startswith("nsd@"):
        return f"nsd_voxel_{stem.removeprefix('nsd@')}mm"
    if stem in ("hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm"):
        return f"{stem.removesuffix('_mm')}_voxel{harsh}_mm"
    return metric


def groups(summary: Json) -> list[tuple[str, Json, int]]:
    """(title, block of means, number of cases) of the headline and, where there are any, of the training cases."""
    cases = summary["cases"]
    found = [
        ("held-out cases", summary, cases["held_out"]),
        ("training cases (the model has seen them)", summary["training"], cases["training"]),
    ]
    return [group for group in found if group[2]]


def comparison_columns() -> list[str]:
    return ["predictions", "slices", "label", "measure", "n", "means", "difference [95 %]", "better : worse : equal"]


def comparison_rows(comparison: Json) -> list[list[str]]:
    """A row per pair of predictions, label, part of the slices and measure that is defined anywhere; better means the second is."""
    rows = []
    for pair in comparison["pairs"]:
        if pair["n"]:
            digits = 2 if pair["metric"].removesuffix("_penalised") in DISTANCES else 3
            low, high = pair["ci95"] or (None, None)
            means = f"{_number(pair['first_mean'], digits)} → {_number(pair['second_mean'], digits)}"
            doubt = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if low is not None else ""
            name = comparison["labels"].get(pair["label"], "")
            rows.append(
                [
                    f"{pair['first']} → {pair['second']}",
                    pair["part"],
                    f"{pair['label']} {name}".strip(),
                    pair["metric"],
                    str(pair["n"]),
                    means,
                    f"{pair['difference']:+.{digits}f}{doubt}",
                    f"{pair['second_better']} : {pair['first_better']} : {pair['equal']}",
                ]
            )
    return rows


def comparison_markdown(comparison: Json) -> str:
    """The comparison as a Markdown table."""
    left_out = f"\nNot compared: {', '.join(map(_plain, comparison['not_compared']))}.\n" if comparison["not_compared"] else ""
    table = _markdown_table(comparison_columns(), comparison_rows(comparison))
    return f"{COMPARISON}\n\n{DEFINITION}. {DIFFERENCE}\n\n{table}{left_out}"


def comparison_csv(summaries: Mapping[str, Json], comparison: Json, metrics: Sequence[str]) -> str:
    """One row per compared case and label, a column per prediction and measure."""
    records = {name: {case["case"]: case["metrics"] for case in summary["metric_per_case"]} for name, summary in summaries.items()}
    header = [*COMPARISON_KEYS, *(f"{name} {column(metric)}" for metric in metrics for name in summaries)]
    rows = [
        [case, label, name, *(records[one][case].get(label, {}).get(metric) for metric in metrics for one in summaries)]
        for case in comparison["cases"]
        for label, name in comparison["labels"].items()
    ]
    return _csv(header, rows)


def label_columns(summary: Json) -> list[str]:
    nsd = f"NSD {summary['definitions']['nsd_tolerance_mm']:g} mm"
    return ["label", "n", "Dice [95 %]", "unprompted", "HD95 mm", "penalised", nsd, "over mm", "worst case"]


def label_rows(summary: Json, block: Json) -> list[list[str]]:
    """A row per label and one for their macro mean, of the headline or of summary["training"]."""
    nsd = nsd_key(summary["definitions"]["nsd_tolerance_mm"])
    rows = [
        _row(f"{label} {name}".strip(), block["statistics"][label], block["unprompted"]["statistics"][label], nsd)
        for label, name in summary["labels"].items()
    ]
    if len(rows) > 1:
        macro = _row("mean of labels", block["foreground_statistics"], block["unprompted"]["foreground_statistics"], nsd)
        rows.append(macro)
    return rows


def markdown(summary: Json) -> str:
    """The same tables for a report or a pull request."""
    cases = summary["cases"]
    parts = [f"# Evaluation\n\n{DEFINITION}.\n", *(f"Warning: {_plain(warning)}\n" for warning in summary["warnings"])]
    for title, block, n in groups(summary):
        parts.append(f"## {title.capitalize()}: {n}\n\n{_markdown_table(label_columns(summary), label_rows(summary, block))}")
    troubled = [[f["case"], f["problem"]] for f in cases["failed"]] + [[case, "no prediction"] for case in cases["pred_missing"]]
    if troubled:
        parts.append(f"## Cases that failed or are missing ({len(troubled)})\n\n{_markdown_table(['case', 'why'], troubled)}")
    return "\n".join(parts)


def _row(name: str, every: Json, rest: Json, nsd: str) -> list[str]:
    dice, hd95, worst = every["Dice"], every["HD95"], every["Dice"].get("worst")
    return [
        name,
        str(dice["n"]) if "n" in dice else "",
        _number(dice["mean"], 3) + (f" [{dice['ci95'][0]:.3f}, {dice['ci95'][1]:.3f}]" if dice["ci95"] else ""),
        _number(rest["Dice"]["mean"], 3) + (f" (n={rest['Dice']['n']})" if "n" in dice and 0 < rest["Dice"]["n"] != dice["n"] else ""),
        _number(hd95["mean"], 2) + (f" (n={hd95['n']})" if "n" in hd95 and hd95["n"] != dice["n"] else ""),
        _number(hd95["mean_penalised"], 2),
        _number(every[nsd]["mean"], 3),
        _number(every["over_extent_mm"]["mean"], 1),
        f"{worst['case']} ({worst['value']:.3f})" if worst else "",
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_plain(str(cell)) for cell in line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join("\\" + c if c in "\\|`*_<>[]" else c for c in printable(text))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Numbers as they are, nothing for None; text that a spreadsheet would run as a formula gets a quote in front."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) else text
