"""What predict saves with the masks that io/volume.py writes: one record per mask, and the manifest that collects them.

MASKS/.slmsam2/HASH.json  one mask: a digest of its inputs (`key`), its own SHA-256, its metadata for the manifest
MASKS/manifest.json       the metadata of all masks in the folder:

    {"format_version": 2, "tool_version": "…", "model": {…digests…},
     "cases": {"<case id>": {"output": "<file>", "slice_axis": "SI", "array_axis": 0,
                             "annotated_slices": {"1": [12]}, "training": false,
                             "confidence": {"1": {"mean": 0.9, "slices": {"11": 0.8, …}}}, "disagreement": {"1": {"11": 0.1}}, …}}}

array_axis: the axis of the stored array (z, y, x) along which slices are numbered; annotated_slices: label value -> indices along it.
training: whether the model was trained on the case. Scores rest on these; confidence and disagreement are only shown, so values that
cannot be read are left out. Other keys are ignored.

A record is written before its mask, as unfinished, and again afterwards, so that the next run knows a mask that a killed run left.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.errors import SlmSam2Error, UsageError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import sha256_of
from slmsam2_cli.io.volume import Volume, image_ending, read_labels, volume_digests, write_mask

MANIFEST = "manifest.json"
FORMAT_VERSION = 2  # of the manifest and of the records
_FOLDER = ".slmsam2"
_LOCK_FILE = ".slmsam2-manifest.lock"
Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of one folder of masks."""

    masks: Path

    def read(self, case_id: str) -> Record:
        """Read the record of a case; empty when there is none of this format."""
        record = _load(self._path(case_id))
        return record if record.get("case") == case_id else {}

    def begin(self, case_id: str) -> None:
        """Record that the mask of a case is about to be written."""
        self._write({"case": case_id, "unfinished": True})

    def save_mask(self, case_id: str, key: str, labels: NDArray[Any], image: Volume, metadata: Record) -> None:
        """Write the mask (Z, Y, X) of a case in the format of its image, and its record.

        Raises: OutputError when a file cannot be written; the record then says that the mask is unfinished.
        """
        self.begin(case_id)
        mask = self.masks / f"{case_id}{image.source.mask_ending}"
        digest = write_mask(mask, labels, image)
        self._write({"case": case_id, "key": key, "sha256": digest, "metadata": {"output": mask.name} | metadata})

    def mark_stale(self, case_id: str) -> str | None:
        """Mark the earlier mask of a case that now fails as out of date. Returns its file name, None when there is no such mask."""
        record = self.read(case_id)
        if not self.intact(record):
            return None
        self._write(record | {"stale": True})
        return str(record["metadata"]["output"])

    def unmark_stale(self, case_id: str) -> None:
        """Mark a mask as up to date again, since its inputs are as they were."""
        record = self.read(case_id)
        if record.pop("stale", False):
            self._write(record)

    def intact(self, record: Record) -> bool:
        """Return whether the mask of a record is still the file that was written."""
        path = self._mask(record)
        return path is not None and sha256_of(path) == record.get("sha256")

    def files_named(self, case_id: str) -> list[Path]:
        """List the files that have the name of this case's mask, whatever their format."""
        if not self.masks.is_dir():
            return []
        return [p for p in sorted(self.masks.iterdir()) if (ending := image_ending(p)) and p.name[: -len(ending)] == case_id]

    def holds_predictions(self) -> bool:
        """Return whether predict wrote masks here and nobody has listed annotated slices beside them since."""
        written = (self.masks / MANIFEST).exists() and (self.masks / _FOLDER).is_dir()
        return written and not any(self.masks.glob("*.prompts.json"))

    def write_manifest(self, header: Record) -> None:
        """Write the manifest: `header`, and the metadata of every case whose mask is in the folder.

        Runs that share the folder wait for each other, so that none writes a manifest from records that another has since replaced.
        """
        with atomic.wait_for_lock(self.masks / _LOCK_FILE):
            folder = self.masks / _FOLDER
            records = [_load(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
            kept = {r["case"]: r["metadata"] for r in records if not r.get("stale") and self._mask(r)}
            atomic.write_json(self.masks / MANIFEST, header | {"cases": {case: kept[case] for case in sorted(kept)}})

    def _write(self, record: Record) -> None:
        atomic.write_json(self._path(record["case"]), {"format_version": FORMAT_VERSION} | record)

    def _path(self, case_id: str) -> Path:
        return self.masks / _FOLDER / f"{hashlib.sha256(case_id.encode()).hexdigest()[:32]}.json"

    def _mask(self, record: Record) -> Path | None:
        """Return the path of a record's mask; None when there is no such file."""
        name = record.get("metadata", {}).get("output")
        path = self.masks / name if isinstance(name, str) and Path(name).name == name else None
        return path if path is not None and path.is_file() else None


def _load(path: Path) -> Record:
    """Read a record; empty when it is absent, damaged or of another format version."""
    try:
        record = atomic.read_json(path, "record of a mask") if path.exists() else {}
    except SlmSam2Error:
        return {}
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        return {}
    return record if isinstance(record.get("case"), str) and isinstance(record.get("metadata", {}), dict) else {}


def is_readable_mask(path: Path, case_id: str) -> bool:
    """Return whether a file is a mask that can be read."""
    try:
        read_labels(path, case=case_id, root=path.parent)
    except SlmSam2Error:
        return False
    return True


def digest_inputs(settings: str, case: Case) -> tuple[str, frozenset[str]]:
    """Compute the key of a mask, a SHA-256 of settings and content of its inputs, and the SHA-256 of each image file.

    A file that cannot be read counts as absent.
    """
    digests: list[tuple[str, ...]] = []
    for path in (*case.images, *(file for file in (case.prompts.mask, case.prompts.listing) if file is not None)):
        try:
            digests.append(volume_digests(path))
        except (SlmSam2Error, OSError):
            digests.append(("absent",))
    key = hashlib.sha256("\n".join([settings, *(" ".join(files) for files in digests)]).encode()).hexdigest()
    return key, frozenset(digest for files in digests[: len(case.images)] for digest in files)


class ManifestCase(BaseModel):
    """The metadata of one case."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    array_axis: Literal[0, 1, 2] | None = None
    annotated_slices: dict[int, tuple[NonNegativeInt, ...]] = Field(default_factory=dict)
    training: bool = False
    confidence: dict[int, dict[int, float]] = Field(default_factory=dict)
    disagreement: dict[int, dict[int, float]] = Field(default_factory=dict)

    @field_validator("confidence", "disagreement", mode="before")
    @classmethod
    def _by_slice(cls, value: object) -> dict[int, dict[int, float]]:
        """Keep what is label -> slice -> number from 0 to 1; a label has an object of slices, or one that holds them as `slices`."""
        found: dict[int, dict[int, float]] = {}
        for label, entry in value.items() if isinstance(value, dict) else ():
            slices = entry.get("slices", entry) if isinstance(entry, dict) else None
            known = slices.items() if isinstance(slices, dict) else ()
            numbers = {int(t): float(v) for t, v in known if _is_index(t) and isinstance(v, int | float) and 0 <= v <= 1}
            if numbers and _is_index(label):
                found[int(label)] = numbers
        return found


class Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    format_version: int = FORMAT_VERSION
    tool_version: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cases: dict[str, ManifestCase] = Field(default_factory=dict)


def _is_index(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 9


def read_manifest(predictions: Path) -> Manifest | None:
    """Read the manifest of a folder of predictions; None when there is none.

    Raises: UsageError when it cannot be read or is of another format version.
    """
    path = predictions / MANIFEST
    if not path.exists():
        return None
    value = atomic.read_json(path, "the predictions' manifest")
    remedy = "Run slmsam2 predict --overwrite again, or remove the file to score without annotated slices"
    version = value.get("format_version", FORMAT_VERSION) if isinstance(value, dict) else FORMAT_VERSION
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(f"{MANIFEST}: format_version {version} is newer than this tool's {FORMAT_VERSION}. Update slmsam2")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise UsageError(f"{MANIFEST}: format_version {version} is of an older slmsam2 (now {FORMAT_VERSION}). {remedy}")
    try:
        return Manifest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"{MANIFEST}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}. {remedy}") from None
