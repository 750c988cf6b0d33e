"""Generate synthetic phantoms: data sets in the Decathlon's layout for the demo and the tests.

A phantom is a body with organs that are similar in all cases but differ in pose, size and contrast. It includes what makes propagation
difficult: structures that begin or end inside the volume, one that moves from slice to slice, a small one, and unlabelled structures
of similar intensity nearby.
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
Grid = tuple[Array, Array, Array]  # z, y and x of every voxel

LABELS = {1: "organ", 2: "vessel", 3: "nodule"}
BODY, ORGAN, VESSEL, NODULE, GLAND, BONE = range(6)
INTENSITY = {
    "MR": {BODY: 0.40, ORGAN: 0.68, VESSEL: 0.95, NODULE: 0.12, GLAND: 0.55, BONE: 0.22},  # relative to the scan's scale
    "CT": {BODY: -70.0, ORGAN: 110.0, VESSEL: 260.0, NODULE: 5.0, GLAND: 55.0, BONE: 650.0},  # HU
}
AIR_HU = -1000.0
BLUR = (0, 0.6, 0.6)  # sigma along slices, rows and columns: scanners blur by about a pixel in-plane


def phantom_volume(
    rng: Rng, shape: tuple[int, int, int] = (24, 96, 96), modality: Modality = "MR"
) -> tuple[Array, Array, tuple[float, float, float]]:
    """Generate one phantom: image (Z, Y, X) float32, labels (Z, Y, X) uint8, spacing in mm (z, y, x)."""
    grid = _warped_coordinates(rng, shape)
    body = _ellipsoid(grid, (0, 0, 0), (9, rng.uniform(0.72, 0.82), rng.uniform(0.80, 0.90)))
    tissue = np.full(shape, BODY)
    for kind, inside in _anatomy(rng, grid).items():
        tissue[inside & body] = kind
    image = _ct(rng, tissue, body) if modality == "CT" else _mr(rng, tissue, body)
    labels = np.select([tissue == ORGAN, tissue == VESSEL, tissue == NODULE], [1, 2, 3], 0) * body
    in_plane = round(float(rng.uniform(0.9, 1.1)), 3)
    return image, labels.astype(np.uint8), (round(float(rng.uniform(2.5, 3.5)), 3), in_plane, in_plane)


def _warped_coordinates(rng: Rng, shape: tuple[int, int, int]) -> Grid:
    """Return coordinates in [-1, 1] along z, y and x, rotated, shifted and slightly warped, each of the given shape."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    z, y, x = (c + 0.06 * _smooth_noise(rng, shape, 4) for c in (z, y, x))
    angle, size = rng.uniform(-0.15, 0.15), rng.uniform(0.92, 1.08)
    rotated_x, rotated_y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    shift_y, shift_x = rng.uniform(-0.06, 0.06, 2)
    return z, rotated_y / size + shift_y, rotated_x / size + shift_x


def _smooth_noise(rng: Rng, shape: tuple[int, int, int], knots: int) -> Array:
    """Return smooth noise of unit standard deviation, interpolated between at most `knots` random values per axis."""
    coarse = tuple(min(knots, n) for n in shape)
    field = zoom(rng.standard_normal(coarse), [n / c for n, c in zip(shape, coarse, strict=True)], order=2, mode="nearest", grid_mode=False)
    deviation = field.std()
    return np.asarray(field / deviation if deviation > 0 else field * 0)


