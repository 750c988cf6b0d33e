"""Stage 4: images + prompts + model -> masks.   Reads images, prompts, the model.   Writes MASKS/<case> and MASKS/manifest.json.

Every case is on its own: a broken one is reported and the others go on. Finished cases are recognised by their record
(hashes of image, prompts, model and mask) and skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.dataset import Case, read_dataset, read_image_folder
from slmsam2_cli.data.prompts import Where
from slmsam2_cli.data.volume import mask_ending, write_mask
from slmsam2_cli.device import DeviceName, choose_device, describe
from slmsam2_cli.errors import (
    DONE,
    SOME_FAILED,
    CaseError,
    DatasetError,
    DeviceError,
    OutputError,
    PlanError,
    UsageError,
    WeightsError,
)
from slmsam2_cli.inference.folder import PromptSource, segment
from slmsam2_cli.inference.records import Records, key_of, whole
from slmsam2_cli.model.checkpoint import Checkpoint, base_weights, fit, read_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan, read_plan
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace


@dataclass(frozen=True)
class Job:
    """Everything a run of predict needs that does not change from case to case."""

    root: Path
    masks: Path
    prompts: PromptSource
    plan: Plan
    checkpoint: Checkpoint
    training: frozenset[str]
    overwrite: bool

    @property
    def records(self) -> Records:
        return Records(self.masks)

    def key(self, case: Case) -> str:
        """Digest of everything that shapes this case's mask."""
        settings = f"{VERSION} {self.checkpoint.digest} {self.plan.digest} {self.prompts.simulated}"
        return key_of(hashlib.sha256(settings.encode()).hexdigest(), [*case.images, *self.prompts.files(case)])

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
        }


def predict(
    images: Path | None,
    masks: Path | None,
    *,
    dataset: Path | None = None,
    prompts: Path | None = None,
    prompts_from: Path | None = None,
    where: Where = "middle",
    workspace: Workspace | None = None,
    model: Path | None = None,
    weights: str | None = None,
    device: DeviceName = "auto",
    num_parts: int = 1,
    part_id: int = 0,
    overwrite: bool = False,
) -> int:
    """Propagate prompts through every image of a folder. The exit code: 0, or 1 when some cases failed.

    Without `images`, the unseen training cases of the data set, into the workspace. Raises UsageError, WeightsError,
    PlanError, DeviceError, OutputError, LockError before anything is written.
    """
    if not 0 <= part_id < num_parts:
        raise UsageError(f"--part-id {part_id} --num-parts {num_parts}: parts are numbered from 0 to {num_parts - 1}")
    checkpoint, plan = _model(workspace, model, weights)
    root, cases, problems = _cases(images, dataset, workspace)
    masks = _masks_folder(masks, workspace, images)
    source = _prompt_source(prompts, prompts_from, where, dataset if images is None else None)
    _refuse_overlap(masks, [root, source.folder, *(image.parent for case in cases for image in case.images)])
    chosen = choose_device(device)
    learned = frozenset(checkpoint.provenance.training) if checkpoint.provenance else frozenset[str]()
    job = Job(root, masks, source, plan, checkpoint, learned, overwrite)
    with store.one_writer(masks, f"{part_id}-of-{num_parts}" if num_parts > 1 else ""):
        return _run(job, cases[part_id::num_parts], problems if part_id == 0 else (), chosen, device == "auto")


def _model(workspace: Workspace | None, model: Path | None, weights: str | None) -> tuple[Checkpoint, Plan]:
    """--model, else --weights, else the workspace's tuned model, else the base; and the plan that goes with it."""
    if model is not None and weights is not None:
        raise UsageError("--model and --weights both name a model. Give one of them")
    tuned = workspace.model if workspace is not None and workspace.model.exists() else None
    if model is not None:
        path = model / "model.safetensors" if model.is_dir() else model
        checkpoint = read_checkpoint(path)
    elif weights is None and tuned is not None:
        checkpoint = read_checkpoint(tuned)
    else:
        checkpoint = _base(weights)
    plan = checkpoint.plan
    if plan is None:
        if workspace is None or not workspace.plan.exists():
            raise PlanError(
                f"{checkpoint.name} carries no plan. Run slmsam2 plan on a data set like these images and name its workspace with -w"
            )
        plan = read_plan(workspace.plan)
    console.say(
        f"model: {checkpoint.name}, weights {checkpoint.digest[:12]}, {plan.network.size} at {plan.geometry.frame_px} px, "
        f"slices along {plan.geometry.slice_axis}"
    )
    if checkpoint.provenance and checkpoint.provenance.random:
        console.warn("this model descends from random weights: for trials and tests, not for clinical data")
    return checkpoint, plan


def _base(weights: str | None) -> Checkpoint:
    try:
        base = base_weights(weights or "auto")
    except WeightsError as error:
        raise WeightsError(f"no tuned model here, and {error}" if weights is None else str(error)) from None
    if base is None:
        raise UsageError("--weights random predicts noise. Fine-tune first: slmsam2 finetune --weights random")
    return base


