"""What an adapter puts beside one linear map: a low-rank pair or a bottleneck. Both end in zeros, so a new one changes nothing.

From more than three channels to the three that the image encoder knows: a learned 1x1 projection, one for each modality.

It starts as means of groups of channels, so its first output stays in [0, 1]. There is no bias: what is 0 in every channel, the
outside of a scan and the padding, is 0 afterwards, as it is without a projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmsam2_cli.planning.plan import MAX_CHANNELS, RGB_CHANNELS, channel_groups


class LowRank(nn.Module):
    """y + U D x for a linear map of P parts (3 for q, k, v in one): down (P, r, in), up (P, out / P, r), which starts at 0."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., in), y (..., out) -> (..., out)."""
        parts, rank, _ = self.down.shape
        inner = F.linear(x, self.down.flatten(0, 1)).reshape(*x.shape[:-1], parts, rank)
        return y + torch.einsum("...pr,por->...po", inner, self.up).flatten(-2)

    def delta(self) -> Tensor:
        """(out, in): what is added to the weight when merged."""
        return torch.bmm(self.up, self.down).flatten(0, 1)


class Bottleneck(nn.Module):
    """y + U gelu(D y): down (h, C), up (C, h), which starts at 0; both with a bias."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (..., C) -> (..., C); x is not needed."""
        change: Tensor = self.up(F.gelu(self.down(y)))
        return y + change


def low_rank(linear: nn.Linear, parts: int, rank: int, rng: torch.Generator) -> LowRank:
    """Down drawn uniformly from +-1 / sqrt(in) on the CPU, up zero."""
    down = (2 * torch.rand(parts, rank, linear.in_features, generator=rng) - 1) / linear.in_features**0.5
    return LowRank(down.to(linear.weight), linear.weight.new_zeros(parts, linear.out_features // parts, rank))


def bottleneck(linear: nn.Linear, ratio: float, rng: torch.Generator) -> Bottleneck:
    """Down drawn uniformly from +-1 / sqrt(C) on the CPU, up and both biases zero."""
    branch = Bottleneck(linear.out_features, max(1, round(linear.out_features * ratio)))
    with torch.no_grad():
        branch.down.bias.zero_()
        branch.down.weight.copy_((2 * torch.rand(branch.down.weight.shape, generator=rng) - 1) / linear.out_features**0.5)
    return branch.to(linear.weight)


def saved_bottleneck(linear: nn.Linear, own: Mapping[str, Tensor]) -> Bottleneck | None:
    """The bottleneck behind a linear map as it was saved; None when its tensors do not fit."""
    branch = Bottleneck(linear.out_features, len(own["down.weight"])).to(linear.weight)
    if {name: tensor.shape for name, tensor in branch.state_dict().items()} != {name: tensor.shape for name, tensor in own.items()}:
        return None
    branch.load_state_dict(own)
    return branch


class Projection(nn.Module):
    """weight (3, C, 1, 1): how much of each channel goes into each colour."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @property
    def channels(self) -> int:
        """How many it reads."""
        return self.weight.shape[1]

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, C, H, W) -> (B, 3, H, W), in full precision also where the network computes in half of it."""
        with torch.autocast(frames.device.type, enabled=False):
            return F.conv2d(frames.float(), self.weight.float()).to(frames.dtype)


def means(channels: int) -> Tensor:
    """Weights (3, C, 1, 1) that make each colour the mean of its group of channels."""
    weight = torch.zeros(RGB_CHANNELS, channels, 1, 1)
    for colour, group in enumerate(channel_groups(channels)):
        weight[colour, list(group)] = 1 / len(group)
    return weight


def fits(weight: Tensor) -> bool:
    """Whether a tensor can be a projection's weight."""
    is_pointwise = weight.ndim == 4 and weight.shape[::2] == (RGB_CHANNELS, 1) and weight.shape[3] == 1
    return is_pointwise and RGB_CHANNELS < weight.shape[1] <= MAX_CHANNELS
