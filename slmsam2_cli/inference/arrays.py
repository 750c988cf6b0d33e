"""Read images, masks and prompts that are given in Python as arrays or single files, and return masks at the arrays' own size.

An array has no spacing, so its pixels are taken for squares and its longer edge fills the network's input; the shorter one is padded
with zeros at the bottom or right. Prompts mean the same as in `dataset/prompts.py`: a slice with anything drawn on it is annotated for
every label. All functions raise ValueError, one line that begins with the name of the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.dataset.intensity import normalise
from slmsam2_cli.dataset.prompts import PromptFile, Prompts, mask_to_prompts, read_annotated_mask, restore_annotated
from slmsam2_cli.dataset.slices import View
from slmsam2_cli.inference.image_set import ImageResult
from slmsam2_cli.inference.propagation import AnnotatedSlice, Propagation
from slmsam2_cli.inference.segment import annotated_slices_of, restore_labels
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import Volume
from slmsam2_cli.model.roi import pad_to_square, to_input
from slmsam2_cli.planning.modality import PERCENTILES
from slmsam2_cli.planning.plan import Plan

Array = np.ndarray[Any, Any]
Window = tuple[float, float] | Literal["percentile"]
_OBJECT = 1  # the one label of a mask


@dataclass(frozen=True, eq=False)
class Track:
    """The result of one object on every slice of a stack.

    mask (T, H, W) bool; confidence (T,) float32: object score probability times predicted IoU, 1 on annotated slices, 0 where no
    pass came; disagreement (T,) float32: 1 - Dice of the two passes that meet, NaN where there is one.
    """

    mask: Array
    confidence: Array
    disagreement: Array


@dataclass(frozen=True, eq=False)
class Match:
    """The result of one object on one image.

    mask (H, W) bool; confidence: object score probability times predicted IoU, 1 on annotated images; nearest: index of the annotated
    image whose object it resembles most; similarity: to that one, -1 to 1; warning: "" if all is well.
    """

    mask: Array
    confidence: float
    nearest: int
    similarity: float
    warning: str


@dataclass(frozen=True)
class _Scheme:
    """How the grey values of one channel are scaled to 0…1."""

    scheme: Literal["ct", "percentile"]
    lower: float
    upper: float


def as_array(value: object, name: str) -> Array:
    """Convert a NumPy array or torch tensor of finite numbers or booleans to a NumPy array."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise ValueError(f"{name}: a sparse tensor; give a dense one")
        value = (value.float() if value.dtype is torch.bfloat16 else value).detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name}: a {type(value).__name__}; give a NumPy array or a torch tensor")
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name}: a masked array; put a value where it is masked, with its method filled")
    if value.dtype.kind not in "buif":
        raise ValueError(f"{name}: values of type {value.dtype}; give numbers")
    if value.size == 0:
        raise ValueError(f"{name}: shape {value.shape} holds nothing")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{name}: holds NaN or infinite values; replace them, for instance by the background's")
    return value


def as_mask(value: object, shape: tuple[int, ...], name: str) -> Array:
    """Convert a mask of this shape, with 0 and one other value, to bool."""
    mask = as_array(value, name)
    if mask.shape != shape:
        raise ValueError(f"{name}: shape {mask.shape}, but the image's is {shape}")
    held: Array = mask != 0
    if held.any() and (mask[held] != mask[held][0]).any():
        shown = ", ".join(f"{one:g}" for one in np.unique(mask[held])[:3].tolist())
        raise ValueError(f"{name}: more than one value besides 0 ({shown}, …); give one mask per object, 0 where it is not")
    return held


