"""Last stage: predictions + labels -> what the masks are worth.

Reads   PREDICTIONS/*, PREDICTIONS/manifest.json, the labels, dataset.json, finetuned/split.json, plan.json; images, for pictures.
Writes  OUT/summary.json, OUT/cases.csv, OUT/slices.csv, OUT/summary.md, OUT/report.html, OUT/report_files/*.
        For several predictions these in OUT/<name>/, and OUT/comparison.json, OUT/comparison.csv, OUT/comparison.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.errors import DONE, NOTHING_DONE, SOME_FAILED, CaseError, UsageError
from slmsam2_cli.evaluation import tables
from slmsam2_cli.evaluation.comparison import compare, compared_metrics
from slmsam2_cli.evaluation.inputs import Predicted, Truth, dataset_root, load_ground_truth, load_predictions, unique_names
from slmsam2_cli.evaluation.matching import Pairing, case_name, group_of, relative_name
from slmsam2_cli.evaluation.scoring import MAX_KEPT_BYTES, CaseScore, Job, fill_missing_labels, score_all
from slmsam2_cli.evaluation.summary import TOOL, About, Json, Threshold, failed_thresholds, parse_thresholds, summarise
from slmsam2_cli.inference.manifest import Manifest
from slmsam2_cli.io import atomic
from slmsam2_cli.report import render
from slmsam2_cli.report.case_files import CaseFiles
from slmsam2_cli.report.case_images import MAX_CASES, DrawAfterScoring, PageOutput
from slmsam2_cli.report.evaluation_page import evaluation_report
from slmsam2_cli.report.schema import Report, Table
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

# Each file with the bytes by which we know our own: a derived file of ours is replaced, anybody else's is not.
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
BESIDE = "evaluation"  # within the folder of masks, whose own report.html is predict's


@dataclass(frozen=True)
class Options:
    """How to score and what to leave out. max_kept_bytes: of what is drawn while scoring."""

    workers: int | None = None
    resample: bool = False
    report: bool = True
    max_kept_bytes: int = MAX_KEPT_BYTES


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """One folder of predictions, scored. out: where its files go."""

    predicted: Predicted
    scores: Sequence[CaseScore]
    summary: Json
    out: Path


def evaluate(
    predictions: Sequence[Path],
    labels: Path | None,
    workspace: Workspace | None,
    out: Path | None,
    *,
    dataset: Path | None,
    images: Path | None = None,
    tolerance_mm: float | None = None,
    as_json: bool = False,
    fail_under: Sequence[str] = (),
    options: Options | None = None,
) -> int:
    """Score folders of predictions against labels; -> exit code. `fail_under` ("Dice=0.8"): a lower foreground mean is exit 1."""
    floors, options = parse_thresholds(fail_under), options or Options()
    root = dataset_root(labels, dataset)
    space = workspace or (Workspace.of(root, None) if root is not None else None)
    truth = load_ground_truth(labels, root, space, images, tolerance_mm)
    folders = _predictions(predictions, space)
    target = _target(out, folders, space, next_to_masks=bool(predictions) and workspace is None)
    outs = {target / name if len(folders) > 1 else target: folder for name, folder in zip(unique_names(folders), folders, strict=True)}
    _check_targets(outs, target, truth)
    for warning in truth.warnings:
        console.warn(warning)
    options = replace(options, max_kept_bytes=MAX_KEPT_BYTES // len(outs))
    evaluated = [_evaluate(load_predictions(folder, truth), truth, one, options) for one, folder in outs.items()]
    comparison = compare({one.out.name: one.summary for one in evaluated}) if len(evaluated) > 1 else None
    for one in evaluated:
        _write(one, truth, comparison, options)
    if comparison is not None:
        _write_comparison(target, comparison, evaluated)
    _show(evaluated, comparison, target, as_json, options)
    codes = [_exit_code(one, floors, several=len(evaluated) > 1) for one in evaluated]
    return SOME_FAILED if NOTHING_DONE in codes and min(codes) < NOTHING_DONE else max(codes)


def _predictions(named: Sequence[Path], space: Workspace | None) -> list[Path]:
    folders = [*named] or ([space.predictions] if space is not None else [])
    if not folders:
        raise UsageError("no predictions were named. Run slmsam2 predict first, or name a folder of masks with -p")
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"no folder of predictions at {folder}. Run slmsam2 predict first, or name a folder of masks with -p")
    return folders


def _target(out: Path | None, folders: Sequence[Path], space: Workspace | None, next_to_masks: bool) -> Path:
    """Where results go: where asked, else into the folder of masks that was named, else the workspace."""
    if out is not None:
        return out
    if next_to_masks and len(folders) == 1:
        return folders[0] / BESIDE
    if space is None:
        raise UsageError("several predictions were named: say where the comparison goes with -o")
    return space.evaluation


def _check_targets(outs: Mapping[Path, Path], target: Path, truth: Truth) -> None:
    """Inputs are never written to, and nobody else's file is replaced. UsageError."""
    holding = {truth.references.root.resolve(), *(path.parent.resolve() for path in truth.references.masks.values())}
    ours = {one / name: start for one in outs for name, start in OUTPUTS.items()}
    ours |= {target / name: start for name, start in COMPARISON_OUTPUTS.items()} if len(outs) > 1 else {}
    for out in {*outs, target}:
        if out.resolve() in holding:
            raise UsageError(f"{out} holds the labels. Name another folder with -o")
    for path, start in ours.items():
        if path.exists() and not render.is_own_file(path, start):
            raise UsageError(f"{path} was not written by slmsam2 evaluate. Move it away, or name another folder with -o")


