"""Write plan.html: measurements, settings with reasons, charts of the dataset, and a picture of every training case under the plan.

The page is one file without scripts; its content security policy allows only its own style sheet and embedded pictures. The template
escapes all text. Charts reach the template as shapes: x in per cent of the plot's width, y in pixels or, in paths, in per cent of the
plot's height from the top. Colours are in the style sheet.
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
from slmsam2_cli.report.contact_sheet import MAX_CHANNELS, MAX_THUMBNAILS, Thumbnail, colour, montage
from slmsam2_cli.report.render import check_own_file, script_hash
from slmsam2_cli.report.schema import Table
from slmsam2_cli.version import VERSION

Array = NDArray[Any]
BINS = 80  # of a histogram
SHOWN_PERCENTILES = (0.5, 99.5)  # of the intensities; the axis includes the window as well
AXIS_MARGIN = 0.04  # fraction of the axis beyond both ends
PAGE_BEGINS = b"<!doctype html>\n<!-- slmsam2 plan -->"
VIEWS = {
    "SI": "anterior at the top, the patient's left on the right",
    "AP": "superior at the top, the patient's left on the right",
    "LR": "superior at the top, anterior on the left",
}


@dataclass(frozen=True)
class Dot:
    """One case. x: per cent; y: pixels from the middle of the lane; title: case and value."""

    x: str
    y: str
    title: str


@dataclass(frozen=True)
class Lane:
    """One row of dots with a box plot."""

    name: str
    text: str
    dots: tuple[Dot, ...]
    box: Box


@dataclass(frozen=True)
class DotPlot:
    """Lanes on one axis. mark: (x, text) of a line across them at the planned value."""

    heading: str
    ticks: tuple[tuple[str, str], ...]
    lanes: tuple[Lane, ...]
    mark: tuple[str, str] | None = None


@dataclass(frozen=True)
class Histogram:
    """Intensities of one channel.

    everything, labelled: paths, x in bins from 0 to BINS, y in per cent; "" without values; window: x of the values that become 0 and 1
    and their distance, in per cent; bounds: these values as text; dots: median of each case's labelled voxels; counted: which voxels are
    counted; rule: the window as text; outside: the fraction of labelled voxels outside the window as text.
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


@dataclass(frozen=True)
class PlanNotes:
    """The tables of the page as raw text; any of them may be empty.

    settings: (key, value, reason); advice: (label, text); estimates: (command, memory); measured: tables of measurements.
    """

    settings: tuple[tuple[str, ...], ...] = ()
    warnings: tuple[str, ...] = ()
    advice: tuple[tuple[str, ...], ...] = ()
    estimates: tuple[tuple[str, ...], ...] = ()
    measured: tuple[Table, ...] = ()


def spacings(fingerprint: Fingerprint, geometry: GeometryPlan) -> tuple[DotPlot, ...]:
    """Plot through-plane and in-plane spacing of all cases, with the planned values as marks; nothing without cases."""
    cases = [case.id for case in fingerprint.cases]
    through, rows, columns = [], [], []
    for case in fingerprint.cases:
        axis = AXES.index(case.axis(geometry.slice_axis))
        through.append(case.spacing_mm[axis])
        first, second = (mm for index, mm in enumerate(case.spacing_mm) if index != axis)
        rows.append(first)
        columns.append(second)
    in_plane = [("between rows", cases, rows), ("between columns", cases, columns)]
    plots = (
        _dot_plot("Through-plane spacing, mm", [("between slices", cases, through)], len(cases), "mm", geometry.through_plane_mm),
        _dot_plot("In-plane spacing, mm", in_plane, len(cases), "mm", geometry.in_plane_mm),
    )
    return tuple(plot for plot in plots if plot is not None)


def extents(fingerprint: Fingerprint, geometry: GeometryPlan) -> DotPlot | None:
    """Plot the number of slices with each label along the slice axis; None when no case has a label."""
    rows = []
    for value, name in fingerprint.labels.items():
        held = [case for case in fingerprint.cases if value in case.labels]
        slices = [float(case.labels[value].extents[case.axis(geometry.slice_axis)].slices) for case in held]
        rows.append((name, [case.id for case in held], slices))
    return _dot_plot(f"Slices with the label along {geometry.slice_axis}", rows, len(fingerprint.cases), "slices")


