"""Whether the masks that a network draws are fine enough for the structures: none should be thinner than half a pixel of them.

A line that covers less than half of every pixel it touches is nowhere more there than not, and vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint
from slmsam2_cli.planning.plan import Decision, NetworkSize

MIN_ROI_SIZE, DEFAULT_ROI_SIZE, MAX_ROI_SIZE = (
    96,
    128,
    256,
)  # below the first nano gets worse; at the second it has learned most; the largest
MASK_STRIDES: dict[NetworkSize, int] = {
    "nano": 2,
    "tiny": 4,
    "small": 4,
    "base_plus": 4,
    "large": 4,
}  # network pixels along one of the mask
MIN_MASK_PIXELS = 0.5  # in pixels of the mask


@dataclass(frozen=True)
class ThinStructure:
    """The label that needs the finest masks. width_mm: its thickness; pixel_mm: edge of a pixel of the mask that would be drawn."""

    name: str
    width_mm: float
    pixel_mm: float

    @property
    def pixels(self) -> float:
        return self.width_mm / self.pixel_mm

    def words(self) -> str:
        return f"{self.name}, the thinnest, is {self.width_mm:.2g} mm wide, a pixel of the mask {self.pixel_mm:.2g} mm"


def width_mm(case: CaseFingerprint, value: int, axis: SliceAxis) -> float | None:
    """Of a rectangle with the label's mean area and border on its slices, the shorter edge: the thickness of a line, half of a disc.

    Borders run along voxel edges. A label in several pieces counts as thinner than its pieces are, but not by more than half. None where
    its borders were not measured.
    """
    label, cut = case.labels[value], case.axis(axis)
    first, second = (one for one in AXES if one != cut)
    extent = label.extents.get(cut)
    if first not in label.borders or second not in label.borders or extent is None:
        return None
    first_mm, second_mm = case.spacing_mm[AXES.index(first)], case.spacing_mm[AXES.index(second)]
    area = label.voxels * first_mm * second_mm / extent.slices
    half = (label.borders[first] * second_mm + label.borders[second] * first_mm) / extent.slices / 2
    return (half - math.sqrt(max(0.0, half**2 - 4 * area))) / 2


def thinnest_structure(
    fingerprint: Fingerprint, axis: SliceAxis, size: NetworkSize, input_size: int, roi_scale: float | None, in_plane_mm: float
) -> ThinStructure | None:
    """The label with the fewest pixels of the mask along its width, by the medians over cases; None where nothing was measured.

    input_size: edge of what the network sees; roi_scale: in widths of what is annotated; without it, pixels of in_plane_mm.
    """
    found = []
    for value, name in fingerprint.labels.items():
        widths, pixels = [], []
        for case in (case for case in fingerprint.cases if value in case.labels):
            width = width_mm(case, value, axis)
            if width is not None:
                widths.append(width)
                seen_mm = _roi_edge_mm(case, value, axis, roi_scale) if roi_scale else in_plane_mm * input_size
                pixels.append(seen_mm / input_size * MASK_STRIDES[size])
        if widths:
            found.append(ThinStructure(name, median(widths), median(pixels)))
    return min(found, key=lambda thin: thin.pixels, default=None)


def _roi_edge_mm(case: CaseFingerprint, value: int, axis: SliceAxis, roi_scale: float) -> float:
    """Edge of the square that is looked at, at most: that of the annotated slice is smaller where the label moves or grows."""
    extents, cut = case.labels[value].extents, case.axis(axis)
    in_plane = [index for index, one in enumerate(AXES) if one != cut]
    spans = [(extents[AXES[i]].last - extents[AXES[i]].first + 1) * case.spacing_mm[i] for i in in_plane if AXES[i] in extents]
    return min(roi_scale * max(spans), max(case.extent_mm[i] for i in in_plane))


def choose_roi_input_size(fingerprint: Fingerprint, axis: SliceAxis, roi_scale: float, stored_mm: float) -> Decision[int]:
    """What nano has learned on most; less where its mask would be finer than what is stored, the double where a structure is too thin.

    stored_mm: edge of a pixel of the slices from which squares are cut.
    """
    thin = thinnest_structure(fingerprint, axis, "nano", DEFAULT_ROI_SIZE, roi_scale, 1.0)
    if thin is None:
        return Decision(DEFAULT_ROI_SIZE, "what nano has learned on most")
    if thin.pixels < 1:
        return Decision(MAX_ROI_SIZE, f"{thin.words()} at {DEFAULT_ROI_SIZE} px")
    edge = _largest_roi_edge_mm(fingerprint, axis, roi_scale) / stored_mm
    enough = max(MIN_ROI_SIZE, 32 * math.ceil(round(edge * MASK_STRIDES["nano"] / 32, 6)))
    if enough < DEFAULT_ROI_SIZE:
        return Decision(enough, f"squares of {edge:.3g} stored pixels have no use for more; {thin.words()} at {DEFAULT_ROI_SIZE} px")
    return Decision(DEFAULT_ROI_SIZE, f"what nano has learned on most; {thin.words()}")


def _largest_roi_edge_mm(fingerprint: Fingerprint, axis: SliceAxis, roi_scale: float) -> float:
    """Edge of the largest label's square, by the medians over cases."""
    by_label = [
        [_roi_edge_mm(case, value, axis, roi_scale) for case in fingerprint.cases if value in case.labels] for value in fingerprint.labels
    ]
    return max(median(edges) for edges in by_label if edges)


def refuse_to_lose(thin: ThinStructure | None, size: NetworkSize, roi_scale: float | None) -> None:
    """DatasetError where a network that sees whole slices would draw a structure nowhere; of squares only the most is known."""
    if thin is not None and thin.pixels < MIN_MASK_PIXELS and not roi_scale:
        raise DatasetError(
            f"{thin.name} is {thin.width_mm:.2g} mm wide, and a pixel of the mask that {size} draws {thin.pixel_mm:.2g} mm: it would be "
            "lost. Plan with nano, which sees squares around what is annotated (--network nano), or cut along another axis (--axis)"
        )


def resolution_warning(
    fingerprint: Fingerprint, axis: SliceAxis, size: NetworkSize, input_size: int, roi_scale: float | None
) -> str | None:
    """A line about a structure that may be too thin for the masks of squares around it; None where there is none."""
    thin = thinnest_structure(fingerprint, axis, size, input_size, roi_scale, 1.0) if roi_scale else None
    if thin is None or thin.pixels >= MIN_MASK_PIXELS:
        return None
    return (
        f"{thin.name} is {thin.width_mm:.2g} mm wide, and a pixel of its mask may be {thin.pixel_mm:.2g} mm: parts of it may be lost. "
        "Crop the images to a part of it, or give its parts labels of their own"
    )