def _cases(images: Path | None, dataset: Path | None, workspace: Workspace | None) -> tuple[Path, Sequence[Case], Sequence[CaseError]]:
    """The folder's images, or the data set's cases that the model has not learned from."""
    if images is not None:
        if not images.is_dir():
            raise UsageError(f"-i {images}: no such folder")
        cases, problems = read_image_folder(images)
        root = images
    elif dataset is not None and workspace is not None:
        data = read_dataset(dataset)
        split = store.read_json(workspace.split, "the split") if workspace.split.exists() else {}
        seen = set(split.get("training", [])) if isinstance(split, dict) else set()
        cases, problems, root = tuple(case for case in data.training if case.id not in seen), data.problems, data.root
        if data.training and not cases:
            raise DatasetError("no case is unseen: the model has learned from all of them. Name other images with -i", problems)
    else:
        raise UsageError("no images named. Give -i IMAGES -o MASKS, or run inside a data set")
    if not cases:
        raise DatasetError(f"{root}: no image to segment. Give a folder with NIfTI, NRRD, MHA, DICOM or PNG images", problems)
    return root, cases, problems


def _masks_folder(masks: Path | None, workspace: Workspace | None, images: Path | None) -> Path:
    if masks is not None:
        return masks
    if images is None and workspace is not None:
        return workspace.predictions
    raise UsageError("-o MASKS is missing: name a folder for the masks")


def _prompt_source(prompts: Path | None, prompts_from: Path | None, where: Where, dataset: Path | None) -> PromptSource:
    if prompts is not None and prompts_from is not None:
        raise UsageError("-p and --prompts-from both give prompts. Give one of them")
    if prompts is None and prompts_from is None:
        if dataset is None:
            raise UsageError(
                "no prompts: give a folder of masks with one painted slice each (-p), or full masks to cut one from (--prompts-from)"
            )
        prompts_from = dataset / "labelsTr"
    folder = prompts if prompts is not None else prompts_from
    assert folder is not None
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of prompts")
    return PromptSource(folder, where if prompts is None else None)


def _refuse_overlap(masks: Path, inputs: Sequence[Path]) -> None:
    """Masks never go where images or prompts come from, not even through a link (R8)."""
    if masks.exists() and not masks.is_dir():
        raise OutputError(f"{masks}: is a file, not a directory. Name a folder with -o")
    for folder in {path.resolve() for path in inputs}:
        if masks.resolve() == folder:
            raise UsageError(f"-o {masks}: is the same folder as an input. Choose another for the masks")


def _run(job: Job, cases: Sequence[Case], problems: Sequence[CaseError], device: torch.device, may_move: bool) -> int:
    todo, done = _sort_out(job, cases)
    failed = list(problems)
    for problem in problems:
        console.error(str(problem))
    if todo:
        runner = _Runner(job, device, may_move)
        try:
            failed += _each(job, runner, todo)
        finally:  # also when interrupted: what is there is accounted for
            job.records.write_manifest(job.head())
    else:
        job.records.write_manifest(job.head())
    console.say(
        f"{len(todo) + len(problems) - len(failed)} masks written, {len(done)} already there, {len(failed)} cases failed: {job.masks}"
    )
    if failed and len(failed) == len(cases) + len(problems):
        raise DatasetError("no case could be segmented")
    return SOME_FAILED if failed else DONE


def _each(job: Job, runner: _Runner, cases: Sequence[Case]) -> list[CaseError]:
    """Segment every case; the problems of those that cannot be."""
    failed = []
    with console.progress("predicting", len(cases)) as advance:
        for case in cases:
            try:
                runner.one(case)
            except CaseError as problem:
                failed.append(problem)
                console.error(str(problem))
                _disown(job, case.id)
            advance(1, case.id)
    return failed


def _disown(job: Job, case_id: str) -> None:
    """An earlier mask of a case that now fails stays, but is out of date and leaves the manifest."""
    if name := job.records.disown(case_id):
        console.warn(f"case {case_id}: {name} is from an earlier run and out of date")


def _sort_out(job: Job, cases: Sequence[Case]) -> tuple[list[Case], set[str]]:
    """Cases to do, and ids of those done. OutputError when a mask that is not ours, or was changed, would be lost."""
    todo, done, foreign = [], set[str](), []
    for case in cases:
        record, existing = job.records.read(case.id), job.records.namesakes(case.id)
        if record and not job.overwrite and job.records.intact(record):
            if record.get("key") == job.key(case):
                job.records.own_again(case.id)
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
    """Holds the model for all cases; moved to the CPU when a chosen device runs out of memory."""

    def __init__(self, job: Job, device: torch.device, may_move: bool) -> None:
        self.job, self.device, self.may_move = job, device, may_move
        model = SlmSam2(job.plan.network, job.plan.geometry.frame_px)
        fit(model, job.checkpoint)
        self.model = model.to(device).eval()
        console.detail(f"running on {describe(device)}")

    def one(self, case: Case) -> None:
        """Segment and write one case. CaseError when it cannot be."""
        job, key = self.job, self.job.key(case)
        try:
            result = segment(case, job.root, job.prompts, self.model, job.plan)
        except torch.OutOfMemoryError:
            if not self.may_move or self.device.type == "cpu":
                raise DeviceError(f"case {case.id}: out of memory on {self.device.type}. Use --device cpu") from None
            console.warn(f"out of memory on {self.device.type}: going on with the CPU")
            self.device = torch.device("cpu")
            self.model = self.model.to(self.device)
            result = segment(case, job.root, job.prompts, self.model, job.plan)
        for warning in result.image.warnings:
            console.warn(f"case {case.id}: {warning}")
        name = f"{case.id}{mask_ending(result.image)}"
        job.records.begin(case.id)
        write_mask(job.masks / name, result.labels, result.image)
        account = {"output": name, "training": case.id in job.training, "model": job.model(), "prompts": job.prompts.words()}
        job.records.finish(case.id, key, account | result.account)