def _dot_plot(
    heading: str, rows: Sequence[tuple[str, Sequence[str], Sequence[float]]], total: int, unit: str, planned: float | None = None
) -> DotPlot | None:
    """Lay out a dot plot. rows: (name, cases, values); total: number of all cases. None without values."""
    everything = [value for _, _, values in rows for value in values]
    if not everything:
        return None
    scale = length_scale([*everything, *([] if planned is None else [planned])])
    lanes = []
    for name, cases, values in rows:
        if values:
            quartiles = [float(value) for value in np.percentile(values, (0, 25, 50, 75, 100))]
            least, q1, middle, q3, greatest = (scale.percent(value) for value in quartiles)
            text = f"median {quartiles[2]:.3g}, {quartiles[0]:.3g} to {quartiles[4]:.3g}, n = {len(values)}" + (
                f" of {total}" if total > len(values) else ""
            )
            titles = [f"{case}: {value:.3g} {unit}" for case, value in zip(cases, values, strict=True)]
            box = Box(least, q1, middle, q3, greatest, format_coordinate(float(q3) - float(q1)))
            lanes.append(Lane(name, text, _dots(values, titles, scale), box))
    mark = None if planned is None else (scale.percent(planned), f"planned: {planned:.3g} {unit}")
    return DotPlot(heading, tuple((scale.percent(tick), f"{tick:g}") for tick in scale.ticks()), tuple(lanes), mark)


def _dots(values: Sequence[float], titles: Sequence[str], scale: Scale) -> tuple[Dot, ...]:
    return tuple(
        Dot(scale.percent(value), format_coordinate((i * GOLDEN % 1 - 0.5) * 2 * JITTER_PX, 1), title)
        for i, (value, title) in enumerate(zip(values, titles, strict=True))
    )


def histograms(thumbnails: Sequence[Thumbnail], plan: Plan) -> tuple[Histogram, ...]:
    """Lay out one histogram per channel that has values."""
    found = (_histogram(thumbnails, index, channel) for index, channel in enumerate(plan.intensity))
    return tuple(histogram for histogram in found if histogram is not None)


def _histogram(thumbnails: Sequence[Thumbnail], index: int, channel: ChannelIntensity) -> Histogram | None:
    """Lay out the histogram of one channel: CT in HU, others relative to each case's window (0 to 1). Constant images are left out."""
    ct = channel.scheme == "ct"
    low, high = (channel.lower, channel.upper) if ct else (0.0, 1.0)
    everything, labelled, medians = [np.empty(0)], [np.empty(0)], {}
    for thumbnail in thumbnails:
        sample = thumbnail.samples[index]
        first, last = sample.window
        if last > first:
            whole, inside = (values if ct else (values - first) / (last - first) for values in (sample.everything, sample.labelled))
            everything.append(whole)
            labelled.append(inside)
            if inside.size:
                medians[thumbnail.case] = float(np.median(inside))
    pooled, tissue = np.concatenate(everything), np.concatenate(labelled)
    if not pooled.size:
        return None
    ends = [float(p) for pool in (pooled, tissue) if pool.size for p in np.percentile(pool, SHOWN_PERCENTILES)]
    start, stop = min(low, *ends), max(high, *ends)
    scale = Scale(start - AXIS_MARGIN * (stop - start), stop + AXIS_MARGIN * (stop - start))
    x0, x1 = scale.percent(low), scale.percent(high)
    lower, upper = f"{channel.lower:g}", f"{channel.upper:g}"
    below, above = (100 * float(np.mean(part)) if tissue.size else 0.0 for part in (tissue < low, tissue > high))
    return Histogram(
        name=channel.name,
        unit="HU" if ct else "relative to the case's window",
        ticks=tuple((scale.percent(tick), f"{tick:g}") for tick in scale.ticks()),
        everything=_histogram_path(pooled, scale, low, high),
        labelled=_histogram_path(tissue, scale, low, high),
        window=(x0, x1, format_coordinate(float(x1) - float(x0))),
        bounds=(f"{lower} HU", f"{upper} HU") if ct else (f"percentile {lower}", f"percentile {upper}"),
        dots=_dots(list(medians.values()), [f"{case}: {value:.3g}" for case, value in medians.items()], scale),
        counted="all voxels" if ct else "non-zero voxels",
        rule=f"{lower} to {upper} HU" if ct else f"percentiles {lower} to {upper} of each case",
        outside=f"{below:.1f} % below and {above:.1f} % above the window" if tissue.size else "",
    )


