"""What every reader of one file hands on, and what a mask needs to look like that file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.data.files import InputError
from slmsam2_cli.data.grid import Grid, nearest_orthonormal

SHEAR_TOLERANCE = 1e-3
_SPACING_PLAUSIBLE_MM = (0.01, 100.0)

Doubt = Literal["orientation", "spacing"]


@dataclass(frozen=True, eq=False)
class Source:
    """Opaque to everybody but the readers, the mask writer and the comparison of geometries.

    ending, mask_ending: of the file read, and of masks that belong to it;
    template: a NIfTI header holding the geometry fields alone (no texts), or None;
    doubts: what the file does not really know about its geometry;
    alternative: the grid by the qform, where the sform says something else.
    """

    ending: str
    mask_ending: str
    template: bytes | None = None
    doubts: frozenset[Doubt] = frozenset()
    alternative: Grid | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """One file: voxels (C, Z, Y, X), native byte order, finite; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...]


def check_size(size: Sequence[int], channels: int, max_voxels: int) -> None:
    """size (x, y, z). InputError when an axis is not positive or there are more voxels than allowed."""
    if any(length < 1 for length in (*size, channels)):
        raise InputError(f"a dimension is zero or negative: {tuple(size)}", "Export the image again from its source")
    total = channels
    for length in size:
        total *= length
    if total > max_voxels:
        raise InputError(f"too large: the header declares {total} voxels, at most {max_voxels} are read", "Crop it, or raise --max-voxels")


def check_spacing(spacing: Sequence[float]) -> None:
    """spacing (x, y, z) mm. InputError unless finite and positive."""
    if not all(np.isfinite(spacing)):
        raise InputError(f"the spacing {_tuple(spacing)} mm is not finite", "Set the voxel size in mm in the header")
    if any(length <= 0 for length in spacing):
        raise InputError(f"the spacing {_tuple(spacing)} mm is not above 0", "Set the voxel size in mm in the header")


def check_affine(affine: NDArray[np.float64]) -> None:
    """LPS or RAS (4, 4). InputError unless finite, regular and orthonormal to 1e-3 (with the angle and the repaired affine)."""
    if not np.all(np.isfinite(affine)):
        raise InputError("the affine (direction and origin) is not finite", "Export the image again from its source")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if np.any(lengths == 0) or abs(np.linalg.det(affine[:3, :3] / np.where(lengths, lengths, 1))) < 1e-6:
        raise InputError("the affine is singular: its directions are degenerate", "Export the image again from its source")
    cosines = affine[:3, :3] / lengths
    gram = np.abs(cosines.T @ cosines - np.eye(3))
    if np.max(gram) > SHEAR_TOLERANCE:
        angle = np.degrees(np.arcsin(min(1.0, float(np.max(gram)))))
        repaired = nearest_orthonormal(cosines) * lengths
        rows = "; ".join(" ".join(f"{v:.5g}" for v in (*row, shift)) for row, shift in zip(repaired, affine[:3, 3], strict=True))
        what = f"the axes are not orthonormal: sheared by {angle:.2g} degrees"
        raise InputError(what, f"Resample the image to a rectangular grid; if the shear is an error, use the affine [{rows}]")


def geometry_warnings(grid: Grid) -> tuple[list[str], frozenset[Doubt]]:
    """Warnings about an implausible spacing or a very small volume, and the doubts that follow."""
    warnings: list[str] = []
    low, high = _SPACING_PLAUSIBLE_MM
    odd = min(grid.spacing_mm) < low or max(grid.spacing_mm) > high
    if odd:
        warnings.append(f"the spacing {_tuple(grid.spacing_mm)} mm (z, y, x) is implausible; another unit than mm?")
    if sorted(grid.shape)[1] < 8:
        warnings.append(f"a very small volume: {grid.shape} voxels (z, y, x)")
    return warnings, frozenset({"spacing"}) if odd else frozenset()


def value_warnings(voxels: NDArray[Any]) -> list[str]:
    """Warnings about a constant image or an extreme range. InputError when a value is not finite."""
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(_not_finite(voxels), "Replace these values, for instance by the background's, and try again")
    if low == high:
        return [f"a constant image: every voxel is {low:g}"]
    if max(abs(low), abs(high)) > 1e12:
        return [f"an extreme range of values: {low:g} to {high:g}"]
    return []


def _not_finite(voxels: NDArray[Any]) -> str:
    nan = sum(int(np.isnan(slab).sum()) for channel in voxels for slab in channel)
    infinite = sum(int(np.isinf(slab).sum()) for channel in voxels for slab in channel)
    counts = [f"{nan} NaN"] * (nan > 0) + [f"{infinite} infinite (Inf)"] * (infinite > 0)
    return f"{' and '.join(counts)} of {voxels.size} voxels, all must be finite"


def _tuple(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
