"""A mask brought onto another grid, when a person asks for it: each voxel takes the value of the nearest one."""

from __future__ import annotations

import numpy as np

from slmsam2_cli.data.grid import Grid


def onto(grid: Grid, labels: np.ndarray, source: Grid) -> tuple[np.ndarray, int]:
    """(labels (Z, Y, X) on `grid`, number of labelled voxels of `source` that lie outside it). 0 where `source` does not reach."""
    there = _index_map(grid, source)
    from scipy import ndimage  # slow to import, and rarely needed

    moved = ndimage.affine_transform(
        labels, there[:3, :3], offset=there[:3, 3], output_shape=grid.shape, output=labels.dtype, order=0, mode="grid-constant", cval=0
    )
    return np.asarray(moved), _outside(grid, labels, source)


def _outside(grid: Grid, labels: np.ndarray, source: Grid) -> int:
    back = _index_map(source, grid)
    voxels = np.argwhere(labels)
    places = voxels @ back[:3, :3].T + back[:3, 3]
    inside = np.all((places >= -0.5) & (places < np.array(grid.shape) - 0.5), axis=1)
    return int(np.count_nonzero(~inside))


def _index_map(start: Grid, end: Grid) -> np.ndarray:
    """(4, 4): index (z, y, x, 1) on `start` -> the same place's index on `end`."""
    matrix = np.linalg.solve(end.affine(), start.affine())
    order = [2, 1, 0, 3]
    return np.asarray(matrix[np.ix_(order, order)])
