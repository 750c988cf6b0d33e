"""Measure predicted masks and flag unusual ones, without a reference.

The limits only select cases for review: a flag names the number behind it and does not prove an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from skimage.measure import label, regionprops

from slmsam2_cli.report.case_files import LoadedCase
from slmsam2_cli.report.flags import Ends

GROSS_Z = 7.0  # robust z beyond which a case is listed first; twice OUTLIER_Z
OUTLIER_Z, OUTLIER_CASES = 3.5, 5  # robust z of log volume, given at least so many cases with the structure
OPEN_END = 0.5  # of the largest slice's area, on the volume's first or last slice; any area where most cases do not reach that end
JUMP, JUMP_SHARE, JUMP_SLICES = 3.0, 0.4, 5  # ratio of adjacent areas; difference relative to the largest slice; slices of the structure
PART = 0.1  # a connected component of at least this fraction of the structure counts as a part
DISAGREEMENT, CONFIDENCE = 0.5, 0.5  # flagged above and below


@dataclass(frozen=True)
class StructureStats:
    """One structure of one predicted mask.

    areas: slice -> pixels, only slices with the structure; parts: voxels of its parts (see PART), descending; slices: of the volume;
    ends: direction in the patient towards the first and the last slice ("feet", "head").
    """

    areas: Mapping[int, int]
    volume_ml: float
    parts: tuple[int, ...]
    slices: int
    ends: Ends

    @property
    def open_ends(self) -> dict[str, float]:
        """Return the ends of the volume that the structure reaches -> area there relative to its largest slice."""
        largest = max(self.areas.values())
        shares = {end: self.areas.get(k, 0) / largest for k, end in ((0, self.ends[0]), (self.slices - 1, self.ends[1]))}
        return {end: share for end, share in shares.items() if share > 0 and self.slices > 1}


def measure(loaded: LoadedCase) -> dict[int, StructureStats]:
    """Measure every label of the prediction: label value -> statistics; parts are connected by faces, edges or corners."""
    found: dict[int, StructureStats] = {}
    if loaded.prediction is None:
        return found
    across = tuple(axis for axis in range(3) if axis != loaded.axis)
    for region in regionprops(loaded.prediction):  # type: ignore[no-untyped-call]
        counts, first = np.count_nonzero(region.image, axis=across), region.bbox[loaded.axis]
        areas = {first + k: int(n) for k, n in enumerate(counts) if n}
        total = sum(areas.values())
        components = label(region.image, connectivity=3)  # type: ignore[no-untyped-call]
        sizes = np.sort(np.bincount(components.ravel())[1:])[::-1]
        parts = tuple(int(n) for n in sizes if n >= PART * total)
        volume_ml = total * math.prod(loaded.grid.spacing_mm) / 1000
        found[int(region.label)] = StructureStats(areas, volume_ml, parts, loaded.slice_count, loaded.ends())
    return found


@dataclass(frozen=True)
class Cohort:
    """One structure in all cases.

    volumes_ml: of the cases that contain it; prompted: whether any case has an annotated slice with it. What is usual, known from
    OUTLIER_CASES cases on: parts: number of parts; open_ends: ends of the volume that the structure reaches.
    """

    volumes_ml: tuple[float, ...]
    prompted: bool
    parts: int = 1
    open_ends: frozenset[str] = frozenset()

    @classmethod
    def of(cls, found: Sequence[StructureStats], prompted: bool) -> Cohort:
        """Summarise the structure in the cases that contain it."""
        volumes = tuple(one.volume_ml for one in found)
        if len(found) < OUTLIER_CASES:
            return cls(volumes, prompted)
        ends = Counter(end for one in found for end in one.open_ends)
        usual = frozenset(end for end, count in ends.items() if 2 * count >= len(found))
        return cls(volumes, prompted, max(1, int(np.median([len(one.parts) for one in found]))), usual)

    def robust_z(self, volume_ml: float) -> float | None:
        """Compute 0.6745 (log v - median) / MAD of a volume; None with fewer than OUTLIER_CASES cases or without any spread."""
        if len(self.volumes_ml) < OUTLIER_CASES:
            return None
        logs = np.log(self.volumes_ml)
        middle = float(np.median(logs))
        spread = float(np.median(np.abs(logs - middle)))
        return 0.6745 * (math.log(volume_ml) - middle) / spread if spread > 1e-9 else None


def is_gross_outlier(found: StructureStats | None, cohort: Cohort) -> bool:
    """Return whether a structure is empty in this case alone, or its volume is so unusual that the case is listed first."""
    if found is None:
        return cohort.prompted and bool(cohort.volumes_ml)
    z = cohort.robust_z(found.volume_ml)
    return z is not None and abs(z) > GROSS_Z


def structure_flags(found: StructureStats | None, cohort: Cohort) -> list[str]:
    """List what is unusual about a structure; found: None when the prediction does not contain it."""
    if found is None:
        others = len(cohort.volumes_ml)
        contain = f"{others} other case{'s contain' if others != 1 else ' contains'} this structure"
        return [f"empty prediction, but {contain}; check the prompt"] if cohort.prompted and others else []
    flags = []
    z = cohort.robust_z(found.volume_ml)
    if z is not None and abs(z) > OUTLIER_Z:
        median = float(np.median(cohort.volumes_ml))
        size = "large" if z > 0 else "small"
        flags.append(f"unusually {size} volume: {found.volume_ml:.3g} ml, median of all cases {median:.3g} ml; check its extent")
    if len(found.parts) > cohort.parts:
        shares = ", ".join(f"{100 * n / sum(found.areas.values()):.0f} %" for n in found.parts)
        flags.append(f"{len(found.parts)} separate parts ({shares}); check the smaller ones")
    last = {found.ends[0]: 0, found.ends[1]: found.slices - 1}
    for end in _unusual_ends(found, cohort):
        area = f"{100 * found.open_ends[end]:.0f} % of its largest area"
        flags.append(f"reaches the {end} end of the volume with {area} on slice {last[end]}; check whether it is cut off")
    for k, before, after in _area_jump(found):
        flags.append(f"area jumps from {before} to {after} pixels between slices {k} and {k + 1}; check both slices")
    return flags


def flagged_slices(found: StructureStats, cohort: Cohort) -> dict[int, str]:
    """Return the slices on which something unusual can be seen -> caption."""
    last = {found.ends[0]: 0, found.ends[1]: found.slices - 1}
    jumps = {k if before > after else k + 1: "area jumps" for k, before, after in _area_jump(found)}
    return jumps | {last[end]: "end of the volume" for end in _unusual_ends(found, cohort)}


def confidence_flags(confidence: float | None, disagreement: Mapping[int, float], usually_low: bool = False) -> list[str]:
    """List low confidence and disagreement of the passes.

    disagreement: slice -> 1 - Dice; usually_low: low confidence is usual for this structure and therefore not flagged.
    """
    flags = []
    if confidence is not None and confidence < CONFIDENCE and not usually_low:
        flags.append(f"mean confidence {confidence:.3f} (below {CONFIDENCE:g}); check the slices with the lowest confidence")
    worst = max(disagreement, key=lambda k: (disagreement[k], -k), default=None)
    if worst is not None and disagreement[worst] > DISAGREEMENT:
        flags.append(f"forward and backward pass disagree by {disagreement[worst]:.3f} on slice {worst}; annotate this slice")
    return flags


def _unusual_ends(found: StructureStats, cohort: Cohort) -> list[str]:
    """List the ends of the volume at which the structure is probably cut off, where that is not usual among the cases."""
    known = len(cohort.volumes_ml) >= OUTLIER_CASES
    return [end for end, share in found.open_ends.items() if end not in cohort.open_ends and (share >= OPEN_END or known)]


def _area_jump(found: StructureStats) -> list[tuple[int, int, int]]:
    """Find the largest jump of the area: at most one (slice, pixels there, pixels on the next slice).

    A jump to an empty slice counts; beyond the first and the last slice of the volume there is none.
    """
    if len(found.areas) < JUMP_SLICES:
        return []
    largest = max(found.areas.values())
    around = range(max(0, min(found.areas) - 1), min(found.slices - 1, max(found.areas) + 1))
    steps = [(k, found.areas.get(k, 0), found.areas.get(k + 1, 0)) for k in around]
    jumps = [s for s in steps if max(s[1:]) > JUMP * min(s[1:]) and abs(s[1] - s[2]) > JUMP_SHARE * largest]
    return [max(jumps, key=lambda s: (abs(s[1] - s[2]), -s[0]))] if jumps else []
