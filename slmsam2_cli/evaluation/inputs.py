"""Collect what is scored and what it is compared with, before any mask is opened.

Predictions come from a folder, labels from a data set or a folder, label names from the data set or the plan, and the cases that the model
was trained on from split.json of the workspace or from the predictions' manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slmsam2_cli.dataset.dataset import Dataset, read_dataset, read_image_folder
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.dataset.discovery import normalise_name, stem
from slmsam2_cli.errors import DatasetError, PlanError, UsageError
from slmsam2_cli.evaluation.matching import Group, Pairing, References, pair, references_of_folder
from slmsam2_cli.evaluation.metrics import NSD_TOLERANCE_MM
from slmsam2_cli.inference.manifest import MANIFEST, Manifest, read_manifest
from slmsam2_cli.io import atomic
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace

_HOMES = ("home", "Users")  # folders whose subfolders are named after users
_PROMPTS_ENDING = ".prompts.json"


@dataclass(frozen=True)
class GroundTruth:
    """The references that all predictions are compared with, and how.

    training_cases: those that the workspace's split.json lists; images: case -> files, for pictures only; warnings: what could not be used.
    """

    references: References
    training_cases: frozenset[str]
    tolerance_mm: float = NSD_TOLERANCE_MM
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """One folder of predictions, matched with the references.

    manifest: with its cases under the names of the references, None when there is none; training_cases: those that its model was trained
    on, under the same names.
    """

    folder: Path
    manifest: Manifest | None
    training_cases: frozenset[str]
    pairing: Pairing

    def group_of(self, case: str) -> Group:
        """Return whether a case was used for training."""
        return "training" if case in self.training_cases else "held_out"


def load_ground_truth(
    labels: Path | None, root: Path | None, space: Workspace | None, images: Path | None = None, tolerance_mm: float | None = None
) -> GroundTruth:
    """Find the references and what is known about them. root: the data set that they belong to, None when there is none.

    Raises: UsageError when a folder is missing or the tolerance is not positive; DatasetError or PlanError when the data set, plan or
    split.json is invalid.
    """
    if tolerance_mm is not None and not 0 < tolerance_mm < math.inf:
        raise UsageError(f"--nsd-tolerance {tolerance_mm:g}: not a distance in mm. Use a positive number such as 2")
    references, warnings = _references(labels, root, space)
    plan = read_plan(space.plan) if space is not None and space.plan.is_file() else None
    planned = plan.evaluation.nsd_tolerance_mm if plan is not None else NSD_TOLERANCE_MM
    tolerance_mm = planned if tolerance_mm is None else tolerance_mm
    return GroundTruth(references, _training_cases(space), tolerance_mm, _images(images, root), warnings)


def load_predictions(folder: Path, truth: GroundTruth) -> Predictions:
    """Match a folder of predictions with the references.

    Raises: UsageError when the folder holds prompts, or its manifest cannot be read.
    """
    manifest = read_manifest(folder)
    prompts = [path.name for path in sorted(folder.glob(f"*{_PROMPTS_ENDING}"))]
    if manifest is None and prompts:
        raise UsageError(
            f"{folder}: a folder of prompts (it holds {prompts[0]} and no {MANIFEST}), not of predictions. "
            f"Run slmsam2 predict -p {folder} first, then name its output folder with -p"
        )
    listed = manifest.cases if manifest is not None else {}
    training = truth.training_cases | {case for case, entry in listed.items() if entry.training}
    pairing = pair(truth.references, folder, manifest, training)
    predicted = {case: normalise_name(stem(path)) for case, _, path in pairing.pairs if path is not None}  # reference -> prediction
    if manifest is not None:
        cases = {case: listed[name] for case, name in predicted.items() if name in listed}
        manifest = manifest.model_copy(update={"cases": cases})
    trained_on = {case for case, name in predicted.items() if name in training}
    return Predictions(folder, manifest, truth.training_cases | trained_on, pairing)


def dataset_root(labels: Path | None, dataset: Path | None) -> Path | None:
    """Find the data set that the labels belong to: the folder itself, its parent, or else `dataset`."""
    near = [] if labels is None else [labels, labels.absolute().parent]
    return next((folder for folder in near if (folder / "dataset.json").is_file()), dataset)


def _references(labels: Path | None, root: Path | None, space: Workspace | None) -> tuple[References, tuple[str, ...]]:
    """List the labels of a data set, or the masks in a folder with the label names of its data set or of the plan.

    Returns the references, and a warning when the data set cannot be read for its label names.

    Raises: UsageError when there are no labels; DatasetError when the data set whose labels are used is invalid.
    """
    if labels is None or labels == root:
        if root is None:
            raise UsageError("no labels to compare with. Use -d for a data set, or -g for a folder of masks")
        data = read_dataset(root)
        masks = {case.id: case.label for case in data.training if case.label is not None}
        return References(data.root, masks, data.structures, data.ignore, data.problems), ()
    if not labels.is_dir():
        raise UsageError(f"-g {labels}: no such folder. Name a folder of masks, or a data set")
    declared: Dataset | None = None
    warnings: tuple[str, ...] = ()
    if root is not None:
        try:
            declared = read_dataset(root)
        except DatasetError as error:
            warnings = (f"label names are not known: {error}",)
    if declared is None:
        planned = read_plan(space.plan).labels if space is not None and space.plan.is_file() else None
        return references_of_folder(labels, None if planned is None else dict[Structure, str](planned.items()), None), warnings
    references = references_of_folder(labels, declared.structures, declared.ignore)
    if not any(case.label is not None and case.label.parent.resolve() == labels.resolve() for case in declared.training):
        return references, ()
    known = {normalise_name(case) for case in references.masks} | {normalise_name(problem.case) for problem in references.problems}
    without = (problem for problem in declared.problems if normalise_name(problem.case) not in known)  # cases whose label is missing
    return replace(references, problems=(*references.problems, *without)), ()


def _images(folder: Path | None, root: Path | None) -> dict[str, tuple[Path, ...]]:
    """List the image files by case: those in `folder`, else of the data set; none if the data set cannot be read.

    Raises: UsageError when `folder` does not exist.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"--images {folder}: no such folder. Name a folder of images, or omit the option")
        return {case.id: case.images for case in read_image_folder(folder)[0]}
    if root is None:
        return {}
    try:
        data = read_dataset(root)
    except DatasetError:
        return {}
    return {case.id: case.images for case in (*data.training, *data.test)}


