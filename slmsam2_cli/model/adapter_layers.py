"""The layers of an adapter: a low-rank pair beside one linear map, and a projection of more than three channels to three.

Low-rank pairs: Hu et al., "LoRA", arXiv:2106.09685. The second matrix starts at zero, so a new adapter does not change the network.
The projection is a learned 1x1 convolution that starts as means of groups of channels, so its first output stays in [0, 1]. It has no
bias: what is 0 in every channel (outside the scan, and the padding) stays 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmsam2_cli.planning.plan import MAX_CHANNELS, RGB_CHANNELS, channel_groups


class LowRank(nn.Module):
    """y + U D x for a linear map of P parts (3 for q, k and v in one): down D (P, r, in), up U (P, out / P, r), which starts at 0."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to the output y (..., out) of the linear map for its input x (..., in)."""
        parts, rank, _ = self.down.shape
        inner = F.linear(x, self.down.flatten(0, 1)).reshape(*x.shape[:-1], parts, rank)
        return y + torch.einsum("...pr,por->...po", inner, self.up).flatten(-2)

    def delta(self) -> Tensor:
        """Compute what merging adds to the weight: (out, in)."""
        return torch.bmm(self.up, self.down).flatten(0, 1)


class Projection(nn.Module):
    """weight (3, C, 1, 1): the share of each of C channels in each of the encoder's three.

    Raises: ValueError when the weight has another shape, or C is not 4 to 16.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.ndim != 4 or weight.shape[::2] != (RGB_CHANNELS, 1) or weight.shape[3] != 1:
            raise ValueError(f"a projection has the shape (3, C, 1, 1), not {tuple(weight.shape)}")
        if not RGB_CHANNELS < weight.shape[1] <= MAX_CHANNELS:
            raise ValueError(f"a projection reads {RGB_CHANNELS + 1} to {MAX_CHANNELS} channels, not {weight.shape[1]}")
        self.weight = nn.Parameter(weight)
        self.channels = weight.shape[1]

    def forward(self, frames: Tensor) -> Tensor:
        """Project frames (B, C, H, W) -> (B, 3, H, W), in full precision also under autocast."""
        with torch.autocast(frames.device.type, enabled=False):
            return F.conv2d(frames.float(), self.weight.float()).to(frames.dtype)


def channel_means(channels: int) -> Tensor:
    """Create weights (3, C, 1, 1) that average each of three groups of channels."""
    weight = torch.zeros(RGB_CHANNELS, channels, 1, 1)
    for row, group in enumerate(channel_groups(channels)):
        weight[row, list(group)] = 1 / len(group)
    return weight
