"""Generate masks of organs for benchmarks: a deformed ellipsoid, and a prediction whose border differs by some millimetres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from slmsam2_cli.dataset.mask_measures import bounding_box


@dataclass(frozen=True)
class Organ:
    """shape (voxels of the volume), spacing_mm, semi_axes_mm: all (z, y, x); wander_mm: deviation of the predicted border (sd)."""

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    wander_mm: float = 3.5


LIVER = Organ("liver, 1.5 l in 512 × 512 × 120", (120, 512, 512), (2.5, 0.8, 0.8), (70.0, 57.0, 90.0))
KIDNEY = Organ("kidney, 0.16 l in 512 × 512 × 120", (120, 512, 512), (2.5, 0.8, 0.8), (53.0, 25.0, 29.0), wander_mm=1.5)
SMALL = Organ("hippocampus, 40 × 50 × 35", (35, 50, 40), (1.0, 1.0, 1.0), (8.0, 17.0, 9.0), wander_mm=0.8)


def pair(organ: Organ, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return reference and prediction, each (Z, Y, X) bool. The prediction lacks the lowest slice and has two more on top."""
    rng = np.random.default_rng(seed)
    depth = _depth_mm(organ) + _wander(organ, rng, mm=5.0)
    reference = depth > 0
    prediction = depth + _wander(organ, rng, organ.wander_mm) > 0
    box = bounding_box(prediction)
    assert box is not None
    first, stop = box[0]
    prediction[first] = False
    prediction[stop : stop + 2] = prediction[stop - 1]
    return reference, prediction


def _depth_mm(organ: Organ) -> np.ndarray:
    """Return roughly the distance to the ellipsoid's surface in mm, positive inside, (Z, Y, X) float32."""
    squares = np.zeros((1, 1, 1), np.float32)
    for axis, (n, spacing, half) in enumerate(zip(organ.shape, organ.spacing_mm, organ.semi_axes_mm)):
        shape = [1, 1, 1]
        shape[axis] = n
        squares = squares + (((np.arange(n, dtype=np.float32) - n / 2) * spacing / half) ** 2).reshape(shape)
    return (1 - np.sqrt(squares)) * np.float32(min(organ.semi_axes_mm))


def _wander(organ: Organ, rng: np.random.Generator, mm: float) -> np.ndarray:
    """Return a smooth random field of standard deviation `mm` with waves of about 30 mm, (Z, Y, X) float32."""
    field = rng.standard_normal([max(2, round(n * s / 15)) for n, s in zip(organ.shape, organ.spacing_mm)]).astype(np.float32)
    for n in organ.shape:  # one axis after the other, each time the first
        between = ndimage.zoom(np.eye(len(field), dtype=np.float32), (n / len(field), 1), order=3)
        field = np.moveaxis(np.tensordot(between, field, axes=1), 0, -1)
    return np.ascontiguousarray(field * np.float32(mm / field.std()))
