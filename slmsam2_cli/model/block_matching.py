"""Block matching and foreground likelihood: where a mask has moved to, and which intensities belong to its inside.

Both are classical, fast and without parameters, and wrong often enough that a network has to follow: block matching between adjacent
slices, as in video coding, and the likelihood of intensities under the histograms inside and outside a mask, as in interactive graph
cuts (Boykov and Jolly, ICCV 2001).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 3  # largest displacement along each axis, in pixels at half resolution
WINDOW = 3  # edge of the window that has to match, in pixels at quarter resolution
SHARPNESS, STIFFNESS = 60.0, 0.01  # inverse temperature of the match; cost of a displacement, per squared pixel at half resolution
BINS = 24
_EPSILON = 1e-4


@torch.no_grad()
def warp_to_slice(current: Tensor, previous: Tensor, planes: Tensor) -> Tensor:
    """Warp planes (B, C, H, W) of the previous slices to the current ones; current, previous (B, 1, H, W): intensities."""
    one, other = F.avg_pool2d(current, 2), F.avg_pool2d(previous, 2)
    height, width = one.shape[-2:]
    padded = F.pad(other, (REACH,) * 4, mode="replicate")
    steps = [(down, across) for down in range(2 * REACH + 1) for across in range(2 * REACH + 1)]
    rows = (padded[..., y : y + height, :].unfold(3, width, 1)[:, 0].transpose(1, 2).contiguous() for y in range(2 * REACH + 1))
    cost = _box_mean(torch.cat([F.avg_pool2d(row.sub_(one).square_(), 2) for row in rows], dim=1))  # in the order of the steps
    scale = cost[:, len(steps) // 2].mean((1, 2))[:, None, None, None].clamp(min=_EPSILON)
    displacement = torch.tensor(steps, device=current.device, dtype=current.dtype).T - REACH
    stiffness = STIFFNESS * SHARPNESS * displacement.square().sum(0)
    weight = cost.mul_(-SHARPNESS / scale).sub_(stiffness[:, None, None]).softmax(dim=1)
    flow = _box_mean(torch.einsum("bkhw,dk->bdhw", weight, displacement.flip(0)))  # across, down
    flow = F.interpolate(flow, scale_factor=4.0, mode="bilinear", align_corners=False) * 2
    size = planes.shape[-2:]
    places = [(torch.arange(n, device=current.device, dtype=current.dtype) * 2 + 1) / n - 1 for n in size]
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x + flow[:, 0] * (2 / size[1]), y + flow[:, 1] * (2 / size[0])], dim=-1)
    warped: Tensor = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped


def _box_mean(planes: Tensor) -> Tensor:
    """Average the window around every position of (B, C, h, w), without padding."""
    return F.avg_pool2d(planes, WINDOW, 1, WINDOW // 2, count_include_pad=False)


@torch.no_grad()
def foreground_likelihood(current: Tensor, known: Tensor, masks: Tensor) -> Tensor:
    """Compute how much more likely the intensities (B, 1, H, W) are inside than outside the masks of known slices, 0 to 1.

    known, masks (B, 1, H', W): intensities and masks; several known slices are stacked along the rows. 0.5: equally likely.
    """
    bins, counts = _bins(known).flatten(1), masks.flatten(1)
    inside, outside = (torch.zeros(len(current), BINS, device=current.device).scatter_add_(1, bins, n) for n in (counts, 1 - counts))
    inside, outside = (_smooth(n / n.sum(1, keepdim=True).clamp(min=1)) + _EPSILON for n in (inside, outside))
    table = inside / (inside + outside)
    return table.gather(1, _bins(current).flatten(1)).reshape(current.shape)


def _bins(grey: Tensor) -> Tensor:
    """Find the histogram bin of every pixel, after a 3 x 3 mean against noise."""
    smooth = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
    return (smooth * BINS).long().clamp(0, BINS - 1)


def _smooth(histogram: Tensor) -> Tensor:
    """Smooth histograms (B, BINS) with the weights 1/4, 1/2, 1/4."""
    padded = F.pad(histogram[:, None], (1, 1), mode="replicate")[:, 0]
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
