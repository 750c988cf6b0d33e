"""From a stack of slices to network input: channels to RGB, and the square frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.planning.channels import COLOURS


def to_input(stack: Tensor) -> Tensor:
    """(C, T, H, W) -> (T, 3, H, W), as `to_rgb`; more than three channels stay C, for the model's own projection (projection.py)."""
    return stack.transpose(0, 1) if len(stack) > COLOURS else to_rgb(stack)


def to_rgb(stack: Tensor) -> Tensor:
    """(C, T, H, W) -> (T, 3, H, W): one channel is replicated, two are joined by their mean, three are RGB.

    Raises ValueError for more than three channels.
    """
    channels = len(stack)
    if channels == 2:
        stack = torch.cat([stack, stack.mean(dim=0, keepdim=True)])
    if channels > COLOURS:
        raise ValueError(f"{channels} channels cannot be shown as RGB")
    return stack.transpose(0, 1).expand(-1, COLOURS, -1, -1)


def framed(slices: Tensor, frame_px: int) -> Tensor:
    """Zero-pad (..., H, W) at the bottom and right to (..., frame_px, frame_px)."""
    height, width = slices.shape[-2:]
    return F.pad(slices, (0, frame_px - width, 0, frame_px - height))
