"""How the label U-Net is learned: single slices of the annotated volumes, around what a person would have annotated.

Nothing is mirrored: a label U-Net names labels, and left may differ from right. A network without a prompt has to see what it will be
shown, so its squares are those of inference, around the middle slices of all labels of a volume, jittered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.cache import PreparedCase
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.inference.postprocess import is_one_piece
from slmsam2_cli.model.label_unet import REACH, LabelUNet, label_unet_roi
from slmsam2_cli.model.roi import RoiCrop, pad_to_square
from slmsam2_cli.planning.rules import (
    LABEL_UNET_BATCH,
    LABEL_UNET_WIDTH,
    MAX_LABEL_UNET_SIZE,
    MIN_LABEL_UNET_SIZE,
    NARROW_LABEL_UNET_SIZE,
)

HELD = 0.75  # share of slices that hold a label
_TURN, _SCALE, _SHIFT = math.radians(20), 0.25, 0.15
_IGNORE_INDEX = -1


@dataclass(frozen=True)
class _Source:
    case: PreparedCase
    square: RoiCrop
    held: tuple[np.ndarray, ...]  # per label, the slices that hold it
    one_piece: tuple[bool | None, ...]  # per label, whether it is one; None: not there, or not all of the volume was looked at


class SliceSampler:
    """Draws slices of the annotated volumes with their labels; at least one of them has to hold one."""

    def __init__(self, cases: Sequence[PreparedCase], values: Sequence[int], storage_size: int, ignore: int | None = None) -> None:
        self.values, self.storage_size, self.ignore = tuple(values), storage_size, ignore
        self.sources = [source for case in cases if (source := self._source(case)) is not None]

    @property
    def px(self) -> int:
        """Edge at which the label U-Net sees these squares: their own size where that is within reason."""
        edge = float(np.median([source.square.edge for source in self.sources]))
        return int(min(MAX_LABEL_UNET_SIZE, max(MIN_LABEL_UNET_SIZE, 16 * math.ceil(edge / 16))))

    def _source(self, case: PreparedCase) -> _Source | None:
        if case.labels is None:
            return None
        labels = np.asarray(case.labels)
        areas = [(labels == value).sum(axis=(1, 2)) for value in self.values]
        middles = [
            pad_to_square(torch.from_numpy(labels[choose_slice(area, "middle")] == value), self.storage_size)
            for value, area in zip(self.values, areas, strict=True)
            if area.any()
        ]
        if not middles:
            return None
        held = tuple(np.flatnonzero(area) for area in areas)
        return _Source(case, label_unet_roi(middles, self.storage_size), held, self._pieces(labels))

    @property
    def one_piece(self) -> list[bool]:
        """Per label, whether it is one connected piece in every volume that can tell; False where none can."""
        told = [[one for one in ones if one is not None] for ones in zip(*(source.one_piece for source in self.sources), strict=True)]
        return [bool(ones) and all(ones) for ones in told]

    def _pieces(self, labels: np.ndarray) -> tuple[bool | None, ...]:
        if self.ignore is not None and (labels == self.ignore).any():
            return (None,) * len(self.values)
        return tuple(is_one_piece(mask) if (mask := labels == value).any() else None for value in self.values)

    def draw(self, rng: np.random.Generator, torch_rng: torch.Generator, px: int, count: int = LABEL_UNET_BATCH) -> tuple[Tensor, Tensor]:
        """Slices (B, C * SLICES, px, px) and which label each pixel is, (B, px, px): 0 none, 1 the first, -1 nobody looked."""
        drawn = [self._one(rng, px) for _ in range(count)]
        slices, truth = torch.stack([s for s, _ in drawn]), torch.stack([t for _, t in drawn])
        turn = (2 * torch.rand(count, generator=torch_rng) - 1) * _TURN
        zero = torch.zeros(count)
        matrix = torch.stack([torch.stack([turn.cos(), -turn.sin(), zero], 1), torch.stack([turn.sin(), turn.cos(), zero], 1)], 1)
        grid = F.affine_grid(matrix, [count, 1, px, px], align_corners=False)
        slices = F.grid_sample(slices, grid, align_corners=False)
        turned = F.grid_sample(truth[:, None].float() - _IGNORE_INDEX, grid, mode="nearest", align_corners=False)[:, 0]
        return _augment_slices(slices, torch_rng), turned.round().long() + _IGNORE_INDEX  # 0 beyond the square is: nobody looked

    def _one(self, rng: np.random.Generator, px: int) -> tuple[Tensor, Tensor]:
        source = self.sources[rng.integers(len(self.sources))]
        frames, labels = source.case.frames, source.case.labels
        assert labels is not None
        known = [slices for slices in source.held if len(slices)]
        t = int(rng.choice(known[rng.integers(len(known))])) if rng.random() < HELD else int(rng.integers(frames.shape[1]))
        square = _jitter(source.square, rng, self.storage_size)
        index = np.clip(np.arange(t - REACH, t + REACH + 1), 0, frames.shape[1] - 1)
        seen = torch.from_numpy(np.ascontiguousarray(frames[:, index].swapaxes(0, 1)).astype(np.float32))
        shown = square.crop(pad_to_square(seen, self.storage_size), px).flatten(0, 1)
        plane = np.asarray(labels[t])
        truth = np.zeros(plane.shape, np.int64)
        for number, value in enumerate(self.values, start=1):
            truth[plane == value] = number
        if self.ignore is not None:
            truth[plane == self.ignore] = _IGNORE_INDEX
        whole = pad_to_square(torch.from_numpy(truth), self.storage_size)
        part = whole[square.row : square.row + square.edge, square.column : square.column + square.edge]
        return shown, F.interpolate(part[None, None].float(), size=(px, px), mode="nearest-exact")[0, 0].long()


def _jitter(square: RoiCrop, rng: np.random.Generator, storage_size: int) -> RoiCrop:
    edge = int(min(storage_size, max(8, round(square.edge * math.exp(rng.uniform(-_SCALE, _SCALE))))))
    row, column = (
        round(place + square.edge / 2 - edge / 2 + square.edge * rng.uniform(-_SHIFT, _SHIFT)) for place in (square.row, square.column)
    )
    return RoiCrop(min(max(row, 0), storage_size - edge), min(max(column, 0), storage_size - edge), edge)


def _augment_slices(slices: Tensor, rng: torch.Generator) -> Tensor:
    """Gamma, contrast, brightness, noise."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(slices), 1, 1, 1), generator=rng)

    shaded = slices.clamp(0, 1) ** torch.exp(between(-0.4, 0.4))
    shaded = (shaded - 0.5) * torch.exp(between(-0.25, 0.25)) + 0.5 + between(-0.1, 0.1)
    return shaded + torch.randn(slices.shape, generator=rng) * between(0.0, 0.05)


def label_unet_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy + soft Dice of every label over the batch, one number. logits (B, 1 + K, h, w); truth (B, h, w): 0 to K, or -1."""
    seen = (truth != _IGNORE_INDEX).float()[:, None]
    entropy = F.cross_entropy(logits, truth, ignore_index=_IGNORE_INDEX, reduction="sum") / seen.sum().clamp(min=1)
    said = logits.softmax(1)[:, 1:] * seen
    real = F.one_hot(truth.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].float() * seen
    dice = (2 * (said * real).sum((0, 2, 3)) + 1) / (said.sum((0, 2, 3)) + real.sum((0, 2, 3)) + 1)
    return entropy + (1 - dice).mean()


def new_label_unet(sampler: SliceSampler, channels: int, seed: int) -> LabelUNet:
    """One with random weights, as fine as these volumes ask for; thinner where it sees more pixels, for the same cost."""
    torch.manual_seed(seed)
    px = sampler.px
    made = LabelUNet(channels, sampler.values, px, LABEL_UNET_WIDTH if px <= NARROW_LABEL_UNET_SIZE else LABEL_UNET_WIDTH // 2)
    made.one_piece.copy_(torch.tensor(sampler.one_piece))
    return made