def frame(
    slices: object, input_size: int, window: Window | None, name: str = "slices", adjacent_slices: bool = False
) -> tuple[View, Tensor]:
    """Turn a stack (T, H, W) or (T, C, H, W) into its view and network input (T, C, px, px) in [0, 1], C at least 3.

    window: the grey values that become 0 and 1; "percentile": the stack's own, as plans have it for all but CT; None: the values
    are from 0 to 1 already. adjacent_slices: the slices before and after a one-channel slice are its further channels.
    """
    stack = as_array(slices, name)
    if stack.ndim not in (3, 4):
        raise ValueError(f"{name}: shape {stack.shape}; give (T, H, W) or (T, C, H, W)")
    stack = stack[None] if stack.ndim == 3 else stack.swapaxes(0, 1)
    _, count, height, width = stack.shape
    grid = Grid((count, height, width), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    rows, columns = (max(1, round(edge * input_size / max(height, width))) for edge in (height, width))
    view = View(grid, "SI", ((0, count), (0, height), (0, width)), (count, rows, columns))
    frames = view.frames(_scaled(stack, window, name))
    return view, pad_to_square(to_input(torch.from_numpy(frames), adjacent_slices), input_size)


def _scaled(stack: Array, window: Window | None, name: str) -> Array:
    """Scale (C, T, H, W) to float32 in [0, 1]."""
    if window is None:
        low, high = float(stack.min()), float(stack.max())
        if low < 0 or high > 1:
            wanted = 'window=(lower, upper), the grey values that become 0 and 1, or window="percentile"'
            raise ValueError(f"{name}: values from {low:g} to {high:g}, not from 0 to 1; give {wanted}")
        return stack.astype(np.float32)
    if isinstance(window, str):
        if window != "percentile":
            raise ValueError(f'window: {window!r}; give (lower, upper) or "percentile"')
        return normalise(stack, [_Scheme("percentile", *PERCENTILES)] * len(stack))
    try:
        lower, upper = (float(edge) for edge in window)
    except (TypeError, ValueError):
        raise ValueError(f"window: {window!r}; give the grey values that become 0 and 1") from None
    if not np.isfinite(upper - lower):
        raise ValueError(f"window: {lower:g} to {upper:g}; give finite values")
    if not lower < upper:
        raise ValueError(f"window: {lower:g} to {upper:g}; the second value must be above the first")
    return normalise(stack, [_Scheme("ct", lower, upper)] * len(stack))


def masks_to_prompts(masks: object, view: View, name: str) -> Prompts:
    """Read the annotated slices of one object: slice index -> mask (H, W), empty where the object is not."""
    count, *size = view.grid.shape
    if not isinstance(masks, Mapping) or not masks:
        raise ValueError(f"{name}: give {{slice index: mask}}, one annotated slice at least")
    labels = np.zeros(view.grid.shape, np.uint8)
    for index, mask in masks.items():
        place = check_index(index, count, name, "slice")
        labels[place] = as_mask(mask, tuple(size), f"{name}, slice {place}")
    if not labels.any():
        raise ValueError(f"{name}: every mask is empty; annotate a slice that holds the object")
    slices = tuple(sorted(int(index) for index in masks))
    return Prompts(labels, {_OBJECT: slices}, slices)


def check_index(index: object, count: int, name: str, what: str) -> int:
    """Check an index from 0 to count - 1."""
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < count:
        raise ValueError(f"{name}: no {what} {index!r}; they are numbered from 0 to {count - 1}")
    return int(index)


def annotated_slices_on(prompts: Prompts, view: View, input_size: int) -> list[AnnotatedSlice]:
    """Bring the annotated slices of the object to the network's input."""
    return annotated_slices_of(prompts, view, (_OBJECT,), input_size)[_OBJECT]


def track_of(found: Propagation, prompts: Prompts, view: View, input_size: int) -> Track:
    """Return the result at the stack's own size, with annotated slices unchanged."""
    mask = restore_annotated(restore_labels({_OBJECT: found}, view, input_size), prompts, view) == _OBJECT
    return Track(mask, found.confidence.numpy(), found.disagreement.numpy())


def images_of(images: object, input_size: int, window: Window | None) -> tuple[list[View], Tensor]:
    """Turn images (H, W) or (C, H, W) into their views and network input (N, C, px, px), C at least 3."""
    if isinstance(images, np.ndarray | Tensor):
        images = [*as_array(images, "images")] if images.ndim in (3, 4) else None
    if not isinstance(images, Sequence) or isinstance(images, str) or not images:
        raise ValueError("images: give an array (N, H, W) or (N, C, H, W), or a list of arrays (H, W) or (C, H, W)")
    views, frames = [], []
    for i, image in enumerate(images):
        pixels = as_array(image, f"images[{i}]")
        if pixels.ndim not in (2, 3):
            raise ValueError(f"images[{i}]: shape {pixels.shape}; give (H, W) or (C, H, W)")
        view, slices = frame(pixels[None], input_size, window, f"images[{i}]")
        views.append(view)
        frames.append(slices)
    if len(seen := sorted({one.shape[1] for one in frames})) > 1:
        raise ValueError(f"images: some of {seen[0]} channels or fewer, some of {seen[-1]}; give as many channels of each")
    return views, torch.cat(frames)


def read_image_prompts(masks: object, views: list[View]) -> dict[int, Array]:
    """Read the annotated images: index -> mask (H, W) bool at the image's own size."""
    if not isinstance(masks, Mapping):
        raise ValueError("prompts: give {image index: mask}")
    places = {check_index(index, len(views), "prompts", "image"): mask for index, mask in masks.items()}
    annotated = {i: as_mask(mask, views[i].grid.shape[1:], f"prompts, image {i}") for i, mask in places.items()}
    if not any(mask.any() for mask in annotated.values()):
        raise ValueError("prompts: no mask holds the object; annotate an image that does")
    return annotated


def mask_at_input_size(mask: Array, view: View, input_size: int) -> Tensor:
    """Bring a mask (H, W) to the network's input: (px, px) bool."""
    slices = annotated_slices_of(Prompts(mask[None].astype(np.uint8), {_OBJECT: (0,)}, ()), view, (_OBJECT,), input_size)
    return slices[_OBJECT][0].mask if slices else torch.zeros(input_size, input_size, dtype=torch.bool)


def match_of(found: ImageResult, annotated: Array | None, view: View, input_size: int) -> Match:
    """Return the result of one image at its own size; an annotated image keeps its mask."""
    alone = Propagation(found.logits[None], torch.tensor([found.confidence]), torch.tensor([torch.nan]))
    mask = annotated if annotated is not None else restore_labels({_OBJECT: alone}, view, input_size)[0] == _OBJECT
    return Match(mask, found.confidence, found.nearest, found.similarity, found.warning)


@dataclass(frozen=True, eq=False)
class ArrayPrompts:
    """Prompts of one volume.

    masks: one mask that holds label values, or one mask per label, by the label's value or name; each an array (Z, Y, X) on the
    image's grid or the path of a file. annotated_slices: further slices that are empty because the labels are not there,
    numbered as the file stores them; None when there are none.
    """

    masks: object
    annotated_slices: Sequence[int] | None = None

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """Read the prompts. Returns them and no warnings. Raises: ValueError for arguments, CaseError for files."""
        if isinstance(self.masks, Mapping):
            mask = self._joined(self.masks, case, image, view, plan)
        else:
            mask = _voxels(self.masks, "prompts", case, image, view)
            known = {0, *plan.labels, *([] if plan.ignore is None else [plan.ignore])}
            if unknown := [value for value in np.unique(mask).tolist() if value not in known]:
                raise ValueError(f"prompts: holds {', '.join(f'{value:g}' for value in unknown[:3])}; the plan has {_labels(plan)}")
            mask = mask.astype(_dtype(plan), copy=False)
        listed = None
        if self.annotated_slices is not None:
            if not isinstance(self.annotated_slices, Sequence | np.ndarray):
                raise ValueError(f"annotated_slices: {self.annotated_slices!r}; give a list of slice numbers")
            count = view.native_slices()
            listed = tuple(view.file_index(check_index(index, count, "annotated_slices", "slice")) for index in self.annotated_slices)
        found = mask_to_prompts(
            mask,
            view,
            tuple(plan.labels),
            PromptFile(case.id, Path(self.masks).name if isinstance(self.masks, str | PathLike) else "prompts", "annotated_slices"),
            plan.ignore,
            listed,
        )
        if found is None:
            raise ValueError("prompts: the mask is empty; give one with at least one annotated slice")
        return found, ()

    def _joined(self, masks: Mapping[object, object], case: Case, image: Volume, view: View, plan: Plan) -> Array:
        """Join masks per label into one mask (Z, Y, X) of label values."""
        joined = np.zeros(view.grid.shape, _dtype(plan))
        for key, mask in masks.items():
            name = f"prompts[{key!r}]"
            value = next((value for value, label in plan.labels.items() if key in (value, label)), None)
            if value is None:
                raise ValueError(f"prompts: no label {key!r}; the plan has {_labels(plan)}")
            held = as_mask(_voxels(mask, name, case, image, view), view.grid.shape, name)
            if (other := joined[held]).any():
                raise ValueError(f"{name}: {np.count_nonzero(other)} of its voxels belong to label {other[other != 0][0]} too")
            joined[held] = value
        return joined


def _voxels(mask: object, name: str, case: Case, image: Volume, view: View) -> Array:
    """Read a mask (Z, Y, X) of the image's shape from a file or an array."""
    if isinstance(mask, str | PathLike):
        path = Path(mask)
        return read_annotated_mask(path, view, image, case=case.id, root=path.parent).voxels
    voxels = as_array(mask, name)
    if voxels.shape != view.grid.shape:
        raise ValueError(f"{name}: shape {voxels.shape}, but the image's is {view.grid.shape} (z, y, x)")
    return voxels


def _labels(plan: Plan) -> str:
    return ", ".join(f"{value} ({name})" for value, name in plan.labels.items())


def _dtype(plan: Plan) -> type[np.uint8 | np.uint16]:
    return np.uint8 if max(*plan.labels, plan.ignore or 0) < 256 else np.uint16
