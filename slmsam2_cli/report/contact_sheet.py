"""Draw small pictures of slices with outlines: the worst slices of a case for its report, and a thumbnail of every case for plan.html.

Slices are turned as in a radiologist's viewer, pixels are square in mm, and the same input gives the same bytes. A case of the plan that
cannot be read becomes a MissingThumbnail with the reason.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import find_boundaries

from slmsam2_cli.dataset.cache import read_pair
from slmsam2_cli.dataset.dataset import Case, Dataset
from slmsam2_cli.dataset.intensity import window_of
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.dataset.slices import SliceAxis, View, interpolation_matrix, nearest_indices, resample_plane
from slmsam2_cli.errors import CaseError
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.report.case_files import LoadedCase, Window, apply_window
from slmsam2_cli.report.charts import GOLDEN
from slmsam2_cli.report.schema import Picture, SliceMark, Structure

Array = NDArray[Any]
T = TypeVar("T")

MAX_THUMBNAILS, MAX_CHANNELS = 40, 4
COLOURS = (0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0xCC79A7, 0xD55E00, 0x0072B2)  # Okabe and Ito, without black
SAMPLE = 10_000  # intensities per case and channel, of all voxels and of labelled voxels
_THUMBNAIL_SIZE = (200, 240)  # largest width and height in CSS pixels
_DENSITY = 2  # picture pixels per CSS pixel, and the width of outlines in picture pixels
_THUMBNAIL_QUALITIES, _THUMBNAIL_BYTES = (60, 40, 20), 12_000

REFERENCE, PREDICTION = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
BLANK = 32  # grey value where there is no image
PICTURES_PER_CASE = 4
FLAGGED_SEVERITY = 1.0  # the severity of a whole structure missed
_PICTURE_SIZE = (220, 260)  # largest width and height in CSS pixels
_MARGIN_MM, _MARGIN_FRACTION = 10.0, 0.25  # around the structures, whichever is more
_DASH = 6  # pixels of one colour where the two outlines coincide
_PICTURE_QUALITIES, _PICTURE_BYTES = (50, 30, 15), 6000


def outline(labels: Array, width: int = 1) -> NDArray[np.bool_]:
    """Find the border pixels of every label in labels (H, W), inside the label and `width` pixels wide; the picture's edge is a border."""
    inside = np.pad(labels, 1)
    border = np.zeros(inside.shape, bool)
    for _ in range(width):
        ring = find_boundaries(inside, connectivity=1, mode="inner")  # type: ignore[no-untyped-call]
        border |= ring
        inside = np.where(ring, 0, inside)
    return border[1:-1, 1:-1]


