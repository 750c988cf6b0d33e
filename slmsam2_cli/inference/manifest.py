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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.errors import CaseError, SlmSam2Error, UsageError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import InputError, sha256_of
from slmsam2_cli.io.image import Segment
from slmsam2_cli.io.volume import SEG_NRRD, Volume, image_ending, read_labels, volume_digests, write_mask

if TYPE_CHECKING:
    from slmsam2_cli.io.dicom_seg import LabelCodes

MANIFEST = "manifest.json"
FORMAT_VERSION = 2  # of the manifest and of the records
_FOLDER = ".slmsam2"
_DICOM_SEG_ENDING = ".dcm"
_LOCK_FILE = ".slmsam2-manifest.lock"
Record = dict[str, Any]


MaskFormat = Literal["auto", "nifti", "nrrd", "seg.nrrd", "dicom-seg"]
_ENDINGS = {"nifti": ".nii.gz", "nrrd": ".nrrd", "seg.nrrd": SEG_NRRD}
_COLOURS = (  # of labels without one: the qualitative palette "tab10" of matplotlib
    *((0.122, 0.467, 0.706), (1.0, 0.498, 0.055), (0.173, 0.627, 0.173), (0.839, 0.153, 0.157), (0.58, 0.404, 0.741)),
    *((0.549, 0.337, 0.294), (0.89, 0.467, 0.761), (0.498, 0.498, 0.498), (0.737, 0.741, 0.133), (0.09, 0.745, 0.812)),
)


@dataclass(frozen=True)
class MaskFiles:
    """In which files masks are written.

    format: "auto" follows the prompt (.seg.nrrd) or the image, and adds a DICOM segmentation for DICOM images; "dicom-seg" does so, too,
    and refuses other images. labels: value -> name. codes: label value -> its codes in a DICOM segmentation; of other labels they follow
    from the name. replace: DICOM segmentations that were not written here, too.
    """

    format: MaskFormat = "auto"
    labels: Mapping[int, str] = field(default_factory=dict)
    codes: Mapping[int, LabelCodes] = field(default_factory=dict)
    replace: bool = False

    def describe(self) -> str:
        """Describe the choice for the digest of a run's settings; empty for the default."""
        codes = {value: str(self.codes[value]) for value in sorted(self.codes)}
        return "" if self.format == "auto" and not codes else f" {self.format} {codes}"

    def dress(self, image: Volume) -> Volume:
        """Return the image with the ending of its mask, and all labels described; those that the prompt describes as it does."""
        described = {one.value: one for one in image.source.segments}
        named = [Segment(value, name, _COLOURS[place % len(_COLOURS)]) for place, (value, name) in enumerate(self.labels.items())]
        segments = tuple(described.get(one.value, one) for one in named)
        return replace(
            image, source=replace(image.source, mask_ending=_ENDINGS.get(self.format, image.source.mask_ending), segments=segments)
        )


@dataclass(frozen=True)
class Records:
    """The records of one folder of masks, and the files in which masks are written."""

    masks: Path
    files: MaskFiles = field(default_factory=MaskFiles)

    def read(self, case_id: str) -> Record:
        """Read the record of a case; empty when there is none of this format."""
        record = _load(self._path(case_id))
        return record if record.get("case") == case_id else {}

    def begin(self, case_id: str, metadata: Record | None = None) -> None:
        """Record that the files of a case are about to be written. metadata: what is known of them already."""
        self._write({"case": case_id, "unfinished": True, "metadata": metadata or {}})

    def save_mask(self, case_id: str, key: str, labels: NDArray[Any], image: Volume, metadata: Record) -> list[str]:
        """Write the mask (Z, Y, X) of a case, its DICOM segmentation where one is due, and its record. Returns warnings.

        Raises: CaseError when a DICOM segmentation is asked for and the image is not DICOM, or a file of its name is there that was not
        written here; OutputError when a file cannot be written; the record then says that the mask is unfinished.
        """
        image, beside, warnings = self.files.dress(image), Record(), list[str]()
        if image.source.frames or self.files.format == "dicom-seg":
            beside, warnings = self._save_segmentation(case_id, labels, image)
        self.begin(case_id, beside)
        mask = self.masks / f"{case_id}{image.source.mask_ending}"
        digest = write_mask(mask, labels, image)
        self._write({"case": case_id, "key": key, "sha256": digest, "metadata": {"output": mask.name} | metadata | beside})
        return warnings

    def _save_segmentation(self, case_id: str, labels: NDArray[Any], image: Volume) -> tuple[Record, list[str]]:
        """Write the DICOM segmentation of a case, or remove that of an earlier run where none is due. For its record; and warnings.

        Raises: CaseError, OutputError, as save_mask does.
        """
        path, known = self.masks / f"{case_id}{_DICOM_SEG_ENDING}", self.read(case_id).get("metadata", {}).get("dicom_segmentation")
        ours = isinstance(known, dict) and path.is_file() and known.get("sha256") == sha256_of(path)
        asked = self.files.format == "dicom-seg"
        if asked and (not image.source.frames or "orientation" in image.source.uncertain):
            what = "no DICOM image with a position in the patient, to which a DICOM segmentation could refer"
            raise CaseError(case_id, "", what, "Choose another --format")
        if self.files.format not in ("auto", "dicom-seg") or "orientation" in image.source.uncertain or not labels.any():
            if ours:  # of an earlier run, and out of date
                path.unlink()
            return {}, []
        from slmsam2_cli.io.dicom_seg import encode_segmentation  # highdicom is slow to import

        if path.exists() and not ours and not self.files.replace:
            remedy = "Move it, or use --overwrite or --format nifti"
            raise CaseError(case_id, path.name, "exists already, not as this slmsam2 wrote it", remedy)
        try:
            content = encode_segmentation(labels, image.source.frames, image.source.segments, self.files.codes)
        except InputError as error:
            if asked:
                raise CaseError(case_id, path.name, f"cannot be written: {error.what}", error.remedy) from None
            if ours:
                path.unlink()
            return {}, [f"case {case_id}: no DICOM segmentation: {error.what}"]
        entry = {"dicom_segmentation": {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}}
        self.begin(case_id, entry)
        atomic.write_bytes(path, content)
        return entry, []

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

    def mask_of(self, case_id: str) -> Path | None:
        """Return the mask that was written for a case and not changed since; None when there is none."""
        record = self.read(case_id)
        return self._mask(record) if self.intact(record) else None

    def lacks_segmentation(self, record: Record) -> bool:
        """Return whether the DICOM segmentation that a record names is gone."""
        known = record.get("metadata", {}).get("dicom_segmentation")
        return isinstance(known, dict) and not (self.masks / str(known.get("file"))).is_file()

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
