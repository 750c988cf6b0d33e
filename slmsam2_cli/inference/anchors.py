"""From a person's prompts on the volume's own grid to anchors on the stack that the network sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slmsam2_cli.data.geometry import View, resample_plane, weights
from slmsam2_cli.data.prompts import Prompts
from slmsam2_cli.inference.engine import Anchor
from slmsam2_cli.model.slices import framed


def anchors_of(prompts: Prompts, view: View, values: Sequence[int], frame_px: int) -> dict[int, list[Anchor]]:
    """Label value -> its annotated slices, ascending; labels that nobody annotated with anything are left out.

    Slices outside the crop hold nothing the network could see, so they anchor nothing (they still come back exact). A slice
    without the label is an end-stop only where all of it was looked at, and marks an end only where nothing at all is painted on it.
    Where several native slices meet in one stack slice, a painted one counts.
    """
    found: dict[int, list[Anchor]] = {}
    for value in values:
        masks = {s: _mask(prompts, view, value, s) for s in prompts.annotated.get(value, ()) if _inside(view, s)}
        empty_first = sorted((s for s in masks if masks[s].any() or _seen_whole(prompts, view, s)), key=lambda s: bool(masks[s].any()))
        by_slice = {view.to_stack(s): masks[s] for s in empty_first}
        if any(mask.any() for mask in by_slice.values()):
            bare = {view.to_stack(s): not _painted(prompts, view, s) for s in empty_first}
            found[value] = [Anchor(s, framed(torch.from_numpy(mask), frame_px), bare[s]) for s, mask in sorted(by_slice.items())]
    return found


def _painted(prompts: Prompts, view: View, native_slice: int) -> bool:
    """Whether anything, of whichever label, is painted on the slice: then it may have been annotated for the sake of that."""
    plane = view.oriented(prompts.labels)[native_slice]
    return bool(((plane != 0) & (plane != (prompts.ignore or 0))).any())


def _inside(view: View, native_slice: int) -> bool:
    start, end = view.box[0]
    return start <= native_slice < end


def _seen_whole(prompts: Prompts, view: View, native_slice: int) -> bool:
    """Whether nothing on the slice is ignored."""
    return prompts.ignore is None or not bool((view.oriented(prompts.labels)[native_slice] == prompts.ignore).any())


def _mask(prompts: Prompts, view: View, value: int, native_slice: int) -> np.ndarray:
    """One label on one slice at the stack's size, (H, W) bool; a structure too thin for the stack keeps its best pixels."""
    _, height, width = view.stack_shape
    drawn = view.cropped(prompts.labels)[native_slice - view.box[0][0]] == value
    cover = resample_plane(drawn.astype(np.float32), weights(drawn.shape[0], height), weights(drawn.shape[1], width))
    return np.asarray(cover >= min(0.5, float(cover.max()))) & (cover > 0)
