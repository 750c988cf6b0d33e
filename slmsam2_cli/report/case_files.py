"""Read the masks and the image of one case for its report, and turn slices and intensities as they are displayed.

A file that cannot be read is left out without an error: a report without a picture is still useful. Arrays are (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.dataset.checks import compare_geometry
from slmsam2_cli.dataset.slices import AXES, Orientation, orient
from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.metrics import box_of, coarsest_axis
from slmsam2_cli.evaluation.scoring import onto
from slmsam2_cli.io.volume import Grid, LabelVolume, read_image, read_labels

Array = NDArray[Any]
Window = tuple[float, float]
Span = tuple[int, int]
Box = tuple[Span, Span, Span]
CT_WINDOWS: tuple[Window, ...] = ((-160.0, 240.0), (-1350.0, 150.0), (-500.0, 1300.0))  # soft tissue, lung, bone, in HU
_AIR_HU = -900.0  # an image of integers that go down to air is treated as CT
_WINDOW_SAMPLES = 2_000_000  # voxels from which a window is computed


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case, all below `root`, and how to show them.

    images: one file per channel, a single file, or none; axis: array axis of the slices, None for the coarsest; ignore: label value that
    is not shown; window: intensities shown as black and white, None to choose; resample: resample a prediction to the reference's grid.
    """

    prediction: Path | None = None
    images: tuple[Path, ...] = ()
    reference: Path | None = None
    root: Path = field(default_factory=Path)
    axis: int | None = None
    ignore: int | None = None
    window: Window | None = None
    resample: bool = False


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """Masks (z, y, x) on one grid, None where missing, and the first channel of the image, None without one.

    axis: array axis of the slices; given_window: intensities shown as black and white, None to choose; image_missing: the case has an
    image, but it cannot be read or lies on another grid; known_box: the value of `box` where it is known already.
    """

    grid: Grid
    axis: int
    prediction: Array | None
    reference: Array | None
    image: Array | None = None
    given_window: Window | None = None
    image_missing: bool = False
    known_box: Box | None = None

    @property
    def slice_mm(self) -> float:
        """Return the distance between slices."""
        return float(self.grid.spacing_mm[self.axis])

    @property
    def slice_count(self) -> int:
        """Return the number of slices of the volume."""
        return int(self.grid.shape[self.axis])

    @property
    def masks(self) -> tuple[Array, ...]:
        """Return the masks that are there, the reference first."""
        return tuple(mask for mask in (self.reference, self.prediction) if mask is not None)

    @cached_property
    def box(self) -> Box | None:
        """Find the bounding box (z, y, x) of both masks together, as half-open ranges; None when they are empty."""
        if self.known_box is not None:
            return self.known_box
        z, y, x = ((side.start, side.stop) for side in box_of(*self.masks))
        return (z, y, x) if z[1] else None

    @cached_property
    def window(self) -> Window:
        """Return the intensities shown as black and white; (0, 0) without an image."""
        if self.image is None:
            return 0.0, 0.0
        if self.given_window is not None:
            return self.given_window
        inside = np.zeros(0)
        if self.box is not None:
            box = tuple(slice(*span) for span in self.box)
            inside = self.image[box][np.logical_or.reduce([mask[box] != 0 for mask in self.masks])]
        return choose_window(self.image, inside)

    @cached_property
    def orientation(self) -> Orientation:
        """Return which array axis runs along S, P and L, and which axes are reversed."""
        return orient(self.grid.direction)

    def ends(self) -> tuple[str, str]:
        """Return the direction in the patient towards the first and the last slice, such as ("feet", "head")."""
        anatomy = self.orientation.order.index(self.axis)
        low, high = (("feet", "head"), ("front", "back"), ("right", "left"))[anatomy]
        return (high, low) if self.orientation.flipped[anatomy] else (low, high)

    def to_display(self, plane: Array) -> Array:
        """Turn a stored slice (two of z, y, x) as radiologists view it, as a view of the array.

        The front or the head is up, and the patient's left (in sagittal slices the back) is on the right.
        """
        orientation = self.orientation
        anatomy = orientation.order.index(self.axis)
        rows, columns = (a for a in range(3) if a != anatomy)
        turned = plane if orientation.order[rows] < orientation.order[columns] else plane.T
        up = orientation.flipped[rows] != (AXES[anatomy] != "SI")  # the head is up, and S increases downwards
        return turned[:: -1 if up else 1, :: -1 if orientation.flipped[columns] else 1]

    def display_spacing_mm(self) -> tuple[float, float]:
        """Return the distance of rows and of columns of a slice as displayed."""
        rows, columns = (axis for axis in self.orientation.order if axis != self.axis)
        return float(self.grid.spacing_mm[rows]), float(self.grid.spacing_mm[columns])