def _histogram_path(values: Array, scale: Scale, low: float, high: float) -> str:
    """Draw the histogram as a path: full height is the highest bin inside the window, higher bins outside are cut off."""
    counts, edges = np.histogram(values, BINS, (scale.low, scale.high))
    inside = counts[(edges[1:] > low) & (edges[:-1] < high)]
    most = int(inside.max()) or int(counts.max())
    if most == 0:
        return ""
    held = np.flatnonzero(counts)
    heights = [min(100.0, 100 * int(n) / most) for n in counts[held[0] : held[-1] + 1]]
    return f"M{held[0]} 100" + "".join(f"V{format_coordinate(100 - height, 1)}h1" for height in heights) + "V100"


def shown_cases(data: Dataset) -> int:
    """Return the number of cases on the page, which is how often write_plan_page advances."""
    return min(len(data.training), MAX_THUMBNAILS)


def write_plan_page(
    path: Path,
    data: Dataset,
    fingerprint: Fingerprint,
    plan: Plan,
    notes: PlanNotes,
    advance: Callable[..., None] = lambda steps=1, note="": None,
) -> None:
    """Draw the training cases, calling advance after each of the shown_cases(), and write the page.

    Raises: OutputError when the page cannot be written, or a file at its path is not from slmsam2.
    """
    check_own_file(path, PAGE_BEGINS)
    shown = montage(data, plan, advance)
    style = _asset("page.css") + _asset("plan.css")
    page = _template().render(
        data=data,
        plan=plan,
        notes=notes,
        shown=shown,
        headline=_headline(fingerprint, plan),
        view=VIEWS[plan.geometry.slice_axis],
        colours=[(name, f"#{colour(place):06x}") for place, name in enumerate(data.labels.values())],
        channels=plan.channels[:MAX_CHANNELS],
        histograms=histograms([one for one in shown if isinstance(one, Thumbnail)], plan),
        spacings=spacings(fingerprint, plan.geometry),
        extents=extents(fingerprint, plan.geometry),
        bins=BINS,
        provenance={
            "dataset": plan.dataset_name,
            "plan made with": f"slmsam2 {plan.tool_version}",
            "plan_digest": plan.digest + (" (edited by hand)" if plan.edited else ""),
            "measured with": f"slmsam2 {fingerprint.tool_version}",
            "fingerprint_digest": fingerprint.digest,
        },
        style=style,
        policy=f"default-src 'none'; style-src {script_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'",
        version=VERSION,
    )
    atomic.write_text(path, page)


def _headline(fingerprint: Fingerprint, plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """Return (name, value, remark) of each card."""
    geometry, network, count = plan.geometry, plan.network, len(plan.labels)
    return (
        ("Training cases", str(len(fingerprint.cases)), f"with {count} label{'s' * (count != 1)}"),
        ("Modality", plan.modality, f"channels: {', '.join(plan.channels)}"),
        ("Slice axis", geometry.slice_axis, "axis of propagation"),
        ("In-plane spacing", f"{geometry.in_plane_mm:.3g} mm", f"in slices of at most {geometry.storage_size} pixels"),
        ("Network", network.size, f"{network.policy} memory, input of {geometry.input_size} pixels"),
    )


def _short(value: float) -> str:
    """Format with three digits, and without an exponent for large values."""
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
