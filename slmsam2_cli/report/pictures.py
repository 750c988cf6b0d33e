"""The contact sheet: which slices of a case are worth a look, and each of them as a small picture with outlines drawn in.

Slices face the reader as in a radiologist's viewer; pixels are square in mm; the same input gives the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slmsam2_cli.report.contents import Picture, SliceMark, Structure
from slmsam2_cli.report.opened import Opened, grey

Array = NDArray[Any]
TRUTH, PREDICTION = (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)
BLANK = 32  # grey where there is no image
A_CASE = 4
ODD = 1.0  # as bad as a whole structure missed
_WIDTH, _HEIGHT = 220, 260  # largest shown size in pixels
_MARGIN_MM, _MARGIN_SHARE = 10.0, 0.25
_DASH = 6  # pixels of one colour where both outlines run together
_QUALITIES, _BYTES = (50, 30, 15), 6000  # WebP; the next lower one where a picture is larger than this


@dataclass(frozen=True)
class Choice:
    """A slice to show. badness: 0 and more, comparable between cases; words: what is wrong with it."""

    slice: int
    badness: float
    words: str


@dataclass(frozen=True)
class Shown:
    """One drawn slice. uri: a data: URI; width, height: shown size in CSS pixels."""

    uri: str
    width: int
    height: int


def worst_slices(structures: Sequence[Structure], most: int = A_CASE, odd: Mapping[int, str] | None = None) -> list[Choice]:
    """The slices to look at first, worst first, none next to another. odd: slices that are to come first whatever, and why.

    A slice is as bad as its worst structure: 1 - Dice, times the square root of its share of the structure's largest slice, so that
    a speck at an end does not stand before half an organ. Without a truth: 1 - confidence, or the disagreement where that is more.
    Given slices are right by definition, and come last.
    """
    found: dict[int, Choice] = {}
    for structure in structures:
        most_px = max((_pixels(mark) for mark in structure.slices), default=0)
        for mark in structure.slices:
            choice = _judged(mark, most_px, structure.name if len(structures) > 1 else "")
            if choice is not None and choice.badness >= found.get(mark.slice, choice).badness:
                found[mark.slice] = choice
    for k, words in (odd or {}).items():
        found[k] = Choice(k, ODD, words)
    ranked = sorted(found.values(), key=lambda choice: (-choice.badness, choice.slice))
    apart = max(2, round(len(found) / (3 * most)))
    return _spread(ranked, apart, most)


def draw_slices(opened: Opened, slices: Sequence[int]) -> dict[int, Shown]:
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
    """The worst pictures of all cases, worst first. shown: case -> (badness, picture)."""
    best = [found for pairs in shown.values() for found in sorted(pairs, key=lambda p: -p[0])[:a_case]]
    return tuple(picture for _, picture in sorted(best, key=lambda p: (-p[0], p[1].case, p[1].slice))[:most])


def _pixels(mark: SliceMark) -> int:
    return max(mark.prediction_px, mark.reference_px or 0)


def _judged(mark: SliceMark, most_px: int, name: str) -> Choice | None:
    """How bad one slice of one structure is; None when nothing is known against it."""
    weight = (_pixels(mark) / most_px) ** 0.5 if most_px else 0.0
    if mark.reference_px is None:
        doubt = max(1 - mark.confidence if mark.confidence is not None else 0.0, mark.disagreement or 0.0)
        known = mark.confidence is not None or mark.disagreement is not None
        words = [f"confidence {mark.confidence:.2f}"] if mark.confidence is not None else []
        words += [f"passes disagree by {mark.disagreement:.2f}"] if mark.disagreement is not None else []
        badness = doubt * weight if known and not mark.prompted else 0.0
    else:
        badness = 0.0 if mark.dice is None or mark.prompted else (1 - mark.dice) * weight
        words = [_verdict(mark)]
    if mark.prompted:
        words = ["given"]
    return Choice(mark.slice, badness, f"{name} {', '.join(words)}".strip())


def _verdict(mark: SliceMark) -> str:
    away = "" if mark.distance is None else f", {abs(mark.distance)} from the prompt"
    if mark.missed:
        return f"missed ({mark.reference_px} px){away}"
    if mark.false:
        return f"false ({mark.prediction_px} px){away}"
    return f"Dice {mark.dice:.2f}{away}" if mark.dice is not None else "empty"


def _spread(ranked: Sequence[Choice], apart: int, most: int) -> list[Choice]:
    """The first `most` that are at least so many slices from one another; those nothing is wrong with only when there is no other."""
    bad = [choice for choice in ranked if choice.badness > 0] or list(ranked[:1])
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
    def around(cls, opened: Opened) -> _Frame | None:
        """Around both masks of the whole case and a margin; None when they are empty."""
        held = [np.nonzero(plane) for plane in _silhouettes(opened)]
        held = [(rows, columns) for rows, columns in held if len(rows)]
        if not held:
            return None
        size, mm = _silhouettes_shape(opened), opened.facing_mm()
        spans = [(min(int(h[a].min()) for h in held), max(int(h[a].max()) for h in held) + 1) for a in range(2)]
        rows, columns = (_widened(span, size[a], mm[a]) for a, span in enumerate(spans))
        high, wide = (rows[1] - rows[0]) * mm[0], (columns[1] - columns[0]) * mm[1]
        scale = min(_WIDTH / wide, _HEIGHT / high)
        return cls(rows, columns, max(1, round(wide * scale)), max(1, round(high * scale)))

    def cut(self, plane: Array) -> Array:
        return plane[slice(*self.rows), slice(*self.columns)]


def _silhouettes(opened: Opened) -> Iterator[Array]:
    """For each mask, where any slice holds something, facing the reader."""
    box = [slice(*span) for span in opened.box or ()]
    for mask in opened.masks if box else ():
        plane = np.zeros([n for a, n in enumerate(mask.shape) if a != opened.axis], bool)
        plane[tuple(side for a, side in enumerate(box) if a != opened.axis)] = mask[tuple(box)].any(axis=opened.axis)
        yield opened.facing(plane)


def _silhouettes_shape(opened: Opened) -> tuple[int, ...]:
    return opened.facing(opened.masks[0].take(0, axis=opened.axis)).shape


def _widened(span: tuple[int, int], size: int, mm: float) -> tuple[int, int]:
    margin = round(max(_MARGIN_MM / mm, _MARGIN_SHARE * (span[1] - span[0])))
    return max(0, span[0] - margin), min(size, span[1] + margin)


def _picture(opened: Opened, frame: _Frame, k: int) -> Shown:
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


def _plane(opened: Opened, frame: _Frame, volume: Array, k: int) -> Array:
    """The shown part of slice k, facing the reader."""
    return frame.cut(opened.facing(volume[(slice(None),) * opened.axis + (k,)]))


def _background(opened: Opened, frame: _Frame, k: int) -> NDArray[np.uint8]:
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
