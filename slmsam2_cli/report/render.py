"""A report as one HTML file that works offline: everything in it, nothing loaded from elsewhere.

Text is escaped by the template engine, data in script tags here. The policy in the head allows this page's own scripts and styles, by
their hashes, and pictures written into the page; a viewer that finds its volumes in files beside the page may load those files as well.
Tables, charts and pictures are in the HTML; the script adds sorting, choosing and the viewer (assets/report/page.js).

The page on disk: FOLDER/report.html, and report_files/ beside it for what the page cannot carry.

Everybody's own files are left alone: ours are known by how they begin.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from slmsam2_cli.errors import OutputError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.report.case_images import FOLDER, Beside
from slmsam2_cli.report.charts import DICE_BINS, curves, dice_class, distributions, slice_range, strips_of
from slmsam2_cli.report.schema import CaseReport, Number, Report, SliceMark, Structure, ViewerVolumes
from slmsam2_cli.version import VERSION

NIIVUE = "niivue-0.69.0.umd.js.gz"
STATUS_WORDS = {
    "ok": "ok",
    "both_empty": "both empty",
    "pred_empty": "prediction empty",
    "ref_empty": "truth empty",
    "pred_missing": "prediction missing",
    "failed": "failed",
}
SCRIPTS = ("page.js", "table.js", "cases.js", "slices.js", "viewer.js", "start.js")
BESIDE = re.compile(r"(HD95|NSD)\b", re.IGNORECASE)
"""Terms that are explained beside the table too."""
ENABLE = "document.documentElement.classList.add('js')"
"""Run in the head: what only the script can work is hidden without it, and nothing jumps when it is there."""


def render(report: Report) -> str:
    """The whole page."""
    report = dataclasses.replace(report, cases=_worst_first(report.cases))
    viewer = any(case.volumes or case.volumes_file for case in report.cases)
    neighbours = any(case.volumes_file for case in report.cases)
    library = _niivue() if viewer else None
    script, style = _script(), _asset("report", "page.css")
    page = _template().render(
        report=report,
        version=VERSION,
        policy=_policy([ENABLE, script, *([library.decode("utf-8")] if library else [])], style, neighbours),
        enable=ENABLE,
        script=script,
        style=style,
        distributions=distributions(report),
        curves=curves(report),
        data=script_json(_data(report)),
        viewer=viewer,
        library=base64.b64encode(_packed_niivue()).decode("ascii") if viewer else "",
        licences=(_asset("niivue", "LICENSE"), _asset("niivue", "THIRD_PARTY")) if viewer else (),
        beside=[pair for pair in report.definitions if BESIDE.match(pair[0])],
        unprompted=any(structure.unprompted for case in report.cases for structure in case.structures),
        groups=sorted({case.group for case in report.cases}, reverse=True),
    )
    return page.lstrip().encode("utf-8", "backslashreplace").decode("utf-8")


def volumes_script(case_id: str, volumes: ViewerVolumes) -> str:
    """Text of a .js file beside the page that holds one case's volumes, loadable by a <script> tag from file://"""
    return f"(window.slmsam2Volumes ||= new Map()).set({script_json(case_id)}, {_volumes_json(volumes)});\n"


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no <, >, &, and ASCII only, so U+2028 and U+2029 are escaped too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(text: str) -> str:
    """How a policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _policy(scripts: list[str], style: str, neighbours: bool) -> str:
    allowed = [*(script_hash(text) for text in scripts), *(["'self'", "file:"] if neighbours else [])]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src {script_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _worst_first(cases: tuple[CaseReport, ...]) -> tuple[CaseReport, ...]:
    """Failed and missing cases before all others; otherwise as given."""
    return tuple(sorted(cases, key=lambda case: ("failed", "pred_missing", case.status).index(case.status)))


@cache
def _asset(*path: str) -> str:
    return resources.files("slmsam2_cli").joinpath("assets", *path).read_text(encoding="utf-8")


@cache
def _script() -> str:
    return "'use strict';\n(() => {\n" + "\n".join(_asset("report", name) for name in SCRIPTS) + "})();\n"


@cache
def _packed_niivue() -> bytes:
    return resources.files("slmsam2_cli").joinpath("assets", "niivue", NIIVUE).read_bytes()


@cache
def _niivue() -> bytes:
    return gzip.decompress(_packed_niivue())


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _asset("report", name)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(measure=_measure, anchor=_anchor, status=_status, dice_class=dice_class, volumes_json=_volumes_json)
    environment.globals.update(slice_range=slice_range, strips_of=strips_of)
    return environment.get_template("page.html.j2")


def _status(key: str) -> str:
    return STATUS_WORDS.get(key, key.replace("_", " "))


def _measure(value: Number, digits: int) -> str:
    """A number as the table shows it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _anchor(case_id: str) -> str:
    """The part of the page's address that opens a case."""
    return "case=" + quote(case_id.encode("utf-8", "backslashreplace"), safe="")


