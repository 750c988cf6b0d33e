"""A look at each training case: one slice as it is prepared for the network, labels outlined, and some of its grey values.

One case is in memory at a time; what cannot be read leaves a gap that says why. No chance anywhere: the same files give the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slmsam2_cli.data.dataset import Case, Dataset
from slmsam2_cli.data.geometry import SliceAxis, View, nearest, resample_plane, weights
from slmsam2_cli.data.intensity import window_of
from slmsam2_cli.data.prepared import read_pair
from slmsam2_cli.data.prompts import choose_slice
from slmsam2_cli.errors import CaseError
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.charts import GOLDEN
from slmsam2_cli.report.opened import Window, grey

Array = NDArray[Any]
T = TypeVar("T")
MOST_CASES, MOST_CHANNELS = 40, 4
COLOURS = (0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0xCC79A7, 0xD55E00, 0x0072B2)  # Okabe and Ito, without black
SAMPLE = 10_000  # grey values a case gives, of all voxels and of labelled ones
_WIDTH, _HEIGHT = 200, 240  # largest shown size in CSS pixels
_DENSITY = 2  # pixels of a picture on one of them; outlines are as wide
_QUALITIES, _BYTES = (60, 40, 20), 12_000  # WebP; the next lower one where a picture is larger than this


@dataclass(frozen=True, eq=False)
class Greys:
    """Some grey values of one channel, (n,) each. everything: where all non-zero voxels count, only those; labelled: without ignored."""

    window: Window
    everything: Array
    labelled: Array


@dataclass(frozen=True, eq=False)
class Look:
    """One case. pictures: data URIs, one a channel, all shown at width x height CSS pixels; slice: as the file counts, from 0; label: the
    value chosen by, None without any; size, spacing_mm: columns, rows, slices; greys: by channel."""

    case: str
    axis: SliceAxis
    slice: int
    label: int | None
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    width: int
    height: int
    pictures: tuple[str, ...]
    greys: tuple[Greys, ...]


@dataclass(frozen=True)
class Gap:
    """A case that could not be looked at, and why."""

    case: str
    problem: str


def montage(data: Dataset, plan: Plan, advance: Callable[..., None] = lambda steps=1, note="": None) -> tuple[Look | Gap, ...]:
    """The training cases, or MOST_CASES of them, in order. advance() is called after each."""
    found: list[Look | Gap] = []
    for case in evenly_chosen(data.training, MOST_CASES):
        try:
            found.append(look_at(case, data, plan))
        except CaseError as error:
            found.append(Gap(case.id, f"{error.file}: {error.what}" if error.file else error.what))
        except MemoryError:
            found.append(Gap(case.id, "is too large for this machine's memory"))
        advance(1, case.id)
    return tuple(found)


def evenly_chosen(things: Sequence[T], most: int) -> tuple[T, ...]:
    """At most so many, from the whole length of the sequence."""
    if len(things) <= most:
        return tuple(things)
    return tuple(things[int((k + 0.5) * len(things) / most)] for k in range(most))


def look_at(case: Case, data: Dataset, plan: Plan) -> Look:
    """Read a case and draw it. CaseError, MemoryError."""
    volume, mask, _ = read_pair(case, data)
    if mask is None:
        raise CaseError(case.id, "", "has no label", "Add its mask to labelsTr, or drop the case from dataset.json")
    view, values = View.fit(volume, plan.geometry), tuple(data.labels)
    windows = [window_of(channel, planned) for channel, planned in zip(volume.voxels, plan.intensity, strict=True)]
    labels = view.cropped(mask.voxels)
    t, label = middle_of_largest(labels, values)
    held = np.where(labels[t] == (data.ignore or 0), 0, labels[t])
    spacing = tuple(float(volume.grid.spacing_mm[axis]) for axis in view.orientation.order[::-1])
    size = tuple(volume.grid.shape[axis] for axis in view.orientation.order[::-1])
    width, height = shown_size(held.shape, (spacing[1], spacing[0]))
    planes = [grey(view.cropped(channel)[t], window) for channel, window in zip(volume.voxels[:MOST_CHANNELS], windows, strict=False)]
    inside = (mask.voxels != 0) & (mask.voxels != (data.ignore or 0))
    return Look(
        case=case.id,
        axis=view.axis,
        slice=view.file_index(view.box[0][0] + t),
        label=label,
        size=size,  # type: ignore[arg-type]
        spacing_mm=spacing,  # type: ignore[arg-type]
        width=width,
        height=height,
        pictures=tuple(_uri(picture(plane, held, values, view, (width, height))) for plane in planes),
        greys=tuple(
            Greys(window, _counted(some(channel.reshape(-1)), planned.scheme), some(channel[inside]))
            for channel, window, planned in zip(volume.voxels, windows, plan.intensity, strict=True)
        ),
    )


def middle_of_largest(labels: Array, values: Sequence[int]) -> tuple[int, int | None]:
    """(slice, value) of the middle of the label with most voxels in labels (T, R, C); the middle slice and None where there is none."""
    areas = np.stack([np.bincount(plane.ravel(), minlength=max(values) + 1)[list(values)] for plane in labels])
    total = areas.sum(axis=0)
    if not total.any():
        return len(labels) // 2, None
    largest = int(total.argmax())
    return choose_slice(areas[:, largest], "middle"), values[largest]


def shown_size(shape: Sequence[int], mm: tuple[float, float]) -> tuple[int, int]:
    """(width, height) in CSS pixels of a slice (rows, columns) with these distances of rows and of columns."""
    high, wide = shape[0] * mm[0], shape[1] * mm[1]
    scale = min(_WIDTH / wide, _HEIGHT / high)
    return max(1, round(wide * scale)), max(1, round(high * scale))


def picture(plane: NDArray[np.uint8], labels: Array, values: Sequence[int], view: View, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice (R, C) at the resolution of the network's slices, outlines on top -> (height, width, 3), facing the reader."""
    width, height = (side * _DENSITY for side in size)
    rows, columns = (weights(before, after) for before, after in zip(plane.shape, view.stack_shape[1:], strict=True))
    seen = np.rint(resample_plane(plane, rows, columns)).clip(0, 255).astype(np.uint8)
    shown = np.asarray(Image.fromarray(seen).resize((width, height), Image.Resampling.BICUBIC))
    canvas = np.repeat(shown[..., None], 3, axis=2)
    paint(canvas, labels[np.ix_(nearest(labels.shape[0], height), nearest(labels.shape[1], width))], values)
    return canvas if view.axis == "SI" else canvas[::-1]  # the head is up, and S increases downwards


