"""The page of a folder of masks that predict wrote: MASKS/manifest.json and the masks in, MASKS/report.html out.

A page is an extra: whatever goes wrong with it is a warning, and the masks stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.data import store
from slmsam2_cli.data.files import open_regular
from slmsam2_cli.data.intensity import ChannelIntensityLike
from slmsam2_cli.report.contents import Report
from slmsam2_cli.report.looks import Beside
from slmsam2_cli.report.opened import Sources, Window
from slmsam2_cli.report.predicted import of_predictions
from slmsam2_cli.report.writing import NAME, write_report

MANIFEST = "manifest.json"
_TURN = ".slmsam2-report.lock"
_DIGEST = "account of the masks"


def report_on(masks: Path, images: Mapping[str, tuple[Path, ...]], shown: ChannelIntensityLike | None = None, anew: bool = True) -> None:
    """Write the page of all masks in the folder. images: case -> its files, where they are known; shown: how the network sees grey values.

    Unless `anew`, a page that tells of these very masks already is left alone. Runs that share the folder take turns.
    """
    window = (shown.lower, shown.upper) if shown is not None and shown.scheme == "ct" else None
    try:
        with store.taking_turns(masks / _TURN):
            manifest = store.read_json(masks / MANIFEST, "the predictions' manifest")
            digest = _digest(manifest)
            if (manifest["cases"] or (masks / NAME).exists()) and (anew or not _tells(masks / NAME, digest)):
                _write(masks, manifest, images, window, digest)
                console.say(f"wrote {masks / NAME}: what to look at first")
    except Exception as error:  # noqa: BLE001 - the masks are done; nothing about a page may make the run fail
        console.warn(f"{NAME} could not be made: {error or type(error).__name__}")
        console.trace(error)


def _write(masks: Path, manifest: dict[str, Any], images: Mapping[str, tuple[Path, ...]], window: Window | None, digest: str) -> None:
    sources = {case: _sources(masks, entry, images.get(case, ()), window) for case, entry in manifest["cases"].items()}

    def make(beside: Beside) -> Report:
        with console.progress("report", 2 * len(sources)) as advance:
            return of_predictions(manifest, sources, facts=[(_DIGEST, digest)], beside=beside, advance=advance)

    write_report(masks, make)


def _sources(masks: Path, entry: dict[str, Any], images: tuple[Path, ...], window: Window | None) -> Sources:
    """A mask outside the folder is none of ours. root: only for messages, which nobody sees."""
    name = entry["output"]
    return Sources(masks / name if Path(name).name == name else None, images, None, masks, entry.get("array_axis"), window=window)


def _digest(manifest: dict[str, Any]) -> str:
    """Of everything that the manifest says of the masks but for the time they took."""
    told = {case: {key: value for key, value in entry.items() if key != "seconds"} for case, entry in manifest["cases"].items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _tells(page: Path, digest: str) -> bool:
    """Whether there is a page with this digest in it."""
    if not page.exists():
        return False
    with open_regular(page) as file:
        return digest.encode() in file.read()
