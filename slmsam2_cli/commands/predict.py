"""Stage 4: images + prompts + model -> masks.

Reads   images, prompts, the model.
Writes  MASKS/<case> (through inference/manifest.py and io/volume.py), MASKS/manifest.json, MASKS/plan.json where there is no plan,
        MASKS/report.html (and MASKS/report_files/ when that would become too large).

A case that fails is reported, and the others are still predicted. Finished cases are known by their record (digests of image, prompts,
model and mask) and skipped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, PreprocessSettings, open_prepared
from slmsam2_cli.dataset.dataset import Case, read_dataset
from slmsam2_cli.dataset.prompts import PromptSlice
from slmsam2_cli.dataset.resources import bytes_on_disk, free_bytes, shape_of
from slmsam2_cli.device import DeviceName, choose_device, describe, is_out_of_memory, needs_one_thread, torch_threads
from slmsam2_cli.errors import (
    DONE,
    SOME_FAILED,
    CaseError,
    DatasetError,
    DeviceError,
    OutputError,
    UsageError,
)
from slmsam2_cli.inference.inputs import (
    check_output_folder,
    codes_of_labels,
    folder_beside,
    masks_folder,
    prompt_source,
    select_cases,
    with_prompts,
)
from slmsam2_cli.inference.load_model import build_model, choose_model, matching_label_unet, plan_from_prompts
from slmsam2_cli.inference.manifest import FORMAT_VERSION, MANIFEST, MaskFiles, MaskFormat, Records, digest_inputs, is_readable_mask
from slmsam2_cli.inference.segment import PromptSource, SegmentedCase, Segmenter, segment_case
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import SEG_NRRD, image_ending, keep_decoded, read_labels, write_mask
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Checkpoint
from slmsam2_cli.model.cpu_ops import keep_freed_memory, to_device
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.parallel import NO_LIMIT, MemoryLimit, as_completed, available_cpus, parallel_map
from slmsam2_cli.planning.estimate import prediction_bytes
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.prediction_page import write_prediction_report
from slmsam2_cli.training.annotated_slices import (
    HALVES,
    ROUNDS,
    TrainingVolume,
    Witnesses,
    cross_fitting,
    digest_of_learning,
    halves_of,
    load_label_unets,
    read_annotated,
    save_label_unets,
    train_label_unets,
)
from slmsam2_cli.training.interrupts import graceful_stop
from slmsam2_cli.training.label_unet import SliceSampler
from slmsam2_cli.version import VERSION
from slmsam2_cli.workspace import Workspace

MAX_KEPT_BYTES = 1 << 30  # of decoded volumes that are kept from planning to segmentation
MIN_PARALLEL_CASES, MIN_PARALLEL_BYTES = 4, 1 << 20  # fewer cases, with fewer bytes on disk in all, are not worth the start of processes
PRELOADED = ("slmsam2_cli.commands.predict",)  # in the process that workers are copied from
MIN_TOGETHER, MIN_OFFERED = 4, 8  # volumes with annotated slices for --together, and from which on it is offered
LEARNED = ".slmsam2/together-{}.safetensors"  # one file per round
MEMORY_FRACTION = 0.7  # of the free memory, for cases segmented at one time


@dataclass(frozen=True)
class Together:
    """What is learned from the annotated slices of all cases.

    key: digest of what is learned from; halves: case id -> half, 0 or 1; labelled: slices of the volumes that the model was trained on,
    where they are at hand; label_unets: one per half, for the cases of that half; empty before they are trained.
    """

    key: str
    halves: Mapping[str, int]
    labelled: SliceSampler | None
    label_unets: Sequence[LabelUNet] = ()

    def label_unet_for(self, case_id: str) -> LabelUNet | None:
        """Return the label U-Net that did not learn from a case; None for a case without annotated slices."""
        half = self.halves.get(case_id)
        return self.label_unets[half] if half is not None and self.label_unets else None

    def describe(self, case_id: str) -> dict[str, Any]:
        """Describe for the manifest what was learned for a case."""
        half = self.halves.get(case_id)
        if half is None:
            return {}
        annotated = sum(other != half for other in self.halves.values())
        labelled = [source.case.id for source in self.labelled.sources] if self.labelled is not None else []
        return {"together": {"half": half, "annotated_volumes": annotated, "labelled_volumes": labelled, "learned_from": self.key}}


@dataclass(frozen=True)
class PredictionJob:
    """What all cases of a run share.

    training_ids: cases known to be no held-out cases. report_images: image files for the report by case, those of other parts too; None
    without a report.
    """

    root: Path
    masks: Path
    prompts: PromptSource
    plan: Plan
    checkpoint: Checkpoint
    training_ids: frozenset[str]
    overwrite: bool
    report_images: Mapping[str, tuple[Path, ...]] | None = None
    together: Together | None = None
    files: MaskFiles = field(default_factory=MaskFiles)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of the model for the plan's modality; None where there is none."""
        return self.checkpoint.calibration_for(self.plan.modality)

    @property
    def records(self) -> Records:
        return Records(self.masks, replace(self.files, labels=self.plan.labels))

    def settings_digest(self) -> str:
        """Compute the SHA-256 of all settings that shape a mask."""
        table = self.calibration.model_dump_json() if self.calibration else ""
        settings = f"{VERSION} {self.checkpoint.digest} {self.plan.digest} {self.prompts.describe()} {table}"
        settings += f" {self.together.key}" if self.together is not None else ""
        settings += self.files.describe()
        return hashlib.sha256(settings.encode()).hexdigest()

    def in_training_set(self, case_id: str, image_digests: frozenset[str]) -> bool:
        """Return whether the model, or an ancestor, was trained on a case, by its id or by its image files."""
        provenance = self.checkpoint.provenance
        if provenance is None:
            return case_id in self.training_ids
        return case_id in {*self.training_ids, *provenance.training} or not image_digests.isdisjoint(provenance.training_image_digests)

    def model(self) -> dict[str, Any]:
        """Describe model and plan for the manifest."""
        return {"name": self.checkpoint.name, "weights_digest": self.checkpoint.digest, "plan_digest": self.plan.digest}

    def manifest_header(self) -> dict[str, Any]:
        """Collect what the manifest says above the cases; model and prompts are those of the last run."""
        provenance = self.checkpoint.provenance
        return {
            "format_version": FORMAT_VERSION,
            "tool_version": VERSION,
            "model": self.model()
            | {"network": self.plan.network.model_dump(), "provenance": provenance.model_dump(mode="json") if provenance else None},
            "labels": {str(value): name for value, name in self.plan.labels.items()},
            "prompts": self.prompts.describe(),
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
    workers: int | None = None,
    together: bool = False,
    series: str | None = None,
    format: MaskFormat = "auto",
    label_codes: Path | None = None,
) -> int:
    """Segment every image of a folder, or one image, from its annotated slices. Returns the exit code: 1 when some cases failed.

    Without `images`, the labelled cases of the data set that were not used for training (all, when all were), into the workspace.
    Raises: UsageError, DatasetError, WeightsError, PlanError, DeviceError, OutputError, LockError before anything is written;
    TrainingError when learning from annotated slices fails.
    """
    if not 0 <= part_id < num_parts:
        raise UsageError(f"--part-id {part_id} --num-parts {num_parts}: parts are numbered from 0 to {num_parts - 1}")
    if together and num_parts > 1:
        raise UsageError("--together learns from all volumes in one run, so it cannot be combined with --num-parts")
    data = read_dataset(dataset) if images is None and dataset is not None else None
    chosen = choose_device(device)  # first: it costs nothing to fail here
    format = "seg.nrrd" if output is not None and image_ending(output) == SEG_NRRD else format
    mask_files = MaskFiles(format, replace=overwrite, codes=codes_of_labels(label_codes))
    if series is not None and not re.fullmatch(r"\d+(-\d+)?|all", series := series.strip().lower()):
        raise UsageError(f"--series {series}: neither the number of a series nor all")
    selected = select_cases(images, data, workspace, series)
    file = output if output is not None and image_ending(output) and not output.is_dir() else None
    masks = masks_folder(output, workspace, images) if file is None else folder_beside(file, len(selected.cases), overwrite)
    source = prompt_source(prompts, simulate_from, prompt_slice, mark_ends, data)
    if source.file is not None and len(selected.cases) != 1:
        raise UsageError(f"{source.file}: one file of prompts, but -i names {len(selected.cases)} images. Name the folder of the prompts")
    selected = with_prompts(selected, source)
    files = [file for case in selected.cases for file in (*case.images, *([case.label] if case.label else []))]
    inputs = {path.resolve() for path in (*files, *(case.prompts.mask for case in selected.cases)) if path is not None}
    if file is not None and file.resolve() in inputs:
        raise UsageError(f"-o {file}: is an input. Choose another name for the mask")
    check_output_folder(masks, [selected.root, source.folder, *(file.parent for file in files)])
    if prompts is not None and Records(source.folder).holds_predictions():
        raise UsageError(
            f"-p {prompts}: a folder of predictions (it holds {MANIFEST}), not of prompts. To score them: slmsam2 evaluate -p {prompts}. "
            "To use some of their slices as prompts, list these in CASE.prompts.json, or copy the masks to another folder"
        )
    make_plan = partial(plan_from_prompts, selected.cases, source, masks=masks, again=overwrite) if data is None else None
    with keep_decoded(min(MAX_KEPT_BYTES, free_bytes() // 4)) as decoded:  # a plan made here has read volumes that are segmented next
        checkpoint, plan = choose_model(workspace, model, weights, data, make_plan)
        decoded.full = True
        pictures = {case.id: case.images for case in selected.cases} if report else None
        trained = selected.training_ids
        job = PredictionJob(selected.root, masks, source, plan, checkpoint, trained, overwrite, pictures, files=mask_files)
        if together:
            job = replace(job, together=_plan_learning(job, selected.cases, workspace))
        elif num_parts == 1:
            _offer_learning(job, selected.cases, workspace)
        with atomic.lock_folder(masks, f"{part_id}-of-{num_parts}" if num_parts > 1 else ""):
            runner = _Runner(job, chosen, device == "auto", workers)
            code = _run(job, selected.cases[part_id::num_parts], selected.problems if part_id == 0 else (), runner)
    if file is not None and (mask := job.records.mask_of(selected.cases[0].id)) is not None:
        labels = read_labels(mask, case=selected.cases[0].id, root=masks)
        write_mask(file, labels.voxels, labels)
        console.say(f"wrote {file}")
    return code


def _run(job: PredictionJob, cases: Sequence[Case], problems: Sequence[CaseError], runner: _Runner) -> int:
    todo, done = _split_done(job, cases)
    failed = list(problems)
    for problem in problems:
        console.error(str(problem))
    try:
        if todo and job.together is not None:
            runner.job = job = replace(job, together=_learn(job, job.together, cases, runner))
        if todo:
            failed += _predict_cases(job, runner, todo)
    finally:  # also when interrupted: the manifest lists the masks that are there
        job.records.write_manifest(job.manifest_header())
    if job.report_images is not None:
        write_prediction_report(job.masks, job.report_images, job.plan.intensity[0], force=bool(todo))
    console.say(
        f"{len(todo) + len(problems) - len(failed)} masks written, {len(done)} already there, {len(failed)} cases failed: {job.masks}"
    )
    if failed:
        rows = [(problem.case, problem.file, problem.what, problem.remedy) for problem in failed]
        console.table(f"failed cases: {len(failed)}", ("case", "file", "problem", "what to do"), rows)
    if failed and len(failed) == len(cases) + len(problems):
        raise DatasetError("no case could be segmented")
    return SOME_FAILED if failed else DONE


def _plan_learning(job: PredictionJob, cases: Sequence[Case], workspace: Workspace | None) -> Together:
    """Decide what is learned from the annotated slices of all cases.

    Raises: UsageError when too few cases carry any.
    """
    settings, labelled = job.settings_digest(), _labelled_cases(job, workspace)
    known = {digest for case in labelled for digest in case.record["inputs"].values()}  # their own label U-Net would be trained on them
    digests = {case.id: digest_inputs(settings, case) for case in cases if case.prompts.mask is not None}
    inputs = {case: key for case, (key, images) in digests.items() if not images & known}
    if len(inputs) < MIN_TOGETHER:
        raise UsageError(f"--together learns from at least {MIN_TOGETHER} volumes with annotated slices, and there are {len(inputs)}")
    sampler = SliceSampler(labelled, tuple(job.plan.labels), job.plan.geometry.storage_size, job.plan.ignore) if labelled else None
    if not labelled and job.checkpoint.provenance is not None and job.checkpoint.provenance.training:
        console.warn(
            "--together is better with the volumes that the model was trained on, and they are not at hand. Name its workspace: -w"
        )
    contents = [str(sorted(case.record["outputs"].items())) for case in labelled]
    return Together(digest_of_learning(inputs, contents), halves_of(list(inputs)), sampler)


def _labelled_cases(job: PredictionJob, workspace: Workspace | None) -> list[PreparedCase]:
    """Open the volumes that the model was trained on, as far as the workspace holds them preprocessed for this plan."""
    provenance, found = job.checkpoint.provenance, list[PreparedCase]()
    if workspace is None or provenance is None or job.checkpoint.plan is None:
        return found
    wanted = PreprocessSettings(job.plan.geometry, job.plan.intensity).digest()
    for case_id in provenance.training:
        with suppress(CaseError):
            case = open_prepared(workspace.prepared, case_id)
            files = set(case.record["inputs"].values())
            if case.record["settings"] == wanted and files & set(provenance.training_image_digests):
                found.append(case)
    return found


def _offer_learning(job: PredictionJob, cases: Sequence[Case], workspace: Workspace | None) -> None:
    """Say that --together would learn from the annotated slices, where there are many, and labelled volumes show where labels end."""
    many = job.prompts.simulated is None and sum(case.prompts.mask is not None for case in cases) >= MIN_OFFERED
    if many and _labelled_cases(job, workspace):
        console.say("these volumes can also learn from each other's annotated slices: add --together (a few minutes)")


def _learn(job: PredictionJob, together: Together, cases: Sequence[Case], runner: _Runner) -> Together:
    """Train label U-Nets on the annotated slices of all cases, or read those of an earlier run."""
    files = [job.masks / LEARNED.format(number) for number in range(1, ROUNDS + 1)]
    kept = [None if job.overwrite else load_label_unets(file, together.key) for file in files]
    done = max((number for number, found in enumerate(kept, start=1) if found is not None), default=0)
    label_unets = (kept[done - 1] if done else None) or ()
    for number in range(done, ROUNDS):
        runner.job = replace(job, together=replace(together, label_unets=label_unets))
        title = f"round {number + 1} of {ROUNDS}"
        volumes = _read_slices([case for case in cases if case.id in together.halves], runner, title)
        starts = label_unets or [matching_label_unet(job.checkpoint, job.plan)] * HALVES
        jobs = cross_fitting(volumes, together.halves, job.plan, starts, together.labelled, runner.device)
        with graceful_stop() as stopped:
            trained = train_label_unets(jobs, f"learning from annotated slices, {title}", stopped)
        assert trained is not None  # graceful_stop has raised otherwise
        label_unets = trained
        save_label_unets(files[number], label_unets, together.key)
    for one in label_unets:  # annotated slices hold a label: only whole volumes show where it is not
        one.can_add = together.labelled is not None
    return replace(together, label_unets=label_unets)


def _read_slices(cases: Sequence[Case], runner: _Runner, title: str) -> dict[str, TrainingVolume]:
    """Read the slices to learn from. Cases that cannot be read are named and left out."""
    workers, jobs, limit = _share_out(runner, cases)
    with torch_threads(runner.threads), console.progress(f"reading slices, {title}", len(jobs)) as advance:
        answers = parallel_map(runner.read_slices, jobs, workers, limit=limit, advance=advance, preload=PRELOADED)
    found = dict(zip(jobs, answers, strict=True))
    if failed := [case for case, one in found.items() if isinstance(one, CaseError)]:
        console.warn(f"not learned from, because they cannot be read: {', '.join(failed)}")
    return {case: one for case, one in found.items() if isinstance(one, TrainingVolume)}


def _predict_cases(job: PredictionJob, runner: _Runner, cases: Sequence[Case]) -> list[CaseError]:
    """Segment every case. Returns the problems of those that failed; their earlier masks leave the manifest as out of date."""
    failed = []
    workers, jobs, limit = _share_out(runner, cases)
    earlier = {case.id: job.records.mask_of(case.id) for case in cases}
    with (
        torch_threads(runner.threads),
        console.progress("predicting", len(cases)) as advance,
        closing(as_completed(runner, jobs, workers, limit=limit, preload=PRELOADED)) as results,
    ):
        for case, result in results:
            if isinstance(result, CaseError):
                failed.append(result)
                console.error(str(result))
                console.trace(result)
                if name := job.records.mark_stale(case):
                    console.warn(f"case {case}: {name} is from an earlier run and out of date")
            else:
                for warning in result:
                    console.warn(warning)
                if (old := earlier[case]) is not None and old != job.records.mask_of(case):  # in another format, and out of date now
                    old.unlink(missing_ok=True)
            advance(1, case)
    return failed


def _share_out(runner: _Runner, cases: Sequence[Case]) -> tuple[int, Mapping[str, Case], MemoryLimit]:
    """Choose the number of worker processes, 0 for this one alone, the order of the cases, and how many run at a time.

    On a CPU, a small network gets one thread per core: as many processes as cores, the largest case first. A single case gets all cores.
    A large network uses all cores in one process, unless the user says otherwise, and so does a GPU.
    """
    jobs = {case.id: case for case in cases}
    workers = 1 if console.settings.debug else runner.workers  # an error of another process comes without its traceback
    few = len(cases) < MIN_PARALLEL_CASES and sum(map(bytes_on_disk, cases)) < MIN_PARALLEL_BYTES
    if workers < 2 or len(cases) < 2 or (runner.workers_by_default and few):
        runner.processes = workers if runner.threads == 1 else 1
        return 0, jobs, NO_LIMIT
    count = min(workers, len(cases))
    runner.processes = workers // count if runner.threads == 1 else 1
    jobs = dict(sorted(jobs.items(), key=lambda one: -bytes_on_disk(one[1])))
    needed = {case.id: prediction_bytes(runner.job.plan, shape_of(case.images[0])) for case in cases}
    free = int(MEMORY_FRACTION * free_bytes())
    most = sorted(needed.values(), reverse=True)[:count]
    while sum(most) > free and len(most) > 1:
        most.pop()
    if len(most) < count:
        console.say(f"memory for {len(most)} of {count} cases at a time: {free / 1e9:.1f} GB are free, a case takes {most[0] / 1e9:.1f} GB")
    console.detail(f"{count} processes segment {len(cases)} cases, the largest first")
    return count, jobs, MemoryLimit(lambda case: needed[case.id], free)


def _split_done(job: PredictionJob, cases: Sequence[Case]) -> tuple[list[Case], set[str]]:
    """Split cases into those to segment and the ids of those that are done.

    Raises: OutputError when a mask would be overwritten that predict did not write, or that was changed since.
    """
    todo, done, unknown_masks, settings = [], set[str](), [], job.settings_digest()
    for case in cases:
        record, existing = job.records.read(case.id), job.records.files_named(case.id)
        if record and not job.overwrite and job.records.intact(record):
            lacks = job.records.lacks_segmentation(record)
            if record.get("key") == digest_inputs(settings, case)[0] and not lacks:
                job.records.unmark_stale(case.id)
                done.add(case.id)
                continue
            unknown_masks += [path.name for path in existing if path != job.records.mask_of(case.id)]  # of the format written next, perhaps
            why = "its DICOM segmentation is gone" if lacks else "outdated (image, prompts, model or settings changed)"
            console.say(f"case {case.id}: {why}, recomputing")
        elif existing and not job.overwrite and record.get("unfinished"):
            console.say(f"case {case.id}: incomplete from an interrupted run, recomputing")
        elif existing and not job.overwrite and any(is_readable_mask(path, case.id) for path in existing):
            unknown_masks.append(existing[0].name)
        elif existing and not job.overwrite:
            console.warn(f"case {case.id}: {existing[0].name} is damaged, recomputing")
        todo.append(case)
    if unknown_masks:
        more = f" (and {len(unknown_masks) - 1} more)" if len(unknown_masks) > 1 else ""
        raise OutputError(
            f"{job.masks}: {unknown_masks[0]} exists already{more}, not as this slmsam2 wrote it. Use --overwrite, or another folder"
        )
    return todo, done


class _Runner:
    """Segments cases with one model. When memory runs out it encodes slices one by one, then moves to the CPU if it may.

    workers: the most processes at a time. threads: of torch in each. processes: that share the passes of a case. May be sent to another
    process before its first case; the network is built there.
    """

    def __init__(self, job: PredictionJob, device: torch.device, allow_cpu_fallback: bool, workers: int | None = None) -> None:
        self.job, self.device, self.allow_cpu_fallback = job, device, allow_cpu_fallback
        self.workers_by_default, cores, small = workers is None, available_cpus(), needs_one_thread(job.plan.network.size, device)
        self.small = small
        self.workers = 1 if device.type != "cpu" else workers or (cores if small else 1)
        self.threads = 1 if small else max(1, min(torch.get_num_threads(), cores // self.workers))
        self.processes = 1
        self.settings, self.metadata = job.settings_digest(), {"model": job.model(), "prompts": job.prompts.describe()}
        self.segmenter: Segmenter | None = None
        self.warnings: list[str] = []

    def __call__(self, case: Case) -> list[str]:
        """Build the network if this is the first case in this process, and segment the case. Otherwise as `run_case`."""
        return self.run_case(case, self.segmenter or self._load())

    def run_case(self, case: Case, segmenter: Segmenter) -> list[str]:
        """Segment one case and write its mask. Returns warnings.

        Raises: CaseError when it cannot be segmented, DeviceError when the requested device has too little memory for it.
        """
        job, self.warnings = self.job, []
        if case.prompts.mask is None or not case.prompts.mask.exists():  # saved, or saved under another ending, since the run started
            case = job.prompts.assign(case)
        key, image_digests = digest_inputs(self.settings, case)
        result = None
        while result is None:
            result = self._attempt(case, self.segmenter or segmenter)
        metadata = {"training": job.in_training_set(case.id, image_digests)} | self.metadata | result.metadata
        metadata |= job.together.describe(case.id) if job.together is not None else {}
        warnings = job.records.save_mask(case.id, key, result.labels, result.image, metadata)
        return [*self.warnings, *warnings, *(f"case {case.id}: {warning}" for warning in result.warnings)]

    def read_slices(self, case: Case) -> TrainingVolume | None:
        """Read the slices of a case to learn from: the annotated ones, and after the first round also those that two witnesses agree on.

        Raises: CaseError when the case cannot be read.
        """
        job, learned = self.job, self.job.together.label_unet_for(case.id) if self.job.together is not None else None
        try:
            witnesses = Witnesses((self.segmenter or self._load()).model, learned.to(self.device)) if learned is not None else None
            return read_annotated(case, job.root, job.prompts, job.plan, witnesses)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise CaseError(case.id, "", f"cannot be learned from: {error}", "Run again with --debug for the traceback") from error

    def _load(self) -> Segmenter:
        """Build the network in the process that uses it."""
        torch.set_num_threads(self.threads)
        model = to_device(build_model(self.job.checkpoint, self.job.plan), self.device)
        self.segmenter = Segmenter(model, self.job.plan, self.job.calibration, self.processes)
        console.detail(f"running on {describe(self.device)}")
        return self.segmenter

    def _attempt(self, case: Case, segmenter: Segmenter) -> SegmentedCase | None:
        """Segment a case; None when memory ran out and another attempt can use less. Memory of the failed attempt is freed by then."""
        try:
            learned = self.job.together.label_unet_for(case.id) if self.job.together is not None else None
            with keep_freed_memory() if self.device.type == "cpu" and not self.small else nullcontext():
                return segment_case(case, self.job.root, self.job.prompts, replace(segmenter, learned=learned and learned.to(self.device)))
        except (MemoryError, RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                what = f"cannot be segmented: {type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
                raise CaseError(case.id, "", what, "Run again with --debug for the traceback") from error
            if not self._reduce_memory(case, segmenter, error):
                remedy = "Use fewer --workers, close other programs, or plan a smaller network (slmsam2 plan --network nano)"
                raise CaseError(case.id, "", f"out of memory on {self.device.type}", remedy) from error
        return None

    def _reduce_memory(self, case: Case, segmenter: Segmenter, error: Exception) -> bool:
        """Use less memory from now on; False when there is no way left. Raises: DeviceError when the device was chosen by the user."""
        inference = segmenter.plan.inference
        if inference.batch_slices != 1:
            smaller = segmenter.plan.model_copy(update={"inference": inference.model_copy(update={"batch_slices": 1})})
            self.segmenter = replace(segmenter, plan=smaller, processes=1)
            self.warnings.append(f"out of memory on {self.device.type}, retrying with batch size 1")
            return True
        if self.device.type == "cpu" or not isinstance(error, torch.OutOfMemoryError):
            return False
        if not self.allow_cpu_fallback:
            raise DeviceError(f"case {case.id}: out of memory on {self.device.type}. Use --device cpu") from error
        self.warnings.append(f"out of memory on {self.device.type}, falling back to CPU")
        self.device = torch.device("cpu")
        self.segmenter = replace(segmenter, model=to_device(segmenter.model, self.device))
        return True
