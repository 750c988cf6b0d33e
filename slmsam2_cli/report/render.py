"""Render a report as one HTML file that works offline, and write it: FOLDER/report.html, with report_files/ for large volumes.

The template engine escapes text, script_json the data in script elements. The content security policy allows only this page's scripts and
styles (by hash) and embedded pictures; a page with volumes next to it may load those files as well. Tables, charts and pictures are in the
HTML; the scripts add sorting, selection and the viewer (assets/report/page.js). Files of others are never replaced or removed: those of
slmsam2 are recognised by their first bytes.
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
from slmsam2_cli.report.case_images import FOLDER, WriteVolumes
from slmsam2_cli.report.charts import DICE_BINS, curves, dice_class, distributions, slice_range, strips_of
from slmsam2_cli.report.schema import Number, Report, ViewerVolumes
from slmsam2_cli.version import VERSION

NAME = "report.html"
PAGE_BEGINS = b"<!doctype html>\n<!-- slmsam2 report -->"
VOLUMES_BEGIN = b"(window.slmsam2Volumes"
NIIVUE = "niivue-0.69.0.umd.js.gz"
STATUS_WORDS = {
    "ok": "ok",
    "both_empty": "both empty",
    "pred_empty": "prediction empty",
    "ref_empty": "reference empty",
    "pred_missing": "no prediction",
    "failed": "failed",
}
SCRIPTS = ("page.js", "table.js", "cases.js", "slices.js", "viewer.js", "start.js")
EXPLAINED = re.compile(r"(HD95|NSD)\b", re.IGNORECASE)
"""Terms whose definitions are also shown below the case table."""
ENABLE = "document.documentElement.classList.add('js')"
"""Run in the head: elements that need the scripts are shown from the start, and are hidden without scripts."""


def render(report: Report) -> str:
    """Render the whole page; failed and missing cases come first, otherwise the cases keep their order."""
    rank = {"failed": 0, "pred_missing": 1}
    report = dataclasses.replace(report, cases=tuple(sorted(report.cases, key=lambda case: rank.get(case.status, 2))))
    has_files = any(case.volumes_file for case in report.cases)
    has_viewer = has_files or any(case.volumes for case in report.cases)
    packed, library = _niivue() if has_viewer else (b"", "")
    script = "'use strict';\n(() => {\n" + "\n".join(_asset("report", name) for name in SCRIPTS) + "})();\n"
    style = _asset("report", "page.css")
    allowed = [script_hash(text) for text in (ENABLE, script, *([library] if library else []))] + ["'self'", "file:"] * has_files
    page = _template().render(
        report=report,
        version=VERSION,
        policy=f"default-src 'none'; script-src {' '.join(allowed)}; style-src {script_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        enable=ENABLE,
        script=script,
        style=style,
        distributions=distributions(report),
        curves=curves(report),
        data=script_json(_script_data(report)),
        viewer=has_viewer,
        library=base64.b64encode(packed).decode("ascii"),
        licences=(_asset("niivue", "LICENSE"), _asset("niivue", "THIRD_PARTY")) if has_viewer else (),
        explained=[pair for pair in report.definitions if EXPLAINED.match(pair[0])],
        unprompted=any(structure.unprompted for case in report.cases for structure in case.structures),
        groups=sorted({case.group for case in report.cases}, reverse=True),
    )
    return page.lstrip().encode("utf-8", "backslashreplace").decode("utf-8")


def volumes_script(case_id: str, volumes: ViewerVolumes) -> str:
    """Return the text of a .js file with one case's volumes, which a <script> tag can load from file://."""
    return f"(window.slmsam2Volumes ||= new Map()).set({script_json(case_id)}, {script_json(dataclasses.asdict(volumes))});\n"


def script_json(value: Any) -> str:
    """Encode a value as JSON that is safe inside a script element: no <, >, &, and ASCII only, so U+2028 and U+2029 are escaped too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def script_hash(text: str) -> str:
    """Return the source expression of an inline script or style for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


@cache
def _asset(*path: str) -> str:
    return resources.files("slmsam2_cli").joinpath("assets", *path).read_text(encoding="utf-8")


