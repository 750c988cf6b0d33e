"""Describe a decoded volume: its voxel grid in patient coordinates, the geometry of its source file, and the checks all readers share.

Array axes are (z, y, x); world coordinates are LPS in mm, as in ITK. No file is read here.
Tolerances when two grids are compared: shape exact; spacing 1e-3 relative; direction 1e-3; origin 1 % of a voxel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.io.files import InputError

DICOM_SERIES = "DICOM series"  # the ending of what is no single file
SPACING_TOLERANCE = 1e-3  # relative
DIRECTION_TOLERANCE = 1e-3  # largest difference of one cosine
ORIGIN_TOLERANCE = 1e-2  # voxels
SHEAR_TOLERANCE = 1e-3  # largest cosine between two axes
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular grid of voxels.

    shape, spacing_mm: (z, y, x); origin_mm: LPS (x, y, z) of voxel 0;
    direction: (3, 3), its columns are the LPS unit vectors of the array axes x, y, z (ITK's convention).
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: NDArray[np.float64]

    def affine(self) -> NDArray[np.float64]:
        """Return the matrix (4, 4) from voxel index (x, y, z, 1) to LPS mm (x, y, z, 1)."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.direction * np.array(self.spacing_mm[::-1])
        matrix[:3, 3] = self.origin_mm
        return matrix

    @classmethod
    def from_affine(cls, shape: tuple[int, int, int], affine: NDArray[np.float64], *, ras: bool = False) -> Grid:
        """Build the grid of an affine (4, 4), LPS or, as in NIfTI, RAS; its axes are made exactly orthonormal.

        Raises: InputError unless it is finite, regular and orthonormal to SHEAR_TOLERANCE; names the angle and a repaired affine.
        """
        if not np.all(np.isfinite(affine)):
            raise InputError("the affine (direction and origin) is not finite", "Export the image again from its source")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if np.any(lengths == 0) or abs(np.linalg.det(affine[:3, :3] / np.where(lengths, lengths, 1))) < 1e-6:
            raise InputError("the affine is singular: its directions are degenerate", "Export the image again from its source")
        cosines = affine[:3, :3] / lengths
        shear = float(np.max(np.abs(cosines.T @ cosines - np.eye(3))))
        if shear > SHEAR_TOLERANCE:
            repaired = nearest_orthonormal(cosines) * lengths
            rows = "; ".join(" ".join(f"{v:.5g}" for v in (*row, shift)) for row, shift in zip(repaired, affine[:3, 3], strict=True))
            what = f"the axes are not orthonormal: sheared by {np.degrees(np.arcsin(min(1.0, shear))):.2g} degrees"
            raise InputError(what, f"Resample the image to a rectangular grid; if the shear is an error, use the affine [{rows}]")
        lps = _RAS_TO_LPS @ affine if ras else affine
        columns = lps[:3, :3]
        x, y, z = (float(length) for length in np.linalg.norm(columns, axis=0))
        origin = (float(lps[0, 3]), float(lps[1, 3]), float(lps[2, 3]))
        return cls(shape, (z, y, x), origin, nearest_orthonormal(columns / np.array([x, y, z])))

    def difference(self, other: Grid) -> str | None:
        """Return None when both grids are the same, else the first difference, with this grid's value first."""
        if self.shape != other.shape:
            return f"shape {_format(self.shape)} but {_format(other.shape)} voxels (z, y, x)"
        if found := self.spacing_difference(other) or self.direction_difference(other):
            return found
        gap = self.direction.T @ (np.array(other.origin_mm) - np.array(self.origin_mm))
        if np.all(np.abs(gap) <= ORIGIN_TOLERANCE * np.array(self.spacing_mm[::-1])):
            return None
        return f"origin {_format(self.origin_mm)} but {_format(other.origin_mm)} mm (LPS)"

    def spacing_difference(self, other: Grid) -> str | None:
        """Return None, or both spacings when they differ by more than SPACING_TOLERANCE."""
        mine, theirs = np.array(self.spacing_mm), np.array(other.spacing_mm)
        if np.all(np.abs(mine - theirs) <= SPACING_TOLERANCE * np.maximum(mine, theirs)):
            return None
        return f"spacing {_format(self.spacing_mm)} but {_format(other.spacing_mm)} mm (z, y, x)"

    def direction_difference(self, other: Grid) -> str | None:
        """Return None, or both directions when any cosine differs by more than DIRECTION_TOLERANCE."""
        if np.max(np.abs(self.direction - other.direction)) <= DIRECTION_TOLERANCE:
            return None
        mine, theirs = (" ".join(_format(column + 0.0, 3) for column in grid.direction.T) for grid in (self, other))
        return f"direction {mine} but {theirs} (LPS cosines of the x, y, z axes)"


def nearest_orthonormal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the orthonormal matrix (3, 3) closest to `matrix`, of the same handedness (polar decomposition)."""
    if np.max(np.abs(matrix.T @ matrix - np.eye(3))) < 1e-14:
        return np.array(matrix, dtype=np.float64)
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right, dtype=np.float64)


def _format(values: Iterable[float], digits: int = 6) -> str:
    """Format numbers as a tuple with this many significant digits."""
    return "(" + ", ".join(f"{value:.{digits}g}" for value in values) + ")"


@dataclass(frozen=True)
class Segment:
    """A label that a mask file describes: its value, its name and its colour (red, green, blue, each 0 to 1)."""

    value: int
    name: str
    colour: tuple[float, float, float]


Uncertainty = Literal["orientation", "spacing"]


@dataclass(frozen=True, eq=False)
class Source:
    """Properties of the source file that the readers, the mask writer and the comparison of geometries use.

    ending, mask_ending: of the file read, and of masks that belong to it;
    template: a NIfTI header holding the geometry fields alone (no texts), or None;
    uncertain: parts of the geometry that the file does not state reliably;
    qform_grid: the grid of the qform where it contradicts the sform, else None;
    step: between two values that the file can hold, where its header scales whole numbers, else 0;
    segments: the labels that the file describes, as 3D Slicer does;
    frames: of a DICOM series, file and number in the file, from 0, of the frame that each slice comes from.
    """

    ending: str
    mask_ending: str
    template: bytes | None = None
    uncertain: frozenset[Uncertainty] = frozenset()
    qform_grid: Grid | None = None
    step: float = 0.0
    segments: tuple[Segment, ...] = ()
    frames: tuple[tuple[Path, int], ...] = ()


@dataclass(frozen=True, eq=False)
class DecodedVolume:
    """The content of one file: voxels (C, Z, Y, X), native byte order, finite; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...]


def check_size(size: Sequence[int], channels: int, max_voxels: int) -> None:
    """Check the size (x, y, z) and the number of channels that a header declares.

    Raises: InputError when an axis is not positive or there are more than max_voxels voxels.
    """
    if any(length < 1 for length in (*size, channels)):
        raise InputError(f"a dimension is zero or negative: {tuple(size)}", "Export the image again from its source")
    total = channels
    for length in size:
        total *= length
    if total > max_voxels:
        raise InputError(f"too large: the header declares {total} voxels, at most {max_voxels} are read", "Crop or downsample it")


def check_spacing(spacing: Sequence[float]) -> None:
    """Check a spacing (x, y, z) in mm.

    Raises: InputError unless it is finite and positive.
    """
    if not all(np.isfinite(spacing)):
        raise InputError(f"the spacing {_format(spacing)} mm is not finite", "Set the voxel size in mm in the header")
    if any(length <= 0 for length in spacing):
        raise InputError(f"the spacing {_format(spacing)} mm is not above 0", "Set the voxel size in mm in the header")
