"""What a person should look at before trusting a data set: cases that differ from the rest, cases twice, labels that are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from slmsam2_cli.data.geometry import AXES
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint

FEW = 3  # cases from which on there is a rest to differ from
FAR = 3.0  # a size or spacing so many times the others' median, or one part in so many, is pointed out
NAMED = 5  # cases named in one line; the others are counted


def oddities(fingerprint: Fingerprint) -> tuple[str, ...]:
    """One line for each, cases by id. Nothing here is an error: all of it can be right."""
    cases = fingerprint.cases
    return (*_twice(cases), *_turned(cases), *_sizes(cases), *_missing(fingerprint))


def _twice(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
    """Images whose size and grey values agree in every number measured, to seven digits, in whatever order they are stored."""
    alike: dict[object, list[CaseFingerprint]] = {}
    for case in cases:
        alike.setdefault((tuple(sorted(case.stored_shape)), tuple(channel.whole for channel in case.channels)), []).append(case)
    for group in (group for group in alike.values() if len(group) > 1):
        same = all(case.labels == group[0].labels for case in group)
        also = "and their masks" if same else "but their masks differ"
        yield f"{named(group)}: the same image, {also}. Keep one: a twin among the unseen cases makes their scores too good"


def _turned(cases: Sequence[CaseFingerprint]) -> Iterator[str]:
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
            far = [(case, value) for case, value in zip(cases, values, strict=True) if not middle / FAR <= value <= middle * FAR]
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
    shown = ", ".join(case.id for case in cases[:NAMED])
    more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
    return f"case{'s' if len(cases) > 1 else ''} {shown}{more}"
