"""Synthetic phantoms: data sets in the Decathlon's layout for demos and tests.

A body with organs that look alike from case to case but differ in pose, size and contrast. What makes propagation hard is in it:
structures that begin or end inside the volume, one that moves from slice to slice, one that is small, and unlabelled neighbours of
similar brightness.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from slmsam2_cli.io import atomic

Array = np.ndarray[Any, Any]
Rng = np.random.Generator
Modality = Literal["MR", "CT"]

LABELS = {1: "organ", 2: "vessel", 3: "nodule"}
BODY, ORGAN, VESSEL, NODULE, GLAND, BONE = range(6)
BRIGHTNESS = {
    "MR": {BODY: 0.40, ORGAN: 0.68, VESSEL: 0.95, NODULE: 0.12, GLAND: 0.55, BONE: 0.22},  # of the scan's own scale
    "CT": {BODY: -70.0, ORGAN: 110.0, VESSEL: 260.0, NODULE: 5.0, GLAND: 55.0, BONE: 650.0},  # HU
}
AIR_HU = -1000.0


def phantom_volume(
    rng: Rng, shape: tuple[int, int, int] = (24, 96, 96), modality: Modality = "MR"
) -> tuple[Array, Array, tuple[float, float, float]]:
    """One synthetic phantom: image (Z, Y, X) float32, labels (Z, Y, X) uint8, spacing in mm (z, y, x)."""
    z, y, x = _warped_coordinates(rng, shape)
    body = _ellipsoid(z, y, x, (0, 0, 0), (9, rng.uniform(0.72, 0.82), rng.uniform(0.80, 0.90)))
    tissue = np.full(shape, BODY)
    for kind, inside in _anatomy(rng, z, y, x).items():
        tissue[inside & body] = kind
    image = _ct(rng, tissue, body) if modality == "CT" else _mr(rng, tissue, body)
    labels = np.select([tissue == ORGAN, tissue == VESSEL, tissue == NODULE], [1, 2, 3], 0) * body
    in_plane = round(float(rng.uniform(0.9, 1.1)), 3)
    return image, labels.astype(np.uint8), (round(float(rng.uniform(2.5, 3.5)), 3), in_plane, in_plane)


def _warped_coordinates(rng: Rng, shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Coordinates in [-1, 1] along z, y, x, turned, shifted and gently warped: three arrays of the shape."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    z, y, x = (c + 0.06 * _smooth(rng, shape, 4) for c in (z, y, x))
    angle, size = rng.uniform(-0.15, 0.15), rng.uniform(0.92, 1.08)
    across, along = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    shift_y, shift_x = rng.uniform(-0.06, 0.06, 2)
    return z, along / size + shift_y, across / size + shift_x


def _smooth(rng: Rng, shape: tuple[int, int, int], knots: int) -> Array:
    """Random smooth field of unit standard deviation."""
    coarse = tuple(min(knots, n) for n in shape)
    field = zoom(rng.standard_normal(coarse), [n / c for n, c in zip(shape, coarse, strict=True)], order=2, mode="nearest", grid_mode=False)
    spread = field.std()
    return np.asarray(field / spread if spread > 0 else field * 0)


def _ellipsoid(z: Array, y: Array, x: Array, centre: tuple[float, ...], radius: tuple[float, ...]) -> Array:
    """Inside of an axis-parallel ellipsoid."""
    distance = np.zeros(z.shape)
    for coordinate, middle, reach in zip((z, y, x), centre, radius, strict=True):
        distance += ((coordinate - middle) / reach) ** 2
    return np.less(distance, 1)


def _tube(z: Array, y: Array, x: Array, path: tuple[Array | float, Array | float], radius: float, start: float, end: float) -> Array:
    """Inside of a tube around the path (y, x, which may vary with z), from start to end along z."""
    return np.less((y - path[0]) ** 2 + (x - path[1]) ** 2, radius**2) & (z > start) & (z < end)


def _anatomy(rng: Rng, z: Array, y: Array, x: Array) -> dict[int, Array]:
    """Tissue -> where it is; later entries lie over earlier ones."""

    def j(spread: float) -> float:  # jitter of a position
        return float(rng.uniform(-spread, spread))

    def s() -> float:  # factor of a size
        return float(rng.uniform(0.88, 1.12))

    swing, phase = 0.12 + j(0.04), j(0.5)
    path = (0.25 + j(0.05) + 0.10 * z, 0.30 + j(0.05) + swing * np.sin(2.2 * z + phase))
    dent = _ellipsoid(z, y, x, (0.1 + j(0.1), -0.30 + j(0.04), -0.10 + j(0.04)), (0.5, 0.18, 0.16))
    return {
        BONE: _tube(z, y, x, (0.55 + j(0.03), j(0.03)), 0.13 * s(), -9, 9),
        GLAND: _ellipsoid(z, y, x, (-0.3 + j(0.1), -0.35 + j(0.05), 0.40 + j(0.05)), (0.55 * s(), 0.20 * s(), 0.24 * s())),
        ORGAN: _ellipsoid(z, y, x, (0.05 + j(0.1), -0.10 + j(0.05), -0.38 + j(0.05)), (0.62 * s(), 0.42 * s(), 0.32 * s())) & ~dent,
        VESSEL: _tube(z, y, x, path, 0.11 * s(), -9, 0.45 + j(0.2)),
        NODULE: _ellipsoid(z, y, x, (0.45 + j(0.12), -0.25 + j(0.06), 0.35 + j(0.06)), (0.32 * s(), 0.13 * s(), 0.13 * s())),
    }


def _mr(rng: Rng, tissue: Array, body: Array) -> Array:
    """Grey values without a unit: uneven coil sensitivity, Rician noise, exact zeros outside the body."""
    clean = _soft(np.vectorize(BRIGHTNESS["MR"].get, otypes=[float])(tissue) * body) * (1 + 0.12 * _smooth(rng, tissue.shape, 3))
    contrast, scale, noise = rng.uniform(0.85, 1.2), rng.uniform(200, 3000), 0.035
    grey = np.maximum(clean, 0) ** contrast
    real, imaginary = (noise * rng.standard_normal(tissue.shape) for _ in range(2))
    noisy: Array = np.rint(np.hypot(grey + real, imaginary) * scale) * body
    return noisy.astype(np.float32)


def _ct(rng: Rng, tissue: Array, body: Array) -> Array:
    """Hounsfield units with noise; air outside the body."""
    shift = {kind: hu + rng.uniform(-8, 8) for kind, hu in BRIGHTNESS["CT"].items()}
    clean = _soft(np.where(body, np.vectorize(shift.get, otypes=[float])(tissue), AIR_HU))
    noise = gaussian_filter(rng.standard_normal(tissue.shape), (0, 0.6, 0.6)) * 45
    noisy: Array = np.clip(np.rint(clean + noise), -1024, 3071)
    return noisy.astype(np.float32)


def _soft(image: Array) -> Array:
    """In-plane blur of about a pixel, as a scanner does."""
    return np.asarray(gaussian_filter(image, (0, 0.6, 0.6)))


def write_phantom_dataset(
    folder: Path,
    *,
    cases: int = 8,
    test_cases: int = 2,
    seed: int = 0,
    modality: Modality = "MR",
    shape: tuple[int, int, int] = (24, 96, 96),
) -> None:
    """A data set in the Decathlon's layout. Case k depends on seed and k alone, so more cases change none of the earlier ones."""
    entries: dict[str, list[Any]] = {"training": [], "test": []}
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(cases + test_cases):
        rng = np.random.default_rng([seed, index])
        name, size = f"phantom_{index:03d}.nii.gz", tuple(max(1, n + int(rng.integers(-n // 12, n // 12 + 1))) for n in shape)
        image, labels, spacing = phantom_volume(rng, size, modality)  # type: ignore[arg-type]
        where = "imagesTr" if index < cases else "imagesTs"
        atomic.write_bytes(folder / where / name, nifti_bytes(image, spacing))
        if index < cases:
            atomic.write_bytes(folder / "labelsTr" / name, nifti_bytes(labels, spacing))
            entries["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        else:
            entries["test"].append(f"./imagesTs/{name}")
    names = {"0": "background", **{str(value): text for value, text in LABELS.items()}}
    about = {"name": f"Phantom_{modality}", "description": "synthetic phantoms", "licence": "CC0-1.0", "tensorImageSize": "3D"}
    head = {"modality": {"0": "CT" if modality == "CT" else "MRI"}, "labels": names, "numTraining": cases, "numTest": test_cases}
    atomic.write_json(folder / "dataset.json", {**about, **head, **entries})


def nifti_bytes(array: Array, spacing_mm: tuple[float, float, float]) -> bytes:
    """A gzipped NIfTI-1 file of (Z, Y, X): int16 for float arrays of whole numbers, else uint8; axes x, y, z run to L, P, S."""
    voxels = array.astype("<i2") if array.dtype.kind == "f" else array.astype("u1")
    code, bits = (4, 16) if voxels.dtype.itemsize == 2 else (2, 8)
    sz, sy, sx = spacing_mm
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *array.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, 1, sx, sy, sz, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    struct.pack_into("<B", header, 123, 2)
    struct.pack_into("<hh", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, -sx, 0, 0, 0, 0, -sy, 0, 0, 0, 0, sz, 0)
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + voxels.tobytes(), compresslevel=6, mtime=0)
