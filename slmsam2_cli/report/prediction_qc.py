"""What a predicted mask says about itself, and what about that is odd: there is no truth to ask.

Limits are those of a first look. Every suspicion names the number behind it, and none says that a mask is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slmsam2_cli.report.case_files import LoadedCase
from slmsam2_cli.report.flags import Ends

GROSS_Z = 7.0  # twice as far out as what is odd
OUTLIER_Z, OUTLIER_CASES = 3.5, 5  # robust z of log volume; at least so many cases with the structure
OPEN_END = 0.5  # of the largest slice, on the volume's first or last one; any share where most cases do not reach it
JUMP, JUMP_SHARE, JUMP_SLICES = 3.0, 0.4, 5  # times its neighbour; of the largest slice; slices of the structure
PART = 0.1  # of the structure's voxels make a separate part a large one
DISAGREEMENT, CONFIDENCE = 0.5, 0.5


@dataclass(frozen=True)
class Found:
    """One structure of one mask.

    areas: slice -> pixels, where there are any; volume_ml; parts: voxels of its large pieces, falling; slices: of the volume;
    ends: where these begin and end in the patient ("feet", "head").
    """

    areas: Mapping[int, int]
    volume_ml: float
    parts: tuple[int, ...]
    slices: int
    ends: Ends

    @property
    def open_ends(self) -> dict[str, float]:
        """End of the volume that the structure reaches -> its share of the largest slice there."""
        largest = max(self.areas.values())
        shares = {end: self.areas.get(k, 0) / largest for k, end in ((0, self.ends[0]), (self.slices - 1, self.ends[1]))}
        return {end: share for end, share in shares.items() if share > 0 and self.slices > 1}


def measure(opened: LoadedCase) -> dict[int, Found]:
    """Label value -> what the prediction holds of it."""
    mask = opened.prediction
    if mask is None:
        return {}
    return {
        value: _found(mask[box] == value, box[opened.axis].start, opened)
        for value, box in enumerate(ndimage.find_objects(mask), start=1)
        if box is not None
    }


def _found(inside: NDArray[np.bool_], first: int, opened: LoadedCase) -> Found:
    """inside: the structure in its box; first: slice number at which the box begins."""
    across = tuple(a for a in range(3) if a != opened.axis)
    counts: Any = np.count_nonzero(inside, axis=across)
    areas = {first + k: int(n) for k, n in enumerate(counts) if n}
    total = sum(areas.values())
    labelled, _ = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.sort(np.bincount(labelled.ravel())[1:])[::-1]
    volume_ml = total * math.prod(opened.grid.spacing_mm) / 1000
    return Found(areas, volume_ml, tuple(int(n) for n in sizes if n >= PART * total), opened.slice_count, opened.ends())


@dataclass(frozen=True)
class Cohort:
    """One structure over all cases. volumes_ml: of the cases that hold it; prompted: whether any case was given it; what is usual, which
    takes at least OUTLIER_CASES to say (`known`): parts: how many large ones; open_ends: where it reaches the end of the volume."""

    volumes_ml: tuple[float, ...]
    prompted: bool
    parts: int = 1
    open_ends: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        return len(self.volumes_ml) >= OUTLIER_CASES

    @classmethod
    def of(cls, found: Sequence[Found], prompted: bool) -> Cohort:
        volumes = tuple(one.volume_ml for one in found)
        if len(found) < OUTLIER_CASES:
            return cls(volumes, prompted)
        ends = Counter(end for one in found for end in one.open_ends)
        usual = frozenset(end for end, count in ends.items() if 2 * count >= len(found))
        return cls(volumes, prompted, max(1, int(np.median([len(one.parts) for one in found]))), usual)

    def robust_z(self, volume_ml: float) -> float | None:
        """How far log volume is from the median, in units of the usual distance (0.6745 / MAD); None with too few cases or no spread."""
        if not self.known:
            return None
        logs = np.log(self.volumes_ml)
        middle = float(np.median(logs))
        spread = float(np.median(np.abs(logs - middle)))
        return 0.6745 * (math.log(volume_ml) - middle) / spread if spread > 1e-9 else None


def gross(found: Found | None, cohort: Cohort) -> bool:
    """Whether one structure alone is reason enough to look at the case before all others."""
    if found is None:
        return cohort.prompted and bool(cohort.volumes_ml)
    z = cohort.robust_z(found.volume_ml)
    return z is not None and abs(z) > GROSS_Z


def structure_flags(found: Found | None, cohort: Cohort) -> list[str]:
    """What is odd about one structure; None: there is none."""
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
    said += [
        f"still at {100 * found.open_ends[end]:.0f} % of its largest area where the volume ends towards the {end}"
        for end in _odd_ends(found, cohort)
    ]
    return [*said, *(f"area jumps from {before} to {after} pixels between slices {k} and {k + 1}" for k, before, after in _jump(found))]


def flagged_slices(found: Found, cohort: Cohort) -> dict[int, str]:
    """Slices on which something odd can be seen -> what."""
    last = {found.ends[0]: 0, found.ends[1]: found.slices - 1}
    jumps = {k if before > after else k + 1: "area jumps" for k, before, after in _jump(found)}
    return jumps | {last[end]: "the volume ends" for end in _odd_ends(found, cohort)}


def doubts(confidence: float | None, disagreement: Mapping[int, float], usually_low: bool = False) -> list[str]:
    """What the model itself was unsure of. disagreement: slice -> share; usually_low: low confidence is usual, so no news."""
    low = confidence is not None and confidence < CONFIDENCE and not usually_low
    said = [f"mean confidence {confidence:.2f}"] if low else []
    worst = max(disagreement, key=lambda k: (disagreement[k], -k), default=None)
    if worst is not None and disagreement[worst] > DISAGREEMENT:
        said.append(f"the passes from both sides disagree by {disagreement[worst]:.2f} on slice {worst}")
    return said


def unsure(confidences: Sequence[float]) -> int:
    """In how many cases confidence in a structure is low, where that is usual among enough of them; else 0."""
    low = sum(confidence < CONFIDENCE for confidence in confidences)
    return low if len(confidences) >= OUTLIER_CASES and 2 * low >= len(confidences) else 0


def _odd_ends(found: Found, cohort: Cohort) -> list[str]:
    return [end for end, share in found.open_ends.items() if end not in cohort.open_ends and (share >= OPEN_END or cohort.known)]


def _jump(found: Found) -> list[tuple[int, int, int]]:
    """(slice, pixels there, pixels on the next) of the largest step, if it is one; to nothing counts, the volume's own ends do not."""
    if len(found.areas) < JUMP_SLICES:
        return []
    largest = max(found.areas.values())
    around = range(max(0, min(found.areas) - 1), min(found.slices - 1, max(found.areas) + 1))
    steps = [(k, found.areas.get(k, 0), found.areas.get(k + 1, 0)) for k in around]
    jumps = [s for s in steps if max(s[1:]) > JUMP * min(s[1:]) and abs(s[1] - s[2]) > JUMP_SHARE * largest]
    return [max(jumps, key=lambda s: (abs(s[1] - s[2]), -s[0]))] if jumps else []
