"""The two values a data set is described by: its cases, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmsam2_cli.errors import CaseError


@dataclass(frozen=True)
class Case:
    """One patient: one image file per channel, or one file (or DICOM folder) holding all; label None when there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """labels: foreground value -> name, sorted by value, without background and ignore; cases sorted by id, usable by path."""

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
