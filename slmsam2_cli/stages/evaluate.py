"""Last stage: predictions + labels -> what the masks are worth.

Reads   PREDICTIONS/*, PREDICTIONS/manifest.json, the labels, dataset.json, finetuned/split.json, plan.json.
Writes  OUT/summary.json, OUT/cases.csv, OUT/slices.csv, OUT/summary.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.dataset import Dataset, read_dataset
from slmsam2_cli.data.files import open_regular
from slmsam2_cli.errors import DONE, NOTHING_DONE, SOME_FAILED, CaseError, DatasetError, PlanError, UsageError
from slmsam2_cli.evaluation import tables
from slmsam2_cli.evaluation.manifest import Manifest, read_manifest
from slmsam2_cli.evaluation.pairing import Pairing, References, group_of, pair, references_of_dataset, references_of_folder, relative_name
from slmsam2_cli.evaluation.scoring import CaseScore, Job, score_all, with_labels
from slmsam2_cli.evaluation.summary import TOOL, About, Json, summarise
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

# Each file with the bytes by which we know our own: a derived file of ours is replaced, anybody else's is not.
OUTPUTS = {
    "summary.json": f'{{\n  "tool": "{TOOL}"'.encode(),
    "cases.csv": ",".join(tables.CASE_KEYS).encode(),
    "slices.csv": ",".join(tables.SLICE_KEYS).encode(),
    "summary.md": b"# Evaluation\n\n" + tables.DEFINITION.encode(),
}


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before a mask is opened."""

    predictions: Path
    references: References
    manifest: Manifest | None
    seen: frozenset[str]
    out: Path


def evaluate(
    predictions: Path | None,
    labels: Path | None,
    workspace: Workspace | None,
    out: Path | None,
    *,
    dataset: Path | None,
    as_json: bool = False,
    fail_under: str | None = None,
    workers: int | None = None,
) -> int:
    """Score predictions against labels; -> exit code. `fail_under` ("Dice=0.8") makes a lower foreground mean exit 1."""
    floor = _floor(fail_under)
    inputs = _inputs(predictions, labels, workspace, out, dataset)
    pairing = pair(inputs.references, inputs.predictions, inputs.manifest, inputs.seen)
    _refuse_nothing_to_score(inputs, pairing)
    scores, values = _scores(inputs, pairing, workers)
    summary = summarise(scores, _about(inputs, pairing, values))
    for warning in inputs.manifest.warnings if inputs.manifest else ():
        console.warn(warning)
    _report_troubles(scores, pairing)
    _write(inputs.out, summary, scores)
    _show(summary, inputs.out, as_json)
    return max(_exit_code(scores), _judge(summary, floor))


def _inputs(predictions: Path | None, labels: Path | None, workspace: Workspace | None, out: Path | None, dataset: Path | None) -> Inputs:
    root = _dataset_root(labels, dataset)
    space = workspace or (Workspace.of(root, None) if root is not None else None)
    references = _references(labels, root, space)
    folder = _predictions(predictions, space)
    manifest = read_manifest(folder)
    beside_masks = predictions is not None and workspace is None
    target = out or (folder if beside_masks or space is None else space.evaluation)
    _refuse_target(target, references)
    return Inputs(folder, references, manifest, _training_cases(space, manifest), target)


def _dataset_root(labels: Path | None, dataset: Path | None) -> Path | None:
    """The data set the labels belong to: they are it, they lie in it, or it was named."""
    near = [] if labels is None else [labels, labels.absolute().parent]
    return next((folder for folder in near if (folder / "dataset.json").is_file()), dataset)


def _references(labels: Path | None, root: Path | None, space: Workspace | None) -> References:
    """A data set's own labels, or the masks in a folder with the names of its data set or of the plan. UsageError, DatasetError."""
    if labels is None or labels == root:
        if root is None:
            raise UsageError("no labels to compare with. Name a data set with -d, or a folder of masks with -g")
        return references_of_dataset(read_dataset(root))
    if not labels.is_dir():
        raise UsageError(f"no folder of labels at {labels}. Name a folder of masks, or a data set, with -g")
    declared = _declared(root) if root is not None else None
    if declared is not None:
        return references_of_folder(labels, declared.labels, declared.ignore)
    planned = read_plan(space.plan).labels if space is not None and space.plan.is_file() else None
    return references_of_folder(labels, planned, None)


