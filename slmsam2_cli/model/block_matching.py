"""What can be said of a slice before anything has been learned: where a mask has moved to, and what is as bright as its inside.

Both are classical, cheap, without parameters, and wrong often enough to need a network behind them: block matching between
neighbouring slices, as in video coding, and the likelihood of grey values under the histograms inside and outside of a mask, as
in interactive graph cuts (Boykov and Jolly, ICCV 2001).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 3  # displacements tried along each axis, in pixels of half the size
WINDOW = 3  # places that have to match, along each axis; a place is a pixel of a quarter of the size
SHARPNESS, STIFFNESS = 60.0, 0.01  # how surely the best match wins; what a displacement costs, per squared pixel of half the size
BINS = 24
_LEAST = 1e-4


@torch.no_grad()
def moved(here: Tensor, before: Tensor, planes: Tensor) -> Tensor:
    """Planes (B, C, H, W) of the slices `before`, brought to where they are on the slices `here`, both (B, 1, H, W) grey values."""
    one, other = F.avg_pool2d(here, 2), F.avg_pool2d(before, 2)
    height, width = one.shape[-2:]
    around = F.pad(other, (REACH,) * 4, mode="replicate")
    steps = [(down, across) for down in range(2 * REACH + 1) for across in range(2 * REACH + 1)]
    rows = (around[..., y : y + height, :].unfold(3, width, 1)[:, 0].transpose(1, 2).contiguous() for y in range(2 * REACH + 1))
    cost = _averaged(torch.cat([F.avg_pool2d(row.sub_(one).square_(), 2) for row in rows], dim=1))  # in the order of the steps
    scale = cost[:, len(steps) // 2].mean((1, 2))[:, None, None, None].clamp(min=_LEAST)
    away = torch.tensor(steps, device=here.device, dtype=here.dtype).T - REACH
    stiff = STIFFNESS * SHARPNESS * away.square().sum(0)
    weight = cost.mul_(-SHARPNESS / scale).sub_(stiff[:, None, None]).softmax(dim=1)
    flow = _averaged(torch.einsum("bkhw,dk->bdhw", weight, away.flip(0)))  # across, down
    flow = F.interpolate(flow, scale_factor=4.0, mode="bilinear", align_corners=False) * 2
    size = planes.shape[-2:]
    places = [(torch.arange(n, device=here.device, dtype=here.dtype) * 2 + 1) / n - 1 for n in size]
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x + flow[:, 0] * (2 / size[1]), y + flow[:, 1] * (2 / size[0])], dim=-1)
    found: Tensor = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found


def _averaged(planes: Tensor) -> Tensor:
    """Mean of the window around every place, within the frame; (B, C, h, w)."""
    return F.avg_pool2d(planes, WINDOW, 1, WINDOW // 2, count_include_pad=False)


@torch.no_grad()
def foreground_likelihood(here: Tensor, known: Tensor, masks: Tensor) -> Tensor:
    """How much better grey values here (B, 1, H, W) go with the inside than with the outside of masks on slices that are known.

    known, masks (B, 1, H', W); several known slices may lie below each other. 0 to 1; 0.5: they go with either.
    """
    bins, counts = _bins(known).flatten(1), masks.flatten(1)
    inside, outside = (torch.zeros(len(here), BINS, device=here.device).scatter_add_(1, bins, share) for share in (counts, 1 - counts))
    inside, outside = (_smooth(n / n.sum(1, keepdim=True).clamp(min=1)) + _LEAST for n in (inside, outside))
    table = inside / (inside + outside)
    return table.gather(1, _bins(here).flatten(1)).reshape(here.shape)


def _bins(grey: Tensor) -> Tensor:
    """The histogram's bin of every pixel, a little smoothed against noise."""
    smooth = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
    return (smooth * BINS).long().clamp(0, BINS - 1)


def _smooth(histogram: Tensor) -> Tensor:
    """(B, BINS): each bin with a half of its neighbours."""
    around = F.pad(histogram[:, None], (1, 1), mode="replicate")[:, 0]
    return (around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]) / 4
