"""A data set's charts as shapes for the template: spacing and extents case by case, grey values and the window chosen for them.

x is in per cent of the plot's width, y in pixels or, in paths, in per cent of the plot's height from the top. Nothing here knows colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.data.geometry import AXES
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.plan import ChannelIntensity, GeometryPlan, Plan
from slmsam2_cli.report.charts import GOLDEN, JITTER_PX, Box
from slmsam2_cli.report.montage import Greys, Look
from slmsam2_cli.report.scales import Scale, length_scale, tidy

Array = NDArray[Any]
BINS = 80
TAILS = (0.5, 99.5)  # percentiles of the values shown; the axis holds the window too
MARGIN = 0.04  # of the axis beyond both


@dataclass(frozen=True)
class Dot:
    """One case. x: per cent; y: px from the lane's middle; title: which case and what."""

    x: str
    y: str
    title: str


@dataclass(frozen=True)
class Lane:
    """One row of dots, and the box around the middle half of them."""

    name: str
    text: str
    dots: tuple[Dot, ...]
    box: Box


@dataclass(frozen=True)
class Spread:
    """Lanes on one axis. mark: (x, what) of a line across them, for the planned value."""

    heading: str
    ticks: tuple[tuple[str, str], ...]
    lanes: tuple[Lane, ...]
    mark: tuple[str, str] | None = None


@dataclass(frozen=True)
class Histogram:
    """Grey values of one channel. everything, labelled: paths, x in bins from 0 to BINS, y in per cent; "" without values.

    window: (x of what becomes 0, x of what becomes 1, how far apart they are), per cent; bounds: these as text; dots: each case's median
    of labelled voxels; counted: which voxels; rule: what the window is, in words; outside: how much of the labels it cuts off, in words.
    """

    name: str
    unit: str
    ticks: tuple[tuple[str, str], ...]
    everything: str
    labelled: str
    window: tuple[str, str, str]
    bounds: tuple[str, str]
    dots: tuple[Dot, ...]
    counted: str
    rule: str
    outside: str


def spacings(fingerprint: Fingerprint, geometry: GeometryPlan) -> tuple[Spread, ...]:
    """Between slices, and in them; none without cases. The lines are the planned slices' own."""
    named: list[tuple[str, list[float]]] = [("slices", []), ("rows", []), ("columns", [])]
    for case in fingerprint.cases:
        axis = AXES.index(case.axis(geometry.slice_axis))
        mm = [case.spacing_mm[axis], *(value for a, value in enumerate(case.spacing_mm) if a != axis)]
        for (_, values), value in zip(named, mm, strict=True):
            values.append(value)
    cases = [case.id for case in fingerprint.cases]
    through, within = ([(f"between {name}", cases, values) for name, values in part] for part in (named[:1], named[1:]))
    found = (
        _spread("Through plane, mm", through, len(cases), "mm", geometry.through_plane_mm),
        _spread("In plane, mm", within, len(cases), "mm", geometry.in_plane_mm),
    )
    return tuple(spread for spread in found if spread is not None)


def extents(fingerprint: Fingerprint, geometry: GeometryPlan) -> Spread | None:
    """On how many slices along the planned axis each label lies; None when no case holds any."""
    rows = []
    for value, name in fingerprint.labels.items():
        held = [case for case in fingerprint.cases if value in case.labels]
        slices = [float(case.labels[value].extents[case.axis(geometry.slice_axis)].slices) for case in held]
        rows.append((name, [case.id for case in held], slices))
    return _spread(f"Slices along {geometry.slice_axis} that hold the label", rows, len(fingerprint.cases), "slices")


def _spread(
    heading: str, rows: Sequence[tuple[str, Sequence[str], Sequence[float]]], of: int, unit: str, planned: float | None = None
) -> Spread | None:
    """rows: (name, cases, values)."""
    everything = [value for _, _, values in rows for value in values]
    if not everything:
        return None
    scale = length_scale([*everything, *([] if planned is None else [planned])])
    lanes = tuple(_lane(name, cases, values, of, unit, scale) for name, cases, values in rows if values)
    mark = None if planned is None else (scale.percent(planned), f"planned: {planned:.3g} {unit}")
    return Spread(heading, _ticks(scale), lanes, mark)


