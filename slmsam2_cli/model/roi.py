"""What the network sees of a slice: a square around what is annotated, brought to the size of its input.

A structure that fills a tenth of a slice has a handful of places at stride 16; in a square twice as wide as itself it has half of
them, whatever the slice (measured in docs/explanation/nano.md).

From a stack of slices to network input: channels to colours, and the square frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.planning.plan import RGB_CHANNELS

MIN_EDGE = 16  # slice pixels; a smaller square would show no surroundings of a dot


@dataclass(frozen=True)
class RoiCrop:
    """A square of a slice, in slice pixels; it lies inside of the slice's frame."""

    row: int
    column: int
    edge: int

    def cut(self, slices: Tensor, input_size: int) -> Tensor:
        """(..., C, S, S) -> (..., C, px, px), bilinear, averaging when shrinking."""
        part = slices[..., self.row : self.row + self.edge, self.column : self.column + self.edge]
        if self.edge == input_size:
            return part
        flat = part.reshape(-1, *part.shape[-3:]).float()
        seen = F.interpolate(flat, size=(input_size, input_size), mode="bilinear", align_corners=False, antialias=self.edge > input_size)
        return seen.reshape(*part.shape[:-2], input_size, input_size)

    def crop_masks(self, masks: Tensor, input_size: int) -> Tensor:
        """Masks (..., S, S) bool or in {0, 1} -> (..., px, px), the same type; a mask too thin for that keeps its best pixels."""
        if self.edge == input_size:
            return masks[..., self.row : self.row + self.edge, self.column : self.column + self.edge]
        cover = self.cut(masks.float().unsqueeze(-3), input_size).squeeze(-3)
        most = cover.flatten(-2).amax(-1)[..., None, None]
        return ((cover >= most.clamp(max=0.5)) & (cover > 0)).to(masks.dtype)

    def paste(self, logits: Tensor, storage_size: int, absent: float) -> Tensor:
        """(..., n, n) logits of the square -> (..., S, S) of the slice's frame, `absent` around it."""
        flat = logits.reshape(-1, 1, *logits.shape[-2:]).float()
        part = F.interpolate(flat, size=(self.edge, self.edge), mode="bilinear", align_corners=False)
        whole = part.new_full((len(part), storage_size, storage_size), absent)
        whole[:, self.row : self.row + self.edge, self.column : self.column + self.edge] = part[:, 0]
        return whole.reshape(*logits.shape[:-2], storage_size, storage_size)


def around(box: tuple[int, int, int, int], times: float, storage_size: int) -> RoiCrop:
    """The square `times` as wide as the longer side of a box (top, left, bottom, right; half-open), moved to lie in the frame."""
    top, left, bottom, right = box
    edge = min(storage_size, max(MIN_EDGE, math.ceil(times * max(bottom - top, right - left))))
    row, column = ((low + high - edge) // 2 for low, high in ((top, bottom), (left, right)))
    return RoiCrop(min(max(row, 0), storage_size - edge), min(max(column, 0), storage_size - edge), edge)


def box_of(masks: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """The box around masks (S, S), of which one at least holds something: top, left, bottom, right, half-open."""
    held = torch.stack([mask != 0 for mask in masks]).any(dim=0)
    rows, columns = (held.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def to_input(stack: Tensor, adjacent_slices: bool = False) -> Tensor:
    """(C, T, H, W) -> (T, 3, H, W): one channel is replicated, two are joined by their mean, three are RGB.

    More than three stay as they are, (T, C, H, W), for the model's own projection (projection.py). adjacent_slices: of one channel, the
    colours are the slice, the one before and the one after; at the ends of the stack, the slice itself instead.
    """
    if adjacent_slices and len(stack) == 1:
        here = stack[0]
        return torch.stack([here, torch.cat([here[:1], here[:-1]]), torch.cat([here[1:], here[-1:]])], dim=1)
    if len(stack) == 2:
        stack = torch.cat([stack, stack.mean(dim=0, keepdim=True)])
    return stack.transpose(0, 1).expand(-1, max(RGB_CHANNELS, len(stack)), -1, -1)


def pad_to_square(slices: Tensor, input_size: int) -> Tensor:
    """Zero-pad (..., H, W) at the bottom and right to (..., input_size, input_size)."""
    height, width = slices.shape[-2:]
    return F.pad(slices, (0, input_size - width, 0, input_size - height))
