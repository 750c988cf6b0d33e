"""Where the voxels of a volume lie in the patient.

Array axes are (z, y, x); the world is LPS millimetres, as in ITK. Nothing here reads a file.
Tolerances: shape exact; spacing 1e-3 relative; direction 1e-3; origin 1 % of a voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPACING_TOLERANCE = 1e-3  # relative
DIRECTION_TOLERANCE = 1e-3  # largest difference of one cosine
ORIGIN_TOLERANCE = 1e-2  # voxels


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
        """(4, 4): voxel index (x, y, z, 1) -> LPS mm (x, y, z, 1)."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.direction * np.array(self.spacing_mm[::-1])
        matrix[:3, 3] = self.origin_mm
        return matrix

    @classmethod
    def from_affine(cls, shape: tuple[int, int, int], affine: NDArray[np.float64]) -> Grid:
        """The grid of an LPS affine (4, 4), its axes made exactly orthonormal; the affine must be finite and regular."""
        columns = affine[:3, :3]
        x, y, z = (float(length) for length in np.linalg.norm(columns, axis=0))
        origin = (float(affine[0, 3]), float(affine[1, 3]), float(affine[2, 3]))
        return cls(shape, (z, y, x), origin, nearest_orthonormal(columns / np.array([x, y, z])))

    def difference(self, other: Grid) -> str | None:
        """None when both are the same grid, else the first thing that differs, this grid's value first."""
        if self.shape != other.shape:
            return f"shape {_numbers(self.shape)} but {_numbers(other.shape)} voxels (z, y, x)"
        return self.spacing_difference(other) or self.direction_difference(other) or self.origin_difference(other)

    def spacing_difference(self, other: Grid) -> str | None:
        """None, or both spacings when they differ by more than one part in a thousand."""
        mine, theirs = np.array(self.spacing_mm), np.array(other.spacing_mm)
        if np.all(np.abs(mine - theirs) <= SPACING_TOLERANCE * np.maximum(mine, theirs)):
            return None
        return f"spacing {_numbers(self.spacing_mm)} but {_numbers(other.spacing_mm)} mm (z, y, x)"

    def direction_difference(self, other: Grid) -> str | None:
        """None, or both directions when any cosine differs by more than 1e-3."""
        if np.max(np.abs(self.direction - other.direction)) <= DIRECTION_TOLERANCE:
            return None
        return f"direction {_axes(self.direction)} but {_axes(other.direction)} (LPS cosines of the x, y, z axes)"

    def origin_difference(self, other: Grid) -> str | None:
        """None, or both origins when they are further apart than one hundredth of a voxel."""
        gap = self.direction.T @ (np.array(other.origin_mm) - np.array(self.origin_mm))
        if np.all(np.abs(gap) <= ORIGIN_TOLERANCE * np.array(self.spacing_mm[::-1])):
            return None
        return f"origin {_numbers(self.origin_mm)} but {_numbers(other.origin_mm)} mm (LPS)"


def nearest_orthonormal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The orthonormal (3, 3) closest to `matrix`, of the same handedness (polar decomposition)."""
    if np.max(np.abs(matrix.T @ matrix - np.eye(3))) < 1e-14:
        return np.array(matrix, dtype=np.float64)
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right, dtype=np.float64)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _axes(direction: NDArray[np.float64]) -> str:
    return " ".join("(" + ", ".join(f"{cosine + 0.0:.3g}" for cosine in column) + ")" for column in direction.T)
