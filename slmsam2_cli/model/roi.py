"""ROI crops, and how a stack of slices becomes network input.

An ROI crop is a square around what is annotated, resampled to the network's input size. A structure that fills a tenth of a slice has
a handful of positions at stride 16; in a crop twice as wide as itself it has half of them (docs/experiments/2026-11-26-roi-scale.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.planning.plan import RGB_CHANNELS

MIN_EDGE = 16  # edge of the smallest crop in slice pixels, so that a dot keeps some surroundings


@dataclass(frozen=True)
class RoiCrop:
    """A square inside a slice of S x S pixels: its first row and column and its edge, in slice pixels."""

    row: int
    column: int
    edge: int

    def crop(self, slices: Tensor, input_size: int) -> Tensor:
        """Crop (..., C, S, S) -> (..., C, input_size, input_size), bilinear, with averaging when shrinking."""
        part = slices[..., self.row : self.row + self.edge, self.column : self.column + self.edge]
        if self.edge == input_size:
            return part
        flat, size = part.reshape(-1, *part.shape[-3:]).float(), (input_size, input_size)
        resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False, antialias=self.edge > input_size)
        return resized.reshape(*part.shape[:-2], *size)

    def crop_masks(self, masks: Tensor, input_size: int) -> Tensor:
        """Crop masks (..., S, S), bool or in {0, 1} -> (..., input_size, input_size) of the same type.

        A pixel is inside where the mask covers half of it; a mask too thin for that keeps the pixels that it covers most.
        """
        cover = self.crop(masks.float().unsqueeze(-3), input_size).squeeze(-3)
        most = cover.flatten(-2).amax(-1)[..., None, None]
        return ((cover >= most.clamp(max=0.5)) & (cover > 0)).to(masks.dtype)

    def paste(self, logits: Tensor, storage_size: int, absent: float) -> Tensor:
        """Paste logits (..., n, n) of the crop, resampled bilinearly, into slices (..., S, S) that are `absent` outside it.

        storage_size: S in pixels. absent: logit.
        """
        flat = logits.reshape(-1, 1, *logits.shape[-2:]).float()
        part = F.interpolate(flat, size=(self.edge, self.edge), mode="bilinear", align_corners=False)
        whole = part.new_full((len(part), storage_size, storage_size), absent)
        whole[:, self.row : self.row + self.edge, self.column : self.column + self.edge] = part[:, 0]
        return whole.reshape(*logits.shape[:-2], storage_size, storage_size)


def roi_around(box: tuple[int, int, int, int], scale: float, storage_size: int) -> RoiCrop:
    """Place a crop around a box (top, left, bottom, right; half-open, in slice pixels).

    The edge is `scale` times the box's longer side, at least `MIN_EDGE` and at most `storage_size`; the crop is moved to lie in the slice.
    """
    top, left, bottom, right = box
    edge = min(storage_size, max(MIN_EDGE, math.ceil(scale * max(bottom - top, right - left))))
    row, column = ((low + high - edge) // 2 for low, high in ((top, bottom), (left, right)))
    return RoiCrop(min(max(row, 0), storage_size - edge), min(max(column, 0), storage_size - edge), edge)


def mask_box(masks: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Find the box (top, left, bottom, right; half-open) around masks (S, S), of which at least one is not empty."""
    box = bounding_box(torch.stack([mask != 0 for mask in masks]).any(dim=0).cpu().numpy())
    assert box is not None
    (top, bottom), (left, right) = box
    return top, left, bottom, right


def to_input(stack: Tensor, adjacent_slices: bool = False) -> Tensor:
    """Turn a stack (C, T, H, W) into T slices (T, 3, H, W): one channel is repeated, two get their mean as the third.

    More than three channels stay, (T, C, H, W), for the model's projection (adapter_layers.py). adjacent_slices: the three channels are
    the slice, the one before and the one after (at the ends, the slice itself); it applies to stacks of one channel only.
    """
    if adjacent_slices and len(stack) == 1:
        slices = stack[0]
        return torch.stack([slices, torch.cat([slices[:1], slices[:-1]]), torch.cat([slices[1:], slices[-1:]])], dim=1)
    if len(stack) == 2:
        stack = torch.cat([stack, stack.mean(dim=0, keepdim=True)])
    return stack.transpose(0, 1).expand(-1, max(RGB_CHANNELS, len(stack)), -1, -1)


@dataclass(frozen=True)
class InputSlices:
    """The slices of a stack (C, T, H, W) as network input (T, 3 or C, edge, edge), made when they are asked for.

    adjacent_slices: as in `to_input`.
    """

    stack: Tensor
    edge: int
    adjacent_slices: bool = False

    def __len__(self) -> int:
        return self.stack.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all slices."""
        return len(self), max(RGB_CHANNELS, len(self.stack)), self.edge, self.edge

    def __getitem__(self, span: slice) -> Tensor:
        """Return the slices of a range as float32."""
        start, stop, _ = span.indices(len(self))
        first, last = max(0, start - 1), min(len(self), stop + 1)  # with the adjacent ones
        part = to_input(self.stack[:, first:last].float(), self.adjacent_slices)
        return pad_to_square(part[start - first : stop - first], self.edge)


def pad_to_square(slices: Tensor, input_size: int) -> Tensor:
    """Zero-pad (..., H, W) at the bottom and right to (..., input_size, input_size)."""
    height, width = slices.shape[-2:]
    return F.pad(slices, (0, input_size - width, 0, input_size - height))