def _ellipsoid(grid: Grid, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Array:
    """Return the inside of an axis-parallel ellipsoid."""
    distance = np.zeros(grid[0].shape)
    for coordinate, middle, radius in zip(grid, centre, radii, strict=True):
        distance += ((coordinate - middle) / radius) ** 2
    return np.less(distance, 1)


def _tube(grid: Grid, path: tuple[Array | float, Array | float], radius: float, start: float, end: float) -> Array:
    """Return the inside of a tube around the path (y, x, which may vary with z), from start to end along z."""
    z, y, x = grid
    return np.less((y - path[0]) ** 2 + (x - path[1]) ** 2, radius**2) & (z > start) & (z < end)


def _anatomy(rng: Rng, grid: Grid) -> dict[int, Array]:
    """Return the inside of every tissue; later tissues hide earlier ones."""

    def shift(limit: float) -> float:  # random shift of a position
        return float(rng.uniform(-limit, limit))

    def scale() -> float:  # random factor of a size
        return float(rng.uniform(0.88, 1.12))

    z = grid[0]
    swing, phase = 0.12 + shift(0.04), shift(0.5)
    path = (0.25 + shift(0.05) + 0.10 * z, 0.30 + shift(0.05) + swing * np.sin(2.2 * z + phase))
    dent = _ellipsoid(grid, (0.1 + shift(0.1), -0.30 + shift(0.04), -0.10 + shift(0.04)), (0.5, 0.18, 0.16))
    return {
        BONE: _tube(grid, (0.55 + shift(0.03), shift(0.03)), 0.13 * scale(), -9, 9),
        GLAND: _ellipsoid(
            grid,
            (-0.3 + shift(0.1), -0.35 + shift(0.05), 0.40 + shift(0.05)),
            (0.55 * scale(), 0.20 * scale(), 0.24 * scale()),
        ),
        ORGAN: _ellipsoid(
            grid,
            (0.05 + shift(0.1), -0.10 + shift(0.05), -0.38 + shift(0.05)),
            (0.62 * scale(), 0.42 * scale(), 0.32 * scale()),
        )
        & ~dent,
        VESSEL: _tube(grid, path, 0.11 * scale(), -9, 0.45 + shift(0.2)),
        NODULE: _ellipsoid(
            grid,
            (0.45 + shift(0.12), -0.25 + shift(0.06), 0.35 + shift(0.06)),
            (0.32 * scale(), 0.13 * scale(), 0.13 * scale()),
        ),
    }


def _mr(rng: Rng, tissue: Array, body: Array) -> Array:
    """Return intensities without a unit: uneven coil sensitivity, Rician noise, exact zeros outside the body."""
    clean = gaussian_filter(np.vectorize(INTENSITY["MR"].get, otypes=[float])(tissue) * body, BLUR)
    clean = clean * (1 + 0.12 * _smooth_noise(rng, tissue.shape, 3))
    contrast, scale, noise = rng.uniform(0.85, 1.2), rng.uniform(200, 3000), 0.035
    grey = np.maximum(clean, 0) ** contrast
    real, imaginary = (noise * rng.standard_normal(tissue.shape) for _ in range(2))
    noisy: Array = np.rint(np.hypot(grey + real, imaginary) * scale) * body
    return noisy.astype(np.float32)


def _ct(rng: Rng, tissue: Array, body: Array) -> Array:
    """Return Hounsfield units with noise; air outside the body."""
    shift = {kind: hu + rng.uniform(-8, 8) for kind, hu in INTENSITY["CT"].items()}
    clean = gaussian_filter(np.where(body, np.vectorize(shift.get, otypes=[float])(tissue), AIR_HU), BLUR)
    noise = gaussian_filter(rng.standard_normal(tissue.shape), BLUR) * 45
    noisy: Array = np.clip(np.rint(clean + noise), -1024, 3071)
    return noisy.astype(np.float32)


def write_phantom_dataset(
    folder: Path,
    *,
    cases: int = 8,
    test_cases: int = 2,
    seed: int = 0,
    modality: Modality = "MR",
    shape: tuple[int, int, int] = (24, 96, 96),
) -> None:
    """Write a data set in the Decathlon's layout. Case k depends on seed and k alone, so more cases leave the earlier ones unchanged."""
    entries: dict[str, list[Any]] = {"training": [], "test": []}
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index in range(cases + test_cases):
        rng = np.random.default_rng([seed, index])
        name, size = f"phantom_{index:03d}.nii.gz", tuple(max(1, n + int(rng.integers(-n // 12, n // 12 + 1))) for n in shape)
        image, labels, spacing = phantom_volume(rng, size, modality)  # type: ignore[arg-type]
        subfolder = "imagesTr" if index < cases else "imagesTs"
        atomic.write_bytes(folder / subfolder / name, nifti_bytes(image, spacing))
        if index < cases:
            atomic.write_bytes(folder / "labelsTr" / name, nifti_bytes(labels, spacing))
            entries["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        else:
            entries["test"].append(f"./imagesTs/{name}")
    names = {"0": "background", **{str(value): text for value, text in LABELS.items()}}
    header = {"name": f"Phantom_{modality}", "description": "synthetic phantoms", "licence": "CC0-1.0", "tensorImageSize": "3D"}
    contents = {"modality": {"0": "CT" if modality == "CT" else "MRI"}, "labels": names, "numTraining": cases, "numTest": test_cases}
    atomic.write_json(folder / "dataset.json", {**header, **contents, **entries})


def nifti_bytes(array: Array, spacing_mm: tuple[float, float, float]) -> bytes:
    """Encode (Z, Y, X) as a gzipped NIfTI-1 file: int16 for float arrays of whole numbers, else uint8; axes x, y, z run to L, P, S."""
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
