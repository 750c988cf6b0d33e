"""Check whether predicted masks are fine enough for the structures: none should be thinner than half a mask pixel.

A line that covers less than half of every mask pixel it touches is background in all of them, so it vanishes from the mask. Network size
and input size are chosen in rules.py; the input size of ROI crops is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint
from slmsam2_cli.planning.plan import Decision, NetworkSize

MIN_ROI_SIZE = 96  # pixels; below it nano's masks get worse
DEFAULT_ROI_SIZE = 128  # nano's main training resolution
MAX_ROI_SIZE = 256
MASK_STRIDES: dict[NetworkSize, int] = {"nano": 2, "tiny": 4, "small": 4, "base_plus": 4, "large": 4}  # input pixels per mask pixel
MIN_MASK_PIXELS = 0.5  # width of a structure


@dataclass(frozen=True)
class ThinStructure:
    """The label with the fewest mask pixels along its width. width_mm: its thickness; pixel_mm: edge of a mask pixel."""

    name: str
    width_mm: float
    pixel_mm: float

    @property
    def pixels(self) -> float:
        """Width in mask pixels."""
        return self.width_mm / self.pixel_mm

    def describe(self) -> str:
        """Return the width and the size of a mask pixel as text."""
        return f"{self.name}, the thinnest structure, is {self.width_mm:.2g} mm wide, a mask pixel {self.pixel_mm:.2g} mm"


def width_mm(case: CaseFingerprint, value: int, axis: SliceAxis) -> float | None:
    """Compute the thickness of a label in mm: the shorter edge of a rectangle with its mean area and border length per slice.

    For a line this is its thickness, for a disc about half of its diameter. Borders run along voxel edges. A label in several parts
    counts as thinner than its parts are, by at most half. None where its borders were not measured.
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
    """Find the label with the fewest mask pixels along its width, by medians over cases; None where no label was measured.

    input_size: edge of the network's input in pixels; in_plane_mm: edge of an input pixel, used where roi_scale is None (whole slices).
    """
    found = []
    for value, name in fingerprint.labels.items():
        widths, pixels = [], []
        for case in (case for case in fingerprint.cases if value in case.labels):
            width = width_mm(case, value, axis)
            if width is not None:
                widths.append(width)
                edge_mm = _roi_edge_mm(case, value, axis, roi_scale) if roi_scale else in_plane_mm * input_size
                pixels.append(edge_mm / input_size * MASK_STRIDES[size])
        if widths:
            found.append(ThinStructure(name, median(widths), median(pixels)))
    return min(found, key=lambda thin: thin.pixels, default=None)


def _roi_edge_mm(case: CaseFingerprint, value: int, axis: SliceAxis, roi_scale: float) -> float:
    """Return the largest possible edge of a label's ROI crop in mm; on a slice where the label is smaller, so is the crop."""
    extents, cut = case.labels[value].extents, case.axis(axis)
    in_plane = [index for index, one in enumerate(AXES) if one != cut]
    spans = [(extents[AXES[i]].last - extents[AXES[i]].first + 1) * case.spacing_mm[i] for i in in_plane if AXES[i] in extents]
    return min(roi_scale * max(spans), max(case.extent_mm[i] for i in in_plane))


def choose_roi_input_size(fingerprint: Fingerprint, axis: SliceAxis, roi_scale: float, stored_mm: float) -> Decision[int]:
    """Choose the input size of ROI crops: DEFAULT_ROI_SIZE, less where the mask would be finer than the image, more for thin structures.

    stored_mm: edge of a pixel of the preprocessed slices from which crops are taken.
    """
    thin = thinnest_structure(fingerprint, axis, "nano", DEFAULT_ROI_SIZE, roi_scale, 1.0)
    if thin is None:
        return Decision(DEFAULT_ROI_SIZE, "nano's main training resolution")
    if thin.pixels < 1:
        return Decision(MAX_ROI_SIZE, f"enlarged for thin structures: {thin.describe()} at {DEFAULT_ROI_SIZE} pixels")
    edges = [
        [_roi_edge_mm(case, value, axis, roi_scale) for case in fingerprint.cases if value in case.labels] for value in fingerprint.labels
    ]
    edge = max(median(of_label) for of_label in edges if of_label) / stored_mm
    enough = max(MIN_ROI_SIZE, 32 * math.ceil(round(edge * MASK_STRIDES["nano"] / 32, 6)))
    if enough < DEFAULT_ROI_SIZE:
        reason = f"the ROI covers {edge:.3g} image pixels, so a larger input adds no detail; {thin.describe()} at {DEFAULT_ROI_SIZE} pixels"
        return Decision(enough, reason)
    return Decision(DEFAULT_ROI_SIZE, f"nano's main training resolution; {thin.describe()}")


def check_resolvable(thin: ThinStructure | None, size: NetworkSize, roi_scale: float | None) -> None:
    """Check that a network that sees whole slices can segment the thinnest structure; for ROI crops the pixel size is only a bound.

    Raises: DatasetError when the structure is thinner than MIN_MASK_PIXELS.
    """
    if thin is not None and thin.pixels < MIN_MASK_PIXELS and not roi_scale:
        raise DatasetError(
            f"{thin.name} is {thin.width_mm:.2g} mm wide, but {size} predicts masks with {thin.pixel_mm:.2g} mm pixels, so it cannot be "
            "segmented. Use --network nano, which sees a crop around the annotation, or another --axis"
        )


def resolution_warning(
    fingerprint: Fingerprint, axis: SliceAxis, size: NetworkSize, input_size: int, roi_scale: float | None
) -> str | None:
    """Return a warning about a structure that may be too thin for the masks of its ROI crop; None where there is none."""
    thin = thinnest_structure(fingerprint, axis, size, input_size, roi_scale, 1.0) if roi_scale else None
    if thin is None or thin.pixels >= MIN_MASK_PIXELS:
        return None
    return (
        f"{thin.name} is {thin.width_mm:.2g} mm wide, but mask pixels may be {thin.pixel_mm:.2g} mm wide, so parts of it may be missed. "
        "Crop the images to a part of the structure, or use separate labels for its parts"
    )
