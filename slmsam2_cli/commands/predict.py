"""Stage 4: images + prompts + model -> masks.

Reads   images, prompts, the model.
Writes  MASKS/<case>, MASKS/manifest.json, MASKS/report.html (and MASKS/report_files/ when that would become too large).

Every case is on its own: a broken one is reported and the others go on. Finished cases are recognised by their record
(hashes of image, prompts, model and mask) and skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.dataset import Case, Dataset, read_dataset, read_image_folder
from slmsam2_cli.dataset.prompts import PromptSlice
from slmsam2_cli.device import DeviceName, choose_device, describe, is_out_of_memory
from slmsam2_cli.errors import (
    DONE,
    SOME_FAILED,
    CaseError,
    DatasetError,
    DeviceError,
    OutputError,
    UsageError,
)
from slmsam2_cli.inference.load_model import build_model, choose_model, plan_from_prompts, read_split
from slmsam2_cli.inference.manifest import Records, cache_key, whole
from slmsam2_cli.inference.segment import PromptSource, SegmentedCase, segment_case
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import ENDINGS, image_ending, mask_ending, volume_files, write_mask
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Checkpoint
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.prediction_page import write_prediction_report
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace


@dataclass(frozen=True)
class Job:
    """Everything a run of predict needs that does not change from case to case.

    training: ids known to be no held-out cases; shown: images for the report, by case, also of other parts; None when it is not wanted.
    """

    root: Path
    masks: Path
    prompts: PromptSource
    plan: Plan
    checkpoint: Checkpoint
    training: frozenset[str]
    overwrite: bool
    shown: Mapping[str, tuple[Path, ...]] | None = None

    @property
    def calibration(self) -> Calibration | None:
        """What the model's confidence is worth on images like these, if that was measured."""
        return self.checkpoint.calibration_for(self.plan.modality)

    @property
    def records(self) -> Records:
        return Records(self.masks)

    def key(self, case: Case) -> str:
        """Digest of everything that shapes this case's mask."""
        table = self.calibration.model_dump_json() if self.calibration else ""
        settings = f"{VERSION} {self.checkpoint.digest} {self.plan.digest} {self.prompts.words()} {table}"
        return cache_key(hashlib.sha256(settings.encode()).hexdigest(), [*case.images, *self.prompts.files(case)])

    def learned_from(self, case: Case) -> bool:
        """Whether the model, or one that it descends from, has learned from this case, under this name or any other."""
        provenance = self.checkpoint.provenance
        known = {*self.training, *(provenance.training if provenance else ())}
        images = frozenset(provenance.learned_from) if provenance else frozenset[str]()
        return case.id in known or any(atomic.sha256_of(file) in images for path in case.images for file in volume_files(path))

    def model(self) -> dict[str, Any]:
        """Which model and which plan, for the manifest."""
        return {"name": self.checkpoint.name, "weights_digest": self.checkpoint.digest, "plan_digest": self.plan.digest}

    def head(self) -> dict[str, Any]:
        """What the manifest says above the cases: `model` and `prompts` are the last run's."""
        provenance = self.checkpoint.provenance
        return {
            "format_version": 1,
            "tool_version": VERSION,
            "model": self.model()
            | {"network": self.plan.network.model_dump(), "provenance": provenance.model_dump(mode="json") if provenance else None},
            "labels": {str(value): name for value, name in self.plan.labels.items()},
            "prompts": self.prompts.words(),
            "calibration": self.calibration.model_dump(mode="json") if self.calibration else None,
            "warnings": list(self.checkpoint.warnings),
        }


def predict(
    images: Path | None,
    output: Path | None,
    *,
    prompts: Path | None = None,
    simulate_from: Path | None = None,
    prompt_slice: PromptSlice = "middle",
    mark_ends: bool = False,
    dataset: Path | None = None,
    workspace: Workspace | None = None,
    model: Path | None = None,
    weights: str | None = None,
    device: DeviceName = "auto",
    num_parts: int = 1,
    part_id: int = 0,
    overwrite: bool = False,
    report: bool = True,
) -> int:
    """Propagate prompts through every image of a folder, or through one image. The exit code: 0, or 1 when some cases failed.

    Without `images`, the labelled cases of the data set that were not learned from (all, when all were), into the workspace.
    Raises UsageError, DatasetError, WeightsError, PlanError, DeviceError, OutputError, LockError before anything is written.
    """
    if not 0 <= part_id < num_parts:
        raise UsageError(f"--part-id {part_id} --num-parts {num_parts}: parts are numbered from 0 to {num_parts - 1}")
    data = read_dataset(dataset) if images is None and dataset is not None else None
    found = _cases(images, data, workspace)
    masks = _masks_folder(output, workspace, images)
    source = _prompt_source(prompts, simulate_from, prompt_slice, mark_ends, data)
    files = [file for case in found.cases for file in (*case.images, *([case.label] if case.label else []))]
    _check_output_folder(masks, [found.root, source.folder, *(file.parent for file in files)])
    unplanned = partial(plan_from_prompts, found.cases, source, masks=masks, again=overwrite) if data is None else None
    checkpoint, plan = choose_model(workspace, model, weights, data, unplanned)
    chosen = choose_device(device)
    shown = {case.id: case.images for case in found.cases} if report else None
    job = Job(found.root, masks, source, plan, checkpoint, found.learned_from, overwrite, shown)
    with atomic.lock_folder(masks, f"{part_id}-of-{num_parts}" if num_parts > 1 else ""):
        return _run(job, found.cases[part_id::num_parts], found.problems if part_id == 0 else (), chosen, device == "auto")


