"""The two values a data set is described by: its cases, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slmsam2_cli.errors import CaseError

Region = tuple[int, ...]
Structure = int | Region  # what is reported: a label value, or a region, the values that make it up


@dataclass(frozen=True)
class Case:
    """One patient: one image file per channel, or one file (or DICOM folder) holding all; label None when there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """labels: foreground value -> name, sorted by value, without background and ignore; cases sorted by id, usable by path.

    regions: what is reported where dataset.json declares regions: those, and the labels with a name of their own; else empty.
    """

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: dict[int, str]
    ignore: int | None
    file_ending: str
    training: tuple[Case, ...]
    test: tuple[Case, ...]
    problems: tuple[CaseError, ...]
    warnings: tuple[str, ...]
    regions: Mapping[Structure, str] = field(default_factory=dict)

    @property
    def structures(self) -> Mapping[Structure, str]:
        """What is reported -> its name: the labels, unless regions are declared."""
        return self.regions or dict[Structure, str](self.labels.items())
