"""The fuser: how the outputs of the long and the short memory-attention stack become one feature map.

`gated` keeps the norm: A_long + g (A_short - A_long), then two ConvNeXt blocks. The gate and the layer scale of the blocks start at zero,
so that a new short stack changes nothing. `sum` is the published form: A_long + A_short, then the blocks with layer scale 1e-6 (Chen et
al., "SLM-SAM 2", arXiv:2505.01854).
"""

from __future__ import annotations

import torch
from sam2.modeling.memory_encoder import CXBlock
from torch import Tensor, nn

from slmsam2_cli.planning.plan import FuserName


def _blocks(width: int, layer_scale: float) -> nn.Sequential:
    blocks = nn.Sequential(*[CXBlock(width, kernel_size=7, padding=3, layer_scale_init_value=1e-6) for _ in range(2)])
    for block in blocks:
        nn.init.constant_(block.gamma, layer_scale)  # type: ignore[arg-type]
    return blocks


class GatedFuser(nn.Module):
    """Fuse long and short (B, C, h, w) -> (B, C, h, w) with one gate per channel; gate 0 gives the long stack alone."""

    def __init__(self, width: int, gate: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((width,), gate))
        self.blocks = _blocks(width, layer_scale=0.0)

    def forward(self, long: Tensor, short: Tensor) -> Tensor:
        fused: Tensor = self.blocks(torch.lerp(long, short, self.gate[:, None, None].to(long.dtype)))
        return fused


class SumFuser(nn.Module):
    """Fuse long and short (B, C, h, w) -> (B, C, h, w) by their sum, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = _blocks(width, layer_scale=1e-6)

    def forward(self, long: Tensor, short: Tensor) -> Tensor:
        fused: Tensor = self.blocks(long + short)
        return fused


def build_fuser(kind: FuserName, width: int) -> nn.Module:
    """Build the fuser that a plan names. width: channels C."""
    return GatedFuser(width) if kind == "gated" else SumFuser(width)