def _declared(root: Path) -> Dataset | None:
    """The data set for its label names alone; one that cannot be read is said and done without."""
    try:
        return read_dataset(root)
    except DatasetError as error:
        console.warn(f"label names are not known: {error}")
        return None


def _predictions(predictions: Path | None, space: Workspace | None) -> Path:
    folder = predictions or (space.predictions if space is not None else None)
    if folder is None or not folder.is_dir():
        where = "no predictions were named" if folder is None else f"no folder of predictions at {folder}"
        raise UsageError(f"{where}. Run slmsam2 predict first, or name a folder of masks with -p")
    return folder


def _training_cases(space: Workspace | None, manifest: Manifest | None) -> frozenset[str]:
    """Cases a model has learned from, by the workspace's split or by the predictions' own account."""
    told = {case for case, entry in manifest.cases.items() if entry.training} if manifest is not None else set()
    if space is None or not space.split.is_file():
        return frozenset(told)
    split = store.read_json(space.split, "the split")
    listed = split.get("training") if isinstance(split, dict) else None
    if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed):
        raise PlanError(f'{space.split.name}: expected {{"training": ["case", …]}}. Run slmsam2 finetune again')
    return frozenset({*told, *listed})


def _refuse_target(out: Path, references: References) -> None:
    """Inputs are never written to, and nobody else's file is replaced. UsageError."""
    folders = {references.root.resolve(), *(path.parent.resolve() for path in references.masks.values())}
    if out.resolve() in folders:
        raise UsageError(f"{out} holds the labels. Name another folder with -o")
    for name, ours in OUTPUTS.items():
        path = out / name
        if path.exists() and not _begins_with(path, ours):
            raise UsageError(f"{path} was not written by slmsam2 evaluate. Move it away, or name another folder with -o")


def _begins_with(path: Path, start: bytes) -> bool:
    with open_regular(path) as file:
        return file.read(len(start)) == start


def _refuse_nothing_to_score(inputs: Inputs, pairing: Pairing) -> None:
    """Folders that have nothing in common are a slip, not a bad result. UsageError."""
    if any(prediction is not None for _, _, prediction in pairing.pairs):
        return
    if not inputs.references.masks:
        problems = "".join(f"\n  {problem}" for problem in inputs.references.problems)
        raise UsageError(f"no labels in {inputs.references.root}{problems}. Name a data set or a folder of masks with -g")
    found = ", ".join(pairing.without_reference[:3]) or "no masks"
    wanted = ", ".join(list(inputs.references.masks)[:3])
    raise UsageError(f"no prediction in {inputs.predictions} belongs to a label: found {found}; wanted {wanted}. Masks are matched by name")


def _scores(inputs: Inputs, pairing: Pairing, workers: int | None) -> tuple[list[CaseScore], Mapping[int, str]]:
    """All cases, those that cannot be used included, and the labels that were scored."""
    declared = inputs.references.labels
    jobs = [_job(inputs, *found) for found in pairing.pairs]
    with console.progress("evaluate", len(jobs)) as advance:
        scored = score_all(jobs, workers, advance)
    values = declared if declared is not None else {value: "" for value in sorted({v for score in scored for v in score.labels})}
    refused = [_refused(inputs, problem) for problem in (*inputs.references.problems, *pairing.problems)]
    return [*refused, *with_labels(scored, list(values))], values


def _job(inputs: Inputs, case: str, reference: Path, prediction: Path | None) -> Job:
    references, manifest = inputs.references, inputs.manifest
    entry = manifest.cases.get(case) if manifest is not None else None
    given = entry.prompted_slices if entry is not None else {} if manifest is not None and prediction is None else None
    return Job(
        case=case,
        group=group_of(case, inputs.seen),
        reference=reference,
        prediction=prediction,
        reference_root=references.root,
        prediction_root=inputs.predictions,
        values=None if references.labels is None else tuple(references.labels),
        ignore=references.ignore,
        slice_axis=entry.array_axis if entry is not None else None,
        prompted=given,
    )


