"""plan.html: what was measured on a data set, what was decided and why, and what the training cases look like under that plan.

One page with everything in it and no script; its policy allows its own style and pictures written into it, nothing else. Text is escaped
by the template engine.

A data set's charts as shapes for the template: spacing and extents case by case, grey values and the window chosen for them.

x is in per cent of the plot's width, y in pixels or, in paths, in per cent of the plot's height from the top. Nothing here knows colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.dataset.dataset import Dataset
from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.io import atomic
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.plan import ChannelIntensity, GeometryPlan, Plan
from slmsam2_cli.report.charts import GOLDEN, JITTER_PX, Box, Scale, format_coordinate, length_scale
from slmsam2_cli.report.contact_sheet import COLOURS, MOST_CASES, MOST_CHANNELS, Gap, Greys, Look, colour, montage
from slmsam2_cli.report.render import check_own_file, script_hash
from slmsam2_cli.report.schema import Table
from slmsam2_cli.version import VERSION

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
    box = Box(
        scale.percent(q0), format_coordinate(x1), scale.percent(q2), format_coordinate(x3), scale.percent(q4), format_coordinate(x3 - x1)
    )
    return Lane(name, text, _dots(values, titles, scale), box)


def _dots(values: Sequence[float], titles: Sequence[str], scale: Scale) -> tuple[Dot, ...]:
    return tuple(
        Dot(scale.percent(value), format_coordinate((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), title)
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
        window=(x0, x1, format_coordinate(float(x1) - float(x0))),
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
    return f"M{held[0]} 100" + "".join(f"V{format_coordinate(100 - height, 1)}h1" for height in heights) + "V100"


def _outside(labelled: Array, low: float, high: float) -> str:
    if not labelled.size:
        return ""
    below, above = (100 * float(np.mean(part)) for part in (labelled < low, labelled > high))
    return f"of the labelled voxels {below:.1f} % lie below the window, {above:.1f} % above"


NAME = "plan.html"
PAGE_BEGINS = b"<!doctype html>\n<!-- slmsam2 plan -->"
FACING = {
    "SI": "front up, the patient's left on the right",
    "AP": "head up, the patient's left on the right",
    "LR": "head up, front on the left",
}


@dataclass(frozen=True)
class PlanNotes:
    """What there is to say beside the pictures, as raw text; any of it may be empty.

    decisions: (decision, value, why); advice: (what, text); costs: (what, predicted memory); measured: tables of facts.
    """

    decisions: tuple[tuple[str, str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    advice: tuple[tuple[str, str], ...] = ()
    costs: tuple[tuple[str, str], ...] = ()
    measured: tuple[Table, ...] = ()


def steps(data: Dataset) -> int:
    """How often write_plan_page advances."""
    return min(len(data.training), MOST_CASES)


def write_plan_page(
    path: Path,
    data: Dataset,
    fingerprint: Fingerprint,
    plan: Plan,
    notes: PlanNotes,
    advance: Callable[..., None] = lambda steps=1, note="": None,
) -> None:
    """Look at the training cases, one after the other, and write the page. advance(): called after each, steps() times.

    OutputError when it cannot be written, or when a file of somebody else's is in the way.
    """
    check_own_file(path, PAGE_BEGINS)
    atomic.write_text(path, render(data, fingerprint, plan, notes, montage(data, plan, advance)))


def render(data: Dataset, fingerprint: Fingerprint, plan: Plan, notes: PlanNotes, shown: tuple[Look | Gap, ...]) -> str:
    """The whole page."""
    looks = [one for one in shown if isinstance(one, Look)]
    style = _asset("page.css") + _asset("plan.css")
    return _template().render(
        data=data,
        plan=plan,
        notes=notes,
        shown=shown,
        gaps=[one for one in shown if isinstance(one, Gap)],
        headline=_headline(fingerprint, plan),
        facing=FACING[plan.geometry.slice_axis],
        colours=[(name, f"#{colour(place):06x}") for place, name in enumerate(data.labels.values())],
        repeated=len(data.labels) > len(COLOURS),
        channels=plan.channels[:MOST_CHANNELS],
        histograms=histograms(looks, plan),
        spacings=spacings(fingerprint, plan.geometry),
        extents=extents(fingerprint, plan.geometry),
        bins=BINS,
        facts=_facts(fingerprint, plan),
        style=style,
        policy=f"default-src 'none'; style-src {script_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'",
        version=VERSION,
    )


def _headline(fingerprint: Fingerprint, plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """(what, value, remark) of each card."""
    geometry, network = plan.geometry, plan.network
    count = len(plan.labels)
    return (
        ("Training cases", str(len(fingerprint.cases)), f"usable, with {count} label{'s' * (count != 1)}"),
        ("Modality", plan.modality, f"channels: {', '.join(plan.channels)}"),
        ("Slices along", geometry.slice_axis, "the axis that becomes time"),
        ("Pixel", f"{geometry.in_plane_mm:.3g} mm", f"in slices of at most {geometry.stack_size} pixels"),
        ("Network", network.size, f"{network.policy} memory, input of {geometry.input_size} pixels"),
    )


def _facts(fingerprint: Fingerprint, plan: Plan) -> tuple[tuple[str, str], ...]:
    return (
        ("data set", plan.dataset_name),
        ("decided with", f"slmsam2 {plan.tool_version}"),
        ("plan_digest", plan.digest + (" (edited by hand)" if plan.edited else "")),
        ("measured with", f"slmsam2 {fingerprint.tool_version}"),
        ("fingerprint_digest", fingerprint.digest),
    )


def _short(value: float) -> str:
    """Three digits, and never an exponent for large values."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@cache
def _asset(name: str) -> str:
    return resources.files("slmsam2_cli").joinpath("assets", "report", name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = _short
    return environment.get_template("plan.html.j2")
