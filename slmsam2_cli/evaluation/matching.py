"""Match predictions to reference masks by file name; no file is opened.

A prediction has the name of its reference; nnU-Net's channel suffix `_0000` is ignored. If no two files have the same name, names that
differ by a common affix are matched, with a warning: `pred_007` and `007_seg` are one case because every mask begins with `pred_` and every
label ends in `_seg`.

An affix consists of whole words that contain a letter, so that a number, which distinguishes cases, is never taken for one. Where both
sides have an affix, one of them must only name the kind of file: `p1_T1` and `p1_T2`, or `left_1` and `right_1`, are different things.
Names that can be matched in two ways are not matched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from pathlib import Path
from typing import Literal

from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.dataset.discovery import list_labels, normalise_name
from slmsam2_cli.errors import CaseError
from slmsam2_cli.inference.manifest import Manifest

Group = Literal["held_out", "training"]
CHANNEL_SUFFIX = "_0000"
KINDS = frozenset(
    (
        *("gt", "ground", "truth", "groundtruth", "ref", "reference", "target", "manual", "annotation", "annotated", "label", "labels"),
        *("mask", "masks", "roi", "seg", "segmentation", "segmentations", "segmented", "labelmap", "auto", "out", "output", "result"),
        *("results", "pred", "preds", "predicted", "prediction", "predictions"),
    )
)
"""Words that name a kind of mask, and so never distinguish one case from another."""
_WORDS = re.compile(r"[^\W_]+|[\W_]+")


@dataclass(frozen=True)
class Affix:
    """The text before and after the name of a case, separators included."""

    before: str = ""
    after: str = ""

    def core(self, name: str) -> str | None:
        """Return the name without the affix; None when it does not have the affix, or nothing would be left."""
        carries = name.startswith(self.before) and name.endswith(self.after) and len(name) > len(self.before) + len(self.after)
        return name[len(self.before) : len(name) - len(self.after)] if carries else None

    @property
    def is_generic(self) -> bool:
        """Return whether every word of it names a kind of mask."""
        return all(word.lower() in KINDS for word in _WORDS.findall(f"{self.before} {self.after}") if word[0].isalnum())


@dataclass(frozen=True)
class References:
    """The reference masks by case id, all below `root`.

    labels: what is reported (label values, regions) -> its name when declared; None: every value above 0 that occurs is a label;
    ignore: value of voxels that are not scored; problems: cases without a usable reference.
    """

    root: Path
    masks: Mapping[str, Path]
    labels: Mapping[Structure, str] | None
    ignore: int | None
    problems: tuple[CaseError, ...]


@dataclass(frozen=True)
class Pairing:
    """The cases to score, and the files that are only mentioned.

    pairs: (case, reference, prediction or None when it is missing), sorted; without_reference: predictions that have no reference;
    not_requested: training cases that were not predicted; problems: cases with two possible files; renamed: (case, name of its
    prediction) where they were matched by a common affix.
    """

    pairs: tuple[tuple[str, Path, Path | None], ...]
    without_reference: tuple[str, ...]
    not_requested: tuple[str, ...]
    problems: tuple[CaseError, ...]
    renamed: tuple[tuple[str, str], ...] = ()


def references_of_folder(folder: Path, labels: Mapping[Structure, str] | None, ignore: int | None) -> References:
    """List the masks in a folder; labels, ignore: as in References."""
    masks, problems = find_masks(folder)
    return References(folder, masks, labels, ignore, problems)


def find_masks(folder: Path) -> tuple[dict[str, Path], tuple[CaseError, ...]]:
    """List the masks in a folder: case id -> file, sorted by id, and a problem for each case id that two files share.

    Raises: DatasetError when the folder cannot be listed.
    """
    found = list_labels(folder, folder)
    return {normalise_name(case): paths[0] for case, paths in sorted(found.cases.items())}, tuple(found.problems)


def pair(references: References, predictions: Path, manifest: Manifest | None, training: Collection[str]) -> Pairing:
    """Match the masks in the folder `predictions` to the references. training: the cases that the model was trained on.

    A reference without a prediction is missing, except for a training case that is not in the manifest.
    """
    masks, problems = find_masks(predictions)
    names = {}
    for case in references.masks:
        plain = normalise_name(case)
        candidates = (plain, plain + CHANNEL_SUFFIX, plain.removesuffix(CHANNEL_SUFFIX))
        if (name := next((name for name in candidates if name in masks), None)) is not None:
            names[case] = name
    renamed = {} if names else match_by_affix(references.masks, masks)
    listed = manifest.cases if manifest is not None else {}
    rejected = {problem.case.removesuffix(CHANNEL_SUFFIX) for problem in problems}
    pairs: list[tuple[str, Path, Path | None]] = []
    taken, not_requested = {problem.case for problem in references.problems}, []
    for case, reference in sorted(references.masks.items()):
        name = names.get(case) or renamed.get(case)
        if name is not None:
            taken.add(name)
            pairs.append((case, reference, masks[name]))
        elif case.removesuffix(CHANNEL_SUFFIX) in rejected:
            continue
        elif case in training and case not in listed:
            not_requested.append(case)
        else:
            pairs.append((case, reference, None))
    ours = {case.removesuffix(CHANNEL_SUFFIX) for case in references.masks}
    return Pairing(
        tuple(pairs),
        tuple(case for case in masks if case not in taken),
        tuple(not_requested),
        tuple(problem for problem in problems if problem.case.removesuffix(CHANNEL_SUFFIX) in ours),
        tuple(sorted(renamed.items())),
    )


def match_by_affix(labels: Collection[str], predictions: Collection[str]) -> dict[str, str]:
    """Match label names to prediction names by the pair of affixes that matches most; empty when none does, or the match is ambiguous."""
    if not labels or not predictions:
        return {}
    found = []
    for ours, theirs in _candidates(sorted(labels), sorted(predictions)):
        by_core = {core: name for name in predictions if (core := theirs.core(name)) is not None}
        matches = {label: by_core[core] for label in labels if (core := ours.core(label)) is not None and core in by_core}
        found.append((matches, ours))
    most = max((len(match) for match, _ in found), default=0)
    best = [(match, ours) for match, ours in found if len(match) == most]
    if not most or any(match != best[0][0] for match, _ in best):
        return {}
    cores = {core for _, ours in best for label in labels if (core := ours.core(label)) is not None}
    left_over = set(predictions) - set(best[0][0].values())
    return {} if any(core in cores for name in left_over for core in _cores(name)) else best[0][0]


def _candidates(labels: Sequence[str], predictions: Sequence[str]) -> Iterator[tuple[Affix, Affix]]:
    """List pairs of affixes: common to all names of either side, or around a name of one side in the first name of the other."""
    nothing = Affix()
    both = ((ours, theirs) for ours in _common(labels) for theirs in _common(predictions))
    yield from ((ours, theirs) for ours, theirs in both if ours.is_generic or theirs.is_generic)
    pairs = [*((label, predictions[0]) for label in labels), *((labels[0], prediction) for prediction in predictions)]
    yield from ((nothing, affix) for label, prediction in pairs for affix in _around(label, prediction))
    yield from ((affix, nothing) for label, prediction in pairs for affix in _around(prediction, label))


def _common(names: Sequence[str]) -> Iterator[Affix]:
    """List the affixes, the empty one included, that all of at least two names have."""
    yield Affix()
    if len(names) < 2:
        return
    words: list[list[str]] = [_WORDS.findall(name) for name in names]
    before, after = (
        [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*lists))]
        for lists in (words, [one[::-1] for one in words])
    )
    starts = {"".join(before[:i]) for i in range(len(before) + 1) if _is_affix(before[:i])}
    ends = {"".join(reversed(after[:i])) for i in range(len(after) + 1) if _is_affix(after[:i])}
    yield from (Affix(start, end) for start in sorted(starts) for end in sorted(ends) if start or end)


def _is_affix(words: Sequence[str]) -> bool:
    """Return whether words are none, or contain letters and end in a separator, so that what follows is a word of its own."""
    if not words:
        return True
    return not words[-1][0].isalnum() and all(any(c.isalpha() for c in word) for word in words if word[0].isalnum())


def _cores(name: str) -> Iterator[str]:
    """List what is left of a name after removing any affix."""
    words = _WORDS.findall(name)
    for start, end in combinations(range(len(words) + 1), 2):
        if _is_affix(words[:start]) and _is_affix(list(reversed(words[end:]))):
            yield "".join(words[start:end])


def _around(core: str, name: str) -> Iterator[Affix]:
    """List the affixes that `name` has around `core`."""
    for found in re.finditer(re.escape(core), name):
        before, after = name[: found.start()], name[found.end() :]
        if (before or after) and _is_affix(_WORDS.findall(before)) and _is_affix(list(reversed(_WORDS.findall(after)))):
            yield Affix(before, after)
