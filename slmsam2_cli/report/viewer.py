"""Image and masks of a case for the 3-D viewer: small NIfTI files made from scratch, so that no text of a source header is in them.

A large case is cut to its structures and a margin, then thinned in the plane of its slices; every voxel that stays keeps its place
in the patient. Arrays are (z, y, x); the NIfTI's are (x, y, z) and RAS.
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
from slmsam2_cli.report.case_files import LoadedCase, grey
from slmsam2_cli.report.schema import ViewerVolumes

Array = NDArray[Any]
MAX_VOXELS = 4_000_000
MAX_EDGE = 2**15 - 1  # of a NIfTI-1
MAX_STEP = 8  # in the plane, before slices are left out
EMBEDDED_BYTES, BESIDE_BYTES = 24 * 2**20, 400 * 2**20  # of base64: in the page, and in files beside it, over all cases
_MARGIN_MM, _MARGIN_SHARE = 20.0, 0.25
_GZIP = 31  # window bits that ask for gzip's header, without a time
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Part:
    """Which voxels are kept along each array axis (z, y, x): every `step`-th from `first` on, `count` of them."""

    first: tuple[int, int, int]
    step: tuple[int, int, int]
    count: tuple[int, int, int]

    @classmethod
    def of(cls, shape: Sequence[int], box: Sequence[tuple[int, int]] | None, spacing_mm: Sequence[float], axis: int, most: int) -> Part:
        """The whole up to `most` voxels, else the box and a margin, else that thinned: in the plane first, along `axis` only at last."""
        spans = [(0, int(n)) for n in shape]
        if math.prod(shape) > most and box is not None:
            spans = [_widened(span, int(n), mm) for span, n, mm in zip(box, shape, spacing_mm, strict=True)]
        steps = [1, 1, 1]
        while math.prod(_counts(spans, steps)) > most or max(_counts(spans, steps)) > MAX_EDGE:
            long = [a for a in range(3) if _counts(spans, steps)[a] > (1 if max(_counts(spans, steps)) <= MAX_EDGE else MAX_EDGE)]
            plane = [a for a in long if a != axis and (steps[a] < MAX_STEP or axis not in long)]
            steps[min(plane or long, key=lambda a: (spacing_mm[a] * steps[a], a))] += 1
        (z, y, x), counts = spans, _counts(spans, steps)
        return cls((z[0], y[0], x[0]), (steps[0], steps[1], steps[2]), (counts[0], counts[1], counts[2]))

    def cut(self, volume: Array) -> Array:
        """(z, y, x) -> the kept voxels, a view."""
        ranges = [slice(f, f + s * n, s) for f, s, n in zip(self.first, self.step, self.count, strict=True)]
        return volume[tuple(ranges)]

    def affine(self, grid: Grid) -> NDArray[np.float64]:
        """(4, 4): index (x, y, z) of a kept voxel -> RAS mm, where that voxel was in the whole."""
        kept = np.diag([*map(float, self.step[::-1]), 1.0])
        kept[:3, 3] = self.first[::-1]
        return np.asarray(_LPS_TO_RAS @ grid.affine() @ kept)

    def note(self, shape: Sequence[int]) -> str:
        """What is not shown, in words; empty when everything is."""
        thinned = max(self.step) > 1
        cut = any(n < -(-whole // s) for n, s, whole in zip(self.count, self.step, shape, strict=True))
        words = ["cut to the structures and a margin"] * cut
        words += [f"every {_ordinal(max(self.step))} voxel where fine"] * thinned
        return "; ".join(words)


def volumes(opened: LoadedCase, most: int = MAX_VOXELS) -> ViewerVolumes | None:
    """The case for the viewer, each file of at most `most` voxels; None without a prediction."""
    if opened.prediction is None:
        return None
    part = Part.of(opened.grid.shape, opened.box, opened.grid.spacing_mm, opened.axis, most)
    affine = part.affine(opened.grid)
    image = None if opened.image is None else _nifti(grey(part.cut(opened.image), opened.window), affine, opened.window)
    truth, prediction = (None if mask is None else _nifti(_small(part.cut(mask)), affine) for mask in (opened.truth, opened.prediction))
    first, step = part.first[opened.axis], part.step[opened.axis]
    return ViewerVolumes(prediction or "", image, truth, 2 - opened.axis, first, step, part.note(opened.grid.shape))


def viewing_order(worst_first: Sequence[str]) -> Iterator[str]:
    """Every case once, those to look at first: the worst, the middle one, the best, then the others from the worst on."""
    if not worst_first:
        return
    picked = list(dict.fromkeys([worst_first[0], worst_first[len(worst_first) // 2], worst_first[-1]]))
    yield from picked
    yield from (case for case in worst_first if case not in set(picked))


def _widened(span: tuple[int, int], size: int, mm: float) -> tuple[int, int]:
    margin = math.ceil(max(_MARGIN_MM / mm, _MARGIN_SHARE * (span[1] - span[0])))
    return max(0, span[0] - margin), min(size, span[1] + margin)


def _counts(spans: Sequence[tuple[int, int]], steps: Sequence[int]) -> list[int]:
    return [-(-(end - start) // step) for (start, end), step in zip(spans, steps, strict=True)]


def _small(mask: Array) -> Array:
    """Label values as the viewer takes them: uint8 where they fit."""
    return mask.astype(np.uint8) if not mask.size or mask.max() < 256 else mask.astype(np.uint16)


def _nifti(voxels: Array, affine: NDArray[np.float64], window: tuple[float, float] | None = None) -> str:
    """Voxels (z, y, x) as a gzipped NIfTI-1 in base64. window: the grey values that 0 and 255 stand for; None for a mask.

    Masks are packed by runs alone: in two fifths of the time, and 6 % larger.
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


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
