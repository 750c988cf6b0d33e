"""Prepared cases: each volume as a stack of normalised slices, ready to be read by memory map.

FOLDER/CASE/frames.npy   (C, T, H, W) float16, 0…1
FOLDER/CASE/labels.npy   (T, H, W) uint8 or uint16, when the case has a mask
FOLDER/CASE/record.json  what they were made from; written last, so a case without a matching record was never finished
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
from slmsam2_cli.dataset.intensity import ChannelIntensityLike, make_frames
from slmsam2_cli.dataset.slices import GeometryPlanLike, View
from slmsam2_cli.errors import CaseError, OutputError, SlmSam2Error
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import error_reason
from slmsam2_cli.io.volume import LabelVolume, Volume, case_errors, read_image, read_labels, relative, volume_files
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 2
ARRAYS = {"frames.npy", "labels.npy"}
Array = np.ndarray[Any, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class _MappedFile:
    """A file of one array."""

    path: Path


def _is_whole_map(value: object) -> bool:
    return isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap)


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One case, opened. frames: (C, T, H, W) float16; labels: (T, H, W) or None; both are read-only memory maps."""

    id: str
    frames: Array
    labels: Array | None
    view: View
    record: Record

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the files itself; what is only a part of one is sent."""
        return {name: _MappedFile(Path(value.filename)) if _is_whole_map(value) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: atomic.open_npy(value.path) if isinstance(value, _MappedFile) else value for name, value in state.items()})


def check_not_truncated(case: PreparedCase) -> None:
    """ArrayError where a file is shorter than when it was mapped: reading what is gone would end the process by a signal."""
    for name in ("frames", "labels"):
        mapped: Any = getattr(case, name)
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
            raise atomic.ArrayError(f"case {case.id}: {name}.npy was cut short while it was in use")


def read_pair(case: Case, dataset: Dataset) -> tuple[Volume, LabelVolume | None, tuple[str, ...]]:
    """A case's image and mask, found to belong together and to hold declared labels only, and warnings, one line each. CaseError."""
    volume = read_image(case.images, case=case.id, root=dataset.root, channels=len(dataset.channels))
    if case.label is None:
        return volume, None, volume.warnings
    mask = read_labels(case.label, case=case.id, root=dataset.root)
    warnings = check_pair(volume, mask, dataset, case)
    return volume, mask, (*volume.warnings, *mask.warnings, *warnings)


def settings_digest(geometry: GeometryPlanLike, intensity: Sequence[ChannelIntensityLike]) -> str:
    """SHA-256 of the decisions that shape a prepared case, and of nothing else in the plan."""
    decisions = {
        "format_version": FORMAT_VERSION,
        "slice_axis": geometry.slice_axis,
        "in_plane_mm": geometry.in_plane_mm,
        "through_plane_mm": geometry.through_plane_mm,
        "input_size": geometry.stack_size,
        "crop_to_nonzero": geometry.crop_to_nonzero,
        "intensity": [[channel.scheme, channel.lower, channel.upper] for channel in intensity],
    }
    return hashlib.sha256(json.dumps(decisions, sort_keys=True).encode()).hexdigest()


def _inputs(case: Case, root: Path) -> dict[str, str]:
    """Content of every input file: path relative to the data set -> SHA-256."""
    digests: dict[str, str] = {}
    for path in [*case.images, *([case.label] if case.label else [])]:
        with case_errors(case.id, path, root):
            files = volume_files(path)
        for file in files:
            with case_errors(case.id, file, root):
                digests[relative(file, root)] = atomic.sha256_of(file)
    return digests


def prepare(
    case: Case, dataset: Dataset, geometry: GeometryPlanLike, intensity: Sequence[ChannelIntensityLike], folder: Path
) -> PreparedCase:
    """Make one case ready, whatever is there already. CaseError when the case is unusable, OutputError when it cannot be written."""
    inputs = _inputs(case, dataset.root)
    volume, mask, _ = read_pair(case, dataset)
    view, frames = make_frames(volume, geometry, intensity)
    labels = None if mask is None else view.labels(mask.voxels)
    _write(folder / case.id, frames.astype(np.float16), labels, view, inputs, settings_digest(geometry, intensity))
    return open_prepared(folder, case.id)