def _evaluate(predicted: Predicted, truth: Truth, out: Path, options: Options) -> EvaluationResult:
    """Score one folder, and say what is wrong with it."""
    _check_anything_to_score(predicted, truth)
    scores, structures = _scores(predicted, truth, options)
    summary = summarise(scores, _about(predicted, truth, structures))
    _print_problems(scores, predicted)
    return EvaluationResult(predicted, scores, summary, out)


def _check_anything_to_score(predicted: Predicted, truth: Truth) -> None:
    """Folders that have nothing in common are a slip, not a bad result. UsageError."""
    if any(prediction is not None for _, _, prediction in predicted.pairing.pairs):
        return
    references = truth.references
    if not references.masks:
        problems = "".join(f"\n  {problem}" for problem in references.problems)
        raise UsageError(f"no labels in {references.root}{problems}. Name a data set or a folder of masks with -g")
    found = ", ".join(predicted.pairing.without_reference[:3]) or "no masks"
    wanted = ", ".join(list(references.masks)[:3])
    raise UsageError(f"no prediction in {predicted.folder} belongs to a label: found {found}; wanted {wanted}. Masks are matched by name")


def _scores(predicted: Predicted, truth: Truth, options: Options) -> tuple[list[CaseScore], Mapping[Structure, str]]:
    """All cases, those that cannot be used included, and the structures that were scored."""
    declared = truth.references.labels
    pairs = predicted.pairing.pairs
    draws = options.report and len(pairs) <= MAX_CASES
    jobs = [_job(predicted, truth, options.resample, draws, *found) for found in pairs]
    with console.progress("evaluate", len(jobs)) as advance:
        scored = score_all(jobs, options.workers, advance, options.max_kept_bytes)
    occurring = {value: "" for value in sorted({v for score in scored for v in score.labels if isinstance(v, int)})}
    structures = declared if declared is not None else dict[Structure, str](occurring.items())
    refused = [_failed_score(predicted, truth, problem) for problem in (*truth.references.problems, *predicted.pairing.problems)]
    return [*refused, *fill_missing_labels(scored, list(structures))], structures


def _job(predicted: Predicted, truth: Truth, resample: bool, draws: bool, case: str, reference: Path, prediction: Path | None) -> Job:
    references, manifest = truth.references, predicted.manifest
    entry = manifest.cases.get(case) if manifest is not None else None
    given = entry.annotated_slices if entry is not None else {} if manifest is not None and prediction is None else None
    return Job(
        case=case,
        group=group_of(case, predicted.seen),
        reference=reference,
        prediction=prediction,
        reference_root=references.root,
        prediction_root=predicted.folder,
        values=None if references.labels is None else tuple(references.labels),
        ignore=references.ignore,
        slice_axis=entry.array_axis if entry is not None else None,
        prompted=given,
        tolerance_mm=truth.tolerance_mm,
        resample=resample,
        post_scoring=DrawAfterScoring(_sources(predicted, truth, False, case, reference, prediction)) if draws else None,
    )


def _failed_score(predicted: Predicted, truth: Truth, problem: CaseError) -> CaseScore:
    """A case that was no use before anything was opened."""
    reference = truth.references.masks.get(problem.case)
    name = problem.file if reference is None else relative_name(reference, truth.references.root)
    return CaseScore(problem.case, group_of(problem.case, predicted.seen), "failed", name, None, problem=str(problem))


