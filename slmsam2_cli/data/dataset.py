"""What a data set holds: cases, channels and labels, found by dataset.json and by the folders beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmsam2_cli.errors import CaseError


@dataclass(frozen=True)
class Case:
    """One patient: one image file per channel, or one file holding all channels; label None when there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """labels: foreground value -> name, sorted by value, without background and ignore; cases sorted by id."""

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


def read_dataset(root: Path) -> Dataset:
    """The data set at `root`. DatasetError when dataset.json itself is unusable."""
    raise NotImplementedError


def read_image_folder(folder: Path) -> tuple[tuple[Case, ...], tuple[CaseError, ...]]:
    """Every volume in a folder, as cases without labels."""
    raise NotImplementedError


def find_label(folder: Path, case_id: str) -> Path | None:
    """The mask named like the case, of any ending we read."""
    raise NotImplementedError