@dataclass(frozen=True)
class Chosen:
    """The cases to segment, all below `root`. problems: those that cannot be; learned_from: ids that are no held-out cases."""

    root: Path
    cases: Sequence[Case]
    problems: Sequence[CaseError]
    learned_from: frozenset[str] = frozenset()


def _cases(images: Path | None, data: Dataset | None, workspace: Workspace | None) -> Chosen:
    """The folder's images, or one; else the data set's cases that the model has not learned from, or all if there is no other."""
    if images is not None:
        if not images.exists():
            raise UsageError(f"-i {images}: no such file or folder")
        if images.is_file() and image_ending(images) is None:
            raise UsageError(f"-i {images}: not the name of a volume. Name one that ends in {', '.join(ENDINGS)}, or a folder of them")
        found = Chosen(images.parent if images.is_file() else images, *read_image_folder(images))
    elif data is not None and workspace is not None:
        split = read_split(workspace)
        seen, unusable = frozenset(split.get("training", ())), frozenset(split.get("skipped", ()))
        held_out = tuple(case for case in data.training if case.id not in seen)
        if seen and not {case.id for case in held_out} - unusable:
            console.warn(
                "no case is held_out: the cases that the model has learned from are segmented; their scores are not those of held-out cases"
            )
            found = Chosen(data.root, data.training, data.problems, seen)
        else:
            found = Chosen(data.root, held_out, data.problems)
    else:
        raise UsageError("no images named. Give -i IMAGES -o MASKS, or run inside a data set")
    if not found.cases:
        raise DatasetError(f"{found.root}: no image to segment. Give a folder with NIfTI, NRRD, MHA, DICOM or PNG images", found.problems)
    return found


def _masks_folder(masks: Path | None, workspace: Workspace | None, images: Path | None) -> Path:
    if masks is not None:
        return masks
    if images is None and workspace is not None:
        return workspace.predictions
    raise UsageError("-o MASKS is missing: name a folder for the masks")


def _prompt_source(
    prompts: Path | None, simulate_from: Path | None, where: PromptSlice, mark_ends: bool, data: Dataset | None
) -> PromptSource:
    """Where prompts come from; silently about it, a slice of each label of the data set's own masks."""
    if prompts is not None and simulate_from is not None:
        raise UsageError("-p and --simulate-prompts cannot be combined")
    if prompts is not None and mark_ends:
        raise UsageError("--mark-ends needs --simulate-prompts. With prompt masks of your own, list the empty slices in CASE.prompts.json")
    folder = prompts if prompts is not None else simulate_from
    if folder is None and data is None:
        raise UsageError("no prompts given. Use -p FOLDER (masks with annotated slices) or --simulate-prompts FOLDER (full masks)")
    if folder is None:
        assert data is not None
        return PromptSource(data.root, where, dataset_labels=True, mark_ends=mark_ends)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of prompts")
    return PromptSource(folder, where if prompts is None else None, mark_ends=mark_ends)


def _check_output_folder(masks: Path, inputs: Sequence[Path]) -> None:
    """Masks never go where images or prompts come from, not even through a link."""
    if masks.exists() and not masks.is_dir():
        raise OutputError(f"{masks}: is a file, not a directory. Name a folder with -o")
    for folder in {path.resolve() for path in inputs}:
        if masks.resolve() == folder:
            raise UsageError(f"-o {masks}: is the same folder as an input. Choose another for the masks")


def _run(job: Job, cases: Sequence[Case], problems: Sequence[CaseError], device: torch.device, allow_cpu_fallback: bool) -> int:
    todo, done = _split_done(job, cases)
    failed = list(problems)
    for problem in problems:
        console.error(str(problem))
    if todo:
        runner = _Runner(job, device, allow_cpu_fallback)
        try:
            failed += _predict_cases(job, runner, todo)
        finally:  # also when interrupted: what is there is accounted for
            job.records.write_manifest(job.head())
    else:
        job.records.write_manifest(job.head())
    if job.shown is not None:
        write_prediction_report(job.masks, job.shown, job.plan.intensity[0], again=bool(todo))
    console.say(
        f"{len(todo) + len(problems) - len(failed)} masks written, {len(done)} already there, {len(failed)} cases failed: {job.masks}"
    )
    if failed:
        rows = [(problem.case, problem.file, problem.what, problem.remedy) for problem in failed]
        console.table(f"failed cases: {len(failed)}", ("case", "file", "what is wrong", "what to do"), rows)
    if failed and len(failed) == len(cases) + len(problems):
        raise DatasetError("no case could be segmented")
    return SOME_FAILED if failed else DONE


