"""The same arithmetic by quicker routes, for training on CPUs (measured in docs/explanation/pretraining.md).

SAM 2 writes its layer norm over channels as six elementwise operations, and its 1x1 convolutions go through a general
kernel whose backward pass is slow; torch has one kernel for either. Keys and values of the weights stay as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn


class FusedLayerNorm2d(LayerNorm2d):  # type: ignore[misc]
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of (B, C, H, W) as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


def optimise_for_cpu(model: nn.Module) -> None:
    """Let the modules of a network take the quicker routes from now on."""
    for module in model.modules():
        if type(module) is LayerNorm2d:
            module.__class__ = FusedLayerNorm2d
        elif type(module) is nn.Conv2d and _is_pointwise(module):
            module.__class__ = PointwiseConv2d
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _is_pointwise(convolution: nn.Conv2d) -> bool:
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.padding == (0, 0) and convolution.groups == 1
