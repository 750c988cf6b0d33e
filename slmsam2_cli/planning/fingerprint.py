"""The fingerprint: all measurements of a dataset as one frozen value and one JSON file. It holds no settings; those are in plan.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import PlanError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.strict_json import explain
from slmsam2_cli.planning.plan import FrozenModel, digest_of, read_document

Triple = tuple[float, float, float]


class Statistics(FrozenModel):
    """Intensities of some voxels, in the image's own unit."""

    voxels: int = Field(description="number of voxels")
    mean: float
    median: float
    std: float
    min: float
    max: float
    p00_5: float = Field(description="0.5th percentile")
    p99_5: float = Field(description="99.5th percentile")


class ChannelFingerprint(FrozenModel):
    """One channel of one case."""

    whole: Statistics | None = Field(description="non-zero voxels; null when there are none")
    foreground: Statistics | None = Field(description="labelled voxels; null when there are none")


class Extent(FrozenModel):
    """Where a label lies along one anatomical axis of the oriented volume."""

    first: int = Field(description="first slice with the label")
    last: int = Field(description="last slice with the label")
    slices: int = Field(description="number of slices with the label")
    gap: int = Field(default=0, description="longest run of slices without the label between the first and the last")


class LabelFingerprint(FrozenModel):
    """One label of one case."""

    voxels: int
    extents: dict[SliceAxis, Extent] = Field(description="per anatomical axis")
    overlap: dict[SliceAxis, float] = Field(description="mean Dice of adjacent slices, of which at least one contains the label")
    copied: dict[SliceAxis, float] = Field(
        description="Dice of the label's middle slice copied to every slice, as a baseline for propagation"
    )
    borders: dict[SliceAxis, int] = Field(
        default_factory=dict, description="number of voxel faces on the border of the label, by the axis that they face"
    )


class CaseFingerprint(FrozenModel):
    """One training case. Triples are (S, P, L) in the oriented volume unless stated otherwise."""

    id: str
    stored_shape: tuple[int, int, int] = Field(description="voxels (z, y, x) as stored")
    orientation: str = Field(description="anatomical direction in which the stored x, y, z axes increase, e.g. RAS")
    shape: tuple[int, int, int] = Field(description="voxels (S, P, L)")
    spacing_mm: Triple = Field(description="mm (S, P, L)")
    content_mm: Triple = Field(description="extent of the non-zero voxels in mm (S, P, L)")
    channels: tuple[ChannelFingerprint, ...]
    labels: dict[int, LabelFingerprint] = Field(description="label value -> measurements; only labels that occur")
    warnings: tuple[str, ...] = ()

    @property
    def extent_mm(self) -> Triple:
        """Extent of the volume in mm (S, P, L)."""
        si, ap, lr = (n * mm for n, mm in zip(self.shape, self.spacing_mm, strict=True))
        return si, ap, lr

    def axis(self, planned: SliceAxis) -> SliceAxis:
        """Return the slice axis of this case: the planned one, or the axis along which it has a single slice."""
        if 1 not in self.shape or self.shape[AXES.index(planned)] == 1:
            return planned
        return AXES[self.shape.index(1)]


class Fingerprint(FrozenModel):
    """All measurements of one dataset."""

    format_version: Literal[2] = Field(default=2, description="version of this file's format")
    tool_version: str = Field(description="version of slmsam2 that measured")
    dataset_name: str
    channels: tuple[str, ...] = Field(description="channel names in order", min_length=1)
    labels: dict[int, str] = Field(description="label value -> structure name")
    ignore: int | None = Field(description="label value of voxels that are not annotated; null: none")
    cases: tuple[CaseFingerprint, ...] = Field(description="valid training cases, sorted by id")
    foreground: tuple[Statistics | None, ...] = Field(description="per channel: labelled voxels of all cases, at most 10,000 per case")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the measurements, without tool_version and without borders and gaps."""
        excluded: Any = {"labels": {"__all__": {"borders": True, "extents": {"__all__": {"gap"}}}}}
        return digest_of(self.model_dump(mode="json", exclude={"tool_version": True, "cases": {"__all__": excluded}}))


def read_fingerprint(path: Path) -> Fingerprint:
    """Read fingerprint.json.

    Raises: PlanError, with file and key, when the file is missing, no JSON, of another format_version or invalid.
    """
    value = read_document(path, "fingerprint")
    try:
        return Fingerprint.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise PlanError(f"{path.name}: {explain(error, Fingerprint)}. Run slmsam2 plan to measure again") from None


def write_fingerprint(path: Path, fingerprint: Fingerprint) -> None:
    """Write fingerprint.json atomically: after a crash the old or the new file is there."""
    atomic.write_json(path, fingerprint.model_dump(mode="json"))