def stale_reason(
    case: Case,
    root: Path,
    geometry: GeometryPlanLike,
    intensity: Sequence[ChannelIntensityLike],
    folder: Path,
    *,
    overwrite: bool = False,
) -> str | None:
    """None when the case stands as it should; "" when it was never made; otherwise what changed. CaseError when an input cannot be read."""
    place, inputs = folder / case.id, _inputs(case, root)
    if not (place / "record.json").exists():
        return "the last attempt was not finished" if place.exists() else ""
    if overwrite:
        return "--overwrite"
    try:
        record = _read_record(place)
    except SlmSam2Error:
        return "its record is damaged or was written by another version"
    if record["settings"] != settings_digest(geometry, intensity):
        return "the plan's geometry or intensities changed"
    changed = sorted(name for name in {*inputs, *record["inputs"]} if inputs.get(name) != record["inputs"].get(name))
    if changed:
        return f"{changed[0]} changed"
    damaged = [
        name for name, digest in record["outputs"].items() if not (place / name).exists() or atomic.sha256_of(place / name) != digest
    ]
    return f"{damaged[0]} is damaged" if damaged else None


def _write(place: Path, frames: Array, mask: Array | None, view: View, inputs: dict[str, str], settings: str) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "record.json").unlink(missing_ok=True)
        if mask is None:
            (place / "labels.npy").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written: {error_reason(error)}") from None
    arrays = {"frames.npy": frames} | ({"labels.npy": mask} if mask is not None else {})
    for name, array in arrays.items():
        atomic.write_npy(place / name, array)
    record = {
        "format_version": FORMAT_VERSION,
        "tool_version": VERSION,
        "case": place.name,
        "inputs": inputs,
        "settings": settings,
        "outputs": {name: atomic.sha256_of(place / name) for name in arrays},
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
        "view": view.to_json(),
    }
    atomic.write_json(place / "record.json", record)


def _read_record(place: Path) -> Record:
    record = atomic.read_json(place / "record.json", "record of a prepared case")
    groups = ("inputs", "outputs", "shapes", "view")
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION or "settings" not in record:
        raise OutputError(f"{place.name}: record.json is not a record of this version")
    if any(not isinstance(record.get(group), dict) for group in groups) or not {"frames.npy"} <= set(record["outputs"]) <= ARRAYS:
        raise OutputError(f"{place.name}: record.json is not whole")
    return record


def open_prepared(folder: Path, case_id: str) -> PreparedCase:
    """One prepared case by memory map. CaseError when it is absent, unfinished or not what its record says."""
    place = folder / case_id
    try:
        record = _read_record(place)
        arrays = {name: atomic.open_npy(place / name) for name in record["outputs"]}
        if any(list(array.shape) != record["shapes"][name] for name, array in arrays.items()):
            raise ValueError("shape")
        view = View.from_json(record["view"])
        return PreparedCase(case_id, arrays["frames.npy"], arrays.get("labels.npy"), view, record)
    except (SlmSam2Error, ValueError, KeyError, TypeError):
        raise CaseError(case_id, "", "is not preprocessed, or only in part", "Run slmsam2 preprocess") from None


@dataclass(frozen=True, eq=False)
class PreprocessResult:
    """What prepare_all did. prepared_now: how many of the cases were made now rather than found ready."""

    cases: tuple[PreparedCase, ...]
    problems: tuple[CaseError, ...]
    prepared_now: int


def prepare_all(
    dataset: Dataset,
    geometry: GeometryPlanLike,
    intensity: Sequence[ChannelIntensityLike],
    folder: Path,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    advance: Callable[..., None] = lambda steps=1, note="": None,
) -> PreprocessResult:
    """Every training case, one in memory at a time; a bad case does not stop the others.

    log() hears why a case is made again; advance() is called after each. problems include those found when the data set was read.
    """
    ready: list[PreparedCase] = []
    problems = list(dataset.problems)
    prepared_now = 0
    for case in dataset.training:
        try:
            reason = stale_reason(case, dataset.root, geometry, intensity, folder, overwrite=overwrite)
            if reason:
                log(f"case {case.id}: prepared again: {reason}")
            prepared_now += reason is not None
            ready.append(prepare(case, dataset, geometry, intensity, folder) if reason is not None else open_prepared(folder, case.id))
        except CaseError as problem:
            problems.append(problem)
        advance(1, case.id)
    return PreprocessResult(tuple(ready), tuple(problems), prepared_now)
