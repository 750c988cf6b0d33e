"""Which prediction belongs to which reference, and which cases a model had already seen.

Files are named here, not opened. A prediction is its reference's namesake; nnU-Net's channel suffix `_0000` is tolerated. Where there is
not one namesake, names that differ by a common affix are matched, which is said (naming.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slmsam2_cli.data.cases import Structure
from slmsam2_cli.data.dataset import Dataset
from slmsam2_cli.data.listing import list_labels, same_name, stem
from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.manifest import Manifest
from slmsam2_cli.evaluation.naming import match_by_affix

Group = Literal["unseen", "training"]
CHANNEL_SUFFIX = "_0000"


@dataclass(frozen=True)
class References:
    """The truth to compare with: masks by case id, all below `root`; problems: cases that are no use already.

    labels: what is reported (label values, regions) -> its name when declared, else None and every value above 0 that occurs is a label;
    ignore: a value not to be scored.
    """

    root: Path
    masks: Mapping[str, Path]
    labels: Mapping[Structure, str] | None
    ignore: int | None
    problems: tuple[CaseError, ...]


@dataclass(frozen=True)
class Pairing:
    """What is to be scored, and what is only to be mentioned.

    pairs: (case, reference, prediction or None when it is missing), sorted; without_reference: predictions nobody can judge;
    not_asked_for: training cases that were not predicted; problems: cases with two files that could be meant;
    renamed: (case, name of its prediction) where the two are no namesakes and were matched by a common affix.
    """

    pairs: tuple[tuple[str, Path, Path | None], ...]
    without_reference: tuple[str, ...]
    not_asked_for: tuple[str, ...]
    problems: tuple[CaseError, ...]
    renamed: tuple[tuple[str, str], ...] = ()


def references_of_dataset(dataset: Dataset) -> References:
    """The labelled cases of a data set."""
    masks = {case.id: case.label for case in dataset.training if case.label is not None}
    return References(dataset.root, masks, dataset.structures, dataset.ignore, dataset.problems)


def references_of_folder(folder: Path, labels: Mapping[Structure, str] | None, ignore: int | None) -> References:
    """The masks in a folder."""
    masks, problems = masks_in(folder)
    return References(folder, masks, labels, ignore, problems)


def with_problems(references: References, problems: Sequence[CaseError]) -> References:
    """The same, and cases that ought to have a label there but have none that can be used."""
    known = {same_name(case) for case in references.masks} | {same_name(problem.case) for problem in references.problems}
    more = tuple(problem for problem in problems if same_name(problem.case) not in known)
    return replace(references, problems=(*references.problems, *more))


def masks_in(folder: Path) -> tuple[dict[str, Path], tuple[CaseError, ...]]:
    """Case id -> mask file, sorted by id; two files of one id are a problem, not a choice. DatasetError when it cannot be listed."""
    found = list_labels(folder, folder)
    return {same_name(case): paths[0] for case, paths in sorted(found.cases.items())}, tuple(found.problems)


def pair(references: References, predictions: Path, manifest: Manifest | None, seen: Collection[str]) -> Pairing:
    """Match predictions to references.

    A reference without a prediction counts as missing, unless it is a training case that predict was not asked for.
    """
    masks, problems = masks_in(predictions)
    listed = manifest.cases if manifest is not None else {}
    pairs: list[tuple[str, Path, Path | None]] = []
    taken = {problem.case for problem in references.problems}
    not_asked_for = []
    names = {case: name for case in references.masks if (name := _namesake(case, masks)) is not None}
    renamed = {} if names else match_by_affix(references.masks, masks)
    refused = {problem.case.removesuffix(CHANNEL_SUFFIX) for problem in problems}
    for case, reference in sorted(references.masks.items()):
        name = names.get(case) or renamed.get(case)
        if name is not None:
            taken.add(name)
            pairs.append((case, reference, masks[name]))
        elif case.removesuffix(CHANNEL_SUFFIX) in refused:
            continue
        elif case in seen and case not in listed:
            not_asked_for.append(case)
        else:
            pairs.append((case, reference, None))
    strangers = [case for case in masks if case not in taken]
    ours = {case.removesuffix(CHANNEL_SUFFIX) for case in references.masks}
    mattering = tuple(problem for problem in problems if problem.case.removesuffix(CHANNEL_SUFFIX) in ours)
    return Pairing(tuple(pairs), tuple(strangers), tuple(not_asked_for), mattering, tuple(sorted(renamed.items())))


def case_name(mask: Path) -> str:
    """The case a mask is named after."""
    return same_name(stem(mask))


def group_of(case: str, seen: Collection[str]) -> Group:
    return "training" if case in seen else "unseen"


def relative_name(path: Path, root: Path) -> str:
    """The path below root with forward slashes; the bare name for a file that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _namesake(case: str, masks: Mapping[str, Path]) -> str | None:
    plain = same_name(case)
    candidates = (plain, plain + CHANNEL_SUFFIX, plain.removesuffix(CHANNEL_SUFFIX))
    return next((name for name in candidates if name in masks), None)
