"""Block matching and foreground likelihood: where a mask has moved to, and which intensities belong to its inside.

Both are classical, fast and without parameters, and wrong often enough that a network has to follow: block matching between adjacent
slices, as in video coding, and the likelihood of intensities under the histograms inside and outside a mask, as in interactive graph
cuts (Boykov and Jolly, ICCV 2001). Means are sums of shifted planes: on a CPU five to eight times as fast as torch's pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 3  # largest displacement along each axis, in pixels at half resolution
SHARPNESS, STIFFNESS = 60.0, 0.01  # inverse temperature of the match; cost of a displacement, per squared pixel at half resolution
BINS = 24
_EPSILON = 1e-4


@torch.no_grad()
def warp_to_slice(current: Tensor, previous: Tensor, planes: Tensor) -> Tensor:
    """Warp planes (B, C, H, W) of the previous slices to the current ones; current, previous (B, 1, H, W): intensities.

    The cost of a displacement is the squared difference at half resolution, averaged over 3 x 3 pixels at quarter resolution. A pixel moves
    by the mean displacement under softmax(-cost), smoothed likewise.
    """
    one, other = _halve(current), _halve(previous)
    height, width = one.shape[-2:]
    padded = F.pad(other, (REACH,) * 4, mode="replicate")
    steps = [(down, across) for down in range(2 * REACH + 1) for across in range(2 * REACH + 1)]
    rows = (padded[..., y : y + height, :].unfold(3, width, 1)[:, 0].transpose(1, 2).contiguous() for y in range(2 * REACH + 1))
    difference = torch.cat([_halve(row.sub_(one).square_()) for row in rows], dim=1)  # in the order of the steps
    cost = _window_mean(difference)
    scale = cost[:, len(steps) // 2].mean((1, 2))[:, None, None, None].clamp(min=_EPSILON)
    displacement = torch.tensor(steps, device=current.device, dtype=current.dtype).T - REACH
    stiffness = STIFFNESS * SHARPNESS * displacement.square().sum(0)
    weight = cost.mul_(-SHARPNESS / scale).sub_(stiffness[:, None, None]).softmax(dim=1)
    flow = torch.einsum("bkhw,dk->bdhw", weight, displacement.flip(0))  # across, down
    flow = _window_mean(flow)
    flow = F.interpolate(flow, scale_factor=4.0, mode="bilinear", align_corners=False) * 2
    size = planes.shape[-2:]
    places = [(torch.arange(n, device=current.device, dtype=current.dtype) * 2 + 1) / n - 1 for n in size]
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x + flow[:, 0] * (2 / size[1]), y + flow[:, 1] * (2 / size[0])], dim=-1)
    warped: Tensor = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped


@torch.no_grad()
def foreground_likelihood(current: Tensor, known: Tensor, masks: Tensor) -> Tensor:
    """Compute how much more likely the intensities (B, 1, H, W) are inside than outside the masks of known slices, 0 to 1.

    known, masks (B, 1, H', W'): intensities and masks; several known slices are stacked along the rows. 0.5: equally likely.
    Intensities are averaged over 3 x 3 pixels against noise, and histograms smoothed with the weights 1/4, 1/2, 1/4.
    """
    smooth = [_window_mean(grey).flatten(1) for grey in (known, current)]
    known_bins, current_bins = ((grey * BINS).long().clamp(0, BINS - 1) for grey in smooth)
    counts = masks.flatten(1)
    histograms = [torch.zeros(len(current), BINS, device=current.device).scatter_add_(1, known_bins, n) for n in (counts, 1 - counts)]
    share = torch.stack([n / n.sum(1, keepdim=True).clamp(min=1) for n in histograms], dim=1)  # (B, 2, BINS)
    padded = F.pad(share, (1, 1), mode="replicate")
    inside, outside = ((padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4 + _EPSILON).unbind(1)
    table = inside / (inside + outside)
    return table.gather(1, current_bins).reshape(current.shape)


def _halve(planes: Tensor) -> Tensor:
    """Average blocks of 2 x 2 pixels (..., H, W) -> (..., H/2, W/2)."""
    rows = planes[..., ::2, :] + planes[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def _window_mean(planes: Tensor) -> Tensor:
    """Average over 3 x 3 pixels (..., H, W), at the border over those that there are."""
    for dim in (-2, -1):
        length = planes.shape[dim]
        total = planes.clone()
        total.narrow(dim, 1, length - 1).add_(planes.narrow(dim, 0, length - 1))
        total.narrow(dim, 0, length - 1).add_(planes.narrow(dim, 1, length - 1))
        count = planes.new_full((length,), 3.0)
        count[0] = count[-1] = min(2, length)
        planes = total.div_(count if dim == -1 else count[:, None])
    return planes
