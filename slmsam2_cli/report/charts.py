"""Lay out the charts of a report as shapes for the template: distributions, Dice by distance from the prompt, and slice strips.

x is in per cent of the plot's width, so that a chart is as wide as the page while its text keeps its size. y is in pixels or, in paths,
in per cent of the plot's height from the top. In the paths of a strip and of a curve, x is in slices: slice k of a strip covers k - first
to k - first + 1. Colours are in the style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from slmsam2_cli.report.schema import CurvePoint, Report, SliceMark, Structure

DISTRIBUTED = (("Dice", "Dice", 3, "high"), ("HD95", "HD95, mm", 1, "low"))
JITTER_PX = 8.0
GOLDEN = 0.6180339887
DICE_BINS = (0.5, 0.7, 0.8, 0.9)
"""Lower edges of Dice classes 1 to 4; class 0 is below the first."""


def format_coordinate(value: float, digits: int = 2) -> str:
    """Format a coordinate without trailing zeros: 12.50 -> "12.5", 3.00 -> "3", -0.0 -> "0"."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Scale:
    """A linear axis from low to high, low < high."""

    low: float
    high: float

    def percent(self, value: float) -> str:
        """Return the position of a value on the axis, "0" to "100"; values outside are moved to the nearer end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return format_coordinate(100 * share)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """Return about `count` round values from low to high."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(round(i * step, 10) for i in range(first, last + 1))


def unit_scale(values: Iterable[float]) -> Scale:
    """Return an axis for values from 0 to 1 that begins at a round number below the least, so that good results differ visibly."""
    least = min(values, default=0.0)
    return Scale(max(0.0, min(0.9, math.floor(least * 10 + 1e-9) / 10)), 1.0)


def length_scale(values: Iterable[float]) -> Scale:
    """Return an axis for values from 0 upwards that ends at a round number at or above the greatest."""
    greatest = max((abs(value) for value in values), default=0.0) or 1.0
    step = _round_step(greatest / 4)
    return Scale(0.0, math.ceil(greatest / step - 1e-9) * step)