def _predict_cases(job: Job, runner: _Runner, cases: Sequence[Case]) -> list[CaseError]:
    """Segment every case; the problems of those that cannot be."""
    failed = []
    with console.progress("predicting", len(cases)) as advance:
        for case in cases:
            try:
                runner.one(case)
            except CaseError as problem:
                failed.append(problem)
                console.error(str(problem))
                console.trace(problem)
                _mark_stale(job, case.id)
            advance(1, case.id)
    return failed


def _mark_stale(job: Job, case_id: str) -> None:
    """An earlier mask of a case that now fails stays, but is out of date and leaves the manifest."""
    if name := job.records.mark_stale(case_id):
        console.warn(f"case {case_id}: {name} is from an earlier run and out of date")


def _split_done(job: Job, cases: Sequence[Case]) -> tuple[list[Case], set[str]]:
    """Cases to do, and ids of those done. OutputError when a mask that is not ours, or was changed, would be lost."""
    todo, done, foreign = [], set[str](), []
    for case in cases:
        record, existing = job.records.read(case.id), job.records.files_named(case.id)
        if record and not job.overwrite and job.records.intact(record):
            if record.get("key") == job.key(case):
                job.records.unmark_stale(case.id)
                done.add(case.id)
                continue
            console.say(f"case {case.id}: segmented again: its image, prompts, model or settings changed")
        elif existing and not job.overwrite and record.get("unfinished"):
            console.say(f"case {case.id}: made again, the last run was interrupted while it was written")
        elif existing and not job.overwrite and any(whole(path, case.id) for path in existing):
            foreign.append(existing[0].name)
        elif existing and not job.overwrite:
            console.warn(f"case {case.id}: {existing[0].name} is damaged and is made again")
        todo.append(case)
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise OutputError(
            f"{job.masks}: {foreign[0]} exists already{more} and was not written by this run. Use --overwrite, or another folder"
        )
    return todo, done


class _Runner:
    """Holds the model for all cases. When memory runs out it takes slices one by one, then moves to the CPU if it may."""

    def __init__(self, job: Job, device: torch.device, allow_cpu_fallback: bool) -> None:
        self.job, self.device, self.allow_cpu_fallback, self.batch = job, device, allow_cpu_fallback, job.plan.inference.batch_slices
        self.model = build_model(job.checkpoint, job.plan).to(device).eval()
        console.detail(f"running on {describe(device)}")

    def one(self, case: Case) -> None:
        """Segment and write one case. CaseError when it cannot be; DeviceError when the device asked for is too small for it."""
        job, key = self.job, self.job.key(case)
        result = None
        while result is None:
            result = self._attempt(case)
        for warning in result.warnings:
            console.warn(f"case {case.id}: {warning}")
        name = f"{case.id}{mask_ending(result.image)}"
        job.records.begin(case.id)
        write_mask(job.masks / name, result.labels, result.image)
        metadata = {"output": name, "training": job.learned_from(case), "model": job.model(), "prompts": job.prompts.words()}
        job.records.finish(case.id, key, metadata | result.metadata)

    def _attempt(self, case: Case) -> SegmentedCase | None:
        """The case, segmented; None when memory ran out and it is worth another try. What failed is freed before that."""
        try:
            return segment_case(case, self.job.root, self.job.prompts, self.model, self.job.plan, self.job.calibration, self.batch)
        except (MemoryError, RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                what = f"cannot be segmented: {type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
                raise CaseError(case.id, "", what, "Run again with --debug for the traceback") from error
            if not self._reduce_memory(case, error):
                remedy = "Close other programs, or plan a smaller network (slmsam2 plan --network nano)"
                raise CaseError(case.id, "", f"out of memory on {self.device.type}", remedy) from error
        return None

    def _reduce_memory(self, case: Case, error: Exception) -> bool:
        """Use less memory from now on, which is said; False when there is no way left. DeviceError for a device other than the CPU."""
        if self.batch > 1:
            self.batch = 1
            console.warn(f"out of memory on {self.device.type}: going on slice by slice")
            return True
        if self.device.type == "cpu" or not isinstance(error, torch.OutOfMemoryError):
            return False
        if not self.allow_cpu_fallback:
            raise DeviceError(f"case {case.id}: out of memory on {self.device.type}. Use --device cpu") from error
        console.warn(f"out of memory on {self.device.type}: going on with the CPU")
        self.device = torch.device("cpu")
        self.model = self.model.to(self.device)
        return True
