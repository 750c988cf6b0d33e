"""A look at each training case: one slice as it is prepared for the network, labels outlined, and some of its grey values.

One case is in memory at a time; what cannot be read leaves a gap that says why. No chance anywhere: the same files give the same bytes.

The contact sheet: which slices of a case are worth a look, and each of them as a small picture with outlines drawn in.

Slices face the reader as in a radiologist's viewer; pixels are square in mm; the same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slmsam2_cli.dataset.cache import read_pair
from slmsam2_cli.dataset.dataset import Case, Dataset
from slmsam2_cli.dataset.intensity import window_of
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.dataset.slices import SliceAxis, View, interpolation_matrix, nearest_indices, resample_plane
from slmsam2_cli.errors import CaseError
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.case_files import LoadedCase, Window, grey
from slmsam2_cli.report.charts import GOLDEN
from slmsam2_cli.report.schema import Picture, SliceMark, Structure

Array = NDArray[Any]
T = TypeVar("T")
MOST_CASES, MOST_CHANNELS = 40, 4
COLOURS = (0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0xCC79A7, 0xD55E00, 0x0072B2)  # Okabe and Ito, without black
SAMPLE = 10_000  # grey values a case gives, of all voxels and of labelled ones
_SHEET_WIDTH, _SHEET_HEIGHT = 200, 240  # largest shown size in CSS pixels
_DENSITY = 2  # pixels of a picture on one of them; outlines are as wide
_SHEET_QUALITIES, _SHEET_BYTES = (60, 40, 20), 12_000  # WebP; the next lower one where a picture is larger than this


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
            found.append(make_thumbnail(case, data, plan))
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


def make_thumbnail(case: Case, data: Dataset, plan: Plan) -> Look:
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
    scale = min(_SHEET_WIDTH / wide, _SHEET_HEIGHT / high)
    return max(1, round(wide * scale)), max(1, round(high * scale))


def picture(plane: NDArray[np.uint8], labels: Array, values: Sequence[int], view: View, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A slice (R, C) at the resolution of the network's slices, outlines on top -> (height, width, 3), facing the reader."""
    width, height = (side * _DENSITY for side in size)
    rows, columns = (interpolation_matrix(before, after) for before, after in zip(plane.shape, view.stack_shape[1:], strict=True))
    seen = np.rint(resample_plane(plane, rows, columns)).clip(0, 255).astype(np.uint8)
    shown = np.asarray(Image.fromarray(seen).resize((width, height), Image.Resampling.BICUBIC))
    canvas = np.repeat(shown[..., None], 3, axis=2)
    paint(canvas, labels[np.ix_(nearest_indices(labels.shape[0], height), nearest_indices(labels.shape[1], width))], values)
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
    for quality in _SHEET_QUALITIES:
        memory = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(canvas)).save(memory, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
        data = memory.getvalue()
        if len(data) <= _SHEET_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


TRUTH, PREDICTION = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
BLANK = 32  # grey where there is no image
PICTURES_PER_CASE = 4
FLAGGED_SEVERITY = 1.0  # as bad as a whole structure missed
_WIDTH, _HEIGHT = 220, 260  # largest shown size in pixels
_MARGIN_MM, _MARGIN_SHARE = 10.0, 0.25
_DASH = 6  # pixels of one colour where both outlines run together
_QUALITIES, _BYTES = (50, 30, 15), 6000  # WebP; the next lower one where a picture is larger than this


@dataclass(frozen=True)
class Choice:
    """A slice to show. severity: 0 and more, comparable between cases; words: what is wrong with it."""

    slice: int
    severity: float
    words: str


@dataclass(frozen=True)
class Shown:
    """One drawn slice. uri: a data: URI; width, height: shown size in CSS pixels."""

    uri: str
    width: int
    height: int


def worst_slices(structures: Sequence[Structure], most: int = PICTURES_PER_CASE, odd: Mapping[int, str] | None = None) -> list[Choice]:
    """The slices to look at first, worst first, none next to another. odd: slices that are to come first whatever, and why.

    A slice is as bad as its worst structure: 1 - Dice, times the square root of its share of the structure's largest slice, so that
    a speck at an end does not stand before half an organ. Without a truth: 1 - confidence, or the disagreement where that is more.
    Given slices are right by definition, and come last.
    """
    found: dict[int, Choice] = {}
    for structure in structures:
        most_px = max((_pixels(mark) for mark in structure.slices), default=0)
        for mark in structure.slices:
            choice = _rate_slice(mark, most_px, structure.name if len(structures) > 1 else "")
            if choice is not None and choice.severity >= found.get(mark.slice, choice).severity:
                found[mark.slice] = choice
    for k, words in (odd or {}).items():
        found[k] = Choice(k, FLAGGED_SEVERITY, words)
    ranked = sorted(found.values(), key=lambda choice: (-choice.severity, choice.slice))
    apart = max(2, round(len(found) / (3 * most)))
    return _spread(ranked, apart, most)


def draw_slices(opened: LoadedCase, slices: Sequence[int]) -> dict[int, Shown]:
    """Those of the slices that the volume has; none when both masks are empty."""
    frame = _Frame.around(opened)
    return {k: _picture(opened, frame, k) for k in slices if frame is not None and 0 <= k < opened.slice_count}


def captioned(case: str, choices: Sequence[Choice], drawn: Mapping[int, Shown]) -> tuple[Picture, ...]:
    """The chosen slices that were drawn, in the order of the choices."""
    there = [(choice, drawn[choice.slice]) for choice in choices if choice.slice in drawn]
    return tuple(Picture(case, choice.slice, shown.uri, shown.width, shown.height, _caption(choice)) for choice, shown in there)


def _caption(choice: Choice) -> str:
    return f"slice {choice.slice}: {choice.words}" if choice.words else f"slice {choice.slice}"


def cohort_sheet(shown: Mapping[str, Sequence[tuple[float, Picture]]], most: int = 24, a_case: int = 2) -> tuple[Picture, ...]:
    """The worst pictures of all cases, worst first. shown: case -> (severity, picture)."""
    best = [found for pairs in shown.values() for found in sorted(pairs, key=lambda p: -p[0])[:a_case]]
    return tuple(picture for _, picture in sorted(best, key=lambda p: (-p[0], p[1].case, p[1].slice))[:most])


def _pixels(mark: SliceMark) -> int:
    return max(mark.prediction_px, mark.reference_px or 0)


def _rate_slice(mark: SliceMark, most_px: int, name: str) -> Choice | None:
    """How bad one slice of one structure is; None when nothing is known against it."""
    weight = (_pixels(mark) / most_px) ** 0.5 if most_px else 0.0
    if mark.reference_px is None:
        doubt = max(1 - mark.confidence if mark.confidence is not None else 0.0, mark.disagreement or 0.0)
        known = mark.confidence is not None or mark.disagreement is not None
        words = [f"confidence {mark.confidence:.2f}"] if mark.confidence is not None else []
        words += [f"passes disagree by {mark.disagreement:.2f}"] if mark.disagreement is not None else []
        severity = doubt * weight if known and not mark.prompted else 0.0
    else:
        severity = 0.0 if mark.dice is None or mark.prompted else (1 - mark.dice) * weight
        words = [_verdict(mark)]
    if mark.prompted:
        words = ["given"]
    return Choice(mark.slice, severity, f"{name} {', '.join(words)}".strip())


def _verdict(mark: SliceMark) -> str:
    away = "" if mark.distance is None else f", {abs(mark.distance)} from the prompt"
    if mark.missed:
        return f"missed ({mark.reference_px} px){away}"
    if mark.false:
        return f"false ({mark.prediction_px} px){away}"
    return f"Dice {mark.dice:.2f}{away}" if mark.dice is not None else "empty"


def _spread(ranked: Sequence[Choice], apart: int, most: int) -> list[Choice]:
    """The first `most` that are at least so many slices from one another; those nothing is wrong with only when there is no other."""
    bad = [choice for choice in ranked if choice.severity > 0] or list(ranked[:1])
    kept: list[Choice] = []
    for choice in bad:
        if len(kept) < most and all(abs(choice.slice - other.slice) >= apart for other in kept):
            kept.append(choice)
    return kept


@dataclass(frozen=True)
class _Frame:
    """What part of every slice of a case is shown. rows, columns: half-open ranges of the facing slice; width, height: shown size."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    width: int
    height: int

    @classmethod
    def around(cls, opened: LoadedCase) -> _Frame | None:
        """Around both masks of the whole case and a margin; None when they are empty."""
        held = [np.nonzero(plane) for plane in _silhouettes(opened)]
        held = [(rows, columns) for rows, columns in held if len(rows)]
        if not held:
            return None
        size, mm = _silhouettes_shape(opened), opened.display_spacing_mm()
        spans = [(min(int(h[a].min()) for h in held), max(int(h[a].max()) for h in held) + 1) for a in range(2)]
        rows, columns = (_widened(span, size[a], mm[a]) for a, span in enumerate(spans))
        high, wide = (rows[1] - rows[0]) * mm[0], (columns[1] - columns[0]) * mm[1]
        scale = min(_WIDTH / wide, _HEIGHT / high)
        return cls(rows, columns, max(1, round(wide * scale)), max(1, round(high * scale)))

    def cut(self, plane: Array) -> Array:
        return plane[slice(*self.rows), slice(*self.columns)]


def _silhouettes(opened: LoadedCase) -> Iterator[Array]:
    """For each mask, where any slice holds something, facing the reader."""
    box = [slice(*span) for span in opened.box or ()]
    for mask in opened.masks if box else ():
        plane = np.zeros([n for a, n in enumerate(mask.shape) if a != opened.axis], bool)
        plane[tuple(side for a, side in enumerate(box) if a != opened.axis)] = mask[tuple(box)].any(axis=opened.axis)
        yield opened.facing(plane)


def _silhouettes_shape(opened: LoadedCase) -> tuple[int, ...]:
    return opened.facing(opened.masks[0].take(0, axis=opened.axis)).shape


def _widened(span: tuple[int, int], size: int, mm: float) -> tuple[int, int]:
    margin = round(max(_MARGIN_MM / mm, _MARGIN_SHARE * (span[1] - span[0])))
    return max(0, span[0] - margin), min(size, span[1] + margin)


def _picture(opened: LoadedCase, frame: _Frame, k: int) -> Shown:
    """One slice."""
    outlines = [
        None if mask is None else _outline(_enlarged(_plane(opened, frame, mask, k), frame)) for mask in (opened.truth, opened.prediction)
    ]
    canvas = np.repeat(_background(opened, frame, k)[..., None], 3, axis=2)
    _paint(canvas, *outlines)
    return Shown(f"data:image/webp;base64,{base64.b64encode(_webp(canvas)).decode()}", frame.width, frame.height)


def _webp(canvas: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) as a file, noisy ones with less detail."""
    data = b""
    for quality in _QUALITIES:
        memory = io.BytesIO()
        Image.fromarray(canvas).save(memory, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
        data = memory.getvalue()
        if len(data) <= _BYTES:
            break
    return data


def _plane(opened: LoadedCase, frame: _Frame, volume: Array, k: int) -> Array:
    """The shown part of slice k, facing the reader."""
    return frame.cut(opened.facing(volume[(slice(None),) * opened.axis + (k,)]))


def _background(opened: LoadedCase, frame: _Frame, k: int) -> NDArray[np.uint8]:
    """(height, width) grey values of the image, smooth; plain without one."""
    if opened.image is None:
        return np.full((frame.height, frame.width), BLANK, np.uint8)
    shown = Image.fromarray(np.ascontiguousarray(grey(_plane(opened, frame, opened.image, k), opened.window)))
    return np.asarray(shown.resize((frame.width, frame.height), Image.Resampling.BICUBIC))


def _enlarged(plane: Array, frame: _Frame) -> Array:
    """Labels at the shown size, voxels as they are."""
    rows, columns = (
        ((np.arange(shown) + 0.5) * stored / shown).astype(int)
        for shown, stored in zip((frame.height, frame.width), plane.shape, strict=True)
    )
    return plane[np.ix_(rows, columns)]


def _outline(labels: Array) -> NDArray[np.bool_]:
    """The pixels of every label that touch the background, a lower label or the edge."""
    ringed = np.pad(labels, 1)
    rows, columns = labels.shape
    around = [ringed[1 + down : 1 + down + rows, 1 + right : 1 + right + columns] for down, right in _NEIGHBOURS]
    return np.asarray(labels > np.minimum.reduce(around))


_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def _paint(canvas: NDArray[np.uint8], truth: Array | None, prediction: Array | None) -> None:
    """Draw both outlines into (height, width, 3); where they coincide the colours take turns."""
    if truth is not None:
        canvas[truth] = TRUTH
    if prediction is not None:
        rows, columns = np.indices(prediction.shape)
        turn = True if truth is None else ~truth | ((rows + columns) // _DASH % 2 == 0)
        canvas[prediction & turn] = PREDICTION
