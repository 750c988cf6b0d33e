"""The cohort's charts as shapes for the template: how a measure is distributed, how Dice falls with distance from the prompt.

x is in per cent of the plot's width, so that a chart is as wide as the page allows while its text keeps its size; y is in pixels, or,
in the paths of a curve, in per cent of the plot's height from the top. Nothing here knows colours.

One structure of one case, slice by slice, as shapes for the template.

x of paths runs in slices (slice k covers k - first to k - first + 1) and is stretched to the page's width; y runs from 0 (top) to 100.
x of marks is in per cent of the strip's width. Nothing here knows colours: shapes have classes or names.

Scored slices as marks of a strip.

Where a value lies on an axis, in per cent of its length; round ticks; numbers short enough to write ten thousand times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from slmsam2_cli.evaluation.metrics import LabelScore, Row
from slmsam2_cli.report.schema import CaseReport, CurvePoint, Report, SliceMark, Structure


def marks(
    label: LabelScore, confidence: Mapping[int, float] | None = None, disagreement: Mapping[int, float] | None = None
) -> tuple[SliceMark, ...]:
    """The slices of one scored structure. confidence, disagreement: by slice, where they are known."""
    return tuple(_mark(row, confidence or {}, disagreement or {}) for row in label.slices)


def _mark(row: Row, confidence: Mapping[int, float], disagreement: Mapping[int, float]) -> SliceMark:
    k, away = int(row["slice"] or 0), row["prompt_distance_slices"]
    return SliceMark(
        slice=k,
        prediction_px=int(row["prediction_px"] or 0),
        reference_px=int(row["reference_px"] or 0),
        dice=row["Dice"],
        prompted=away == 0,
        distance=None if away is None else int(away),
        confidence=confidence.get(k),
        disagreement=disagreement.get(k),
    )


def format_coordinate(value: float, digits: int = 2) -> str:
    """A coordinate without needless characters: 12.50 -> "12.5", 3.00 -> "3", -0.0 -> "0"."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Scale:
    """A linear axis from low to high, low < high."""

    low: float
    high: float

    def percent(self, value: float) -> str:
        """Where a value lies, "0" to "100"; what lies outside sticks to the end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return format_coordinate(100 * share)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """About `count` round values from low to high."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(round(i * step, 10) for i in range(first, last + 1))


def unit_scale(values: Iterable[float]) -> Scale:
    """For values from 0 to 1: down to a round number below the least, so that good results still differ visibly."""
    least = min(values, default=0.0)
    return Scale(max(0.0, min(0.9, math.floor(least * 10 + 1e-9) / 10)), 1.0)


def length_scale(values: Iterable[float]) -> Scale:
    """For values from 0 up: to a round number at or above the greatest."""
    greatest = max((abs(value) for value in values), default=0.0) or 1.0
    step = _round_step(greatest / 4)
    return Scale(0.0, math.ceil(greatest / step - 1e-9) * step)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


DISTRIBUTED = (("Dice", "Dice", 2, "high"), ("HD95", "HD95, mm", 1, "low"))
JITTER_PX = 8.0
GOLDEN = 0.6180339887


@dataclass(frozen=True)
class Point:
    """One case of one structure. x: per cent; y: px from the lane's middle; case: its place in Report.cases."""

    x: str
    y: str
    case: int
    training: bool
    value: str


@dataclass(frozen=True)
class Box:
    """Least, quartiles, greatest of one lane, per cent."""

    least: str
    q1: str
    median: str
    q3: str
    greatest: str
    width: str


@dataclass(frozen=True)
class Lane:
    """One structure of one measure. box: of held-out cases, or of all when none is held-out; None without a value."""

    name: str
    text: str
    points: tuple[Point, ...]
    box: Box | None


@dataclass(frozen=True)
class Distribution:
    """One measure over all structures. better: "high", "low" or ""."""

    heading: str
    better: str
    ticks: tuple[tuple[str, str], ...]
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Curve:
    """Dice against distance for one structure.

    band, median: paths with x in slices from 0 to `distance`; dots: (x, y) per cent; counts: (x per cent, n) for ticks of the x axis;
    bars: a path in the same x, y per cent of the row of counts, as high as n.
    """

    name: str
    distance: int
    band: str
    median: str
    dots: tuple[tuple[str, str], ...]
    x_ticks: tuple[tuple[str, int], ...]
    y_ticks: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, int], ...]
    bars: str
    summary: str


def distributions(report: Report) -> tuple[Distribution, ...]:
    """Dice and HD95; where no case has either (there is no truth), the measures of the table that have a better end."""
    found = [chart for column in DISTRIBUTED if (chart := _distribution(report, *column)) is not None]
    if not found:
        found = [chart for column in report.columns if column[3] and (chart := _distribution(report, *column)) is not None]
    return tuple(found[:4])


