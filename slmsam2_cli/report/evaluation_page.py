"""An evaluation as a report: summary.json and the scores behind it, with pictures from the files where they can be had.

Numbers are those of summary.json; nothing is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from slmsam2_cli.evaluation.metrics import Row
from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.surface import nsd_key
from slmsam2_cli.evaluation.tables import groups, label_columns, label_rows
from slmsam2_cli.inference.manifest import Manifest, ManifestCase
from slmsam2_cli.report.case_files import Sources
from slmsam2_cli.report.case_images import Beside, Budget, Drawn, Looks, add_thumbnails
from slmsam2_cli.report.charts import marks
from slmsam2_cli.report.flags import evaluation_flags, named
from slmsam2_cli.report.schema import CaseReport, CurvePoint, Report, SliceMark, Structure, Table

Json = Mapping[str, Any]
_ORDER = {"failed": 0, "pred_missing": 1}


def evaluation_report(
    summary: Json,
    scores: Sequence[CaseScore],
    sources: Mapping[str, Sources],
    *,
    manifest: Manifest | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
    tables: Sequence[Table] = (),
    beside: Beside | None = None,
    budget: Budget | None = None,
    advance: Callable[..., None] = lambda: None,
) -> Report:
    """The page of an evaluation.

    sources: case -> its files, for pictures; cases that are not in it get none. flags, tables: what was found out elsewhere, shown first.
    What scoring drew of a case (CaseScore.made) is not drawn again. beside: writes the volumes that do not fit into the page, see
    looks.py. advance: called once a case.
    """
    entries = manifest.cases if manifest is not None else {}
    by_case = {score.case: score for score in scores}
    cases = [_case(row, by_case.get(row["case"]), entries.get(row["case"]), summary["labels"]) for row in summary["metric_per_case"]]
    ordered = sorted(cases, key=lambda case: (_ORDER.get(case.status, 2), _merit(case), case.id))
    more = flags or {}

    def finish(case: CaseReport, drawn: Drawn | None) -> CaseReport:
        return _finished(case, drawn, more.get(case.id, ()))

    ready = {score.case: score.made for score in scores if isinstance(score.made, Drawn)}
    looks = add_thumbnails(ordered, sources, finish, beside, advance, budget, ready=ready)
    return _report(summary, looks, tables)


def _report(summary: Json, looks: Looks, tables: Sequence[Table]) -> Report:
    census = summary["cases"]
    total = census["held_out"] + census["training"]
    return Report(
        kind="evaluation",
        title=f"Evaluation of {total} case{'s' * (total != 1)}",
        headline=_headline(summary),
        cases=looks.cases,
        structures={key: name or f"label {key}" for key, name in summary["labels"].items()},
        columns=_columns(summary),
        tables=(*tables, *_label_tables(summary)),
        worst=looks.worst,
        curve={key: tuple(map(_point, points)) for key, points in summary["slice_curve"].items() if points},
        facts=_facts(summary, looks),
        definitions=tuple((key, str(value)) for key, value in summary["definitions"].items() if isinstance(value, str)),
        warnings=tuple(summary["warnings"]),
    )


def _case(row: Json, score: CaseScore | None, entry: ManifestCase | None, labels: Json) -> CaseReport:
    """One case without what only its files know."""
    structures = tuple(
        Structure(
            key,
            name or f"label {key}",
            row["metrics"][key]["status"] or row["status"],
            _numbers(row["metrics"][key]),
            _numbers(row["unprompted"][key]),
            _marks(score, key, entry),
        )
        for key, name in labels.items()
    )
    problem = score.problem if score is not None else None
    rows = [found for label in (score.labels.values() if score is not None else ()) for found in label.slices]
    return CaseReport(row["case"], row["group"], row["status"], structures, problem, slice_mm=_slice_mm(rows))


def _finished(case: CaseReport, drawn: Drawn | None, more: Sequence[str]) -> CaseReport:
    """With the geometry that the files know, and the flags, those from elsewhere first."""
    slice_mm = drawn.slice_mm if drawn is not None else case.slice_mm
    count = drawn.slice_count if drawn is not None else 0
    structures = tuple(replace(s, slice_count=count) for s in case.structures)
    ends = drawn.ends if drawn is not None else None
    own = [] if case.status == "failed" else named(structures, [evaluation_flags(s, ends, slice_mm) for s in structures])
    if case.status == "pred_missing":
        own = ["no prediction"]
    if drawn is not None and drawn.image_missing:
        own.append("its image is not shown: it cannot be read, or lies on another grid")
    return replace(case, structures=structures, slice_mm=slice_mm, flags=(*more, *own))


def _numbers(record: Json) -> dict[str, float | int | None]:
    return {key: value for key, value in record.items() if key != "status"}


def _marks(score: CaseScore | None, key: str, entry: ManifestCase | None) -> tuple[SliceMark, ...]:
    label = next((found for value, found in score.labels.items() if str(value) == key), None) if score is not None else None
    if label is None:
        return ()
    known = entry is not None and score is not None and not score.resampled  # else its slices are those of another grid
    told, value = entry if entry is not None and known else ManifestCase(), int(key) if key.isdecimal() else -1
    return marks(label, told.confidence.get(value, {}), told.disagreement.get(value, {}))


def _slice_mm(rows: Sequence[Row]) -> float | None:
    """From any slice whose distance to a prompt is known both ways."""
    for row in rows:
        slices, mm = row["prompt_distance_slices"], row["prompt_distance_mm"]
        if slices and mm is not None:
            return float(mm) / float(slices)
    return None


def _merit(case: CaseReport) -> float:
    """The mean Dice of its structures; a case without any comes last."""
    known = [float(dice) for s in case.structures if (dice := s.measures.get("Dice")) is not None]
    return sum(known) / len(known) if known else 2.0


def _headline(summary: Json) -> tuple[tuple[str, str, str], ...]:
    """The few numbers of held-out cases; without any, that there is none."""
    census, tolerance = summary["cases"], summary["definitions"]["nsd_tolerance_mm"]
    if not census["held_out"]:
        return (("Mean Dice", "-", "no held-out case: the model has learned from every case"),)
    mean, rest = summary["foreground_statistics"], summary["unprompted"]["foreground_statistics"]
    counted, found = (sum(record["Dice"]["n"] for record in part["statistics"].values()) for part in (summary, summary["unprompted"]))
    n = f"{counted} structures in {census['held_out']} held-out case{'s' * (census['held_out'] != 1)}"
    interval = mean["Dice"]["ci95"]
    alone = "Dice of the slices that the model had to find itself" + (f", of {found} structures" if 0 < found != counted else "")
    doubt = f"95 % interval {interval[0]:.3f} to {interval[1]:.3f}; " if interval else ""
    return (
        ("Mean Dice", _text(mean["Dice"]["mean"], 3), f"{doubt}{n}"),
        ("Without given slices", _text(rest["Dice"]["mean"], 3), alone),
        ("Mean HD95", _text(mean["HD95"]["mean"], 2, " mm"), _distance_remark(summary)),
        (f"NSD at {tolerance:g} mm", _text(mean[nsd_key(tolerance)]["mean"], 3), f"share of the surface within {tolerance:g} mm"),
    )


def _distance_remark(summary: Json) -> str:
    n = sum(record["HD95"]["n"] for record in summary["statistics"].values())
    harsh = summary["foreground_statistics"]["HD95"]["mean_penalised"]
    return f"of {n} structures in both masks; {_text(harsh, 2, ' mm')} when missed ones count as the volume's diagonal"


def _text(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _columns(summary: Json) -> tuple[tuple[str, str, int, str], ...]:
    tolerance = summary["definitions"]["nsd_tolerance_mm"]
    return (
        ("Dice", "Dice", 3, "high"),
        ("HD95", "HD95 mm", 2, "low"),
        (nsd_key(tolerance), f"NSD {tolerance:g} mm", 3, "high"),
        ("assd_mm", "ASSD mm", 2, "low"),
        ("volume_difference_percent", "Volume %", 1, ""),
        ("over_extent_mm", "Over mm", 1, "low"),
        ("over_slices", "Over slices", 0, "low"),
        ("under_slices", "Under slices", 0, "low"),
    )


def _label_tables(summary: Json) -> list[Table]:
    columns = tuple(label_columns(summary))
    return [
        Table(f"{title.capitalize()}: {n}", columns, tuple(map(tuple, label_rows(summary, block)))) for title, block, n in groups(summary)
    ]


def _point(told: Json) -> CurvePoint:
    return CurvePoint(told["distance_slices"], told["n"], told["p10"], told["p50"], told["p90"])


def _facts(summary: Json, looks: Looks) -> tuple[tuple[str, str], ...]:
    census, model = summary["cases"], summary["model"]
    told = [("model", str(model.get("name") or "")), *((key, str(model.get(key) or "")) for key in ("weights_digest", "plan_digest"))]
    counts = f"{census['held_out']} held-out, {census['training']} training, {len(census['failed'])} failed"
    counts += f", {len(census['pred_missing'])} without a prediction, {len(census['without_reference'])} predictions without a label"
    shown = [("shown", f"pictures of {looks.opened} cases, the worst first")] if looks.opened else []
    facts = [
        ("evaluated with", f"slmsam2 {summary['tool_version']}"),
        ("predicted with", summary["predicted_with"] and f"slmsam2 {summary['predicted_with']}"),
    ]
    return tuple((what, value) for what, value in [*facts, *told, ("cases", counts), *shown] if value)
