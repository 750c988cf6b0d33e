"""Which prediction belongs to which reference, and which cases a model had already seen.

Compare file names; open no file. A prediction has the name of its reference; nnU-Net's channel suffix `_0000` is tolerated. Where there is
no file of the same name, names that differ by a common affix are matched, which is said (naming.py).

Which mask belongs to which label when no two files have the same name: by what is left after a common affix.

`pred_007` and `007_seg` are one case because every mask begins with `pred_` and every label ends in `_seg`. An affix is made of whole
words, each with a letter in it, so that a number, which tells cases apart, is never taken for one. Where both sides carry an affix, one
of them must say no more than what kind of file it is: `p1_T1` and `p1_T2`, or `left_1` and `right_1`, are not the same thing. Names that
fit in two ways fit in none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

from slmsam2_cli.dataset.dataset import Dataset
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.dataset.discovery import list_labels, normalise_name, stem
from slmsam2_cli.errors import CaseError
from slmsam2_cli.inference.manifest import Manifest

_WORDS = re.compile(r"[^\W_]+|[\W_]+")
KINDS = frozenset(
    (
        *("gt", "ground", "truth", "groundtruth", "ref", "reference", "target", "manual", "annotation", "annotated", "label", "labels"),
        *("mask", "masks", "roi", "seg", "segmentation", "segmentations", "segmented", "labelmap", "auto", "out", "output", "result"),
        *("results", "pred", "preds", "predicted", "prediction", "predictions"),
    )
)
"""Words that tell masks from masks, never a case from another."""


@dataclass(frozen=True)
class Affix:
    """What is written before and after the name of a case, separators included."""

    before: str = ""
    after: str = ""

    def core(self, name: str) -> str | None:
        """The name without the affix; None when it does not carry it, or nothing would be left."""
        carries = name.startswith(self.before) and name.endswith(self.after) and len(name) > len(self.before) + len(self.after)
        return name[len(self.before) : len(name) - len(self.after)] if carries else None

    @property
    def is_generic(self) -> bool:
        """Whether no word of it could tell one case from another."""
        return all(word.lower() in KINDS for word in _WORDS.findall(f"{self.before} {self.after}") if word[0].isalnum())


def match_by_affix(labels: Collection[str], predictions: Collection[str]) -> dict[str, str]:
    """Label name -> prediction name, for the pair of affixes that matches most; empty when none does, or a label fits two predictions."""
    if not labels or not predictions:
        return {}
    found = [(_matches(labels, ours, predictions, theirs), ours) for ours, theirs in _candidates(sorted(labels), sorted(predictions))]
    most = max((len(match) for match, _ in found), default=0)
    best = [(match, ours) for match, ours in found if len(match) == most]
    if not most or any(match != best[0][0] for match, _ in best):
        return {}
    cores = {core for _, ours in best for label in labels if (core := ours.core(label)) is not None}
    left_over = set(predictions) - set(best[0][0].values())
    return {} if any(core in cores for name in left_over for core in _cores(name)) else best[0][0]


def _matches(labels: Collection[str], ours: Affix, predictions: Collection[str], theirs: Affix) -> dict[str, str]:
    by_core = {core: name for name in predictions if (core := theirs.core(name)) is not None}
    return {label: by_core[core] for label in labels if (core := ours.core(label)) is not None and core in by_core}


def _candidates(labels: Sequence[str], predictions: Sequence[str]) -> Iterator[tuple[Affix, Affix]]:
    """Affixes common to all names of either side, and those around a name of one side in the first of the other, or the other way round."""
    nothing = Affix()
    both = ((ours, theirs) for ours in _common(labels) for theirs in _common(predictions))
    yield from ((ours, theirs) for ours, theirs in both if ours.is_generic or theirs.is_generic)
    pairs = [*((label, predictions[0]) for label in labels), *((labels[0], prediction) for prediction in predictions)]
    yield from ((nothing, affix) for label, prediction in pairs for affix in _around(label, prediction))
    yield from ((affix, nothing) for label, prediction in pairs for affix in _around(prediction, label))


def _common(names: Sequence[str]) -> Iterator[Affix]:
    """Whole words that all of at least two names begin or end with, and that are no numbers; also none of them."""
    yield Affix()
    if len(names) < 2:
        return
    words = [_WORDS.findall(name) for name in names]
    before = _shared(words)
    after = _shared([list(reversed(one)) for one in words])
    starts = {"".join(before[:i]) for i in range(len(before) + 1) if _is_affix(before[:i])}
    ends = {"".join(reversed(after[:i])) for i in range(len(after) + 1) if _is_affix(after[:i])}
    yield from (Affix(start, end) for start in sorted(starts) for end in sorted(ends) if start or end)


def _shared(words: Sequence[Sequence[str]]) -> list[str]:
    """The longest list of words with which every list begins."""
    longest: list[str] = []
    for column in zip(*words):
        if len(set(column)) != 1:
            break
        longest.append(column[0])
    return longest


def _is_affix(words: Sequence[str]) -> bool:
    """Nothing, or words with letters that end in a separator, so that what follows is a word of its own."""
    if not words:
        return True
    return not words[-1][0].isalnum() and all(any(c.isalpha() for c in word) for word in words if word[0].isalnum())


def _cores(name: str) -> Iterator[str]:
    """What any affixes could leave of a name."""
    words = _WORDS.findall(name)
    for start, end in combinations(range(len(words) + 1), 2):
        if _is_affix(words[:start]) and _is_affix(list(reversed(words[end:]))):
            yield "".join(words[start:end])


def _around(core: str, name: str) -> Iterator[Affix]:
    """How `name` is written around `core`, if it is."""
    for found in re.finditer(re.escape(core), name):
        before, after = name[: found.start()], name[found.end() :]
        if (before or after) and _is_affix(_WORDS.findall(before)) and _is_affix(list(reversed(_WORDS.findall(after)))):
            yield Affix(before, after)


Group = Literal["held_out", "training"]
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
    not_requested: training cases that were not predicted; problems: cases with two files that could be meant;
    renamed: (case, name of its prediction) where the two differ and were matched by a common affix.
    """

    pairs: tuple[tuple[str, Path, Path | None], ...]
    without_reference: tuple[str, ...]
    not_requested: tuple[str, ...]
    problems: tuple[CaseError, ...]
    renamed: tuple[tuple[str, str], ...] = ()