def _data(report: Report) -> dict[str, Any]:
    """What the script needs beyond the HTML, names shortened: there may be tens of thousands of slices."""
    return {
        "kind": report.kind,
        "bins": DICE_BINS,
        "structures": list(report.structures.items()),
        "columns": [{"digits": digits, "better": better} for _, _, digits, better in report.columns],
        "cases": [_case(case, report) for case in report.cases],
    }


def _case(case: CaseReport, report: Report) -> dict[str, Any]:
    first, count = slice_range(case.structures)
    return {
        "id": case.id,
        "anchor": _anchor(case.id),
        "group": case.group,
        "first": first,
        "count": count,
        "volumes": "page" if case.volumes else "file" if case.volumes_file else None,
        "file": None if case.volumes else case.volumes_file,
        "structures": [_structure(structure, report) for structure in case.structures],
    }


def _structure(structure: Structure, report: Report) -> dict[str, Any]:
    keys = [column[0] for column in report.columns]
    return {
        "key": structure.key,
        "name": structure.name,
        "all": [_known(structure.measures.get(key)) for key in keys],
        "unprompted": [_known(structure.unprompted.get(key)) for key in keys],
        "slices": [_mark(mark) for mark in structure.slices],
    }


def _mark(mark: SliceMark) -> list[Number | bool]:
    """In the order that page.js reads: slice, prediction, reference, Dice, prompted, distance, confidence, disagreement."""
    given = (_short(mark.dice), int(mark.prompted), mark.distance, _short(mark.confidence), _short(mark.disagreement))
    return [mark.slice, mark.prediction_px, mark.reference_px, *given]


def _known(value: Number) -> Number:
    """As it is, so that the script shows the very digits that the HTML does; no NaN."""
    return None if value is None or not math.isfinite(value) else value


def _short(value: Number) -> Number:
    """A share with more digits than anyone reads, and no NaN: there may be tens of thousands."""
    known = _known(value)
    return known if known is None or isinstance(known, int) else float(f"{known:.5g}")


def _volumes_json(volumes: ViewerVolumes) -> str:
    return script_json(dataclasses.asdict(volumes))


NAME = "report.html"
PAGE_BEGINS = b"<!doctype html>\n<!-- slmsam2 report -->"
VOLUMES_BEGIN = b"(window.slmsam2Volumes"


def write_report(folder: Path, make: Callable[[Beside], Report]) -> Report:
    """Let `make` build the report, its large volumes written beside the page meanwhile; then the page; then drop what no page names.

    OutputError when a file cannot be written, or one of somebody else's is in the way: then nothing of theirs has changed.
    """

    check_own_file(folder / NAME, PAGE_BEGINS)
    report = make(lambda name, case, volumes: _write_volumes(folder / name, case, volumes))
    atomic.write_text(folder / NAME, render(report))
    _drop_stale(folder, report)
    return report


def check_own_file(path: Path, begins: bytes) -> None:
    """OutputError when there is a file that does not begin like ours."""
    if path.exists() and not is_own_file(path, begins):
        raise OutputError(f"{path}: was not written by slmsam2. Move it away, or choose another folder")


def is_own_file(path: Path, begins: bytes) -> bool:
    """Whether it is a regular file that begins with these bytes. OSError."""
    try:
        with open_regular(path) as file:
            return file.read(len(begins)) == begins
    except InputError:
        return False


def _write_volumes(path: Path, case: str, volumes: ViewerVolumes) -> None:

    check_own_file(path, VOLUMES_BEGIN)
    atomic.write_text(path, volumes_script(case, volumes))


def _drop_stale(folder: Path, report: Report) -> None:
    """Files of an earlier page of ours that this one does not name."""
    named = {case.volumes_file for case in report.cases}
    for path in sorted((folder / FOLDER).glob("*.js")):
        if f"{FOLDER}/{path.name}" not in named and path.is_file() and not path.is_symlink() and is_own_file(path, VOLUMES_BEGIN):
            path.unlink()
