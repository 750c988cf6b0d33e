"""Which structures of a window are followed, and which way: from the first slice or from the last, ends preferred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slmsam2_cli.pretraining.draw import Draw

SMALLEST_PX = 6


class Tracks(NamedTuple):
    """(M,) each: window, target and direction of every track."""

    window: Tensor
    target: Tensor
    reverse: Tensor


def areas(targets: Tensor, count: int) -> Tensor:
    """Target maps (T, W, px, px), `count` - 1 being background -> pixels of each target, (T, W, count - 1)."""
    slices, windows = targets.shape[:2]
    place = torch.arange(slices * windows, device=targets.device).view(slices, windows, 1, 1) * count
    counted = torch.bincount((targets + place).flatten(), minlength=slices * windows * count)
    return counted.view(slices, windows, count)[..., :-1]


def choose(draw: Draw, area: Tensor, tracks: int, ends: float) -> Tracks:
    """At most `tracks` tracks, spread evenly over the windows; one with an end is `ends` times as likely as one without."""
    edges = torch.stack([area[0], area[-1]], -1)  # (W, targets, 2)
    absent = (area == 0).any(0)[..., None].float()
    eager = (1 + (ends - 1) * absent).log() - draw.uniform((1e-6, 1.0), *edges.shape).log().neg().log()
    eager = torch.where(edges >= SMALLEST_PX, eager, -torch.inf)
    order = eager.flatten(1).argsort(dim=1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    rank = torch.where(eager.flatten(1).isfinite(), rank, rank.new_tensor(10**6))
    shuffled = rank + draw.uniform((0.0, 0.5), *rank.shape)
    best = shuffled.flatten().argsort()[:tracks]
    best = best[rank.flatten()[best] < 10**6].sort().values
    window, rest = best // rank.shape[1], best % rank.shape[1]
    return Tracks(window, rest // 2, rest % 2 == 1)
