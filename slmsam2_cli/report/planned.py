"""plan.html: what was measured on a data set, what was decided and why, and what the training cases look like under that plan.

One page with everything in it and no script; its policy allows its own style and pictures written into it, nothing else. Text is escaped
by the template engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2

from slmsam2_cli.data import store
from slmsam2_cli.data.dataset import Dataset
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.contents import Table
from slmsam2_cli.report.montage import COLOURS, MOST_CASES, MOST_CHANNELS, Gap, Look, colour, montage
from slmsam2_cli.report.page import script_hash
from slmsam2_cli.report.plan_charts import BINS, extents, histograms, spacings
from slmsam2_cli.report.writing import refuse_foreign
from slmsam2_cli.version import VERSION

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
    refuse_foreign(path, PAGE_BEGINS)
    store.write_text(path, render(data, fingerprint, plan, notes, montage(data, plan, advance)))


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
        ("Pixel", f"{geometry.in_plane_mm:.3g} mm", f"in slices of at most {geometry.stack_px} pixels"),
        ("Network", network.size, f"{network.policy} memory, input of {geometry.frame_px} pixels"),
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