def paint(canvas: NDArray[np.uint8], labels: Array, values: Sequence[int]) -> None:
    """Draw into (height, width, 3) the border of every label (height, width) in its colour, inside of the label."""
    rows, columns = labels.shape
    ringed = np.pad(labels, _DENSITY)
    steps = [(0, k) for k in range(1, _DENSITY + 1)]
    around = [
        ringed[_DENSITY + down : _DENSITY + down + rows, _DENSITY + right : _DENSITY + right + columns]
        for a, b in steps
        for down, right in ((a, b), (a, -b), (b, a), (-b, a))
    ]
    border = labels > np.minimum.reduce(around)
    for place, value in enumerate(values):
        canvas[border & (labels == value)] = tuple(colour(place).to_bytes(3, "big"))


def colour(place: int) -> int:
    """0xRRGGBB of the label at this place among all; they repeat."""
    return COLOURS[place % len(COLOURS)]


def some(values: Array, count: int = SAMPLE) -> Array:
    """At most `count` of the values (n,), spread over all of them in golden steps, with which no row of voxels keeps pace."""
    if values.size <= count:
        return values.astype(np.float64)
    picks = (np.arange(count) * GOLDEN % 1 * values.size).astype(np.int64)
    return np.asarray(values[picks], np.float64)


def _counted(values: Array, scheme: str) -> Array:
    """Percentiles are those of non-zero voxels."""
    return values if scheme == "ct" else values[values != 0]


def _uri(canvas: NDArray[np.uint8]) -> str:
    """(height, width, 3) as a data URI, noisy ones with less detail."""
    data = b""
    for quality in _QUALITIES:
        memory = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(canvas)).save(memory, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
        data = memory.getvalue()
        if len(data) <= _BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
