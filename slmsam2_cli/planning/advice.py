"""Which slices to annotate on a new volume: one in the middle of each structure, and an empty one beyond each of its ends.

What it rests on is measured: where the label lies in the training volumes, how long it is, whether it runs out of them. What an end that
is marked brings is in docs/reference/benchmarks.md.

What a person should look at before trusting a data set: cases that differ from the rest, cases twice, labels that are missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Extent, Fingerprint

AXIS_ENDS: dict[SliceAxis, tuple[str, str]] = {"SI": ("inferior", "superior"), "AP": ("anterior", "posterior"), "LR": ("right", "left")}
MAJORITY = 0.5  # share of cases from which on something is usual


@dataclass(frozen=True)
class Advice:
    """For one label, along the planned axis.

    place: where its middle lies, from 0, the first of SIDES, to 1; slices, shortest, longest: median, least and most slices from its
    first to its last; length_mm: median; pieces: whether it usually has gaps; open_: share of cases in which it reaches the volume's
    rim on either of SIDES.
    """

    label: int
    name: str
    place: float
    slices: int
    shortest: int
    longest: int
    length_mm: float
    pieces: bool
    open_: tuple[float, float]

    def words(self, axis: SliceAxis) -> str:
        """What to do, for a person in front of a volume."""
        if self.longest == 1:
            return "lies on one slice: annotate that one"
        varies = f" ({self.shortest} to {self.longest})" if self.shortest != self.longest else ""
        length = f"{self.slices} slices{varies}, {self.length_mm:.0f} mm"
        first = f"annotate its middle slice, about {self.place:.0%} of the way from the {AXIS_ENDS[axis][0]} side ({length})"
        more = "; it has gaps, so annotate one slice in each of its pieces instead" if self.pieces else ""
        ends = [side for side, share in zip(AXIS_ENDS[axis], self.open_, strict=True) if share <= MAJORITY]
        if not ends:
            return f"{first}{more}; it runs through the whole volume, so no end needs a mark"
        place = f"mark the first empty slice beyond its {' and '.join(ends)} end{'s' if len(ends) > 1 else ''}"
        usual, most = self.slices // 2 + 1, self.longest // 2 + 1
        return f"{first}{more}; {place}, {f'at most {most}' if most == usual else f'usually {usual}, at most {most}'} slices away"


def annotation_advice(fingerprint: Fingerprint, axis: SliceAxis) -> tuple[Advice, ...]:
    """For every label that lies in some case."""
    found = []
    for value, name in fingerprint.labels.items():
        cases = [case for case in fingerprint.cases if value in case.labels and case.axis(axis) in case.labels[value].extents]
        cases = [case for case in cases if 1 not in case.shape] or cases  # a single slice tells nothing of ends
        if cases:
            found.append(_of_label(value, name, cases, axis))
    return tuple(found)


def _of_label(value: int, name: str, cases: Sequence[CaseFingerprint], axis: SliceAxis) -> Advice:
    extents: list[Extent] = [case.labels[value].extents[case.axis(axis)] for case in cases]
    counts = [case.shape[AXES.index(case.axis(axis))] for case in cases]
    apart = [case.spacing_mm[AXES.index(case.axis(axis))] for case in cases]
    lengths = [extent.last - extent.first + 1 for extent in extents]
    broken = [extent.slices < length for extent, length in zip(extents, lengths, strict=True)]
    at_first, at_last = sum(extent.first == 0 for extent in extents), sum(e.last == n - 1 for e, n in zip(extents, counts, strict=True))
    return Advice(
        label=value,
        name=name,
        place=median((extent.first + extent.last + 1) / (2 * count) for extent, count in zip(extents, counts, strict=True)),
        slices=math.ceil(median(lengths)),
        shortest=min(lengths),
        longest=max(lengths),
        length_mm=median(length * mm for length, mm in zip(lengths, apart, strict=True)),
        pieces=sum(broken) > MAJORITY * len(cases),
        open_=(at_first / len(cases), at_last / len(cases)),
    )


FEW = 3  # cases from which on there is a rest to differ from
OUTLIER_FACTOR = 3.0  # a size or spacing so many times the others' median, or one part in so many, is pointed out
MAX_NAMED = 5  # cases named in one line; the others are counted


def dataset_warnings(fingerprint: Fingerprint) -> tuple[str, ...]:
    """One line for each, cases by id. Nothing here is an error: all of it can be right."""
    cases = fingerprint.cases
    return (*_duplicate_images(cases), *_orientation_outliers(cases), *_sizes(cases), *_missing(fingerprint))


def _duplicate_images(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Images whose size and grey values agree in every number measured, to seven digits, in whatever order they are stored."""
    alike: dict[object, list[CaseFingerprint]] = {}
    for case in cases:
        alike.setdefault((tuple(sorted(case.stored_shape)), tuple(channel.whole for channel in case.channels)), []).append(case)
    for group in (group for group in alike.values() if len(group) > 1):
        same = all(case.labels == group[0].labels for case in group)
        also = "and their masks" if same else "but their masks differ"
        yield f"{named(group)}: the same image, {also}. Keep one: a twin among the unseen cases makes their scores too good"


def _orientation_outliers(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Cases stored another way round than most. Headers say so and are followed; a wrong header shows in the picture."""
    usual, count = Counter(case.orientation for case in cases).most_common(1)[0]
    if len(cases) < FEW or 2 * count <= len(cases):
        return
    for code in sorted({case.orientation for case in cases} - {usual}):
        group = [case for case in cases if case.orientation == code]
        yield f"{named(group)}: stored as {code}, most as {usual}. Fine if the header is right: see that they lie alike in plan.html"


def _sizes(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    if len(cases) < FEW:
        return
    for index, axis in enumerate(AXES):
        measured = (
            (f"slices along {axis} are apart", [case.spacing_mm[index] for case in cases]),
            (f"the volume measures along {axis}", [case.extent_mm[index] for case in cases]),
        )
        for what, values in measured:
            middle = median(values)
            far = [
                (case, value)
                for case, value in zip(cases, values, strict=True)
                if not middle / OUTLIER_FACTOR <= value <= middle * OUTLIER_FACTOR
            ]
            if far and 2 * len(far) < len(cases):
                low, high = (f"{end(value for _, value in far):.3g}" for end in (min, max))
                span = low if low == high else f"{low} to {high}"
                yield f"{named([case for case, _ in far])}: {what} {span} mm, in most cases {middle:.3g}. See that the header is right"


def _missing(fingerprint: Fingerprint) -> Iterator[str]:
    for value, name in fingerprint.labels.items():
        lacking = [case for case in fingerprint.cases if value not in case.labels]
        if len(lacking) == len(fingerprint.cases):
            yield f"label {value} ({name}) is in no case: it cannot be learned"
        elif lacking:
            yield f"label {value} ({name}) is missing in {named(lacking)}. Fine where the structure is not there"


def named(cases: Sequence[CaseFingerprint]) -> str:
    """ "case a", "cases a, b", or the first few and how many more."""
    shown = ", ".join(case.id for case in cases[:MAX_NAMED])
    more = f" and {len(cases) - MAX_NAMED} more" if len(cases) > MAX_NAMED else ""
    return f"case{'s' if len(cases) > 1 else ''} {shown}{more}"
