"""Faster layers for CPUs, with the same arithmetic and weights (docs/experiments/2026-11-22-pretraining-step-time.md).

SAM 2 computes its layer norm over channels in six elementwise operations, and its 1x1 convolutions with a general kernel whose backward
pass is slow; torch has one kernel for each.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_POINTWISE = ((1, 1), (1, 1), (0, 0), 1)  # kernel size, stride, padding, groups


class FusedLayerNorm2d(LayerNorm2d):  # type: ignore[misc]
    """Layer norm over the channels, `sam2_utils.LayerNorm2d` with one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C."""
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W) -> (B, C', H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


def optimise_for_cpu(model: nn.Module) -> None:
    """Replace the layers of a network by the faster ones, in place, and store its weights channels last."""
    for module in model.modules():
        if type(module) is LayerNorm2d:
            module.__class__ = FusedLayerNorm2d
        elif type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding, module.groups) == _POINTWISE:
            module.__class__ = PointwiseConv2d
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_device(model: Network, device: torch.device) -> Network:
    """Move a network to a device for inference, in place; on a CPU, give it the faster layers."""
    model.to(device).eval()
    if device.type == "cpu":
        optimise_for_cpu(model)
    return model
