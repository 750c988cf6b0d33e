"""Last step: score predicted masks against labels.

Reads   PREDICTIONS/*, PREDICTIONS/manifest.json, the labels, dataset.json, finetuned/split.json, plan.json; images for the report.
Writes  OUTPUT/summary.json, OUTPUT/cases.csv, OUTPUT/slices.csv, OUTPUT/summary.md, OUTPUT/report.html, OUTPUT/report_files/*.
        For several folders of predictions these in OUTPUT/<name>/, and OUTPUT/comparison.json, OUTPUT/comparison.csv, OUTPUT/comparison.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.dataset.discovery import normalise_name, stem
from slmsam2_cli.errors import DONE, NOTHING_DONE, SOME_FAILED, UsageError
from slmsam2_cli.evaluation import tables
from slmsam2_cli.evaluation.comparison import compare, compared_metrics
from slmsam2_cli.evaluation.inputs import GroundTruth, Predictions, dataset_root, load_ground_truth, load_predictions, unique_names
from slmsam2_cli.evaluation.matching import Pairing
from slmsam2_cli.evaluation.scoring import MAX_KEPT_BYTES, CaseScore, Job, fill_missing_labels, score_all
from slmsam2_cli.evaluation.summary import TOOL, About, Json, Threshold, failed_thresholds, parse_thresholds, summarise
from slmsam2_cli.inference.manifest import Manifest, ManifestCase
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import relative
from slmsam2_cli.report import render
from slmsam2_cli.report.case_files import CaseFiles
from slmsam2_cli.report.case_images import MAX_CASES, DrawAfterScoring, PageOutput
from slmsam2_cli.report.evaluation_page import evaluation_report
from slmsam2_cli.report.schema import Table
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

# Each file with the bytes that it begins with: a file that begins so is replaced, any other is not ours and stays.
OUTPUTS = {
    "summary.json": f'{{\n  "tool": "{TOOL}"'.encode(),
    "cases.csv": ",".join(tables.CASE_KEYS).encode(),
    "slices.csv": ",".join(tables.SLICE_KEYS).encode(),
    "summary.md": b"# Evaluation\n\n" + tables.DEFINITION.encode(),
    render.NAME: render.PAGE_BEGINS,
}
COMPARISON_OUTPUTS = {
    "comparison.json": OUTPUTS["summary.json"],
    "comparison.csv": ",".join(tables.COMPARISON_KEYS).encode(),
    "comparison.md": tables.COMPARISON.encode(),
}
SUBFOLDER = "evaluation"  # of a folder of masks, which holds the report.html of predict


@dataclass(frozen=True)
class Options:
    """How to score and what to write. max_kept_bytes: of pictures drawn while scoring."""

    workers: int | None = None
    resample: bool = False
    report: bool = True
    max_kept_bytes: int = MAX_KEPT_BYTES


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """The scores of one folder of predictions, and the folder that its files go to."""

    predictions: Predictions
    scores: Sequence[CaseScore]
    summary: Json
    output: Path


def evaluate(
    predictions: Sequence[Path],
    labels: Path | None,
    workspace: Workspace | None,
    output: Path | None,
    *,
    dataset: Path | None,
    images: Path | None = None,
    tolerance_mm: float | None = None,
    as_json: bool = False,
    fail_under: Sequence[str] = (),
    options: Options | None = None,
) -> int:
    """Score folders of predictions against labels. Returns the exit code.

    fail_under: thresholds such as "Dice=0.8"; a lower foreground mean gives exit code 1.

    Raises: UsageError, DatasetError or PlanError when an input is missing or invalid; OutputError or LockError when results cannot be
    written.
    """
    thresholds, options = parse_thresholds(fail_under), options or Options()
    root = dataset_root(labels, dataset)
    space = workspace or (Workspace.of(root, None) if root is not None else None)
    truth = load_ground_truth(labels, root, space, images, tolerance_mm)
    folders = [*predictions] or ([space.predictions] if space is not None else [])
    if not folders:
        raise UsageError("no predictions to score. Run slmsam2 predict first, or name a folder of masks with -p")
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise UsageError(f"no folder of predictions at {missing[0]}. Run slmsam2 predict first, or name a folder of masks with -p")
    target = output or _default_output(folders, space, beside_masks=bool(predictions) and workspace is None)
    outputs = {target / name if len(folders) > 1 else target: folder for name, folder in zip(unique_names(folders), folders, strict=True)}
    _check_outputs(outputs, target, truth)
    for warning in truth.warnings:
        console.warn(warning)
    options = replace(options, max_kept_bytes=MAX_KEPT_BYTES // len(outputs))
    evaluated = [_evaluate(load_predictions(folder, truth), truth, one, options) for one, folder in outputs.items()]
    comparison = compare({one.output.name: one.summary for one in evaluated}) if len(evaluated) > 1 else None
    for one in evaluated:
        _write(one, truth, comparison, options)
    if comparison is not None:
        _write_comparison(target, comparison, evaluated)
    _print_results(evaluated, comparison, target, as_json, options)
    codes = [_exit_code(one, thresholds, several=len(evaluated) > 1) for one in evaluated]
    return SOME_FAILED if NOTHING_DONE in codes and min(codes) < NOTHING_DONE else max(codes)


def _default_output(folders: Sequence[Path], space: Workspace | None, beside_masks: bool) -> Path:
    """Choose where results go without -o: a subfolder of the folder of masks, or the workspace.

    Raises: UsageError when there is neither.
    """
    if beside_masks and len(folders) == 1:
        return folders[0] / SUBFOLDER
    if space is None:
        raise UsageError("several folders of predictions need a folder for the comparison. Name it with -o")
    return space.evaluation


def _check_outputs(outputs: Mapping[Path, Path], target: Path, truth: GroundTruth) -> None:
    """Check that no input is written to, and that only files of evaluate are replaced.

    Raises: UsageError when one would be.
    """
    with_labels = {truth.references.root.resolve(), *(path.parent.resolve() for path in truth.references.masks.values())}
    ours = {one / name: start for one in outputs for name, start in OUTPUTS.items()}
    ours |= {target / name: start for name, start in COMPARISON_OUTPUTS.items()} if len(outputs) > 1 else {}
    for output in {*outputs, target}:
        if output.resolve() in with_labels:
            raise UsageError(f"{output} holds the labels. Name another folder with -o")
    for path, start in ours.items():
        if path.exists() and not render.is_own_file(path, start):
            raise UsageError(f"{path} was not written by slmsam2 evaluate. Move it away, or name another folder with -o")


def _evaluate(predictions: Predictions, truth: GroundTruth, output: Path, options: Options) -> EvaluationResult:
    """Score one folder of predictions, and print its problems.

    Raises: UsageError when no prediction belongs to a label, which is a wrong folder and not a bad result.
    """
    references, pairing, manifest = truth.references, predictions.pairing, predictions.manifest or Manifest()
    if not any(prediction is not None for _, _, prediction in pairing.pairs):
        if not references.masks:
            problems = "".join(f"\n  {problem}" for problem in references.problems)
            raise UsageError(f"no labels in {references.root}{problems}. Name a data set or a folder of masks with -g")
        found = ", ".join(pairing.without_reference[:3]) or "no masks"
        wanted = ", ".join(list(references.masks)[:3])
        raise UsageError(
            f"no prediction in {predictions.folder} has the name of a label: found {found}; expected {wanted}. "
            "Name the folder of predicted masks with -p, and their labels with -g"
        )
    scores, structures = _score(predictions, truth, options)
    about = About(
        VERSION,
        structures,
        manifest.model,
        manifest.tool_version,
        pairing.without_reference,
        pairing.not_requested,
        pairing.renamed,
        tolerance_mm=truth.tolerance_mm,
        warnings=[*_pairing_warnings(pairing), *manifest.warnings],
    )
    _print_problems(scores, pairing, about.warnings)
    return EvaluationResult(predictions, scores, summarise(scores, about), output)


def _score(predictions: Predictions, truth: GroundTruth, options: Options) -> tuple[list[CaseScore], Mapping[Structure, str]]:
    """Score all cases, and add those without usable files as failed. Returns the scores and the structures that were scored."""
    references, pairing = truth.references, predictions.pairing
    draws = options.report and len(pairing.pairs) <= MAX_CASES
    jobs = []
    for case, reference, prediction in pairing.pairs:
        entry = predictions.manifest.cases.get(case) if predictions.manifest is not None else None
        unlisted: Mapping[int, tuple[int, ...]] | None = {} if predictions.manifest is not None and prediction is None else None
        files = _case_files(predictions, truth, False, (case, reference, prediction))
        jobs.append(
            Job(
                case=case,
                group=predictions.group_of(case),
                reference=reference,
                prediction=prediction,
                reference_root=references.root,
                prediction_root=predictions.folder,
                values=None if references.labels is None else tuple(references.labels),
                ignore=references.ignore,
                slice_axis=entry.array_axis if entry is not None else None,
                annotated=entry.annotated_slices if entry is not None else unlisted,
                tolerance_mm=truth.tolerance_mm,
                resample=options.resample,
                post_scoring=DrawAfterScoring(files) if draws else None,
            )
        )
    with console.progress("evaluate", len(jobs)) as advance:
        scored = score_all(jobs, options.workers, advance, options.max_kept_bytes)
    structures = references.labels
    if structures is None:
        structures = dict.fromkeys(sorted({v for score in scored for v in score.labels if isinstance(v, int)}), "")
    invalid = []
    for problem in (*references.problems, *pairing.problems):
        mask = references.masks.get(problem.case)
        name = problem.file if mask is None else relative(mask, references.root)
        invalid.append(CaseScore(problem.case, predictions.group_of(problem.case), "failed", name, None, problem=str(problem)))
    return [*invalid, *fill_missing_labels(scored, list(structures))], structures


def _case_files(predictions: Predictions, truth: GroundTruth, resampled: bool, files: tuple[str, Path, Path | None]) -> CaseFiles:
    """Return the files of a case for its pictures; its image is named like its reference or its prediction. files: as in Pairing.pairs."""
    case, reference, prediction = files
    entry = predictions.manifest.cases.get(case, ManifestCase()) if predictions.manifest is not None else ManifestCase()
    axis = None if resampled else entry.array_axis  # it is an axis of the prediction's own grid
    images = truth.images.get(case) or (truth.images.get(normalise_name(stem(prediction)), ()) if prediction is not None else ())
    return CaseFiles(prediction, images, reference, truth.references.root, axis, truth.references.ignore, resample=resampled)


def _pairing_warnings(pairing: Pairing) -> list[str]:
    """Describe how files were matched when their names differ."""
    if not pairing.renamed:
        return []
    case, name = pairing.renamed[0]
    more = f", and {len(pairing.renamed) - 1} more" if len(pairing.renamed) > 1 else ""
    return [f"no mask has the name of a label; matched without their prefixes and suffixes: {name} with {case}{more}"]


def _print_problems(scores: Sequence[CaseScore], pairing: Pairing, warnings: Sequence[str]) -> None:
    """Print one line for each failed case, then warnings, missing predictions and hints, then what was not scored."""
    for score in scores:
        if score.status == "failed":
            console.error(score.problem or f"case {score.case}: could not be scored")
    for warning in warnings:
        console.warn(warning)
    for score in scores:
        if score.status == "pred_missing":
            console.error(f"case {score.case}: no prediction; it counts as empty (Dice 0). Predict it and evaluate again")
        for line in (*score.warnings, *(f"case {score.case}: {hint}" for hint in score.hints)):
            console.warn(line)
    if pairing.without_reference:
        listed = ", ".join(pairing.without_reference[:5])
        console.warn(f"{len(pairing.without_reference)} predictions have no label and are not scored: {listed}")
    if pairing.not_requested:
        console.say(f"training cases that were not predicted and are not scored: {len(pairing.not_requested)}")
    if scores and all(score.group == "training" for score in scores):
        console.warn("all cases were used for training; there is no score on held-out cases")


def _write(one: EvaluationResult, truth: GroundTruth, comparison: Json | None, options: Options) -> None:
    """Write the files of one folder of predictions.

    Raises: OutputError or LockError when they cannot be written.
    """
    resampled = {score.case for score in one.scores if score.resampled}
    files = {pair[0]: _case_files(one.predictions, truth, pair[0] in resampled, pair) for pair in one.predictions.pairing.pairs}
    compared = []
    if comparison is not None:
        rows = tuple(map(tuple, tables.comparison_rows(comparison)))
        compared.append(Table("Predictions compared in pairs", tables.COMPARISON_COLUMNS, rows, tables.DIFFERENCE))
    with atomic.lock_folder(one.output):
        atomic.write_text(one.output / "cases.csv", tables.cases_csv(one.summary))
        atomic.write_text(one.output / "slices.csv", tables.slices_csv(one.scores))
        atomic.write_text(one.output / "summary.md", tables.markdown(one.summary))
        atomic.write_json(one.output / "summary.json", one.summary)
        if not options.report:
            if (one.output / render.NAME).exists():
                console.warn(f"{one.output / render.NAME} is of an earlier run and does not show these results")
            return
        with console.progress("report", len(one.scores)) as advance:
            render.write_report(
                one.output,
                lambda write: evaluation_report(
                    one.summary, one.scores, files, PageOutput(write, advance), manifest=one.predictions.manifest, tables=compared
                ),
            )


def _write_comparison(output: Path, comparison: Json, evaluated: Sequence[EvaluationResult]) -> None:
    """Write the comparison of several folders of predictions.

    Raises: OutputError or LockError when it cannot be written.
    """
    summaries = {one.output.name: one.summary for one in evaluated}
    metrics = compared_metrics(evaluated[0].summary)
    with atomic.lock_folder(output):
        atomic.write_text(output / "comparison.csv", tables.comparison_csv(summaries, comparison, metrics))
        atomic.write_text(output / "comparison.md", tables.comparison_markdown(comparison))
        atomic.write_json(output / "comparison.json", comparison)


def _print_results(evaluated: Sequence[EvaluationResult], comparison: Json | None, target: Path, as_json: bool, options: Options) -> None:
    """Print the tables, or the summary or comparison as JSON, and the files that were written."""
    if as_json:
        shown: Any = comparison if comparison is not None else evaluated[0].summary
        console.result(json.dumps(shown, indent=2, allow_nan=False))
    else:
        for one in evaluated:
            before = f"{one.output.name}, " if comparison is not None else ""
            for title, block, cases in tables.groups(one.summary):
                columns, rows = tables.label_columns(one.summary), tables.label_rows(one.summary, block)
                console.table(f"{before}{title}: {cases}. {tables.DEFINITION}", columns, rows)
        if comparison is not None:
            title = f"{len(comparison['cases'])} cases in pairs. {tables.DIFFERENCE}"
            console.table(title, tables.COMPARISON_COLUMNS, tables.comparison_rows(comparison))
    for one in evaluated:
        for name in OUTPUTS:
            if name != render.NAME or options.report:
                console.say(f"wrote {one.output / name}")
    for name in COMPARISON_OUTPUTS if comparison is not None else ():
        console.say(f"wrote {target / name}")


def _exit_code(one: EvaluationResult, thresholds: Sequence[Threshold], several: bool) -> int:
    """Return 2 when every case failed, 1 when one failed or is missing or a threshold is not reached, else 0; print failed thresholds."""
    if all(score.status == "failed" for score in one.scores):
        return NOTHING_DONE
    below = failed_thresholds(one.summary, thresholds)
    for line in below:
        console.error(f"{one.output.name}: {line}" if several else line)
    return SOME_FAILED if below or any(score.status != "ok" for score in one.scores) else DONE
