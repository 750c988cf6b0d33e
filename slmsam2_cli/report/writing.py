"""The page on disk: FOLDER/report.html, and report_files/ beside it for what the page cannot carry.

Everybody's own files are left alone: ours are known by how they begin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slmsam2_cli.data import store
from slmsam2_cli.data.files import InputError, open_regular
from slmsam2_cli.errors import OutputError
from slmsam2_cli.report.contents import Report, ViewerVolumes
from slmsam2_cli.report.looks import FOLDER, Beside

NAME = "report.html"
PAGE_BEGINS = b"<!doctype html>\n<!-- slmsam2 report -->"
VOLUMES_BEGIN = b"(window.slmsam2Volumes"


def write_report(folder: Path, make: Callable[[Beside], Report]) -> Report:
    """Let `make` build the report, its large volumes written beside the page meanwhile; then the page; then drop what no page names.

    OutputError when a file cannot be written, or one of somebody else's is in the way: then nothing of theirs has changed.
    """
    from slmsam2_cli.report.page import render  # its templates are slow to import, and wanted last

    refuse_foreign(folder / NAME, PAGE_BEGINS)
    report = make(lambda name, case, volumes: _write_volumes(folder / name, case, volumes))
    store.write_text(folder / NAME, render(report))
    _drop_stale(folder, report)
    return report


def refuse_foreign(path: Path, begins: bytes) -> None:
    """OutputError when there is a file that does not begin like ours."""
    if path.exists() and not is_ours(path, begins):
        raise OutputError(f"{path}: was not written by slmsam2. Move it away, or choose another folder")


def is_ours(path: Path, begins: bytes) -> bool:
    """Whether it is a regular file that begins with these bytes. OSError."""
    try:
        with open_regular(path) as file:
            return file.read(len(begins)) == begins
    except InputError:
        return False


def _write_volumes(path: Path, case: str, volumes: ViewerVolumes) -> None:
    from slmsam2_cli.report.page import volumes_script

    refuse_foreign(path, VOLUMES_BEGIN)
    store.write_text(path, volumes_script(case, volumes))


def _drop_stale(folder: Path, report: Report) -> None:
    """Files of an earlier page of ours that this one does not name."""
    named = {case.volumes_file for case in report.cases}
    for path in sorted((folder / FOLDER).glob("*.js")):
        if f"{FOLDER}/{path.name}" not in named and path.is_file() and not path.is_symlink() and is_ours(path, VOLUMES_BEGIN):
            path.unlink()