def _training_cases(space: Workspace | None) -> frozenset[str]:
    """Read the cases that the workspace's model was trained on from split.json; empty when there is none.

    Raises: PlanError when the file is invalid.
    """
    if space is None or not space.split.is_file():
        return frozenset()
    split = atomic.read_json(space.split, "the split")
    listed = split.get("training") if isinstance(split, dict) else None
    if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed):
        raise PlanError(f'{space.split.name}: expected {{"training": ["case", …]}}. Run slmsam2 finetune again')
    return frozenset(listed)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Name several folders by as many last components of their paths as distinguish them.

    Each name is a single path component, and no two are equal even without regard to case. Folders that only the names of users
    distinguish are numbered.

    Raises: UsageError when a folder is listed twice.
    """
    found = [folder.resolve() for folder in folders]
    if len(set(found)) != len(found):
        raise UsageError("-p names the same folder twice. Name each folder of predictions once")
    parts = [folder.relative_to(folder.anchor).parts for folder in found]
    names: list[str] = []
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if any(part[0] in _HOMES and len(part) - depth <= 1 for part in parts if part):
            names = [part[-1] for part in parts]
            break
        if len({name.casefold() for name in names}) == len(names):
            return names
    return [f"{number}-{name}" for number, name in enumerate(names, start=1)]
