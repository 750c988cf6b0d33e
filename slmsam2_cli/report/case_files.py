"""One case read back for looking at: the masks, the image if it can be had, and how grey values are to be shown.

What cannot be read leaves a gap, never an error: a report without a picture is still a report. Arrays are (z, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.dataset.checks import compare_geometry
from slmsam2_cli.dataset.slices import AXES, Orientation, orient
from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.metrics import box_of
from slmsam2_cli.evaluation.scoring import onto
from slmsam2_cli.io.volume import Grid, LabelVolume, read_image, read_labels

Array = NDArray[Any]
Window = tuple[float, float]
Span = tuple[int, int]
Box = tuple[Span, Span, Span]
CT_WINDOWS: tuple[Window, ...] = ((-160.0, 240.0), (-1350.0, 150.0), (-500.0, 1300.0))  # soft tissue, lung, bone, in HU
_AIR_HU = -900.0  # a volume that goes down to air, in whole numbers, is taken for CT
_SAMPLES = 2_000_000  # voxels that a window is measured on


@dataclass(frozen=True)
class Sources:
    """The files of one case, all below `root`. images: one file a channel, or one file, or none; axis: the array axis of the slices
    (None: the coarsest); ignore: a label value not to be shown; window: grey values shown as black and white, when known; resample: bring
    a prediction on another grid onto the reference's, as it was scored."""

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
    """Masks (z, y, x) on `grid`, None where there is none; image (z, y, x) of the first channel or None; axis of the slices;
    image_missing: there ought to be one, but it cannot be read, or lies on another grid; known_box: `box`, if somebody has found it."""

    grid: Grid
    axis: int
    prediction: Array | None
    truth: Array | None
    image: Array | None = None
    given_window: Window | None = None
    image_missing: bool = False
    known_box: Box | None = None

    @property
    def slice_mm(self) -> float:
        return float(self.grid.spacing_mm[self.axis])

    @property
    def slice_count(self) -> int:
        return int(self.grid.shape[self.axis])

    @property
    def masks(self) -> tuple[Array, ...]:
        return tuple(mask for mask in (self.truth, self.prediction) if mask is not None)

    @cached_property
    def box(self) -> Box | None:
        """The smallest half-open box (z, y, x) around everything in both masks; None when they are empty."""
        if self.known_box is not None:
            return self.known_box
        z, y, x = ((side.start, side.stop) for side in box_of(*self.masks))
        return (z, y, x) if z[1] else None

    @cached_property
    def window(self) -> Window:
        """The grey values shown as black and white; (0, 0) without an image."""
        if self.image is None:
            return 0.0, 0.0
        return self.given_window or window_of(self.image, self._inside())

    def _inside(self) -> Array:
        """Some grey values of the structures."""
        if self.image is None or self.box is None:
            return np.zeros(0)
        cut = tuple(slice(*span) for span in self.box)
        return self.image[cut][np.logical_or.reduce([mask[cut] != 0 for mask in self.masks])]

    @cached_property
    def orientation(self) -> Orientation:
        """Which stored axis serves S, P and L, and which of them run backwards."""
        return orient(self.grid.direction)

    def ends(self) -> tuple[str, str]:
        """Where the slices' numbers begin and where they end, in the patient: ("feet", "head")."""
        anatomy = self.orientation.order.index(self.axis)
        low, high = (("feet", "head"), ("front", "back"), ("right", "left"))[anatomy]
        return (high, low) if self.orientation.flipped[anatomy] else (low, high)

    def facing(self, plane: Array) -> Array:
        """A stored slice (two of z, y, x) as it is looked at: front or head up, the patient's left (or back) on the right; a view."""
        orientation = self.orientation
        anatomy = orientation.order.index(self.axis)
        rows, columns = (a for a in range(3) if a != anatomy)
        turned = plane if orientation.order[rows] < orientation.order[columns] else plane.T
        up = orientation.flipped[rows] != (AXES[anatomy] != "SI")  # the head is up, and S increases downwards
        return turned[:: -1 if up else 1, :: -1 if orientation.flipped[columns] else 1]

    def display_spacing_mm(self) -> tuple[float, float]:
        """Distance of rows and of columns of such a slice."""
        rows, columns = (axis for axis in self.orientation.order if axis != self.axis)
        return float(self.grid.spacing_mm[rows]), float(self.grid.spacing_mm[columns])


