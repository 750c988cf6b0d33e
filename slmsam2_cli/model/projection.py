"""From more than three channels to the three that the image encoder knows: a learned 1x1 projection, one for each modality.

It starts as means of groups of channels, so its first output stays in [0, 1]. There is no bias: what is 0 in every channel, the
outside of a scan and the padding, is 0 afterwards, as it is without a projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmsam2_cli.planning.channels import COLOURS, MOST_CHANNELS, groups


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
    weight = torch.zeros(COLOURS, channels, 1, 1)
    for colour, group in enumerate(groups(channels)):
        weight[colour, list(group)] = 1 / len(group)
    return weight


def fits(weight: Tensor) -> bool:
    """Whether a tensor can be a projection's weight."""
    return weight.ndim == 4 and weight.shape[::2] == (COLOURS, 1) and weight.shape[3] == 1 and COLOURS < weight.shape[1] <= MOST_CHANNELS
