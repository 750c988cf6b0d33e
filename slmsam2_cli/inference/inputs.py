"""What predict works on: the cases, their prompts, and the folder for the masks, as its options name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slmsam2_cli import console
from slmsam2_cli.dataset.dataset import Case, Dataset, read_image_folder
from slmsam2_cli.dataset.discovery import stem
from slmsam2_cli.dataset.prompts import PromptSlice
from slmsam2_cli.errors import CaseError, DatasetError, OutputError, UsageError
from slmsam2_cli.inference.load_model import read_split
from slmsam2_cli.inference.segment import PromptSource
from slmsam2_cli.io.dicom_files import is_dicom
from slmsam2_cli.io.volume import ENDINGS, MASK_ENDINGS, image_ending
from slmsam2_cli.workspace import Workspace

if TYPE_CHECKING:
    from slmsam2_cli.io.dicom_seg import LabelCodes


@dataclass(frozen=True)
class CaseSelection:
    """The cases to segment, all below `root`. problems: cases that cannot be; training_ids: cases that are not held out."""

    root: Path
    cases: Sequence[Case]
    problems: Sequence[CaseError]
    training_ids: frozenset[str] = frozenset()


def codes_of_labels(file: Path | None) -> Mapping[int, LabelCodes]:
    """Read the codes of labels for DICOM segmentations; empty without a file.

    Raises: SlmSam2Error when the file cannot be read.
    """
    if file is None:
        return {}
    from slmsam2_cli.io.dicom_seg import read_codes  # highdicom is slow to import

    return read_codes(file)


def select_cases(images: Path | None, data: Dataset | None, workspace: Workspace | None, series: str | None = None) -> CaseSelection:
    """Select the images of a folder, or one; without one, the data set's held-out cases, or all when all were used for training.

    series: as in choose_series. Raises: UsageError when no images are named, DatasetError when there are none.
    """
    if images is not None:
        if not images.exists():
            raise UsageError(f"-i {images}: no such file or folder")
        if images.is_file() and image_ending(images) is None and not is_dicom(images):
            raise UsageError(f"-i {images}: unsupported file type. Supported: {', '.join(ENDINGS)}")
        found = CaseSelection(images.parent if images.is_file() else images, *read_image_folder(images, series))
    elif data is not None and workspace is not None:
        split = read_split(workspace)
        seen, unusable = frozenset(split.get("training", ())), frozenset(split.get("skipped", ()))
        held_out = tuple(case for case in data.training if case.id not in seen)
        if seen and not {case.id for case in held_out} - unusable:
            console.warn("all labelled cases were used for training; scores will be optimistic")
            found = CaseSelection(data.root, data.training, data.problems, seen)
        else:
            found = CaseSelection(data.root, held_out, data.problems)
    else:
        raise UsageError("no images given. Use -i IMAGES -o MASKS, or run inside a data set")
    if not found.cases:
        below = next((path for path in sorted(found.root.glob("*/**/*")) if image_ending(path)), None)
        advice = f"Give {below.parent}, or a BIDS folder" if below else "Give a folder with NIfTI, NRRD, MHA, DICOM or PNG images"
        raise DatasetError(f"{found.root}: no image to segment. {advice}", found.problems)
    return found


def with_prompts(selected: CaseSelection, source: PromptSource) -> CaseSelection:
    """Find the prompts of each case; cases with several masks become problems. Says which files are taken for channels.

    Raises: DatasetError when no case is left.
    """
    cases, problems = [], list(selected.problems)
    for case in selected.cases:
        try:
            cases.append(source.assign(case))
        except CaseError as problem:
            problems.append(problem)
    if several := [] if source.dataset_labels else [case for case in selected.cases if len(case.images) > 1]:
        names, count = f"{several[0].images[0].name} ... {several[0].images[-1].name}", len(several[0].images)
        more = f", and so in {len(several) - 1} more cases" if len(several) > 1 else ""
        console.say(f"case {several[0].id}: {names} are taken for its {count} channels{more}")
    if not cases:
        raise DatasetError(f"{source.folder}: no prompt mask can be used", problems)
    return replace(selected, cases=cases, problems=problems)


def masks_folder(masks: Path | None, workspace: Workspace | None, images: Path | None) -> Path:
    """Return the folder for the masks: the one named, or the workspace's for the cases of its data set.

    Raises: UsageError when images are named and no folder is.
    """
    if masks is not None:
        return masks
    if images is None and workspace is not None:
        return workspace.predictions
    raise UsageError("-o FOLDER is missing: name a folder for the masks")


def folder_beside(file: Path, images: int, overwrite: bool) -> Path:
    """Return the folder for what predict writes besides the one mask `file`: plan, manifest, report and records.

    Raises: UsageError when there are several images, or the file exists and is not to be replaced.
    """
    if images != 1:
        raise UsageError(f"-o {file}: names a file, but -i names {images} images. Name a folder for their masks")
    if file.exists() and not overwrite:
        raise UsageError(f"-o {file}: exists already. Use --overwrite, or another name")
    if image_ending(file) not in MASK_ENDINGS:
        raise UsageError(f"-o {file}: masks are not written in this format. Use {', '.join(MASK_ENDINGS)}")
    return file.with_name(f"{stem(file)}.slmsam2")


def prompt_source(
    prompts: Path | None, simulate_from: Path | None, prompt_slice: PromptSlice, mark_ends: bool, data: Dataset | None
) -> PromptSource:
    """Choose where prompts are read from; by default one slice per label of the data set's own masks.

    Raises: UsageError for options that exclude each other, and a folder that does not exist.
    """
    if prompts is not None and simulate_from is not None:
        raise UsageError("-p and --simulate-prompts cannot be combined")
    if prompts is not None and mark_ends:
        raise UsageError("--mark-ends needs --simulate-prompts. With prompt masks of your own, list the empty slices in CASE.prompts.json")
    folder = prompts if prompts is not None else simulate_from
    if folder is None and data is None:
        raise UsageError("no prompts given. Use -p FOLDER (masks with annotated slices) or --simulate-prompts FOLDER (full masks)")
    if folder is None:
        assert data is not None
        return PromptSource(data.root, prompt_slice, dataset_labels=True, mark_ends=mark_ends)
    if folder.is_file() and image_ending(folder):
        return PromptSource(folder.parent, prompt_slice if prompts is None else None, mark_ends=mark_ends, file=folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    return PromptSource(folder, prompt_slice if prompts is None else None, mark_ends=mark_ends)


def check_output_folder(masks: Path, inputs: Sequence[Path]) -> None:
    """Check that the folder for the masks holds no images or prompts, also behind a link.

    Raises: UsageError when it does, OutputError when it is a file.
    """
    if masks.exists() and not masks.is_dir():
        raise OutputError(f"{masks}: is a file, not a directory. Name a folder with -o")
    for folder in {path.resolve() for path in inputs}:
        if masks.resolve() == folder:
            raise UsageError(f"-o {masks}: is the same folder as an input. Choose another for the masks")
