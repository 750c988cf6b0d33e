"""The one door through which volumes come in and masks go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.data.grid import Grid as Grid

MAX_VOXELS = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Source:
    """What a mask needs to look like the file it belongs to; opaque to everybody else.

    ending: of the file read; mask_ending: of the masks that belong to it.
    """

    ending: str
    mask_ending: str


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: voxels (C, Z, Y, X) as stored (scaled where the header asks for it) on a grid; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LabelVolume:
    """A mask: voxels (Z, Y, X), uint8 or uint16, on a grid; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...] = ()


def read_image(paths: Sequence[Path], *, case: str, root: Path, max_voxels: int = MAX_VOXELS, channels: int | None = None) -> Volume:
    """The image of one case. CaseError."""
    raise NotImplementedError


def read_labels(path: Path, *, case: str, root: Path, max_voxels: int = MAX_VOXELS) -> LabelVolume:
    """The mask of one case. CaseError."""
    raise NotImplementedError


def write_mask(path: Path, labels: NDArray[Any], like: Volume | LabelVolume) -> None:
    """(Z, Y, X) whole numbers on the grid of `like`. OutputError."""
    raise NotImplementedError


def image_ending(path: Path) -> str | None:
    """".nii.gz", ".nrrd", ... or None when the file is not a volume we read."""
    raise NotImplementedError
