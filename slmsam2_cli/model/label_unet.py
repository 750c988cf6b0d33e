"""The label U-Net: a small U-Net that segments the labels of a dataset slice by slice, without a prompt.

Propagation knows what was annotated in a volume, but loses it slice by slice; the label U-Net does not use the annotation and is as
good far from it as next to it. It is trained on the few labelled cases (training/label_unet.py), and its result is weighted by its Dice
on the annotated slices of the very volume (inference/label_prior.py). U-Net: Ronneberger et al. 2015, arXiv:1505.04597.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmsam2_cli.model.roi import RoiCrop, mask_box, roi_around
from slmsam2_cli.planning.rules import ROI_SCALE

REACH = 2  # adjacent slices on either side that the network reads
SLICES = 2 * REACH + 1
PREFIX = "label_unet."
MAX_INPUT_SIZE = 1024
_GROUPS = 8


def _block(read: int, write: int) -> nn.Sequential:
    """Build two 3x3 convolutions, each with group norm and GELU: (B, read, H, W) -> (B, write, H, W)."""
    layers: list[nn.Module] = []
    for channels in (read, write):
        layers += [nn.Conv2d(channels, write, 3, padding=1), nn.GroupNorm(_GROUPS, write), nn.GELU()]
    return nn.Sequential(*layers)


class LabelUNet(nn.Module):
    """A U-Net for C channels of 5 slices.

    labels, values: label values, one output channel each. input_size: edge of its input in pixels, a multiple of 8. width: channels at
    full resolution, a multiple of 8. can_add: whether it may add a structure where propagation predicts none (`training.can_add` in the
    plan).

    Raises: ValueError when the input size or the width is no positive multiple of 8, or the input is larger than 1024 pixels.
    """

    labels: Tensor
    one_piece: Tensor
    px_seen: Tensor  # the names of tensors are keys of saved weights

    def __init__(self, channels: int, labels: Sequence[int], input_size: int, width: int = 32) -> None:
        super().__init__()
        if input_size % 8 or not 8 <= input_size <= MAX_INPUT_SIZE or width % _GROUPS or width <= 0:
            raise ValueError(
                f"input size {input_size} and width {width} must be positive multiples of 8, the input size at most {MAX_INPUT_SIZE}"
            )
        self.channels, self.input_size, self.values, self.can_add = channels, input_size, list(labels), True
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList([_block(read, write) for read, write in zip([channels * SLICES, *widths[:-1]], widths, strict=True)])
        self.up = nn.ModuleList([_block(8 * width, 2 * width), _block(4 * width, width), _block(2 * width, width)])  # from below, and skip
        self.logits = nn.Conv2d(width, len(labels) + 1, 1)
        self.register_buffer("labels", torch.tensor(self.values, dtype=torch.int64))
        self.register_buffer("one_piece", torch.zeros(len(labels), dtype=torch.bool))
        self.register_buffer("px_seen", torch.tensor(input_size, dtype=torch.int64))

    @property
    def one_piece_labels(self) -> list[int]:
        """Return the labels that are connected in every training case."""
        return [value for value, one in zip(self.values, self.one_piece.tolist(), strict=True) if one]

    def forward(self, slices: Tensor) -> Tensor:
        """Segment (B, C * SLICES, n, n), stacked by `with_adjacent_slices` -> logits (B, 1 + K, n, n), background first."""
        skips: list[Tensor] = []
        x = (slices - 0.5) * 4
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        x = skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), skips.pop()], dim=1))
        found: Tensor = self.logits(x)
        return found


def label_unet_from(state: Mapping[str, Tensor]) -> LabelUNet:
    """Build a label U-Net of the size of these tensors, without its prefix, and load them.

    Raises: KeyError, IndexError, RuntimeError or TypeError when tensors are missing, unexpected or misshapen; ValueError for a size that
    it cannot have.
    """
    width, inputs = state["logits.weight"].shape[1], state["down.0.0.weight"].shape[1]
    label_unet = LabelUNet(inputs // SLICES, state["labels"].tolist(), int(state["px_seen"]), width)
    label_unet.load_state_dict(dict(state))
    return label_unet.eval()


def with_adjacent_slices(stack: Tensor, t: int) -> Tensor:
    """Stack slice t of (T, C, h, w) and REACH slices on either side as channels: (C * SLICES, h, w); the outermost slices repeat."""
    index = torch.arange(t - REACH, t + REACH + 1).clamp(0, len(stack) - 1)
    return stack[index].flatten(0, 1)


def label_unet_roi(masks: Sequence[Tensor], storage_size: int) -> RoiCrop:
    """Place the label U-Net's crop around all annotated masks (S, S), whatever their label; at least one must not be empty."""
    return roi_around(mask_box(masks), ROI_SCALE, storage_size)


def without_label_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint without those of the label U-Net."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