def _lane(name: str, cases: Sequence[str], values: Sequence[float], of: int, unit: str, scale: Scale) -> Lane:
    q0, q1, q2, q3, q4 = (float(value) for value in np.percentile(values, (0, 25, 50, 75, 100)))
    text = f"median {q2:.3g}, {q0:.3g} to {q4:.3g}, n {len(values)}" + (f" of {of}" if of > len(values) else "")
    titles = [f"{case}: {value:.3g} {unit}" for case, value in zip(cases, values, strict=True)]
    x1, x3 = float(scale.percent(q1)), float(scale.percent(q3))
    box = Box(scale.percent(q0), tidy(x1), scale.percent(q2), tidy(x3), scale.percent(q4), tidy(x3 - x1))
    return Lane(name, text, _dots(values, titles, scale), box)


def _dots(values: Sequence[float], titles: Sequence[str], scale: Scale) -> tuple[Dot, ...]:
    return tuple(
        Dot(scale.percent(value), tidy((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), title)
        for i, (value, title) in enumerate(zip(values, titles, strict=True))
    )


def _ticks(scale: Scale) -> tuple[tuple[str, str], ...]:
    return tuple((scale.percent(tick), f"{tick:g}") for tick in scale.ticks())


def histograms(looks: Sequence[Look], plan: Plan) -> tuple[Histogram, ...]:
    """One a channel, those of which there are values."""
    found = (_histogram(looks, place, channel) for place, channel in enumerate(plan.intensity))
    return tuple(histogram for histogram in found if histogram is not None)


def _histogram(looks: Sequence[Look], place: int, channel: ChannelIntensity) -> Histogram | None:
    """HU as they are; else each case on its own scale, where its window runs from 0 to 1. Cases without contrast are left out."""
    ct = channel.scheme == "ct"
    low, high = (channel.lower, channel.upper) if ct else (0.0, 1.0)
    parts = {look.case: look.greys[place] for look in looks if look.greys[place].window[1] > look.greys[place].window[0]}
    if not ct:
        parts = {case: _by_window(greys) for case, greys in parts.items()}
    everything = np.concatenate([*(greys.everything for greys in parts.values()), np.empty(0)])
    labelled = np.concatenate([*(greys.labelled for greys in parts.values()), np.empty(0)])
    if not everything.size:
        return None
    scale = _axis([everything, labelled], low, high)
    medians = {case: float(np.median(greys.labelled)) for case, greys in parts.items() if greys.labelled.size}
    x0, x1 = scale.percent(low), scale.percent(high)
    planned = f"{channel.lower:g}", f"{channel.upper:g}"
    return Histogram(
        name=channel.name,
        unit="HU" if ct else "of the case's window",
        ticks=_ticks(scale),
        everything=_steps(everything, scale, low, high),
        labelled=_steps(labelled, scale, low, high),
        window=(x0, x1, tidy(float(x1) - float(x0))),
        bounds=(f"{planned[0]} HU", f"{planned[1]} HU") if ct else (f"percentile {planned[0]}", f"percentile {planned[1]}"),
        dots=_dots(list(medians.values()), [f"{case}: {value:.3g}" for case, value in medians.items()], scale),
        counted="all voxels" if ct else "non-zero voxels",
        rule=f"{planned[0]} to {planned[1]} HU" if ct else f"percentiles {planned[0]} to {planned[1]} of each case",
        outside=_outside(labelled, low, high),
    )


def _by_window(greys: Greys) -> Greys:
    """The same values, the window's ends at 0 and 1."""
    low, high = greys.window
    return Greys((0.0, 1.0), (greys.everything - low) / (high - low), (greys.labelled - low) / (high - low))


def _axis(pools: Sequence[Array], low: float, high: float) -> Scale:
    """Holds the window and nearly all values."""
    ends = [float(p) for pool in pools if pool.size for p in np.percentile(pool, TAILS)]
    first, last = min(low, *ends), max(high, *ends)
    return Scale(first - MARGIN * (last - first), last + MARGIN * (last - first))


def _steps(values: Array, scale: Scale, low: float, high: float) -> str:
    """The histogram as a path, as high as the plot where it is highest inside the window; what is higher outside is cut off."""
    counts, edges = np.histogram(values, BINS, (scale.low, scale.high))
    inside = counts[(edges[1:] > low) & (edges[:-1] < high)]
    most = int(inside.max()) or int(counts.max())
    if most == 0:
        return ""
    held = np.flatnonzero(counts)
    heights = [min(100.0, 100 * int(n) / most) for n in counts[held[0] : held[-1] + 1]]
    return f"M{held[0]} 100" + "".join(f"V{tidy(100 - height, 1)}h1" for height in heights) + "V100"


def _outside(labelled: Array, low: float, high: float) -> str:
    if not labelled.size:
        return ""
    below, above = (100 * float(np.mean(part)) for part in (labelled < low, labelled > high))
    return f"of the labelled voxels {below:.1f} % lie below the window, {above:.1f} % above"
