"""What a folder of masks remembers: for every mask a record of what it was made from, and the manifest they add up to.

MASKS/.slmsam2/HASH.json  one mask: what it was made from (`key`), its digest, its account for the manifest
MASKS/manifest.json       the accounts of all masks that are there

A record says that the mask is about to be written before it is, and that it is done afterwards, so that a run which is
killed in between knows the mask for its own.

What predict wrote beside its masks: which slices were given for which label, which cases the model had learned from.

`MASKS/manifest.json`:

    {"format_version": 1, "tool_version": "…", "model": {…digests…},
     "cases": {"<case id>": {"output": "<file>", "slice_axis": "SI", "array_axis": 0,
                             "prompted_slices": {"1": [12]}, "training": false,
                             "confidence": {"1": {"mean": 0.9, "slices": {"11": 0.8, …}}}, "disagreement": {"1": {"11": 0.1}}, …}}}

array_axis: the (z, y, x) axis of the stored array along which slices are numbered; prompted_slices: label value -> indices along it.
Scores rest on these; confidence and disagreement are only shown, so what cannot be understood of them is left out. Other keys are
left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from slmsam2_cli.errors import SlmSam2Error, UsageError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import image_ending, read_labels, volume_files

MANIFEST = "manifest.json"
_FOLDER = ".slmsam2"
_TURN = ".slmsam2-manifest.lock"
Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of one folder of masks."""

    masks: Path

    def read(self, case_id: str) -> Record:
        """The record of a case; empty when there is none that can be used."""
        record = _load(self._path(case_id))
        return record if record.get("case") == case_id else {}

    def begin(self, case_id: str) -> None:
        """The mask of this case is about to be written. OutputError."""
        atomic.write_json(self._path(case_id), {"format_version": 1, "case": case_id, "unfinished": True})

    def finish(self, case_id: str, key: str, metadata: Record) -> None:
        """The mask that `account` names as output is written. OutputError."""
        digest = atomic.sha256_of(self.masks / metadata["output"])
        record = {"format_version": 1, "case": case_id, "key": key, "sha256": digest, "metadata": metadata}
        atomic.write_json(self._path(case_id), record)

    def mark_stale(self, case_id: str) -> str | None:
        """Mark an earlier mask of a case that now fails as out of date; the name of the mask, if there is one. OutputError."""
        record = self.read(case_id)
        if not self.intact(record):
            return None
        atomic.write_json(self._path(case_id), record | {"stale": True})
        return str(record["metadata"]["output"])

    def unmark_stale(self, case_id: str) -> None:
        """What made the case fail is as it was before, and so is its mask. OutputError."""
        record = self.read(case_id)
        if record.pop("stale", False):
            atomic.write_json(self._path(case_id), record)

    def intact(self, record: Record) -> bool:
        """Whether the mask of a record is the one that was written."""
        path = self._mask(record)
        return path is not None and atomic.sha256_of(path) == record.get("sha256")

    def files_named(self, case_id: str) -> list[Path]:
        """Files in the folder that carry the name of this case's mask."""
        if not self.masks.is_dir():
            return []
        return [p for p in sorted(self.masks.iterdir()) if (ending := image_ending(p)) and p.name[: -len(ending)] == case_id]

    def write_manifest(self, head: Record) -> None:
        """One account of the whole folder, from every record whose mask is there, under what `head` says of this run. OutputError.

        Runs that share the folder take turns, so that none writes a manifest of records older than those another has read.
        """
        with atomic.wait_for_lock(self.masks / _TURN):
            folder = self.masks / _FOLDER
            records = [_load(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
            kept = {r["case"]: r["metadata"] for r in records if not r.get("stale") and self._mask(r)}
            atomic.write_json(self.masks / MANIFEST, head | {"cases": {case: kept[case] for case in sorted(kept)}})

    def _path(self, case_id: str) -> Path:
        return self.masks / _FOLDER / f"{hashlib.sha256(case_id.encode()).hexdigest()[:32]}.json"

    def _mask(self, record: Record) -> Path | None:
        """The mask that a record speaks of, when it is there."""
        name = record.get("metadata", {}).get("output")
        path = self.masks / name if isinstance(name, str) and Path(name).name == name else None
        return path if path is not None and path.is_file() else None


def _load(path: Path) -> Record:
    """A record; empty when it is absent, damaged or none."""
    try:
        record = atomic.read_json(path, "record of a mask") if path.exists() else {}
    except SlmSam2Error:
        return {}
    whole = isinstance(record, dict) and isinstance(record.get("case"), str) and isinstance(record.get("metadata", {}), dict)
    return record if whole else {}


def whole(path: Path, case_id: str) -> bool:
    """Whether a file is a mask that can be read."""
    try:
        read_labels(path, case=case_id, root=path.parent)
    except SlmSam2Error:
        return False
    return True


def cache_key(settings: str, inputs: Iterable[Path]) -> str:
    """Digest of everything that shapes a mask: the settings' digest and the content of its inputs; what cannot be read is absent."""
    return hashlib.sha256("\n".join([settings, *map(_content, inputs)]).encode()).hexdigest()


def _content(path: Path) -> str:
    """Digest of a volume: of its file, or of every file it consists of."""
    try:
        return " ".join(atomic.sha256_of(file) for file in ((path,) if path.is_dir() else volume_files(path)))
    except (SlmSam2Error, OSError):
        return "absent"


NAME = "manifest.json"
FORMAT_VERSION = 1


class ManifestCase(BaseModel):
    """One case as predict left it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    array_axis: Literal[0, 1, 2] | None = None
    prompted_slices: dict[int, tuple[NonNegativeInt, ...]] = Field(default_factory=dict)
    training: bool = False
    confidence: dict[int, dict[int, float]] = Field(default_factory=dict)
    disagreement: dict[int, dict[int, float]] = Field(default_factory=dict)

    @field_validator("confidence", "disagreement", mode="before")
    @classmethod
    def _by_slice(cls, value: object) -> dict[int, dict[int, float]]:
        """Label -> slice -> share, of what is one."""
        labels = value.items() if isinstance(value, dict) else ()
        return {int(label): shares for label, told in labels if _is_index(label) and (shares := _shares(told))}


class Manifest(BaseModel):
    """The predictions' own account of themselves."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    tool_version: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cases: dict[str, ManifestCase] = Field(default_factory=dict)


def _shares(told: object) -> dict[int, float]:
    """Slice -> share, from the slices alone or from an object that holds them as `slices` beside other things."""
    slices = told.get("slices", told) if isinstance(told, dict) else None
    known = slices.items() if isinstance(slices, dict) else ()
    return {int(k): float(v) for k, v in known if _is_index(k) and isinstance(v, int | float) and 0 <= v <= 1}


def _is_index(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 9


def read_manifest(predictions: Path) -> Manifest | None:
    """The manifest of a folder of predictions, None when there is none; UsageError when it cannot be understood."""
    path = predictions / NAME
    if not path.exists():
        return None
    value = atomic.read_json(path, "the predictions' manifest")
    remedy = "Run slmsam2 predict again, or remove the file to score without prompted slices"
    try:
        manifest = Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"{NAME}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}. {remedy}") from None
    if manifest.format_version > FORMAT_VERSION:
        raise UsageError(f"{NAME}: format_version {manifest.format_version} is newer than this tool's {FORMAT_VERSION}. Update slmsam2")
    return manifest