def references_of_dataset(dataset: Dataset) -> References:
    """The labelled cases of a data set."""
    masks = {case.id: case.label for case in dataset.training if case.label is not None}
    return References(dataset.root, masks, dataset.structures, dataset.ignore, dataset.problems)


def references_of_folder(folder: Path, labels: Mapping[Structure, str] | None, ignore: int | None) -> References:
    """The masks in a folder."""
    masks, problems = find_masks(folder)
    return References(folder, masks, labels, ignore, problems)


def add_problems(references: References, problems: Sequence[CaseError]) -> References:
    """The same, and cases that ought to have a label there but have none that can be used."""
    known = {normalise_name(case) for case in references.masks} | {normalise_name(problem.case) for problem in references.problems}
    more = tuple(problem for problem in problems if normalise_name(problem.case) not in known)
    return replace(references, problems=(*references.problems, *more))


def find_masks(folder: Path) -> tuple[dict[str, Path], tuple[CaseError, ...]]:
    """Case id -> mask file, sorted by id; two files of one id are a problem, not a choice. DatasetError when it cannot be listed."""
    found = list_labels(folder, folder)
    return {normalise_name(case): paths[0] for case, paths in sorted(found.cases.items())}, tuple(found.problems)


def pair(references: References, predictions: Path, manifest: Manifest | None, seen: Collection[str]) -> Pairing:
    """Match predictions to references.

    A reference without a prediction counts as missing, unless it is a training case that predict was not asked for.
    """
    masks, problems = find_masks(predictions)
    listed = manifest.cases if manifest is not None else {}
    pairs: list[tuple[str, Path, Path | None]] = []
    taken = {problem.case for problem in references.problems}
    not_requested = []
    names = {case: name for case in references.masks if (name := _same_named_mask(case, masks)) is not None}
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
            not_requested.append(case)
        else:
            pairs.append((case, reference, None))
    strangers = [case for case in masks if case not in taken]
    ours = {case.removesuffix(CHANNEL_SUFFIX) for case in references.masks}
    mattering = tuple(problem for problem in problems if problem.case.removesuffix(CHANNEL_SUFFIX) in ours)
    return Pairing(tuple(pairs), tuple(strangers), tuple(not_requested), mattering, tuple(sorted(renamed.items())))


def case_name(mask: Path) -> str:
    """The case a mask is named after."""
    return normalise_name(stem(mask))


def group_of(case: str, seen: Collection[str]) -> Group:
    return "training" if case in seen else "held_out"


def relative_name(path: Path, root: Path) -> str:
    """The path below root with forward slashes; the bare name for a file that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _same_named_mask(case: str, masks: Mapping[str, Path]) -> str | None:
    plain = normalise_name(case)
    candidates = (plain, plain + CHANNEL_SUFFIX, plain.removesuffix(CHANNEL_SUFFIX))
    return next((name for name in candidates if name in masks), None)
