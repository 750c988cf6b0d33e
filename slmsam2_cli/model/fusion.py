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


class Fuser(nn.Module):
    """Fuse long and short (B, C, h, w) -> (B, C, h, w). width: channels C.

    `gated` has one gate per channel, which starts at 0 and then gives the long stack alone; `sum` has none.
    """

    def __init__(self, kind: FuserName, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width)) if kind == "gated" else None
        self.blocks = nn.Sequential(*[CXBlock(width, kernel_size=7, padding=3, layer_scale_init_value=1e-6) for _ in range(2)])
        if kind == "gated":
            for block in self.blocks:
                nn.init.zeros_(block.gamma)  # type: ignore[arg-type]

    def forward(self, long: Tensor, short: Tensor) -> Tensor:
        """Combine the outputs of the long and the short stack."""
        mixed = long + short if self.gate is None else torch.lerp(long, short, self.gate[:, None, None].to(long.dtype))
        fused: Tensor = self.blocks(mixed)
        return fused
