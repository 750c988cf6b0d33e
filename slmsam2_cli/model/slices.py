"""From a stack of slices to network input: channels to colours, and the square frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.planning.channels import COLOURS


def to_input(stack: Tensor, neighbours: bool = False) -> Tensor:
    """(C, T, H, W) -> (T, 3, H, W): one channel is replicated, two are joined by their mean, three are RGB.

    More than three stay as they are, (T, C, H, W), for the model's own projection (projection.py). neighbours: of one channel, the
    colours are the slice, the one before and the one after; at the ends of the stack, the slice itself instead.
    """
    if neighbours and len(stack) == 1:
        here = stack[0]
        return torch.stack([here, torch.cat([here[:1], here[:-1]]), torch.cat([here[1:], here[-1:]])], dim=1)
    if len(stack) == 2:
        stack = torch.cat([stack, stack.mean(dim=0, keepdim=True)])
    return stack.transpose(0, 1).expand(-1, max(COLOURS, len(stack)), -1, -1)


def framed(slices: Tensor, frame_px: int) -> Tensor:
    """Zero-pad (..., H, W) at the bottom and right to (..., frame_px, frame_px)."""
    height, width = slices.shape[-2:]
    return F.pad(slices, (0, frame_px - width, 0, frame_px - height))
