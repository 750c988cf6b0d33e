"""Write cases with a block in them to disk, or build them in memory."""

from __future__ import annotations

import numpy as np

from slmsam2_cli.io.volume import Grid, LabelVolume, Source, write_mask
from slmsam2_cli.report.case_files import LoadedCase

LPS = np.eye(3)


def grid(shape=(8, 20, 24), spacing=(3.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=LPS):
    return Grid(tuple(shape), tuple(map(float, spacing)), tuple(map(float, origin)), np.asarray(direction, float))


def block(shape=(8, 20, 24), z=(2, 6), y=(5, 15), x=(8, 20), value=1):
    mask = np.zeros(shape, np.uint8)
    mask[slice(*z), slice(*y), slice(*x)] = value
    return mask


def loaded_case(prediction=None, reference=None, image=None, axis=0, **geometry):
    shape = next(a.shape for a in (prediction, reference) if a is not None)
    return LoadedCase(grid(shape, **geometry), axis, prediction, reference, image)


def saved(path, voxels, like=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mask(path, voxels, LabelVolume(voxels, like or grid(voxels.shape), Source(".nii.gz", ".nii.gz")))
    return path
