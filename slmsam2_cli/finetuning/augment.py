"""Random changes of a clip that leave its meaning alone; every slice of a window gets the same draw.

Spatial: rotation up to 25 degrees, scale 0.75-1.35, shift up to 15 % of the frame, in-plane mirroring (tracks follow
a mask, not a name, so left may become right). Intensity: gamma, contrast, brightness, noise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.finetuning.clips import Clips

_DEGREES, _SCALE, _SHIFT = 25.0, 0.3, 0.3


def _between(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _affine(windows: int, rng: torch.Generator) -> Tensor:
    """(W, 2, 3) matrices for `affine_grid`."""
    angle = _between(-math.radians(_DEGREES), math.radians(_DEGREES), (windows,), rng)
    scale = torch.exp(_between(-_SCALE, _SCALE, (windows,), rng))
    mirror = torch.where(torch.rand(windows, generator=rng) < 0.5, -1.0, 1.0)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    shift = _between(-_SHIFT / 2, _SHIFT / 2, (windows, 2), rng)
    rows = [torch.stack([cosine * mirror, -sine, shift[:, 0]], 1), torch.stack([sine * mirror, cosine, shift[:, 1]], 1)]
    return torch.stack(rows, dim=1)


def _move(stack: Tensor, affine: Tensor, mode: str) -> Tensor:
    """Resample (T, W, C, H, W) with one matrix per window, (W, 2, 3)."""
    length, windows, channels, height, width = stack.shape
    flat = stack.transpose(0, 1).reshape(windows, length * channels, height, width)
    grid = F.affine_grid(affine, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, grid, mode=mode, align_corners=False)
    return moved.reshape(windows, length, channels, height, width).transpose(0, 1)


def _shade(frames: Tensor, rng: torch.Generator) -> Tensor:
    """Gamma, contrast, brightness and noise on (T, W, C, H, W), one draw per window."""
    one = (1, frames.shape[1], 1, 1, 1)
    gamma = torch.exp(_between(-0.4, 0.4, one, rng))
    contrast = torch.exp(_between(-0.3, 0.3, one, rng))
    brightness = _between(-0.15, 0.15, one, rng)
    noise = torch.randn(frames.shape[:2] + (1,) + frames.shape[3:], generator=rng) * _between(0.0, 0.05, one, rng)
    return ((frames.clamp(0, 1) ** gamma - 0.5) * contrast + 0.5 + brightness + noise).clamp(0, 1)


def augment(clips: Clips, rng: torch.Generator) -> Clips:
    """A changed copy of the clips, on the CPU; tracks whose annotated slice was moved out of sight are dropped.

    When that would be all of them, nothing is moved.
    """
    affine = _affine(clips.frames.shape[1], rng)
    masks = _move(clips.masks, affine[clips.window], "nearest")
    kept = masks[0].flatten(1).any(dim=1)
    if not kept.any():
        return replace(clips, frames=_shade(clips.frames, rng))
    frames = _shade(_move(clips.frames, affine, "bilinear"), rng)
    known = None if clips.known is None else 1 - _move(1 - clips.known, affine[clips.window], "nearest")[:, kept]
    return replace(clips, frames=frames, masks=masks[:, kept], window=clips.window[kept], reverse=clips.reverse[kept], known=known)
