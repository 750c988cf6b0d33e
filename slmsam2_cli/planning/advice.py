"""Which slices to annotate on a new volume: one in the middle of each structure, and an empty one beyond each of its ends.

What it rests on is measured: where the label lies in the training volumes, how long it is, whether it runs out of them. What an end that
is marked brings is in docs/reference/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.data.geometry import AXES, SliceAxis
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Extent, Fingerprint

SIDES: dict[SliceAxis, tuple[str, str]] = {"SI": ("inferior", "superior"), "AP": ("anterior", "posterior"), "LR": ("right", "left")}
USUALLY = 0.5  # share of cases from which on something is usual


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
        first = f"annotate its middle slice, about {self.place:.0%} of the way from the {SIDES[axis][0]} side ({length})"
        more = "; it has gaps, so annotate one slice in each of its pieces instead" if self.pieces else ""
        ends = [side for side, share in zip(SIDES[axis], self.open_, strict=True) if share <= USUALLY]
        if not ends:
            return f"{first}{more}; it runs through the whole volume, so no end needs a mark"
        place = f"mark the first empty slice beyond its {' and '.join(ends)} end{'s' if len(ends) > 1 else ''}"
        usual, most = self.slices // 2 + 1, self.longest // 2 + 1
        return f"{first}{more}; {place}, {f'at most {most}' if most == usual else f'usually {usual}, at most {most}'} slices away"


def advise(fingerprint: Fingerprint, axis: SliceAxis) -> tuple[Advice, ...]:
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
        pieces=sum(broken) > USUALLY * len(cases),
        open_=(at_first / len(cases), at_last / len(cases)),
    )
