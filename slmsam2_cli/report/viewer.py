"""Make image and masks of a case for the 3-D viewer: small NIfTI files with new headers, free of text from the source files.

A large case is cropped to its structures and a margin, then subsampled within its slices; every voxel that remains keeps its position in
the patient. Arrays are (z, y, x); the NIfTI's are (x, y, z) and RAS.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.io.volume import Grid
from slmsam2_cli.report.case_files import LoadedCase, apply_window
from slmsam2_cli.report.schema import ViewerVolumes

Array = NDArray[Any]
MAX_VOXELS = 4_000_000
MAX_EDGE = 2**15 - 1  # voxels along an axis of a NIfTI-1
MAX_STEP = 8  # subsampling within a slice before slices are left out
EMBEDDED_BYTES, SEPARATE_BYTES = 24 * 2**20, 400 * 2**20  # of base64 over all cases: in the page, and in files next to it
_MARGIN_MM, _MARGIN_FRACTION = 20.0, 0.25  # around the structures, whichever is more
_GZIP = 31  # zlib window bits for a gzip header without a time stamp
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Subset:
    """The voxels that are kept along each array axis (z, y, x): `count` of them, every `step`-th from `first` on."""

    first: tuple[int, int, int]
    step: tuple[int, int, int]
    count: tuple[int, int, int]

    @classmethod
    def of(cls, shape: Sequence[int], box: Sequence[tuple[int, int]] | None, spacing_mm: Sequence[float], axis: int, most: int) -> Subset:
        """Choose at most `most` voxels: the whole volume, else the box and a margin, else every few voxels of that.

        Subsampling begins within the slices; slices along `axis` are left out only when that is not enough.
        """
        spans = [(0, int(n)) for n in shape]
        if math.prod(shape) > most and box is not None:
            margins = [math.ceil(max(_MARGIN_MM / mm, _MARGIN_FRACTION * (b - a))) for (a, b), mm in zip(box, spacing_mm, strict=True)]
            spans = [(max(0, a - m), min(int(n), b + m)) for (a, b), m, n in zip(box, margins, shape, strict=True)]
        steps, counts = [1, 1, 1], [stop - start for start, stop in spans]
        while math.prod(counts) > most or max(counts) > MAX_EDGE:
            long = [a for a in range(3) if counts[a] > (1 if max(counts) <= MAX_EDGE else MAX_EDGE)]
            plane = [a for a in long if a != axis and (steps[a] < MAX_STEP or axis not in long)]
            steps[min(plane or long, key=lambda a: (spacing_mm[a] * steps[a], a))] += 1
            counts = [-(-(stop - start) // step) for (start, stop), step in zip(spans, steps, strict=True)]
        return cls((spans[0][0], spans[1][0], spans[2][0]), (steps[0], steps[1], steps[2]), (counts[0], counts[1], counts[2]))

    def crop(self, volume: Array) -> Array:
        """Return the kept voxels of a volume (z, y, x), as a view."""
        ranges = [slice(f, f + s * n, s) for f, s, n in zip(self.first, self.step, self.count, strict=True)]
        return volume[tuple(ranges)]

    def affine(self, grid: Grid) -> NDArray[np.float64]:
        """Return the affine (4, 4) from the index (x, y, z) of a kept voxel to its position in RAS mm."""
        kept = np.diag([*map(float, self.step[::-1]), 1.0])
        kept[:3, 3] = self.first[::-1]
        return np.asarray(_LPS_TO_RAS @ grid.affine() @ kept)


def make_volumes(loaded: LoadedCase, most: int = MAX_VOXELS) -> ViewerVolumes | None:
    """Make the files of a case, each of at most `most` voxels; None without a prediction. Labels up to 255 are stored as uint8."""
    if loaded.prediction is None:
        return None
    subset = Subset.of(loaded.grid.shape, loaded.box, loaded.grid.spacing_mm, loaded.axis, most)
    affine, files = subset.affine(loaded.grid), []
    for mask in (loaded.prediction, loaded.reference):
        voxels = None if mask is None else subset.crop(mask)
        files.append(None if voxels is None else _nifti(voxels.astype(np.uint8 if voxels.max(initial=0) < 256 else np.uint16), affine))
    image = None if loaded.image is None else _nifti(apply_window(subset.crop(loaded.image), loaded.window), affine, loaded.window)
    first, step = subset.first[loaded.axis], subset.step[loaded.axis]
    finest, note = max(subset.step), []
    if any(kept < -(-whole // n) for kept, n, whole in zip(subset.count, subset.step, loaded.grid.shape, strict=True)):
        note.append("cropped to the structures and a margin")
    if finest > 1:
        note.append(f"every {({2: '2nd', 3: '3rd'}).get(finest, f'{finest}th')} voxel along axes of fine resolution")
    return ViewerVolumes(files[0] or "", image, files[1], 2 - loaded.axis, first, step, "; ".join(note))


def viewing_order(worst_first: Sequence[str]) -> Iterator[str]:
    """Yield every case once: the worst, the median and the best, then the others from the worst on."""
    if not worst_first:
        return
    picked = list(dict.fromkeys([worst_first[0], worst_first[len(worst_first) // 2], worst_first[-1]]))
    yield from picked
    yield from (case for case in worst_first if case not in set(picked))


def _nifti(voxels: Array, affine: NDArray[np.float64], window: tuple[float, float] | None = None) -> str:
    """Encode voxels (z, y, x) as a gzipped NIfTI-1 in base64. window: intensities that 0 and 255 stand for; None for a mask.

    Masks are compressed by run lengths only, in 40 % of the time and 6 % larger.
    """
    import nibabel  # slow to import, and often another process draws

    nib: Any = nibabel  # untyped
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape[::-1])
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
    if window is not None and window[1] > window[0]:
        low, high = window
        header["scl_slope"], header["scl_inter"], header["cal_min"], header["cal_max"] = (high - low) / 255, low, low, high
    data = header.binaryblock + bytes(4) + np.ascontiguousarray(voxels).tobytes()
    packer = zlib.compressobj(6, zlib.DEFLATED, _GZIP, strategy=zlib.Z_DEFAULT_STRATEGY if window is not None else zlib.Z_RLE)
    return base64.b64encode(packer.compress(data) + packer.flush()).decode()