@cache
def _niivue() -> tuple[bytes, str]:
    """Read the viewer library: gzipped, and as text."""
    packed = resources.files("slmsam2_cli").joinpath("assets", "niivue", NIIVUE).read_bytes()
    return packed, gzip.decompress(packed).decode("utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _asset("report", name)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        measure=_measure,
        anchor=_anchor,
        status=lambda key: STATUS_WORDS.get(key, key),
        group=lambda key: key.replace("_", "-"),
        dice_class=dice_class,
        volumes_json=lambda volumes: script_json(dataclasses.asdict(volumes)),
    )
    environment.globals.update(slice_range=slice_range, strips_of=strips_of)
    return environment.get_template("page.html.j2")


def _measure(value: Number, digits: int) -> str:
    """Format a number for the tables; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _anchor(case_id: str) -> str:
    """Return the fragment of the page's address that opens a case."""
    return "case=" + quote(case_id.encode("utf-8", "backslashreplace"), safe="")


def _script_data(report: Report) -> dict[str, Any]:
    """Collect what the scripts need beyond the HTML.

    A slice is a list in the order of slices.js: slice, prediction, reference, Dice, prompted, distance, confidence, disagreement; there may
    be tens of thousands. Measures keep all digits, so that the scripts round them as the HTML does.
    """
    keys = [column[0] for column in report.columns]
    cases = []
    for case in report.cases:
        first, count = slice_range(case.structures)
        structures = [
            {
                "key": structure.key,
                "name": structure.name,
                "all": [_finite(structure.measures.get(key)) for key in keys],
                "unprompted": [_finite(structure.unprompted.get(key)) for key in keys],
                "slices": [
                    [m.slice, m.prediction_px, m.reference_px, _finite(m.dice, 5), int(m.prompted), m.distance]
                    + [_finite(m.confidence, 5), _finite(m.disagreement, 5)]
                    for m in structure.slices
                ],
            }
            for structure in case.structures
        ]
        source = {"volumes": "page" if case.volumes else "file" if case.volumes_file else None}
        source["file"] = None if case.volumes else case.volumes_file
        item = {"id": case.id, "anchor": _anchor(case.id), "group": case.group, "first": first, "count": count}
        cases.append({**item, **source, "structures": structures})
    return {
        "kind": report.kind,
        "bins": DICE_BINS,
        "structures": list(report.structures.items()),
        "columns": [{"digits": digits, "better": better} for _, _, digits, better in report.columns],
        "cases": cases,
    }


def _finite(value: Number, digits: int | None = None) -> Number:
    """Return a number, rounded to so many significant digits; None for NaN and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return value if digits is None or isinstance(value, int) else float(f"{value:.{digits}g}")


def write_report(folder: Path, make: Callable[[WriteVolumes], Report]) -> Report:
    """Let `make` build the report while it writes large volumes next to the page, write the page, and remove volumes of earlier pages.

    Raises: OutputError when a file cannot be written, or a file that is not from slmsam2 has its name; that file is not changed.
    """

    def write_volumes(name: str, case: str, volumes: ViewerVolumes) -> None:
        check_own_file(folder / name, VOLUMES_BEGIN)
        atomic.write_text(folder / name, volumes_script(case, volumes))

    check_own_file(folder / NAME, PAGE_BEGINS)
    report = make(write_volumes)
    atomic.write_text(folder / NAME, render(report))
    used = {case.volumes_file for case in report.cases}
    for path in sorted((folder / FOLDER).glob("*.js")):
        if f"{FOLDER}/{path.name}" not in used and path.is_file() and not path.is_symlink() and is_own_file(path, VOLUMES_BEGIN):
            path.unlink()
    return report


def check_own_file(path: Path, begins: bytes) -> None:
    """Check that a file can be replaced.

    Raises: OutputError when there is a file that does not begin with these bytes.
    """
    if path.exists() and not is_own_file(path, begins):
        raise OutputError(f"{path}: was not written by slmsam2. Move it away, or choose another folder")


def is_own_file(path: Path, begins: bytes) -> bool:
    """Return whether a path is a regular file that begins with these bytes.

    Raises: OSError when it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read(len(begins)) == begins
    except InputError:
        return False
