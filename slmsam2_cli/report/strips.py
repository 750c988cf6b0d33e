"""One structure of one case, slice by slice, as shapes for the template.

x of paths runs in slices (slice k covers k - first to k - first + 1) and is stretched to the page's width; y runs from 0 (top) to 100.
x of marks is in per cent of the strip's width. Nothing here knows colours: shapes have classes or names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from slmsam2_cli.report.contents import SliceMark, Structure
from slmsam2_cli.report.scales import Scale, tidy

DICE_BINS = (0.5, 0.7, 0.8, 0.9)
"""Lower edges of Dice classes 1 to 4; below the first is class 0."""


@dataclass(frozen=True)
class Run:
    """Neighbouring slices with the same fault. x, width, centre: per cent."""

    x: str
    width: str
    centre: str
    first: int
    last: int


@dataclass(frozen=True)
class Strip:
    """One strip. bars: (Dice class, path); the paths are "" where there is nothing to draw."""

    first: int
    count: int
    ticks: tuple[tuple[str, int], ...]
    bars: tuple[tuple[int, str], ...]
    confidence: str
    disagreement: str
    reference_area: str
    prediction_area: str
    largest_px: int
    false: tuple[Run, ...]
    missed: tuple[Run, ...]
    prompts: tuple[str, ...]
    summary: str


def dice_class(dice: float) -> int:
    """0 (worst) to 4 (best)."""
    return sum(dice >= edge for edge in DICE_BINS)


def slice_range(structures: Iterable[Structure]) -> tuple[int, int]:
    """First slice and number of slices that the strips of one case share; (0, 0) when there is nothing to show."""
    shown = [mark.slice for structure in structures for mark in structure.slices]
    return (min(shown), max(shown) - min(shown) + 1) if shown else (0, 0)


def strips_of(structures: Sequence[Structure]) -> tuple[Strip | None, ...]:
    """The strips of one case, all over the same slices."""
    first, count = slice_range(structures)
    return tuple(strip(structure, first, count) for structure in structures)


def strip(structure: Structure, first: int, count: int) -> Strip | None:
    """The strip of one structure over slices first to first + count - 1; None without slices."""
    marks = structure.slices
    if not marks or count < 1:
        return None
    largest = max(max(mark.prediction_px, mark.reference_px or 0) for mark in marks)
    has_reference = any(mark.reference_px is not None for mark in marks)
    return Strip(
        first=first,
        count=count,
        ticks=_ticks(first, count),
        bars=_bars(marks, first),
        confidence=_line(marks, first, lambda mark: mark.confidence),
        disagreement=_line(marks, first, lambda mark: mark.disagreement),
        reference_area=_area(marks, first, largest, lambda mark: mark.reference_px or 0) if has_reference else "",
        prediction_area=_area(marks, first, largest, lambda mark: mark.prediction_px),
        largest_px=largest,
        false=_runs(marks, first, count, lambda mark: mark.false),
        missed=_runs(marks, first, count, lambda mark: mark.missed),
        prompts=tuple(tidy(100 * (mark.slice - first + 0.5) / count) for mark in marks if mark.prompted),
        summary=_summary(structure),
    )


def _ticks(first: int, count: int) -> tuple[tuple[str, int], ...]:
    """Whole slices only, at their centres."""
    if count == 1:
        return (("50", first),)
    wanted = sorted({round(value) for value in Scale(first, first + count - 1).ticks(6)})
    return tuple((tidy(100 * (index - first + 0.5) / count), index) for index in wanted)


def _bars(marks: Sequence[SliceMark], first: int) -> tuple[tuple[int, str], ...]:
    """Bars as high as Dice, one path a class. False and missed slices have none: they are marked as such."""
    paths: dict[int, list[str]] = {}
    for mark in marks:
        if mark.dice is not None and not mark.false and not mark.missed:
            height = max(2, round(100 * mark.dice))
            paths.setdefault(dice_class(mark.dice), []).append(f"M{mark.slice - first}.1 100v-{height}h.8v{height}z")
    return tuple((index, "".join(parts)) for index, parts in sorted(paths.items()))


def _line(marks: Sequence[SliceMark], first: int, value: Callable[[SliceMark], float | None]) -> str:
    """A line through the centres of slices; broken where a value or a slice is missing. A lone value is a short dash."""
    parts: list[str] = []
    previous: int | None = None
    for mark in marks:
        found = value(mark)
        if found is None:
            previous = None
            continue
        x, y = f"{mark.slice - first}.5", 100 - round(100 * min(max(found, 0.0), 1.0))
        parts.append(f"L{x} {y}" if previous == mark.slice - 1 else f"M{x} {y}h.01")
        previous = mark.slice
    return "".join(parts)


def _area(marks: Sequence[SliceMark], first: int, largest: int, value: Callable[[SliceMark], int]) -> str:
    """Steps from the ground up: the area slice by slice, in per cent of the largest."""
    if largest == 0:
        return ""
    parts: list[str] = []
    for _, group in groupby(enumerate(m for m in marks if value(m) > 0), lambda pair: pair[1].slice - pair[0]):
        run = [mark for _, mark in group]
        heights = [max(1, round(100 * value(mark) / largest)) for mark in run]
        parts.append(f"M{run[0].slice - first} 100" + "".join(f"V{100 - height}h1" for height in heights) + "V100")
    return "".join(parts)


def _runs(marks: Sequence[SliceMark], first: int, count: int, chosen: Callable[[SliceMark], bool]) -> tuple[Run, ...]:
    found = [mark.slice for mark in marks if chosen(mark)]
    runs = []
    for _, group in groupby(enumerate(found), lambda pair: pair[1] - pair[0]):
        indices = [index for _, index in group]
        start, width = indices[0] - first, len(indices)
        percents = (100 * start / count, 100 * width / count, 100 * (start + width / 2) / count)
        x, wide, centre = (tidy(value) for value in percents)
        runs.append(Run(x, wide, centre, indices[0], indices[-1]))
    return tuple(runs)


def _summary(structure: Structure) -> str:
    """What the strip shows, for those who do not see it."""
    marks = structure.slices
    parts = [f"{structure.name}, slices {marks[0].slice} to {marks[-1].slice}"]
    scored = [(mark.dice, mark.slice) for mark in marks if mark.dice is not None]
    if scored:
        worst, where = min(scored)
        parts.append(f"lowest Dice {worst:.2f} on slice {where}")
    for word, indices in (
        ("false on", [mark.slice for mark in marks if mark.false]),
        ("missed on", [mark.slice for mark in marks if mark.missed]),
        ("given on", [mark.slice for mark in marks if mark.prompted]),
    ):
        if indices:
            parts.append(f"{word} {_listed(indices)}")
    return "; ".join(parts)


def _listed(indices: Sequence[int]) -> str:
    """3, 4, 5, 9 -> "3-5, 9"."""
    runs = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)