def encode_webp(canvas: NDArray[np.uint8], qualities: Sequence[int], most_bytes: int) -> str:
    """Encode a picture (H, W, 3) as a data URI with the first of the qualities that gives at most so many bytes, else with the last."""
    data = b""
    for quality in qualities:
        memory = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(canvas)).save(memory, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
        data = memory.getvalue()
        if len(data) <= most_bytes:
            break
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def display_size(shape: Sequence[int], spacing_mm: tuple[float, float], most: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height in CSS pixels of a slice (rows, columns), as large as fits into the width and height `most`."""
    high, wide = shape[0] * spacing_mm[0], shape[1] * spacing_mm[1]
    scale = min(most[0] / wide, most[1] / high)
    return max(1, round(wide * scale)), max(1, round(high * scale))


@dataclass(frozen=True, eq=False)
class IntensitySample:
    """Some intensities of one channel, (n,) each.

    window: intensities shown as black and white; everything: of all voxels, or of the non-zero voxels where the window is computed from
    those; labelled: of labelled voxels.
    """

    window: Window
    everything: Array
    labelled: Array


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """One case of the plan.

    slice: as the file counts it, from 0; label: the label value that it was chosen for, None without any; size, spacing_mm: columns, rows,
    slices; width, height: in CSS pixels; pictures: a data URI per channel; samples: by channel.
    """

    case: str
    axis: SliceAxis
    slice: int
    label: int | None
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    width: int
    height: int
    pictures: tuple[str, ...]
    samples: tuple[IntensitySample, ...]


@dataclass(frozen=True)
class MissingThumbnail:
    """A case that could not be drawn, and why."""

    case: str
    problem: str


def montage(
    data: Dataset, plan: Plan, advance: Callable[..., None] = lambda steps=1, note="": None
) -> tuple[Thumbnail | MissingThumbnail, ...]:
    """Draw the training cases, or MAX_THUMBNAILS of them, in their order; advance is called after each. One case is in memory at a time."""
    found: list[Thumbnail | MissingThumbnail] = []
    for case in choose_evenly(data.training, MAX_THUMBNAILS):
        try:
            found.append(make_thumbnail(case, data, plan))
        except CaseError as error:
            found.append(MissingThumbnail(case.id, f"{error.file}: {error.what}" if error.file else error.what))
        except MemoryError:
            found.append(MissingThumbnail(case.id, "not enough memory to load the case"))
        advance(1, case.id)
    return tuple(found)


def choose_evenly(items: Sequence[T], most: int) -> tuple[T, ...]:
    """Choose at most so many items, evenly spaced in the sequence."""
    if len(items) <= most:
        return tuple(items)
    return tuple(items[int((k + 0.5) * len(items) / most)] for k in range(most))


def make_thumbnail(case: Case, data: Dataset, plan: Plan) -> Thumbnail:
    """Read a case and draw one slice of it as the plan prepares it for the network.

    Raises: CaseError when the case cannot be read or has no label; MemoryError when it is too large.
    """
    volume, mask, _ = read_pair(case, data)
    if mask is None:
        raise CaseError(case.id, "", "has no label", "Add its mask to labelsTr, or remove the case from dataset.json")
    view, values = View.fit(volume, plan.geometry), tuple(data.labels)
    windows = [window_of(channel, planned) for channel, planned in zip(volume.voxels, plan.intensity, strict=True)]
    labels = view.cropped(mask.voxels)
    t, label = middle_of_largest(labels, values)
    plane_labels = np.where(labels[t] == (data.ignore or 0), 0, labels[t])
    spacing = tuple(float(volume.grid.spacing_mm[axis]) for axis in view.orientation.order[::-1])
    width, height = display_size(plane_labels.shape, (spacing[1], spacing[0]), _THUMBNAIL_SIZE)
    pictures, samples = [], []
    for channel, window in zip(volume.voxels[:MAX_CHANNELS], windows, strict=False):
        plane = apply_window(view.cropped(channel)[t], window)
        canvas = _draw_thumbnail(plane, plane_labels, values, view, (height * _DENSITY, width * _DENSITY))
        pictures.append(encode_webp(canvas, _THUMBNAIL_QUALITIES, _THUMBNAIL_BYTES))
    inside = (mask.voxels != 0) & (mask.voxels != (data.ignore or 0))
    for channel, window, planned in zip(volume.voxels, windows, plan.intensity, strict=True):
        sample = sample_values(channel.reshape(-1))
        samples.append(IntensitySample(window, sample if planned.scheme == "ct" else sample[sample != 0], sample_values(channel[inside])))
    return Thumbnail(
        case=case.id,
        axis=view.axis,
        slice=view.file_index(view.box[0][0] + t),
        label=label,
        size=tuple(volume.grid.shape[axis] for axis in view.orientation.order[::-1]),  # type: ignore[arg-type]
        spacing_mm=spacing,  # type: ignore[arg-type]
        width=width,
        height=height,
        pictures=tuple(pictures),
        samples=tuple(samples),
    )


def middle_of_largest(labels: Array, values: Sequence[int]) -> tuple[int, int | None]:
    """Find the middle slice of the label with most voxels in labels (T, H, W): (slice, label value).

    Without any of the label values: the middle slice of the volume and None.
    """
    areas = np.stack([np.bincount(plane.ravel(), minlength=max(values) + 1)[list(values)] for plane in labels])
    largest = int(areas.sum(axis=0).argmax())
    if not areas[:, largest].sum():
        return len(labels) // 2, None
    return choose_slice(areas[:, largest], "middle"), values[largest]


def _draw_thumbnail(plane: NDArray[np.uint8], labels: Array, values: Sequence[int], view: View, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a slice (R, C) at the resolution of the network's slices with outlines on top -> (*size, 3), turned as displayed."""
    rows, columns = (interpolation_matrix(before, after) for before, after in zip(plane.shape, view.stack_shape[1:], strict=True))
    network_slice = np.rint(resample_plane(plane, rows, columns)).clip(0, 255).astype(np.uint8)
    enlarged = np.asarray(Image.fromarray(network_slice).resize(size[::-1], Image.Resampling.BICUBIC))
    canvas = np.repeat(enlarged[..., None], 3, axis=2)
    paint_outlines(canvas, labels[np.ix_(nearest_indices(labels.shape[0], size[0]), nearest_indices(labels.shape[1], size[1]))], values)
    return canvas if view.axis == "SI" else canvas[::-1]  # the head is up, and S increases downwards


def paint_outlines(canvas: NDArray[np.uint8], labels: Array, values: Sequence[int]) -> None:
    """Draw the outline of every label (H, W) into the canvas (H, W, 3), each label value in its own colour."""
    border = outline(labels, _DENSITY)
    for place, value in enumerate(values):
        canvas[border & (labels == value)] = tuple(colour(place).to_bytes(3, "big"))


def colour(place: int) -> int:
    """Return the colour 0xRRGGBB of the label at this place in the list of labels; colours repeat."""
    return COLOURS[place % len(COLOURS)]


def sample_values(values: Array, count: int = SAMPLE) -> Array:
    """Return at most `count` of the values (n,), float64, spread over all of them in golden-ratio steps.

    Regular steps could pick the same column of every row.
    """
    if values.size <= count:
        return values.astype(np.float64)
    picks = (np.arange(count) * GOLDEN % 1 * values.size).astype(np.int64)
    return np.asarray(values[picks], np.float64)


@dataclass(frozen=True)
class SliceChoice:
    """A slice to show. severity: at least 0, comparable between cases; words: what is wrong with the slice."""

    slice: int
    severity: float
    words: str


@dataclass(frozen=True)
class DrawnSlice:
    """A slice as a picture. uri: a data: URI; width, height: size on the page in CSS pixels."""

    uri: str
    width: int
    height: int


def worst_slices(
    structures: Sequence[Structure], most: int = PICTURES_PER_CASE, flagged: Mapping[int, str] | None = None
) -> list[SliceChoice]:
    """Choose the slices to show first, worst first, no two of them close together. flagged: slice -> what is wrong there; always first.

    A slice is as bad as its worst structure: 1 - Dice, times the square root of its area relative to the structure's largest slice, so
    that a few voxels at an end come after half an organ. Without a reference: 1 - confidence or the disagreement, whichever is more.
    Annotated slices are correct by definition and come last. Slices without any fault are shown only when there are no others.
    """
    found: dict[int, SliceChoice] = {}
    for structure in structures:
        largest_px = max((mark.area_px for mark in structure.slices), default=0)
        for mark in structure.slices:
            choice = _rate_slice(mark, largest_px, structure.name if len(structures) > 1 else "")
            if choice.severity >= found.get(mark.slice, choice).severity:
                found[mark.slice] = choice
    for k, words in (flagged or {}).items():
        found[k] = SliceChoice(k, FLAGGED_SEVERITY, words)
    ranked = sorted(found.values(), key=lambda choice: (-choice.severity, choice.slice))
    apart = max(2, round(len(found) / (3 * most)))
    kept: list[SliceChoice] = []
    for choice in [choice for choice in ranked if choice.severity > 0] or ranked[:1]:
        if len(kept) < most and all(abs(choice.slice - other.slice) >= apart for other in kept):
            kept.append(choice)
    return kept


def _rate_slice(mark: SliceMark, largest_px: int, name: str) -> SliceChoice:
    """Rate one slice of one structure and describe its fault. name: of the structure, "" if it need not be named."""
    weight = (mark.area_px / largest_px) ** 0.5 if largest_px else 0.0
    severity, words = 0.0, []
    if mark.reference_px is None:
        if mark.confidence is not None:
            severity, words = 1 - mark.confidence, [f"confidence {mark.confidence:.3f}"]
        if mark.disagreement is not None:
            severity = max(severity, mark.disagreement)
            words.append(f"forward and backward pass disagree by {mark.disagreement:.3f}")
    else:
        severity = 0.0 if mark.dice is None else 1 - mark.dice
        if mark.missed:
            words = [f"missed ({mark.reference_px} px)"]
        elif mark.false:
            words = [f"false positive ({mark.prediction_px} px)"]
        else:
            words = [f"Dice {mark.dice:.3f}" if mark.dice is not None else "empty"]
        if mark.distance is not None and mark.area_px:
            words.append(f"{abs(mark.distance)} slice{'s' * (abs(mark.distance) != 1)} from the prompt")
    if mark.prompted:
        severity, words = 0.0, ["annotated"]
    return SliceChoice(mark.slice, severity * weight, f"{name} {', '.join(words)}".strip())


def draw_slices(loaded: LoadedCase, slices: Sequence[int]) -> dict[int, DrawnSlice]:
    """Draw those of the slices that the volume has; none when both masks are empty."""
    frame = _frame_of(loaded)
    return {k: _draw_slice(loaded, frame, k) for k in slices if frame is not None and 0 <= k < loaded.slice_count}


def make_pictures(case: str, choices: Sequence[SliceChoice], drawn: Mapping[int, DrawnSlice]) -> tuple[Picture, ...]:
    """Combine the chosen slices that were drawn with their captions, in the order of the choices."""
    pictures = []
    for choice in choices:
        if (found := drawn.get(choice.slice)) is not None:
            caption = f"slice {choice.slice}: {choice.words}" if choice.words else f"slice {choice.slice}"
            pictures.append(Picture(case, choice.slice, found.uri, found.width, found.height, caption))
    return tuple(pictures)


def worst_of_all(pictures: Mapping[str, Sequence[tuple[float, Picture]]], most: int = 24, per_case: int = 2) -> tuple[Picture, ...]:
    """Choose the worst pictures of all cases, worst first. pictures: case -> (severity, picture)."""
    best = [found for pairs in pictures.values() for found in sorted(pairs, key=lambda p: -p[0])[:per_case]]
    return tuple(picture for _, picture in sorted(best, key=lambda p: (-p[0], p[1].case, p[1].slice))[:most])


@dataclass(frozen=True)
class _Frame:
    """The part of every slice of a case that is shown: rows and columns of the displayed slice; width, height: in CSS pixels."""

    rows: slice
    columns: slice
    width: int
    height: int


def _frame_of(loaded: LoadedCase) -> _Frame | None:
    """Choose the part that holds both masks of the whole case and a margin; None when they are empty."""
    if loaded.box is None:
        return None
    in_plane = [axis for axis in range(3) if axis != loaded.axis]
    box = np.zeros([loaded.grid.shape[axis] for axis in in_plane], bool)
    box[tuple(slice(*loaded.box[axis]) for axis in in_plane)] = True
    box, spacing, spans = loaded.to_display(box), loaded.display_spacing_mm(), []
    for (start, stop), size, mm in zip(bounding_box(box) or (), box.shape, spacing, strict=True):
        margin = round(max(_MARGIN_MM / mm, _MARGIN_FRACTION * (stop - start)))
        spans.append((max(0, start - margin), min(size, stop + margin)))
    width, height = display_size([stop - start for start, stop in spans], spacing, _PICTURE_SIZE)
    return _Frame(slice(*spans[0]), slice(*spans[1]), width, height)


def _draw_slice(loaded: LoadedCase, frame: _Frame, k: int) -> DrawnSlice:
    """Draw slice k with the outlines of both masks; their colours alternate where the outlines coincide."""

    def part(volume: Array) -> Array:
        return loaded.to_display(volume[(slice(None),) * loaded.axis + (k,)])[frame.rows, frame.columns]

    if loaded.image is None:
        background = np.full((frame.height, frame.width), BLANK, np.uint8)
    else:
        plane = Image.fromarray(np.ascontiguousarray(apply_window(part(loaded.image), loaded.window)))
        background = np.asarray(plane.resize((frame.width, frame.height), Image.Resampling.BICUBIC))
    borders = []
    for mask in (loaded.reference, loaded.prediction):
        labels = np.zeros((1, 1), np.uint8) if mask is None else part(mask)
        rows, columns = (nearest_indices(*sizes) for sizes in zip(labels.shape, background.shape, strict=True))
        borders.append(outline(labels[np.ix_(rows, columns)]))
    reference, prediction = borders
    canvas = np.repeat(background[..., None], 3, axis=2)
    canvas[reference] = REFERENCE
    y, x = np.indices(background.shape)
    canvas[prediction & (~reference | ((y + x) // _DASH % 2 == 0))] = PREDICTION
    return DrawnSlice(encode_webp(canvas, _PICTURE_QUALITIES, _PICTURE_BYTES), frame.width, frame.height)
