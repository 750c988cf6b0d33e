"""Which structures of a window are followed, and which way: from its first slice or from its last, ends preferred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slmsam2_cli.pretraining.draw import Draw

SMALLEST_PX = 6
_NEVER = 10**6


class Tracks(NamedTuple):
    """(M,) each: window, target and direction of every track."""

    window: Tensor
    target: Tensor
    reverse: Tensor


def areas(targets: Tensor, count: int) -> Tensor:
    """Target maps (T, W, px, px), `count` being background -> pixels of each target, (T, W, count)."""
    slices, windows = targets.shape[:2]
    place = torch.arange(slices * windows, device=targets.device).view(slices, windows, 1, 1) * (count + 1)
    counted = torch.bincount((targets + place).flatten(), minlength=slices * windows * (count + 1))
    return counted.view(slices, windows, count + 1)[..., :-1]


def choose(draw: Draw, area: Tensor, weight: Tensor, tracks: int) -> Tracks:
    """At most `tracks` tracks, spread evenly over the windows.

    area (T, W, targets): pixels; weight (W, targets): how likely a target is to be followed, compared with the others.
    """
    edges = torch.stack([area[0], area[-1]], -1)
    eager = weight.log()[..., None] - draw.uniform((1e-6, 1.0), *edges.shape).log().neg().log()  # Gumbel: a draw without replacement
    eager = torch.where(edges >= SMALLEST_PX, eager, -torch.inf).flatten(1)
    order = eager.argsort(dim=1, descending=True)
    turn = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.where(eager.isfinite(), torch.empty_like(order).scatter_(1, order, turn), _NEVER).flatten()
    chosen = (rank + draw.uniform((0.0, 0.5), *rank.shape)).argsort()[:tracks]
    chosen = chosen[rank[chosen] < _NEVER].sort().values
    window, rest = chosen // order.shape[1], chosen % order.shape[1]
    return Tracks(window, rest // 2, rest % 2 == 1)
