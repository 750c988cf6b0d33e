"""What the labels of a data set look like: a small U-Net that names them slice by slice, without a prompt.

Propagation knows what was drawn and forgets it slice by slice; a label U-Net knows nothing of this volume's drawing and is as good far
away from it as beside it. It is learned from the few annotated volumes (training/label_unet.py), and weighted as far as it agrees
with what a person drew on this very volume (inference/label_prior.py). U-Net: Ronneberger et al. 2015, arXiv:1505.04597.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmsam2_cli.model.roi import RoiCrop, around, box_of
from slmsam2_cli.planning.rules import ROI_SCALE

REACH = 2  # slices seen on either side
SLICES = 2 * REACH + 1
PREFIX = "label_unet."
MOST_PX = 1024
_GROUPS = 8


def _block(read: int, write: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (read, write):
        layers += [nn.Conv2d(channels, write, 3, padding=1), nn.GroupNorm(_GROUPS, write), nn.GELU()]
    return nn.Sequential(*layers)


class LabelUNet(nn.Module):
    """channels: of the images; labels: values it tells apart; px: edge of what it sees, a multiple of 8; width: channels at full
    resolution, a multiple of 8. ValueError. `raises`: whether it may find a structure where propagation sees none, as `training.can_add`
    of its plan says.
    """

    raises: bool
    labels: Tensor
    one_piece: Tensor
    px_seen: Tensor

    def __init__(self, channels: int, labels: Sequence[int], px: int, width: int = 32) -> None:
        super().__init__()
        self.raises = True
        if px % 8 or not 8 <= px <= MOST_PX or width % _GROUPS or width <= 0:
            raise ValueError(f"px {px} and width {width} must be multiples of 8 above 0, px at most {MOST_PX}")
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList([_block(read, write) for read, write in zip([channels * SLICES, *widths[:-1]], widths, strict=True)])
        self.up = nn.ModuleList([_block(8 * width, 2 * width), _block(4 * width, width), _block(2 * width, width)])  # from below, and skip
        self.logits = nn.Conv2d(width, len(labels) + 1, 1)
        self.register_buffer("labels", torch.tensor(list(labels), dtype=torch.int64))
        self.register_buffer("one_piece", torch.zeros(len(labels), dtype=torch.bool))
        self.register_buffer("px_seen", torch.tensor(px, dtype=torch.int64))

    @property
    def px(self) -> int:
        """Edge of what it sees, in pixels."""
        return int(self.px_seen)

    @property
    def channels(self) -> int:
        """Channels of the images it reads."""
        first = next(self.parameters())
        return int(first.shape[1]) // SLICES

    @property
    def values(self) -> list[int]:
        """The label values it tells apart."""
        return [int(value) for value in self.labels]

    @property
    def pieces(self) -> list[int]:
        """The labels that are one connected piece in every volume it has learned from."""
        return [int(value) for value in self.labels[self.one_piece]]

    def forward(self, slices: Tensor) -> Tensor:
        """(B, C * SLICES, px, px), as `with_adjacent_slices` stacks them -> logits (B, 1 + K, px, px), background first."""
        kept: list[Tensor] = []
        x = (slices - 0.5) * 4
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        x = kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), kept.pop()], dim=1))
        found: Tensor = self.logits(x)
        return found


def with_adjacent_slices(stack: Tensor, t: int) -> Tensor:
    """Slice t of a stack (T, C, h, w) with REACH slices on either side, the outermost repeated: (C * SLICES, h, w)."""
    index = torch.arange(t - REACH, t + REACH + 1).clamp(0, len(stack) - 1)
    return stack[index].flatten(0, 1)


def view_of(masks: Sequence[Tensor], storage_size: int) -> RoiCrop:
    """Where a label U-Net looks: around everything that was annotated, whichever label it is. masks (S, S), one at least not empty."""
    return around(box_of(masks), ROI_SCALE, storage_size)


def without_label_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are not the label U-Net's."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


def label_unet_from_state(state: Mapping[str, Tensor]) -> LabelUNet | None:
    """The label U-Net among the tensors of a checkpoint; None where it has none. ValueError when it is not whole."""
    own = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    if not own:
        return None
    try:
        width, inputs = own["logits.weight"].shape[1], own["down.0.0.weight"].shape[1]
        made = LabelUNet(inputs // SLICES, own["labels"].tolist(), int(own["px_seen"]), width)
        made.load_state_dict(own)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"its label U-Net is not whole ({str(error).splitlines()[0][:120]})") from None
    return made.eval()
