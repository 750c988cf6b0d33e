"""Advise which slices to annotate on a new volume, and warn about cases of a dataset that differ from the others.

The advice is one slice in the middle of each structure and an empty slice beyond each of its ends. It follows from the training labels:
their position, their length, and whether they reach the end of the volume. What end marks gain is in docs/benchmarks.md.
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
MAJORITY = 0.5  # fraction of cases above which something is usual
MIN_CASES = 3  # fewer cases are not compared with each other
OUTLIER_FACTOR = 3.0  # a size or spacing this many times the median, or the median this many times it, is reported
MAX_NAMED = 5  # cases named in one line; the others are counted


@dataclass(frozen=True)
class Advice:
    """Where to annotate one label along the slice axis.

    position: of its middle, from 0 at the first of AXIS_ENDS to 1 at the second; slices, shortest, longest: median, minimum and maximum
    number of slices from its first to its last; length_mm: median; has_gaps: whether gaps are usual; open_ends: fraction of cases in
    which it reaches the end of the volume, for each of AXIS_ENDS.
    """

    label: int
    name: str
    position: float
    slices: int
    shortest: int
    longest: int
    length_mm: float
    has_gaps: bool
    open_ends: tuple[float, float]

    def describe(self, axis: SliceAxis) -> str:
        """Return the advice as text."""
        if self.longest == 1:
            return "is on one slice: annotate this slice"
        varies = f" ({self.shortest} to {self.longest})" if self.shortest != self.longest else ""
        length = f"{self.slices} slices{varies}, {self.length_mm:.0f} mm"
        text = f"annotate the middle slice, about {self.position:.0%} of the way from the {AXIS_ENDS[axis][0]} end of the volume ({length})"
        text += "; the structure has gaps, so annotate one slice of each part instead" if self.has_gaps else ""
        ends = [side for side, fraction in zip(AXIS_ENDS[axis], self.open_ends, strict=True) if fraction <= MAJORITY]
        if not ends:
            return f"{text}; it extends through the whole volume, so no end marks are needed"
        usual, most = self.slices // 2 + 1, self.longest // 2 + 1
        distance = f"at most {most}" if most == usual else f"usually {usual}, at most {most}"
        plural = "s" if len(ends) > 1 else ""
        return f"{text}; mark the first empty slice beyond the {' and '.join(ends)} end{plural}, {distance} slices away"


def annotation_advice(fingerprint: Fingerprint, axis: SliceAxis) -> tuple[Advice, ...]:
    """Compute the advice for every label that occurs in a case."""
    found = []
    for value, name in fingerprint.labels.items():
        cases = [case for case in fingerprint.cases if value in case.labels and case.axis(axis) in case.labels[value].extents]
        cases = [case for case in cases if 1 not in case.shape] or cases  # single slices have no ends
        if not cases:
            continue
        extents: list[Extent] = [case.labels[value].extents[case.axis(axis)] for case in cases]
        counts = [case.shape[AXES.index(case.axis(axis))] for case in cases]
        spacings = [case.spacing_mm[AXES.index(case.axis(axis))] for case in cases]
        lengths = [extent.last - extent.first + 1 for extent in extents]
        with_gaps = [extent.slices < length for extent, length in zip(extents, lengths, strict=True)]
        at_first = sum(extent.first == 0 for extent in extents)
        at_last = sum(extent.last == count - 1 for extent, count in zip(extents, counts, strict=True))
        advice = Advice(
            label=value,
            name=name,
            position=median((extent.first + extent.last + 1) / (2 * count) for extent, count in zip(extents, counts, strict=True)),
            slices=math.ceil(median(lengths)),
            shortest=min(lengths),
            longest=max(lengths),
            length_mm=median(length * mm for length, mm in zip(lengths, spacings, strict=True)),
            has_gaps=sum(with_gaps) > MAJORITY * len(cases),
            open_ends=(at_first / len(cases), at_last / len(cases)),
        )
        found.append(advice)
    return tuple(found)


def dataset_warnings(fingerprint: Fingerprint) -> tuple[str, ...]:
    """List cases to check, one line per finding: duplicates, unusual orientations and sizes, missing labels. None of them is an error."""
    cases = fingerprint.cases
    missing = []
    for value, name in fingerprint.labels.items():
        without = [case for case in cases if value not in case.labels]
        if len(without) == len(cases):
            missing.append(f"label {value} ({name}) is in no case, so it cannot be learned")
        elif without:
            where = format_case_names(without)
            missing.append(f"label {value} ({name}) is absent in {where}. Ignore this if the structure is not present")
    return (*_duplicate_images(cases), *_orientation_outliers(cases), *_size_outliers(cases), *missing)


def _duplicate_images(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Report images whose size and intensity statistics agree to seven digits, in whatever orientation they are stored."""
    groups: dict[object, list[CaseFingerprint]] = {}
    for case in cases:
        groups.setdefault((tuple(sorted(case.stored_shape)), tuple(channel.whole for channel in case.channels)), []).append(case)
    for group in (group for group in groups.values() if len(group) > 1):
        same = all(case.labels == group[0].labels for case in group)
        what = "duplicate images and masks" if same else "duplicate images with different masks"
        yield f"{format_case_names(group)}: {what}. Remove the duplicates; otherwise held-out scores are optimistic"


def _orientation_outliers(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Report cases stored in another orientation than most. The header is followed; if it is wrong, the picture shows it."""
    usual, count = Counter(case.orientation for case in cases).most_common(1)[0]
    if len(cases) < MIN_CASES or 2 * count <= len(cases):
        return
    for code in sorted({case.orientation for case in cases} - {usual}):
        names = format_case_names([case for case in cases if case.orientation == code])
        yield f"{names}: orientation is {code}, most cases are {usual}. Check in plan.html that they are shown in the same orientation"


def _size_outliers(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Report cases whose spacing or extent is far from the median."""
    if len(cases) < MIN_CASES:
        return
    for index, axis in enumerate(AXES):
        measured = (
            (f"spacing along {axis}", [case.spacing_mm[index] for case in cases]),
            (f"extent along {axis}", [case.extent_mm[index] for case in cases]),
        )
        for what, values in measured:
            middle = median(values)
            lowest, highest = middle / OUTLIER_FACTOR, middle * OUTLIER_FACTOR
            far = [(case, value) for case, value in zip(cases, values, strict=True) if not lowest <= value <= highest]
            if far and 2 * len(far) < len(cases):
                low, high = (f"{end(value for _, value in far):.3g}" for end in (min, max))
                span = low if low == high else f"{low} to {high}"
                yield f"{format_case_names([case for case, _ in far])}: {what} is {span} mm, median {middle:.3g} mm. Check the image header"


def format_case_names(cases: Sequence[CaseFingerprint]) -> str:
    """Return "case a", "cases a, b", or the first MAX_NAMED and the number of others."""
    names = ", ".join(case.id for case in cases[:MAX_NAMED])
    more = f" and {len(cases) - MAX_NAMED} more" if len(cases) > MAX_NAMED else ""
    return f"case{'s' if len(cases) > 1 else ''} {names}{more}"
