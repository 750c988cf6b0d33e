"""Which of a NIfTI header's geometries holds: sform if its code is above 0, else qform, else the voxel size alone.

A header may state two geometries; the sform is used and a contradiction is told in mm. Without any form code the
orientation is unknown: axes are then taken as LPS from the origin, as ITK does. NIfTI is RAS, the grid is LPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.data.decoded import Doubt, check_affine, check_spacing, geometry_warnings
from slmsam2_cli.data.files import InputError
from slmsam2_cli.data.grid import Grid

_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # NIfTI unit codes metre and micron; everything else is taken as mm
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CONFLICT_VOXELS = 0.1


@dataclass(frozen=True, eq=False)
class Forms:
    """The geometry fields of a NIfTI header, as stored. pixdim: (qfac, x, y, z); rows: (3, 4) sform."""

    pixdim: NDArray[np.float64]
    qform_code: int
    sform_code: int
    quaternion: NDArray[np.float64]
    offset: NDArray[np.float64]
    rows: NDArray[np.float64]
    units: int


Geometry = tuple[Grid, Grid | None, frozenset[Doubt], list[str]]


def geometry(forms: Forms, size: tuple[int, int, int]) -> Geometry:
    """(grid, the qform's grid where it contradicts, doubts, warnings) for size (x, y, z). InputError."""
    shape = size[::-1]
    grid = Grid.from_affine(shape, _chosen(forms))
    warnings, odd = geometry_warnings(grid)
    doubts: set[Doubt] = set(odd)
    if forms.units in _MM_PER_UNIT:
        warnings.append(f"the header's unit of length is {'metre' if forms.units == 1 else 'micron'}; converted to mm")
    if forms.sform_code <= 0 and forms.qform_code <= 0:
        warnings.append("the orientation is unknown (no form codes): the axes are taken to run to the left, back and head")
        doubts.add("orientation")
    alternative = _second(forms, shape) if forms.sform_code > 0 else None
    gap = _largest_gap(grid, alternative) if alternative else 0.0
    if gap > CONFLICT_VOXELS * min(grid.spacing_mm):
        warnings.append(f"sform and qform disagree by up to {gap:.3g} mm; the sform is used")
        return grid, alternative, frozenset(doubts), warnings
    return grid, None, frozenset(doubts), warnings


def _chosen(forms: Forms) -> NDArray[np.float64]:
    """The checked LPS affine in mm that holds."""
    scale = np.diag([*[_MM_PER_UNIT.get(forms.units, 1.0)] * 3, 1.0])
    if forms.sform_code > 0:
        affine = scale @ np.vstack([forms.rows, [0, 0, 0, 1]])
        check_affine(affine)
        return np.asarray(_RAS_TO_LPS @ affine, np.float64)
    check_spacing(tuple(forms.pixdim[1:4]))
    if forms.qform_code > 0:
        affine = scale @ qform_affine(forms)
        check_affine(affine)
        return np.asarray(_RAS_TO_LPS @ affine, np.float64)
    return np.asarray(scale @ np.diag([*forms.pixdim[1:4], 1.0]), np.float64)


def qform_affine(forms: Forms) -> NDArray[np.float64]:
    """(4, 4) RAS affine of the quaternion, in the header's unit. InputError when it is no rotation."""
    b, c, d = forms.quaternion
    rest = 1.0 - float(b * b + c * c + d * d)
    if not np.isfinite(rest) or not np.all(np.isfinite(forms.offset)):
        raise InputError("the affine (qform direction and origin) is not finite", "Export the image again from its source")
    if rest < -1e-3:
        raise InputError("the qform direction is no rotation: its quaternion is longer than 1", "Export the image again from its source")
    quaternion = np.array([np.sqrt(max(rest, 0.0)), b, c, d])
    a, b, c, d = quaternion / np.linalg.norm(quaternion)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * forms.pixdim[1:4] * [1, 1, -1 if forms.pixdim[0] < 0 else 1]
    affine[:3, 3] = forms.offset
    return affine


def _second(forms: Forms, shape: tuple[int, int, int]) -> Grid | None:
    """The qform's grid beside a valid sform; None when there is none or it is unusable."""
    if forms.qform_code <= 0:
        return None
    try:
        return Grid.from_affine(shape, _chosen(Forms(**{**vars(forms), "sform_code": 0})))
    except InputError:
        return None


def _largest_gap(one: Grid, other: Grid) -> float:
    """The largest distance in mm between the two places of a corner voxel."""
    corners = np.array([(*corner, 1) for corner in product(*[(0, length - 1) for length in one.shape[::-1]])], np.float64)
    return float(np.max(np.linalg.norm(corners @ (one.affine() - other.affine()).T, axis=1)))