def _about(predicted: Predicted, truth: Truth, structures: Mapping[Structure, str]) -> About:
    manifest, pairing = predicted.manifest or Manifest(), predicted.pairing
    return About(
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


def _pairing_warnings(pairing: Pairing) -> list[str]:
    """How files were matched, where that is a guess."""
    if not pairing.renamed:
        return []
    case, name = pairing.renamed[0]
    more = f", and {len(pairing.renamed) - 1} more" if len(pairing.renamed) > 1 else ""
    return [f"no mask has the name of a label; matched by what their affixes leave: {name} with {case}{more}"]


def _print_problems(scores: Sequence[CaseScore], predicted: Predicted) -> None:
    """What went wrong, one line each; then what is merely worth knowing."""
    pairing = predicted.pairing
    for score in scores:
        if score.status == "failed":
            console.error(score.problem or f"case {score.case}: could not be scored")
    for warning in [*_pairing_warnings(pairing), *(predicted.manifest.warnings if predicted.manifest else ())]:
        console.warn(warning)
    for score in scores:
        if score.status == "pred_missing":
            console.error(f"case {score.case}: no prediction; it counts as nothing found (Dice 0). Predict it and evaluate again")
        for line in (*score.warnings, *(f"case {score.case}: {hint}" for hint in score.hints)):
            console.warn(line)
    if pairing.without_reference:
        listed = ", ".join(pairing.without_reference[:5])
        console.warn(f"{len(pairing.without_reference)} predictions have no label and are not scored: {listed}")
    if pairing.not_requested:
        console.say(f"{len(pairing.not_requested)} training cases were not predicted and are not scored")
    if scores and all(score.group == "training" for score in scores):
        console.warn("every case was used for training: there is no held-out case, so the headline is empty")


def _write(one: EvaluationResult, truth: Truth, comparison: Json | None, options: Options) -> None:
    with atomic.lock_folder(one.out):
        atomic.write_text(one.out / "cases.csv", tables.cases_csv(one.summary))
        atomic.write_text(one.out / "slices.csv", tables.slices_csv(one.scores))
        atomic.write_text(one.out / "summary.md", tables.markdown(one.summary))
        atomic.write_json(one.out / "summary.json", one.summary)
        if not options.report and (one.out / render.NAME).exists():
            console.warn(f"{one.out / render.NAME} is of an earlier run and does not tell of these results")
        if options.report:
            with console.progress("report", len(one.scores)) as advance:
                render.write_report(one.out, lambda write: _report(one, truth, comparison, PageOutput(write, advance)))


def _report(one: EvaluationResult, truth: Truth, comparison: Json | None, output: PageOutput) -> Report:
    """The page."""
    resampled = {score.case for score in one.scores if score.resampled}
    sources = {
        case: _sources(one.predicted, truth, case in resampled, case, reference, prediction)
        for case, reference, prediction in one.predicted.pairing.pairs
    }
    return evaluation_report(
        one.summary,
        one.scores,
        sources,
        output,
        manifest=one.predicted.manifest,
        tables=[] if comparison is None else [_comparison_table(comparison)],
    )


def _sources(predicted: Predicted, truth: Truth, resampled: bool, case: str, reference: Path, prediction: Path | None) -> CaseFiles:
    entry = predicted.manifest.cases.get(case) if predicted.manifest is not None else None
    axis = entry.array_axis if entry is not None and not resampled else None  # else it is one of another grid
    images = truth.images.get(case) or (truth.images.get(case_name(prediction), ()) if prediction is not None else ())
    return CaseFiles(prediction, images, reference, truth.references.root, axis, truth.references.ignore, resample=resampled)


def _comparison_table(comparison: Json) -> Table:
    rows = tuple(map(tuple, tables.comparison_rows(comparison)))
    return Table("Predictions compared in pairs", tuple(tables.comparison_columns()), rows, tables.DIFFERENCE)


def _write_comparison(out: Path, comparison: Json, evaluated: Sequence[EvaluationResult]) -> None:
    summaries = {one.out.name: one.summary for one in evaluated}
    metrics = compared_metrics(evaluated[0].summary)
    with atomic.lock_folder(out):
        atomic.write_text(out / "comparison.csv", tables.comparison_csv(summaries, comparison, metrics))
        atomic.write_text(out / "comparison.md", tables.comparison_markdown(comparison))
        atomic.write_json(out / "comparison.json", comparison)


def _show(evaluated: Sequence[EvaluationResult], comparison: Json | None, target: Path, as_json: bool, options: Options) -> None:
    if as_json:
        shown: Any = comparison if comparison is not None else evaluated[0].summary
        console.result(json.dumps(shown, indent=2, allow_nan=False))
    else:
        for one in evaluated:
            before = f"{one.out.name}, " if comparison is not None else ""
            for title, block, cases in tables.groups(one.summary):
                columns, rows = tables.label_columns(one.summary), tables.label_rows(one.summary, block)
                console.table(f"{before}{title}: {cases}. {tables.DEFINITION}", columns, rows)
        if comparison is not None:
            title = f"{len(comparison['cases'])} cases in pairs. {tables.DIFFERENCE}"
            console.table(title, tables.comparison_columns(), tables.comparison_rows(comparison))
    for one in evaluated:
        for name in OUTPUTS:
            if name != render.NAME or options.report:
                console.say(f"wrote {one.out / name}")
    for name in COMPARISON_OUTPUTS if comparison is not None else ():
        console.say(f"wrote {target / name}")


def _exit_code(one: EvaluationResult, floors: Sequence[Threshold], several: bool) -> int:
    """1 when a case failed or is missing, or a limit is not reached; 2 when there is nothing but failures."""
    if all(score.status == "failed" for score in one.scores):
        return NOTHING_DONE
    short = failed_thresholds(one.summary, floors)
    for line in short:
        console.error(f"{one.out.name}: {line}" if several else line)
    return SOME_FAILED if short or any(score.status != "ok" for score in one.scores) else DONE
