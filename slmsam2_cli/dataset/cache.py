"""Preprocessed cases: each volume as a stack of normalised slices, read by memory map.

FOLDER/CASE/frames.npy   (C, T, H, W) float16, 0…1
FOLDER/CASE/labels.npy   (T, H, W) uint8 or uint16, when the case has a mask
FOLDER/CASE/record.json  digests of inputs, settings and arrays; written last, so a case without a matching record is incomplete
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmsam2_cli.dataset.dataset import Case, Dataset, check_pair
from slmsam2_cli.dataset.intensity import ChannelIntensityLike
from slmsam2_cli.dataset.slices import GeometryPlanLike, View, make_frames
from slmsam2_cli.errors import CaseError, OutputError, SlmSam2Error
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import error_reason, sha256_of
from slmsam2_cli.io.volume import LabelVolume, Volume, case_errors, read_image, read_labels, relative, volume_files
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 2
ARRAYS = {"frames.npy", "labels.npy"}
Array = np.ndarray[Any, Any]
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PreprocessSettings:
    """The settings of a plan that determine a preprocessed case: geometry, and intensity of each channel."""

    geometry: GeometryPlanLike
    intensity: Sequence[ChannelIntensityLike]

    def digest(self) -> str:
        """Compute the SHA-256 of these settings; other settings of the plan do not change it."""
        values = {
            "format_version": FORMAT_VERSION,
            "slice_axis": self.geometry.slice_axis,
            "in_plane_mm": self.geometry.in_plane_mm,
            "through_plane_mm": self.geometry.through_plane_mm,
            "input_size": self.geometry.storage_size,
            "crop_to_nonzero": self.geometry.crop_to_nonzero,
            "intensity": [[channel.scheme, channel.lower, channel.upper] for channel in self.intensity],
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _MappedFile:
    """The path of a memory-mapped array, sent to other processes in place of the array."""

    path: Path


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """An opened preprocessed case. frames: (C, T, H, W) float16; labels: (T, H, W) or None; both are read-only memory maps."""

    id: str
    frames: Array
    labels: Array | None
    view: View
    record: Record

    def __getstate__(self) -> dict[str, Any]:
        """Replace whole memory maps by their paths, so that another process opens the files itself; views are sent as arrays."""
        state = vars(self).copy()
        for name, value in state.items():
            if isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap):
                state[name] = _MappedFile(Path(str(value.filename)))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: atomic.open_npy(value.path) if isinstance(value, _MappedFile) else value for name, value in state.items()})


def check_not_truncated(case: PreparedCase) -> None:
    """Check that no file became shorter since it was mapped, because reading beyond its end would kill the process (SIGBUS).

    Raises: ArrayError when one did.
    """
    for name in ("frames", "labels"):
        mapped: Any = getattr(case, name)
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
            raise atomic.ArrayError(f"case {case.id}: {name}.npy was truncated while in use")


def read_pair(case: Case, dataset: Dataset) -> tuple[Volume, LabelVolume | None, tuple[str, ...]]:
    """Read image, mask (or None) and warnings of a case.

    Raises: CaseError when a file cannot be read, the grids differ, or the mask holds undeclared labels.
    """
    volume = read_image(case.images, case=case.id, root=dataset.root, channels=len(dataset.channels))
    if case.label is None:
        return volume, None, volume.warnings
    mask = read_labels(case.label, case=case.id, root=dataset.root, on=volume.grid)
    warnings = check_pair(volume, mask, dataset, case)
    return volume, mask, (*volume.warnings, *mask.warnings, *warnings)


def _inputs(case: Case, root: Path) -> dict[str, str]:
    """Compute the digests of all input files: path relative to the dataset -> SHA-256."""
    digests: dict[str, str] = {}
    for path in [*case.images, *([case.label] if case.label else [])]:
        with case_errors(case.id, path, root):
            files = volume_files(path)
        for file in files:
            with case_errors(case.id, file, root):
                digests[relative(file, root)] = sha256_of(file)
    return digests


def prepare(case: Case, dataset: Dataset, settings: PreprocessSettings, folder: Path) -> PreparedCase:
    """Preprocess one case and replace what is in FOLDER/CASE.

    Raises: CaseError when the case is invalid; OutputError when it cannot be written.
    """
    inputs = _inputs(case, dataset.root)
    volume, mask, _ = read_pair(case, dataset)
    view, frames = make_frames(volume, settings.geometry, settings.intensity)
    arrays = {"frames.npy": frames.astype(np.float16)} | ({} if mask is None else {"labels.npy": view.labels(mask.voxels)})
    place = folder / case.id
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name in ["record.json", *(ARRAYS - set(arrays))]:
            (place / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written: {error_reason(error)}") from None
    for name, array in arrays.items():
        atomic.write_npy(place / name, array)
    record = {
        "format_version": FORMAT_VERSION,
        "tool_version": VERSION,
        "case": case.id,
        "inputs": inputs,
        "settings": settings.digest(),
        "outputs": {name: sha256_of(place / name) for name in arrays},
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
        "view": view.to_json(),
    }
    atomic.write_json(place / "record.json", record)
    return open_prepared(folder, case.id)


def stale_reason(case: Case, root: Path, settings: PreprocessSettings, folder: Path, *, overwrite: bool = False) -> str | None:
    """Return why a case must be preprocessed: None when it is up to date, "" when it is new, otherwise what changed.

    Raises: CaseError when an input file cannot be read.
    """
    place, inputs = folder / case.id, _inputs(case, root)
    if not (place / "record.json").exists():
        return "the previous run was interrupted" if place.exists() else ""
    if overwrite:
        return "--overwrite"
    try:
        record = _read_record(place)
    except SlmSam2Error:
        return "record.json is damaged or from another version"
    if record["settings"] != settings.digest():
        return "geometry or intensity changed in the plan"
    changed = sorted(name for name in {*inputs, *record["inputs"]} if inputs.get(name) != record["inputs"].get(name))
    if changed:
        return f"{changed[0]} changed"
    damaged = [name for name, digest in record["outputs"].items() if not (place / name).exists() or sha256_of(place / name) != digest]
    return f"{damaged[0]} is damaged" if damaged else None


def _read_record(place: Path) -> Record:
    record = atomic.read_json(place / "record.json", "record of a preprocessed case")
    groups = ("inputs", "outputs", "shapes", "view")
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION or "settings" not in record:
        raise OutputError(f"{place.name}: record.json has another format version. Run slmsam2 preprocess")
    if any(not isinstance(record.get(group), dict) for group in groups) or not {"frames.npy"} <= set(record["outputs"]) <= ARRAYS:
        raise OutputError(f"{place.name}: record.json is incomplete. Run slmsam2 preprocess")
    return record


def open_prepared(folder: Path, case_id: str) -> PreparedCase:
    """Open one preprocessed case by memory map.

    Raises: CaseError when it is absent, incomplete, or differs from its record.
    """
    place = folder / case_id
    try:
        record = _read_record(place)
        arrays = {name: atomic.open_npy(place / name) for name in record["outputs"]}
        if any(list(array.shape) != record["shapes"][name] for name, array in arrays.items()):
            raise ValueError("shape")
        view = View.from_json(record["view"])
        return PreparedCase(case_id, arrays["frames.npy"], arrays.get("labels.npy"), view, record)
    except (SlmSam2Error, ValueError, KeyError, TypeError):
        raise CaseError(case_id, "", "not preprocessed, or incomplete", "Run slmsam2 preprocess") from None


@dataclass(frozen=True, eq=False)
class PreprocessResult:
    """The preprocessed cases, the problems of the others, and how many cases were preprocessed in this run (the rest was up to date)."""

    cases: tuple[PreparedCase, ...]
    problems: tuple[CaseError, ...]
    prepared_now: int


def prepare_all(
    dataset: Dataset,
    settings: PreprocessSettings,
    folder: Path,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    advance: Callable[..., None] = lambda steps=1, note="": None,
) -> PreprocessResult:
    """Preprocess every training case that is not up to date, one in memory at a time; an invalid case does not stop the others.

    log(line) reports why a case is preprocessed again; advance(1, case id) is called after each case. The problems include those found
    when the dataset was read.

    Raises: OutputError when a case cannot be written.
    """
    ready: list[PreparedCase] = []
    problems = list(dataset.problems)
    prepared_now = 0
    for case in dataset.training:
        try:
            reason = stale_reason(case, dataset.root, settings, folder, overwrite=overwrite)
            if reason:
                log(f"case {case.id}: preprocessing again: {reason}")
            prepared_now += reason is not None
            ready.append(open_prepared(folder, case.id) if reason is None else prepare(case, dataset, settings, folder))
        except CaseError as problem:
            problems.append(problem)
        advance(1, case.id)
    return PreprocessResult(tuple(ready), tuple(problems), prepared_now)