def load_case(case: str, files: CaseFiles) -> LoadedCase | None:
    """Read the masks and the image of a case as far as possible; None when no mask can be read."""
    reference, prediction = (_read_mask(path, case, files.root) for path in (files.reference, files.prediction))
    first = reference or prediction
    if first is None:
        return None
    predicted = prediction.voxels if prediction is not None else None
    if prediction is not None and compare_geometry(first, prediction)[0]:
        predicted = onto(first.grid, prediction.voxels, prediction.grid)[0] if files.resample else None
    expected = reference.voxels if reference is not None else None
    if expected is not None and files.ignore is not None:
        ignored = expected == files.ignore
        expected = np.where(ignored, 0, expected).astype(expected.dtype)
        predicted = None if predicted is None else np.where(ignored, 0, predicted).astype(predicted.dtype)
    return add_image(case, files, first, expected, predicted)


def add_image(
    case: str, files: CaseFiles, mask: LabelVolume, reference: Array | None, prediction: Array | None, box: Box | None = None
) -> LoadedCase:
    """Read the image for masks (z, y, x) on the grid of `mask`; it is left out if it cannot be read or lies on another grid.

    The masks are without ignored voxels. box: the bounding box of both, if known.
    """
    image = None
    if files.images:
        try:
            volume = read_image(files.images[:1], case=case, root=files.root)
            image = None if compare_geometry(volume, mask)[0] else np.asarray(volume.voxels[0])
        except (CaseError, MemoryError):
            image = None
    axis = coarsest_axis(mask.grid.spacing_mm) if files.axis is None else files.axis
    return LoadedCase(mask.grid, axis, prediction, reference, image, files.window, bool(files.images) and image is None, box)


def _read_mask(path: Path | None, case: str, root: Path) -> LabelVolume | None:
    try:
        return None if path is None else read_labels(path, case=case, root=root)
    except (CaseError, MemoryError):
        return None


def choose_window(image: Array, inside: Array) -> Window:
    """Choose the intensities shown as black and white. inside: values (n,) within the structures, may be empty.

    CT: the first of CT_WINDOWS that contains the median inside the structures. Other images: percentiles 0.5 and 99.5 of non-zero voxels.
    """
    sample = image.reshape(-1)[:: max(1, image.size // _WINDOW_SAMPLES)]
    if float(sample.min()) <= _AIR_HU and np.array_equal(sample, np.rint(sample)):
        median = float(np.median(inside)) if inside.size else 0.0
        return next((window for window in CT_WINDOWS if window[0] <= median <= window[1]), CT_WINDOWS[0])
    foreground = sample[sample != 0]
    low, high = (float(p) for p in np.percentile(foreground if foreground.size else sample, [0.5, 99.5]))
    return (low, high) if high > low else (float(image.min()), float(image.max()))


def apply_window(values: Array, window: Window) -> NDArray[np.uint8]:
    """Scale values of any shape so that the window becomes 0 to 255, and clip; all 0 for an empty window."""
    low, high = window
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.asarray(np.rint(scaled).clip(0, 255), np.uint8)