def _refused(inputs: Inputs, problem: CaseError) -> CaseScore:
    """A case that was no use before anything was opened."""
    reference = inputs.references.masks.get(problem.case)
    name = problem.file if reference is None else relative_name(reference, inputs.references.root)
    return CaseScore(problem.case, group_of(problem.case, inputs.seen), "failed", name, None, problem=str(problem))


def _about(inputs: Inputs, pairing: Pairing, values: Mapping[int, str]) -> About:
    manifest = inputs.manifest or Manifest()
    return About(
        VERSION,
        values,
        manifest.model,
        manifest.tool_version,
        pairing.without_reference,
        pairing.not_asked_for,
        warnings=manifest.warnings,
    )


def _report_troubles(scores: Sequence[CaseScore], pairing: Pairing) -> None:
    """What went wrong, one line each; then what is merely worth knowing."""
    for score in scores:
        if score.status == "failed":
            console.error(score.problem or f"case {score.case}: could not be scored")
    for score in scores:
        if score.status == "pred_missing":
            console.error(f"case {score.case}: no prediction; it counts as nothing found (Dice 0). Predict it and evaluate again")
        for line in score.warnings:
            console.warn(line)
    if pairing.without_reference:
        console.warn(
            f"{len(pairing.without_reference)} predictions have no label and are not scored: {', '.join(pairing.without_reference[:5])}"
        )
    if pairing.not_asked_for:
        console.say(f"{len(pairing.not_asked_for)} training cases were not predicted and are not scored")
    if scores and all(score.group == "training" for score in scores):
        console.warn("every case was used for training: there is no unseen case, so the headline is empty")


def _write(out: Path, summary: Json, scores: Sequence[CaseScore]) -> None:
    with store.one_writer(out):
        store.write_text(out / "cases.csv", tables.cases_csv(summary))
        store.write_text(out / "slices.csv", tables.slices_csv(scores))
        store.write_text(out / "summary.md", tables.markdown(summary))
        store.write_json(out / "summary.json", summary)


def _show(summary: Json, out: Path, as_json: bool) -> None:
    if as_json:
        console.result(json.dumps(summary, indent=2, allow_nan=False))
    else:
        for title, block, cases in tables.groups(summary):
            console.table(f"{title}: {cases}. {tables.DEFINITION}", tables.label_columns(summary), tables.label_rows(summary, block))
    for name in OUTPUTS:
        console.say(f"wrote {out / name}")


def _exit_code(scores: Sequence[CaseScore]) -> int:
    if all(score.status == "failed" for score in scores):
        return NOTHING_DONE
    return DONE if all(score.status == "ok" for score in scores) else SOME_FAILED


def _floor(asked: str | None) -> tuple[str, float] | None:
    """("Dice", 0.8) from "Dice=0.8" or "0.8". UsageError."""
    if asked is None:
        return None
    metric, _, number = asked.rpartition("=")
    try:
        floor = float(number)
    except ValueError:
        floor = -1.0
    if metric not in ("", "Dice", "IoU", "precision", "recall") or not 0 <= floor <= 1:
        raise UsageError(f"{asked!r} is no limit. Write Dice=0.8; known are Dice, IoU, precision and recall, from 0 to 1")
    return metric or "Dice", floor


def _judge(summary: Json, floor: tuple[str, float] | None) -> int:
    """Whether the foreground mean of unseen cases reaches the limit; an undefined mean does not."""
    if floor is None:
        return DONE
    metric, least = floor
    value: Any = summary["foreground_mean"][metric]
    if value is not None and value >= least:
        return DONE
    console.error(f"{metric} {'is undefined' if value is None else f'{value:.4f}'}, the limit is {least:g}")
    return SOME_FAILED
