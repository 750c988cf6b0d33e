"""What a predicted mask says about itself, and what about that is odd: there is no truth to ask.

Limits are those of a first look. Every suspicion names the number behind it, and none says that a mask is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slmsam2_cli.report.flags import Ends
from slmsam2_cli.report.opened import Opened

OUTLIER_Z, OUTLIER_CASES = 3.5, 5  # robust z of log volume; at least so many cases with the structure
OPEN_END = 0.5  # of the largest slice, on the volume's first or last one
JUMP, JUMP_SHARE, JUMP_SLICES = 3.0, 0.4, 5  # times its neighbour; of the largest slice; slices of the structure
PART = 0.1  # of the structure's voxels make a separate part a large one
DISAGREEMENT, CONFIDENCE = 0.5, 0.5


@dataclass(frozen=True)
class Found:
    """One structure of one mask. areas: slice -> pixels, where there are any; volume_ml; parts: voxels of its large pieces, falling."""

    areas: Mapping[int, int]
    volume_ml: float
    parts: tuple[int, ...]


def measure(opened: Opened) -> dict[int, Found]:
    """Label value -> what the prediction holds of it."""
    mask = opened.prediction
    if mask is None:
        return {}
    voxel_ml = math.prod(opened.grid.spacing_mm) / 1000
    return {
        value: _found(mask[box] == value, box[opened.axis].start, opened.axis, voxel_ml)
        for value, box in enumerate(ndimage.find_objects(mask), start=1)
        if box is not None
    }


def _found(inside: NDArray[np.bool_], first: int, axis: int, voxel_ml: float) -> Found:
    """inside: the structure in its box; first: slice number at which the box begins."""
    across = tuple(a for a in range(3) if a != axis)
    counts: Any = np.count_nonzero(inside, axis=across)
    areas = {first + k: int(n) for k, n in enumerate(counts) if n}
    total = sum(areas.values())
    labelled, _ = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.sort(np.bincount(labelled.ravel())[1:])[::-1]
    return Found(areas, total * voxel_ml, tuple(int(n) for n in sizes if n >= PART * total))


@dataclass(frozen=True)
class Cohort:
    """One structure over all cases. volumes_ml: of the cases that hold it; parts: how many large ones are usual; prompted: any case."""

    volumes_ml: tuple[float, ...]
    parts: int
    prompted: bool

    @classmethod
    def of(cls, found: Sequence[Found], prompted: bool) -> Cohort:
        usual = int(np.median([len(one.parts) for one in found])) if len(found) >= OUTLIER_CASES else 1
        return cls(tuple(one.volume_ml for one in found), max(1, usual), prompted)

    def robust_z(self, volume_ml: float) -> float | None:
        """How far log volume is from the median, in units of the usual distance (0.6745 / MAD); None with too few cases or no spread."""
        if len(self.volumes_ml) < OUTLIER_CASES:
            return None
        logs = np.log(self.volumes_ml)
        middle = float(np.median(logs))
        spread = float(np.median(np.abs(logs - middle)))
        return 0.6745 * (math.log(volume_ml) - middle) / spread if spread > 1e-9 else None


def suspicions(found: Found | None, cohort: Cohort, slices: int, ends: Ends) -> list[str]:
    """What is odd about one structure. slices: of the volume; ends: where they begin and end in the patient."""
    if found is None:
        others = len(cohort.volumes_ml)
        return [f"empty; {others} other case{'s hold' if others != 1 else ' holds'} it"] if cohort.prompted and others else []
    said = []
    z = cohort.robust_z(found.volume_ml)
    if z is not None and abs(z) > OUTLIER_Z:
        middle = float(np.median(cohort.volumes_ml))
        said.append(f"unusually {'large' if z > 0 else 'small'}: {found.volume_ml:.3g} ml, the median of all cases is {middle:.3g} ml")
    if len(found.parts) > cohort.parts:
        shares = ", ".join(f"{100 * n / sum(found.areas.values()):.0f} %" for n in found.parts)
        said.append(f"{len(found.parts)} separate parts ({shares})")
    return [*said, *_open_ends(found, slices, ends), *_jumps(found, slices)]


def doubts(confidence: float | None, disagreement: Mapping[int, float]) -> list[str]:
    """What the model itself was unsure of. disagreement: slice -> share."""
    said = [f"mean confidence {confidence:.2f}"] if confidence is not None and confidence < CONFIDENCE else []
    worst = max(disagreement, key=lambda k: (disagreement[k], -k), default=None)
    if worst is not None and disagreement[worst] > DISAGREEMENT:
        said.append(f"the passes from both sides disagree by {disagreement[worst]:.2f} on slice {worst}")
    return said


def _open_ends(found: Found, slices: int, ends: Ends) -> list[str]:
    largest = max(found.areas.values())
    return [
        f"still at {100 * found.areas[k] / largest:.0f} % of its largest area where the volume ends towards the {end}"
        for k, end in ((0, ends[0]), (slices - 1, ends[1]))
        if slices > 1 and found.areas.get(k, 0) >= OPEN_END * largest
    ]


def _jumps(found: Found, slices: int) -> list[str]:
    """The largest step between neighbouring slices, where it is one; to nothing counts, the volume's own ends do not."""
    if len(found.areas) < JUMP_SLICES:
        return []
    largest = max(found.areas.values())
    around = range(max(0, min(found.areas) - 1), min(slices - 1, max(found.areas) + 1))
    steps = [(k, found.areas.get(k, 0), found.areas.get(k + 1, 0)) for k in around]
    jumps = [s for s in steps if max(s[1:]) > JUMP * min(s[1:]) and abs(s[1] - s[2]) > JUMP_SHARE * largest]
    if not jumps:
        return []
    k, before, after = max(jumps, key=lambda s: (abs(s[1] - s[2]), -s[0]))
    return [f"area jumps from {before} to {after} pixels between slices {k} and {k + 1}"]