def load_case(case: str, sources: Sources) -> LoadedCase | None:
    """Read what can be read; None when there is not even a mask."""
    truth, prediction = (_mask(path, case, sources.root) for path in (sources.reference, sources.prediction))
    first = truth or prediction
    if first is None:
        return None
    predicted = None if prediction is None else _on_grid(first, prediction, sources.resample)
    shown = None if truth is None else _without(truth.voxels, sources.ignore)
    if truth is not None and predicted is not None and sources.ignore is not None:
        predicted = np.where(truth.voxels == sources.ignore, 0, predicted).astype(predicted.dtype)
    return with_image(case, sources, first, shown, predicted)


def with_image(
    case: str, sources: Sources, mask: LabelVolume, truth: Array | None, prediction: Array | None, box: Box | None = None
) -> LoadedCase:
    """Masks (z, y, x) that somebody has read already, without ignored voxels and on the grid of `mask`, and the image if it can be had.

    box: around everything in both masks, if it is known.
    """
    image = _image(case, sources, mask)
    axis = coarsest(mask.grid.spacing_mm) if sources.axis is None else sources.axis
    return LoadedCase(mask.grid, axis, prediction, truth, image, sources.window, bool(sources.images) and image is None, box)


def coarsest(spacing_mm: Sequence[float]) -> int:
    """The axis of the thickest slices, the first of equals: what evaluation takes when nobody says."""
    return next(axis for axis, mm in enumerate(spacing_mm) if mm >= max(spacing_mm) * 0.999)


def window_of(image: Array, inside: Array) -> Window:
    """The grey values to show as black and white. inside: values of the structures, (n,), perhaps none.

    CT: the first of the usual windows that holds the structures' median. Else the 0.5th to the 99.5th percentile of what is not 0.
    """
    some = image.reshape(-1)[:: max(1, image.size // _SAMPLES)]
    if float(some.min()) <= _AIR_HU and np.array_equal(some, np.rint(some)):
        middle = float(np.median(inside)) if inside.size else 0.0
        return next((w for w in CT_WINDOWS if w[0] <= middle <= w[1]), CT_WINDOWS[0])
    busy = some[some != 0]
    low, high = (float(p) for p in np.percentile(busy if busy.size else some, [0.5, 99.5]))
    return (low, high) if high > low else (float(image.min()), float(image.max()))


def grey(values: Array, window: Window) -> NDArray[np.uint8]:
    """Values of any shape -> 0 to 255, clipped to the window."""
    low, high = window
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.asarray(np.rint(scaled).clip(0, 255), np.uint8)


def _mask(path: Path | None, case: str, root: Path) -> LabelVolume | None:
    try:
        return None if path is None else read_labels(path, case=case, root=root)
    except (CaseError, MemoryError):
        return None


def _image(case: str, sources: Sources, mask: LabelVolume) -> Array | None:
    """The first channel on the masks' grid; None when it cannot be had."""
    if not sources.images:
        return None
    try:
        image = read_image(sources.images[:1], case=case, root=sources.root)
    except (CaseError, MemoryError):
        return None
    return None if compare_geometry(image, mask)[0] else np.asarray(image.voxels[0])


def _on_grid(first: LabelVolume, mask: LabelVolume, resample: bool) -> Array | None:
    """The labels (z, y, x) on the grid of `first`; None when they are on another and may not be moved."""
    if not compare_geometry(first, mask)[0]:
        return mask.voxels
    return onto(first.grid, mask.voxels, mask.grid)[0] if resample else None


def _without(mask: Array, ignore: int | None) -> Array:
    return mask if ignore is None else np.where(mask == ignore, 0, mask).astype(mask.dtype)
