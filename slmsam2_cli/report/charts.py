"""The cohort's charts as shapes for the template: how a measure is distributed, how Dice falls with distance from the prompt.

x is in per cent of the plot's width, so that a chart is as wide as the page allows while its text keeps its size; y is in pixels, or,
in the paths of a curve, in per cent of the plot's height from the top. Nothing here knows colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmsam2_cli.report.contents import CaseReport, CurvePoint, Report
from slmsam2_cli.report.scales import Scale, length_scale, share_scale, tidy

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
    """One structure of one measure. box: of unseen cases, or of all when none is unseen; None without a value."""

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
    scale = share_scale(everything) if better == "high" and min(everything) >= 0 and max(everything) <= 1 else length_scale(everything)
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
    unseen = [value for _, value, training in values if not training]
    described = unseen or [value for _, value, _ in values]
    q0, q1, q2, q3, q4 = (float(value) for value in np.percentile(described, (0, 25, 50, 75, 100)))
    of = sum(1 for case in report.cases if (case.group != "training") == bool(unseen) and any(s.key == key for s in case.structures))
    text = f"median {q2:.{digits}f} ({q1:.{digits}f}–{q3:.{digits}f}), n {len(described)}"  # noqa: RUF001
    text += f" of {of}" if of > len(described) else ""
    text += "" if unseen else ", training cases"
    points = tuple(
        Point(scale.percent(value), tidy((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), place, training, f"{value:.{digits}f}")
        for i, (place, value, training) in enumerate(values)
    )
    x1, x3 = float(scale.percent(q1)), float(scale.percent(q3))
    box = Box(scale.percent(q0), tidy(x1), scale.percent(q2), tidy(x3), scale.percent(q4), tidy(x3 - x1))
    return Lane(report.structures[key], text, points, box)


def curves(report: Report) -> tuple[Curve, ...]:
    """One curve a structure, all on the same axes."""
    named = {key: sorted(points, key=lambda p: p.distance) for key, points in report.curve.items() if points}
    if not named:
        return ()
    scale = share_scale(point.p10 for points in named.values() for point in points)
    far = max(points[-1].distance for points in named.values())
    return tuple(_curve(_name(report.structures, key), points, scale, max(far, 1)) for key, points in named.items())


def _name(names: Mapping[str, str], key: str) -> str:
    return names.get(key, key)


def _curve(name: str, points: Sequence[CurvePoint], scale: Scale, far: int) -> Curve:
    def down(value: float) -> str:
        return tidy(100 - float(scale.percent(value)), 1)

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
        bars="".join(f"M{tidy(p.distance - 0.4)} 100v-{max(2, round(100 * p.n / most))}h.8V100z" for p in points),
        summary=_summary(name, points),
    )


def _summary(name: str, points: Sequence[CurvePoint]) -> str:
    first, last = points[0], points[-1]
    return (
        f"{name}: median Dice {first.p50:.2f} at {first.distance} slices from the prompt ({first.n} slices), "
        f"{last.p50:.2f} at {last.distance} slices ({last.n} slices)"
    )
