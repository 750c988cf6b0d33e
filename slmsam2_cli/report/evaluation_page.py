"""Make the report of an evaluation from summary.json and the scores behind it, with pictures from the files where they can be read.

All numbers are those of summary.json; nothing is measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.surface import nsd_key
from slmsam2_cli.evaluation.tables import groups, label_columns, label_rows
from slmsam2_cli.inference.manifest import Manifest, ManifestCase
from slmsam2_cli.report.case_files import CaseFiles
from slmsam2_cli.report.case_images import CaseDrawing, PageOutput, Thumbnails, add_thumbnails, slice_marks
from slmsam2_cli.report.flags import NO_PREDICTION, evaluation_flags, prefix_names
from slmsam2_cli.report.schema import CaseReport, CurvePoint, Report, Structure, Table

Json = Mapping[str, Any]


def evaluation_report(
    summary: Json,
    scores: Sequence[CaseScore],
    files: Mapping[str, CaseFiles],
    output: PageOutput | None = None,
    manifest: Manifest | None = None,
    tables: Sequence[Table] = (),
) -> Report:
    """Make the page of an evaluation.

    scores: their hints are shown as the first flags, and drawings made while scoring (CaseScore.made) are used; files: by case, for
    pictures, a case that is not in it gets none; manifest: of the predictions; tables: shown before the means of the labels.
    """
    entries = manifest.cases if manifest is not None else {}
    by_case = {score.case: score for score in scores}
    cases = [_case(row, by_case.get(row["case"]), entries.get(row["case"]), summary["labels"]) for row in summary["metric_per_case"]]
    hints = {score.case: score.hints for score in scores}
    ready = {score.case: score.made for score in scores if isinstance(score.made, CaseDrawing)}
    thumbnails = add_thumbnails(
        sorted(cases, key=_order),
        files,
        lambda case, drawing: _complete_case(case, drawing, hints.get(case.id, ())),
        output or PageOutput(),
        ready=ready,
    )
    return _report(summary, thumbnails, tables)


def _report(summary: Json, thumbnails: Thumbnails, tables: Sequence[Table]) -> Report:
    total = summary["cases"]["held_out"] + summary["cases"]["training"]
    columns = tuple(label_columns(summary))
    means = [
        Table(f"{name.capitalize()}: {n}", columns, tuple(map(tuple, label_rows(summary, block)))) for name, block, n in groups(summary)
    ]
    curve = {
        key: tuple(CurvePoint(point["distance_slices"], point["n"], point["p10"], point["p50"], point["p90"]) for point in points)
        for key, points in summary["slice_curve"].items()
        if points
    }
    return Report(
        kind="evaluation",
        title=f"Evaluation of {total} case{'s' * (total != 1)}",
        headline=_headline(summary),
        cases=thumbnails.cases,
        structures={key: name or f"label {key}" for key, name in summary["labels"].items()},
        columns=_columns(summary["definitions"]["nsd_tolerance_mm"]),
        tables=(*tables, *means),
        worst=thumbnails.worst,
        curve=curve,
        facts=_facts(summary, thumbnails),
        definitions=tuple((key, str(value)) for key, value in summary["definitions"].items() if isinstance(value, str)),
        warnings=tuple(summary["warnings"]),
    )


def _case(row: Json, score: CaseScore | None, entry: ManifestCase | None, labels: Json) -> CaseReport:
    """Collect what is known of a case without its files. row: of summary.json; entry: of the manifest."""
    scored = {str(value): label for value, label in score.labels.items()} if score is not None else {}
    predicted = entry if entry is not None and score is not None and not score.resampled else ManifestCase()  # else slices of another grid
    structures = []
    for key, name in labels.items():
        value = int(key) if key.isdecimal() else -1
        confidence, disagreement = predicted.confidence.get(value, {}), predicted.disagreement.get(value, {})
        measures, unprompted = ({k: v for k, v in row[part][key].items() if k != "status"} for part in ("metrics", "unprompted"))
        marks = slice_marks(scored[key], confidence, disagreement) if key in scored else ()
        status = row["metrics"][key]["status"] or row["status"]
        structures.append(Structure(key, name or f"label {key}", status, measures, unprompted, marks))
    slice_mm = next(  # from any slice whose distance from the prompt is known in slices and in mm
        (
            float(mm) / float(slices)
            for label in scored.values()
            for found in label.slices
            if (slices := found["prompt_distance_slices"]) and (mm := found["prompt_distance_mm"]) is not None
        ),
        None,
    )
    problem = score.problem if score is not None else None
    return CaseReport(row["case"], row["group"], row["status"], tuple(structures), problem, slice_mm=slice_mm)


def _complete_case(case: CaseReport, drawing: CaseDrawing | None, hints: Sequence[str]) -> CaseReport:
    """Add the geometry that only the files have, and the flags, the hints of scoring first."""
    slice_mm, count, ends = (case.slice_mm, 0, None) if drawing is None else (drawing.slice_mm, drawing.slice_count, drawing.ends)
    structures = tuple(replace(s, slice_count=count) for s in case.structures)
    flags = [] if case.status == "failed" else prefix_names(structures, [evaluation_flags(s, ends, slice_mm) for s in structures])
    if case.status == "pred_missing":
        flags = [NO_PREDICTION]
    if drawing is not None and drawing.image_missing:
        flags.append("image not shown: it cannot be read, or its grid differs from the reference; check the image file")
    return replace(case, structures=structures, slice_mm=slice_mm, flags=(*hints, *flags))


def _order(case: CaseReport) -> tuple[int, float, str]:
    """Sort failed cases first, then missing predictions, then by mean Dice of the structures, cases without any last."""
    known = [float(dice) for s in case.structures if (dice := s.measures.get("Dice")) is not None]
    return {"failed": 0, "pred_missing": 1}.get(case.status, 2), sum(known) / len(known) if known else 2.0, case.id


def _headline(summary: Json) -> tuple[tuple[str, str, str], ...]:
    """Return (name, value, remark) of each card for the held-out cases."""
    held_out, tolerance = summary["cases"]["held_out"], summary["definitions"]["nsd_tolerance_mm"]
    if not held_out:
        return (("Mean Dice", "-", "no held-out case: all cases were used for training"),)
    mean, rest = summary["foreground_statistics"], summary["unprompted"]["foreground_statistics"]
    counted, found = (sum(record["Dice"]["n"] for record in part["statistics"].values()) for part in (summary, summary["unprompted"]))
    distances = sum(record["HD95"]["n"] for record in summary["statistics"].values())
    ci95 = mean["Dice"]["ci95"]
    cases = f"{held_out} held-out case{'s' * (held_out != 1)}"
    interval = f"95 % interval {ci95[0]:.3f} to {ci95[1]:.3f}; " if ci95 else ""
    unprompted = "Dice on unprompted slices only" + (f", {found} structures" if 0 < found != counted else "")
    penalised = f"{_format(mean['HD95']['mean_penalised'], 2, ' mm')} when missed structures count as the volume's diagonal"
    return (
        ("Mean Dice", _format(mean["Dice"]["mean"], 3), f"{interval}{counted} structures in {cases}"),
        ("Without annotated slices", _format(rest["Dice"]["mean"], 3), unprompted),
        ("Mean HD95", _format(mean["HD95"]["mean"], 2, " mm"), f"of {distances} structures present in both masks; {penalised}"),
        (f"NSD at {tolerance:g} mm", _format(mean[nsd_key(tolerance)]["mean"], 3), f"fraction of both borders within {tolerance:g} mm"),
    )


def _format(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _columns(tolerance_mm: float) -> tuple[tuple[str, str, int, str], ...]:
    """Return (measure, heading, digits, better) of the columns of the case table."""
    return (
        ("Dice", "Dice", 3, "high"),
        ("HD95", "HD95 mm", 2, "low"),
        (nsd_key(tolerance_mm), f"NSD {tolerance_mm:g} mm", 3, "high"),
        ("assd_mm", "ASSD mm", 2, "low"),
        ("volume_difference_percent", "Volume error %", 1, ""),
        ("over_extent_mm", "Extra mm", 1, "low"),
        ("over_slices", "Extra slices", 0, "low"),
        ("under_slices", "Missed slices", 0, "low"),
    )


def _facts(summary: Json, thumbnails: Thumbnails) -> tuple[tuple[str, str], ...]:
    """Return the provenance: versions, model and numbers of cases."""
    cases, model = summary["cases"], summary["model"]
    counts = f"{cases['held_out']} held-out, {cases['training']} training, {len(cases['failed'])} failed"
    counts += f", {len(cases['pred_missing'])} without prediction, {len(cases['without_reference'])} predictions without reference"
    facts = [
        ("evaluated with", f"slmsam2 {summary['tool_version']}"),
        ("predicted with", summary["predicted_with"] and f"slmsam2 {summary['predicted_with']}"),
        ("model", model.get("name")),
        *((key, model.get(key)) for key in ("weights_digest", "plan_digest")),
        ("cases", counts),
        ("pictures", thumbnails.drawn and f"of {thumbnails.drawn} cases, the worst first"),
    ]
    return tuple((name, str(value)) for name, value in facts if value)