def _distribution(report: Report, key: str, heading: str, digits: int, better: str) -> Distribution | None:
    values = {name: _values(report.cases, name, key) for name in report.structures}
    everything = [value for found in values.values() for _, value, _ in found]
    if not everything:
        return None
    scale = unit_scale(everything) if better == "high" and min(everything) >= 0 and max(everything) <= 1 else length_scale(everything)
    lanes = tuple(_lane(report, name, values[name], scale, digits) for name in report.structures if values[name])
    return Distribution(heading, better, tuple((scale.percent(tick), f"{tick:g}") for tick in scale.ticks()), lanes)


def _values(cases: Sequence[CaseReport], structure: str, key: str) -> list[tuple[int, float, bool]]:
    """(place of the case, value, whether it was learned from) of every case that has a value."""
    return [
        (place, float(value), case.group == "training")
        for place, case in enumerate(cases)
        for part in case.structures
        if part.key == structure and (value := part.measures.get(key)) is not None and math.isfinite(value)
    ]


def _lane(report: Report, key: str, values: Sequence[tuple[int, float, bool]], scale: Scale, digits: int) -> Lane:
    held_out = [value for _, value, training in values if not training]
    described = held_out or [value for _, value, _ in values]
    q0, q1, q2, q3, q4 = (float(value) for value in np.percentile(described, (0, 25, 50, 75, 100)))
    of = sum(1 for case in report.cases if (case.group != "training") == bool(held_out) and any(s.key == key for s in case.structures))
    text = f"median {q2:.{digits}f} ({q1:.{digits}f}–{q3:.{digits}f}), n {len(described)}"  # noqa: RUF001
    text += f" of {of}" if of > len(described) else ""
    text += "" if held_out else ", training cases"
    points = tuple(
        Point(scale.percent(value), format_coordinate((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), place, training, f"{value:.{digits}f}")
        for i, (place, value, training) in enumerate(values)
    )
    x1, x3 = float(scale.percent(q1)), float(scale.percent(q3))
    box = Box(
        scale.percent(q0), format_coordinate(x1), scale.percent(q2), format_coordinate(x3), scale.percent(q4), format_coordinate(x3 - x1)
    )
    return Lane(report.structures[key], text, points, box)


def curves(report: Report) -> tuple[Curve, ...]:
    """One curve a structure, all on the same axes."""
    named = {key: sorted(points, key=lambda p: p.distance) for key, points in report.curve.items() if points}
    if not named:
        return ()
    scale = unit_scale(point.p10 for points in named.values() for point in points)
    far = max(points[-1].distance for points in named.values())
    return tuple(_curve(_name(report.structures, key), points, scale, max(far, 1)) for key, points in named.items())


def _name(names: Mapping[str, str], key: str) -> str:
    return names.get(key, key)


def _curve(name: str, points: Sequence[CurvePoint], scale: Scale, far: int) -> Curve:
    def down(value: float) -> str:
        return format_coordinate(100 - float(scale.percent(value)), 1)

    upper = "L".join(f"{p.distance} {down(p.p90)}" for p in points)
    lower = "L".join(f"{p.distance} {down(p.p10)}" for p in reversed(points))
    most = max(point.n for point in points)
    across = Scale(0, far)
    x_ticks = tuple(sorted({round(tick) for tick in across.ticks(6)}))
    n_at = {point.distance: point.n for point in points}
    return Curve(
        name=name,
        distance=far,
        band=f"M{upper}L{lower}Z",
        median="M" + "L".join(f"{p.distance} {down(p.p50)}" for p in points),
        dots=tuple((across.percent(p.distance), down(p.p50)) for p in points),
        x_ticks=tuple((across.percent(tick), tick) for tick in x_ticks),
        y_ticks=tuple((down(tick), f"{tick:g}") for tick in scale.ticks(4)),
        counts=tuple((across.percent(tick), n_at[tick]) for tick in x_ticks if tick in n_at),
        bars="".join(f"M{format_coordinate(p.distance - 0.4)} 100v-{max(2, round(100 * p.n / most))}h.8V100z" for p in points),
        summary=_summary(name, points),
    )


def _summary(name: str, points: Sequence[CurvePoint]) -> str:
    first, last = points[0], points[-1]
    return (
        f"{name}: median Dice {first.p50:.2f} at {first.distance} slices from the prompt ({first.n} slices), "
        f"{last.p50:.2f} at {last.distance} slices ({last.n} slices)"
    )


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
        prompts=tuple(format_coordinate(100 * (mark.slice - first + 0.5) / count) for mark in marks if mark.prompted),
        summary=_strip_summary(structure),
    )


def _ticks(first: int, count: int) -> tuple[tuple[str, int], ...]:
    """Whole slices only, at their centres."""
    if count == 1:
        return (("50", first),)
    wanted = sorted({round(value) for value in Scale(first, first + count - 1).ticks(6)})
    return tuple((format_coordinate(100 * (index - first + 0.5) / count), index) for index in wanted)


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
        x, wide, centre = (format_coordinate(value) for value in percents)
        runs.append(Run(x, wide, centre, indices[0], indices[-1]))
    return tuple(runs)


def _strip_summary(structure: Structure) -> str:
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
