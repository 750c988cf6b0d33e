"""What is scored against what: everything that is known before a mask is opened.

Predictions come from a folder, labels from a data set or a folder, names from the data set or the plan, the cases a model has seen from the
workspace's split or the predictions' own account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slmsam2_cli.dataset.dataset import Dataset, read_dataset, read_image_folder
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.errors import DatasetError, PlanError, UsageError
from slmsam2_cli.evaluation.matching import Pairing, References, add_problems, case_name, pair, references_of_dataset, references_of_folder
from slmsam2_cli.evaluation.metrics import NSD_TOLERANCE_MM
from slmsam2_cli.inference.manifest import Manifest, read_manifest
from slmsam2_cli.io import atomic
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace

_HOMES = ("home", "Users")  # folders whose folders have the names of users


@dataclass(frozen=True)
class Truth:
    """What all predictions are compared with.

    images: case -> files, for pictures only, below image_root; split: cases that fine-tuning learned from, as the workspace tells;
    warnings: what could not be made use of.
    """

    references: References
    split: frozenset[str]
    tolerance_mm: float = NSD_TOLERANCE_MM
    images: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    image_root: Path = field(default_factory=Path)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predicted:
    """One folder of predictions, matched.

    manifest: by the labels' case ids, None where nobody knows; seen: the cases that its model learned from.
    """

    folder: Path
    manifest: Manifest | None
    seen: frozenset[str]
    pairing: Pairing


def load_ground_truth(
    labels: Path | None, root: Path | None, space: Workspace | None, images: Path | None = None, tolerance_mm: float | None = None
) -> Truth:
    """The labels and what is known of them. root: the data set they belong to, if any. UsageError, DatasetError, PlanError."""
    if tolerance_mm is not None and not 0 < tolerance_mm < math.inf:
        raise UsageError(f"--nsd-tolerance {tolerance_mm:g} is no distance. Name millimetres, as in 2")
    warnings: list[str] = []
    references = _references(labels, root, space, warnings)
    plan = read_plan(space.plan) if space is not None and space.plan.is_file() else None
    planned = plan.evaluation.nsd_tolerance_mm if plan is not None else NSD_TOLERANCE_MM
    shown, image_root = _images(images, root)
    return Truth(
        references,
        _split_cases(space),
        planned if tolerance_mm is None else tolerance_mm,
        shown,
        image_root,
        tuple(dict.fromkeys(warnings)),
    )


def load_predictions(folder: Path, truth: Truth) -> Predicted:
    """A folder of predictions matched with the labels. UsageError when its manifest cannot be understood."""
    manifest = read_manifest(folder)
    told = {case for case, entry in manifest.cases.items() if entry.training} if manifest is not None else set[str]()
    learned = truth.split | told
    pairing = pair(truth.references, folder, manifest, learned)
    renamed = {case for case, name in _names_by_label(pairing).items() if name in learned}
    return Predicted(folder, _by_label(manifest, pairing), truth.split | renamed, pairing)


def dataset_root(labels: Path | None, dataset: Path | None) -> Path | None:
    """The data set the labels belong to: they are it, they lie in it, or it was named."""
    near = [] if labels is None else [labels, labels.absolute().parent]
    return next((folder for folder in near if (folder / "dataset.json").is_file()), dataset)


def _by_label(manifest: Manifest | None, pairing: Pairing) -> Manifest | None:
    """The manifest with its cases under the names the labels have."""
    if manifest is None:
        return None
    cases = {case: manifest.cases[name] for case, name in _names_by_label(pairing).items() if name in manifest.cases}
    return manifest.model_copy(update={"cases": cases})


def _names_by_label(pairing: Pairing) -> dict[str, str]:
    """Case -> the name under which it was predicted."""
    return {case: case_name(path) for case, _, path in pairing.pairs if path is not None}


def _references(labels: Path | None, root: Path | None, space: Workspace | None, warnings: list[str]) -> References:
    """A data set's own labels, or the masks in a folder with the names of its data set or of the plan."""
    if labels is None or labels == root:
        if root is None:
            raise UsageError("no labels to compare with. Name a data set with -d, or a folder of masks with -g")
        return references_of_dataset(read_dataset(root))
    if not labels.is_dir():
        raise UsageError(f"no folder of labels at {labels}. Name a folder of masks, or a data set, with -g")
    declared = _declared(root, warnings) if root is not None else None
    if declared is not None:
        references = references_of_folder(labels, declared.structures, declared.ignore)
        own = any(case.label is not None and case.label.parent.resolve() == labels.resolve() for case in declared.training)
        return add_problems(references, declared.problems) if own else references
    planned = read_plan(space.plan).labels if space is not None and space.plan.is_file() else None
    return references_of_folder(labels, None if planned is None else dict[Structure, str](planned.items()), None)


def _declared(root: Path, warnings: list[str]) -> Dataset | None:
    """The data set for its label names alone; one that cannot be read is said and done without."""
    try:
        return read_dataset(root)
    except DatasetError as error:
        warnings.append(f"label names are not known: {error}")
        return None


def _images(folder: Path | None, root: Path | None) -> tuple[dict[str, tuple[Path, ...]], Path]:
    """Images by case: those of the folder named, else those of the data set; none when they cannot be listed."""
    if folder is not None:
        if not folder.is_dir():
            raise UsageError(f"no folder of images at {folder}. Name one with --images, or leave it out")
        return {case.id: case.images for case in read_image_folder(folder)[0]}, folder
    if root is None:
        return {}, Path()
    try:
        data = read_dataset(root)
    except DatasetError:
        return {}, Path()
    return {case.id: case.images for case in (*data.training, *data.test)}, root


def _split_cases(space: Workspace | None) -> frozenset[str]:
    """The cases that fine-tuning learned from, by the workspace's split."""
    if space is None or not space.split.is_file():
        return frozenset()
    split = atomic.read_json(space.split, "the split")
    listed = split.get("training") if isinstance(split, dict) else None
    if not isinstance(listed, list) or not all(isinstance(case, str) for case in listed):
        raise PlanError(f'{space.split.name}: expected {{"training": ["case", …]}}. Run slmsam2 finetune again')
    return frozenset(listed)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Short names for several folders: as many last parts of their paths as it takes to tell them apart. UsageError for one named twice.

    Every name is one component of a path, and no two are alike, also where upper and lower case are. Where only the names of users
    would tell them apart, numbers do.
    """
    found = [folder.resolve() for folder in folders]
    if len(set(found)) != len(found):
        raise UsageError("one folder of predictions is named twice with -p")
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