def _round_step(rough: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Point:
    """One case of one structure. x: per cent; y: pixels from the middle of the lane; case: its index in Report.cases."""

    x: str
    y: str
    case: int
    training: bool
    value: str


@dataclass(frozen=True)
class Box:
    """Minimum, quartiles and maximum of one lane; all in per cent."""

    least: str
    q1: str
    median: str
    q3: str
    greatest: str
    width: str


@dataclass(frozen=True)
class Lane:
    """One structure of one measure. box: of held-out cases, or of all cases when none is held out."""

    name: str
    text: str
    points: tuple[Point, ...]
    box: Box


@dataclass(frozen=True)
class Distribution:
    """One measure of all structures. better: "high", "low" or ""."""

    heading: str
    better: str
    ticks: tuple[tuple[str, str], ...]
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Curve:
    """Dice by distance from the prompt for one structure.

    band, median: paths with x in slices from 0 to `distance`; dots: (x, y) in per cent; counts: (x in per cent, n) at ticks of the x axis;
    bars: a path with the same x, and y in per cent of the row of counts, as high as n.
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
    """Lay out the distributions of Dice and HD95.

    Without either (a prediction without reference): of at most four columns of the table for which high or low values are better.
    """
    found = [chart for column in DISTRIBUTED if (chart := _distribution(report, *column)) is not None]
    if not found:
        found = [chart for column in report.columns if column[3] and (chart := _distribution(report, *column)) is not None]
    return tuple(found[:4])


def _distribution(report: Report, key: str, heading: str, digits: int, better: str) -> Distribution | None:
    """Lay out one measure; None when no case has a value. A lane's values are (index of the case, value, whether a training case)."""
    values = {
        name: [
            (index, float(value), case.group == "training")
            for index, case in enumerate(report.cases)
            for part in case.structures
            if part.key == name and (value := part.measures.get(key)) is not None and math.isfinite(value)
        ]
        for name in report.structures
    }
    everything = [value for found in values.values() for _, value, _ in found]
    if not everything:
        return None
    scale = unit_scale(everything) if better == "high" and min(everything) >= 0 and max(everything) <= 1 else length_scale(everything)
    lanes = tuple(_lane(report, name, values[name], scale, digits) for name in report.structures if values[name])
    return Distribution(heading, better, tuple((scale.percent(tick), f"{tick:g}") for tick in scale.ticks()), lanes)


def _lane(report: Report, key: str, values: Sequence[tuple[int, float, bool]], scale: Scale, digits: int) -> Lane:
    held_out = [value for _, value, training in values if not training]
    described = held_out or [value for _, value, _ in values]
    q0, q1, q2, q3, q4 = (float(value) for value in np.percentile(described, (0, 25, 50, 75, 100)))
    of = sum(1 for case in report.cases if (case.group != "training") == bool(held_out) and any(s.key == key for s in case.structures))
    text = f"median {q2:.{digits}f} ({q1:.{digits}f}–{q3:.{digits}f}), n {len(described)}"  # noqa: RUF001
    text += f" of {of}" if of > len(described) else ""
    text += "" if held_out else ", training cases"
    points = tuple(
        Point(scale.percent(value), format_coordinate((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), index, training, f"{value:.{digits}f}")
        for i, (index, value, training) in enumerate(values)
    )
    least, low, median, high, greatest = (scale.percent(value) for value in (q0, q1, q2, q3, q4))
    return Lane(report.structures[key], text, points, Box(least, low, median, high, greatest, format_coordinate(float(high) - float(low))))


def curves(report: Report) -> tuple[Curve, ...]:
    """Lay out one curve per structure, all on the same axes."""
    known = {key: sorted(points, key=lambda p: p.distance) for key, points in report.curve.items() if points}
    if not known:
        return ()
    scale = unit_scale(point.p10 for points in known.values() for point in points)
    far = max(1, *(points[-1].distance for points in known.values()))
    return tuple(_curve(report.structures.get(key, key), points, scale, far) for key, points in known.items())


def _curve(name: str, points: Sequence[CurvePoint], scale: Scale, far: int) -> Curve:
    """Lay out one curve. far: the end of the x axis in slices."""

    def down(value: float) -> str:
        return format_coordinate(100 - float(scale.percent(value)), 1)

    upper = "L".join(f"{p.distance} {down(p.p90)}" for p in points)
    lower = "L".join(f"{p.distance} {down(p.p10)}" for p in reversed(points))
    most = max(point.n for point in points)
    across = Scale(0, far)
    x_ticks = tuple(sorted({round(tick) for tick in across.ticks(6)}))
    n_at = {point.distance: point.n for point in points}
    first, last = points[0], points[-1]
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
        summary=f"{name}: median Dice {first.p50:.3f} at {first.distance} slices from the prompt ({first.n} slices), "
        f"{last.p50:.3f} at {last.distance} slices ({last.n} slices)",
    )


@dataclass(frozen=True)
class Run:
    """Adjacent slices with the same fault. x, width, centre: per cent."""

    x: str
    width: str
    centre: str
    first: int
    last: int


@dataclass(frozen=True)
class Strip:
    """One structure of one case, slice by slice. bars: (Dice class, path); paths are "" where there is nothing to draw."""

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
    """Return the Dice class, 0 (worst) to 4 (best)."""
    return sum(dice >= edge for edge in DICE_BINS)


def slice_range(structures: Iterable[Structure]) -> tuple[int, int]:
    """Return the first slice and the number of slices that the strips of a case share; (0, 0) without slices."""
    shown = [mark.slice for structure in structures for mark in structure.slices]
    return (min(shown), max(shown) - min(shown) + 1) if shown else (0, 0)


def strips_of(structures: Sequence[Structure]) -> tuple[Strip | None, ...]:
    """Lay out the strips of a case, all over the same slices; None for a structure without slices."""
    first, count = slice_range(structures)
    ticks = sorted({round(value) for value in Scale(first, first + count - 1).ticks(6)}) if count > 1 else [first]
    strips: list[Strip | None] = []
    for structure in structures:
        marks = structure.slices
        if not marks:
            strips.append(None)
            continue
        largest = max(mark.area_px for mark in marks)
        strip = Strip(
            first=first,
            count=count,
            ticks=tuple((format_coordinate(100 * (index - first + 0.5) / count), index) for index in ticks),
            bars=_bars(marks, first),
            confidence=_line((mark.slice - first, mark.confidence) for mark in marks),
            disagreement=_line((mark.slice - first, mark.disagreement) for mark in marks),
            reference_area=_area(((mark.slice - first, mark.reference_px or 0) for mark in marks), largest),
            prediction_area=_area(((mark.slice - first, mark.prediction_px) for mark in marks), largest),
            largest_px=largest,
            false=_runs([mark.slice for mark in marks if mark.false], first, count),
            missed=_runs([mark.slice for mark in marks if mark.missed], first, count),
            prompts=tuple(format_coordinate(100 * (mark.slice - first + 0.5) / count) for mark in marks if mark.prompted),
            summary=_strip_summary(structure),
        )
        strips.append(strip)
    return tuple(strips)


def _bars(marks: Sequence[SliceMark], first: int) -> tuple[tuple[int, str], ...]:
    """Draw bars as high as Dice, one path per Dice class. False-positive and missed slices have no bar; they are marked as such."""
    paths: dict[int, str] = {}
    for mark in marks:
        if mark.dice is not None and not mark.false and not mark.missed:
            height, index = max(2, round(100 * mark.dice)), dice_class(mark.dice)
            paths[index] = paths.get(index, "") + f"M{mark.slice - first}.1 100v-{height}h.8v{height}z"
    return tuple(sorted(paths.items()))


def _line(values: Iterable[tuple[int, float | None]]) -> str:
    """Draw a line through (slice, value) at the centres of slices; it breaks where a value or a slice is missing.

    A single value is a short dash.
    """
    parts: list[str] = []
    previous: int | None = None
    for k, value in values:
        if value is None:
            previous = None
            continue
        x, y = f"{k}.5", 100 - round(100 * min(max(value, 0.0), 1.0))
        parts.append(f"L{x} {y}" if previous == k - 1 else f"M{x} {y}h.01")
        previous = k
    return "".join(parts)


def _area(pixels: Iterable[tuple[int, int]], largest: int) -> str:
    """Draw the area (slice, pixels) as steps, in per cent of the largest; slices without pixels leave a gap."""
    held = {k: count for k, count in pixels if count > 0}
    parts = []
    for run in _consecutive(held):
        heights = [max(1, round(100 * held[k] / largest)) for k in run]
        parts.append(f"M{run[0]} 100" + "".join(f"V{100 - height}h1" for height in heights) + "V100")
    return "".join(parts)


def _consecutive(indices: Iterable[int]) -> list[list[int]]:
    """Split ascending indices into runs without gaps: 3, 4, 9 -> [3, 4], [9]."""
    return [[index for _, index in group] for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]


def _runs(slices: Sequence[int], first: int, count: int) -> tuple[Run, ...]:
    runs = []
    for run in _consecutive(slices):
        start, width = run[0] - first, len(run)
        x, wide, centre = (format_coordinate(100 * place / count) for place in (start, width, start + width / 2))
        runs.append(Run(x, wide, centre, run[0], run[-1]))
    return tuple(runs)


def list_slices(indices: Iterable[int]) -> str:
    """Name ascending slices: 3 -> "slice 3"; 3, 4, 5, 9 -> "slices 3-5, 9"."""
    runs = _consecutive(indices)
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"slice{'s' * (sum(map(len, runs)) != 1)} {text}"


def _strip_summary(structure: Structure) -> str:
    """Describe a strip in words, for screen readers."""
    marks = structure.slices
    parts = [f"{structure.name}, slices {marks[0].slice} to {marks[-1].slice}"]
    scored = [(mark.dice, mark.slice) for mark in marks if mark.dice is not None]
    if scored:
        worst, where = min(scored)
        parts.append(f"lowest Dice {worst:.3f} on slice {where}")
    for word, indices in (
        ("false positive on", [mark.slice for mark in marks if mark.false]),
        ("missed on", [mark.slice for mark in marks if mark.missed]),
        ("annotated:", [mark.slice for mark in marks if mark.prompted]),
    ):
        if indices:
            parts.append(f"{word} {list_slices(indices)}")
    return "; ".join(parts)
