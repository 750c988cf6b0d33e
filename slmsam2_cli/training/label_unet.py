"""Training data and loss of the label U-Net: single slices of the annotated volumes, around what a user would have annotated.

Nothing is mirrored: a label U-Net names labels, and left may differ from right. It is trained on the crops that it sees at inference,
around the middle slices of all labels of a volume, with random shifts, scales and rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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

LABELLED_FRACTION = 0.75  # of the slices that are drawn
_ROTATION, _SCALE, _SHIFT = math.radians(20), 0.25, 0.15
IGNORE_INDEX = -1
_NO_LOGIT = -1e4
MAX_REACH = 0.5 * math.exp(_SCALE) + _SHIFT - 0.5  # of a drawn crop beyond its ROI crop, relative to the ROI's edge


@dataclass(frozen=True)
class _Source:
    """A case, its ROI crop, and per label the slices that hold it and whether it is one piece.

    one_piece: None where the label is absent, or pixels are ignored.
    """

    case: PreparedCase
    roi: RoiCrop
    held: tuple[np.ndarray, ...]
    one_piece: tuple[bool | None, ...]


class SliceSampler:
    """Draws slices of the annotated volumes with their labels; at least one volume must hold a label."""

    def __init__(self, cases: Sequence[PreparedCase], values: Sequence[int], storage_size: int, ignore: int | None = None) -> None:
        self.values, self.storage_size, self.ignore = tuple(values), storage_size, ignore
        self.sources = [source for case in cases if (source := self._source(case)) is not None]

    @property
    def input_size(self) -> int:
        """The edge in pixels at which the label U-Net sees the ROI crops."""
        return label_unet_input_size([source.roi.edge for source in self.sources])

    @property
    def one_piece(self) -> list[bool]:
        """Per label, whether it is connected in every volume where that is known; False where it is known in none."""
        known = [[one for one in ones if one is not None] for ones in zip(*(source.one_piece for source in self.sources), strict=True)]
        return [bool(ones) and all(ones) for ones in known]

    def _source(self, case: PreparedCase) -> _Source | None:
        """Measure the labels of a case; None where it has none."""
        if case.labels is None:
            return None
        labels = np.asarray(case.labels)
        areas = [(labels == value).sum(axis=(1, 2)) for value in self.values]
        held = tuple(np.flatnonzero(area) for area in areas)
        middles = [
            pad_to_square(torch.from_numpy(labels[choose_slice(area, "middle")] == value), self.storage_size)
            for value, area, slices in zip(self.values, areas, held, strict=True)
            if slices.size
        ]
        if not middles:
            return None
        incomplete = self.ignore is not None and bool((labels == self.ignore).sum())
        one_piece = tuple(
            is_one_piece(labels == value) if slices.size and not incomplete else None
            for value, slices in zip(self.values, held, strict=True)
        )
        return _Source(case, label_unet_roi(middles, self.storage_size), held, one_piece)

    def draw(
        self, rng: np.random.Generator, torch_rng: torch.Generator, input_size: int, count: int = LABEL_UNET_BATCH
    ) -> tuple[Tensor, Tensor]:
        """Draw B slices (B, C * SLICES, px, px) and the label of each pixel (B, px, px): 0 none, 1 the first label, -1 ignored."""
        return augment([self.draw_one(rng, input_size) for _ in range(count)], torch_rng)

    def draw_one(self, rng: np.random.Generator, input_size: int) -> tuple[Tensor, Tensor]:
        """Draw a slice with its neighbours (C * SLICES, px, px), and the label of each pixel (px, px)."""
        source = self.sources[rng.integers(len(self.sources))]
        frames, labels = source.case.frames, source.case.labels
        assert labels is not None
        held = [slices for slices in source.held if len(slices)]
        labelled = rng.random() < LABELLED_FRACTION
        t = int(rng.choice(held[rng.integers(len(held))])) if labelled else int(rng.integers(frames.shape[1]))
        roi = jitter(source.roi, rng, self.storage_size)
        index = np.clip(np.arange(t - REACH, t + REACH + 1), 0, frames.shape[1] - 1)
        stack = torch.from_numpy(np.ascontiguousarray(frames[:, index].swapaxes(0, 1)).astype(np.float32))
        slices = roi.crop(pad_to_square(stack, self.storage_size), input_size).flatten(0, 1)
        plane = np.asarray(labels[t])
        target = np.zeros(plane.shape, np.int64)
        for number, value in enumerate(self.values, start=1):
            target[plane == value] = number
        if self.ignore is not None:
            target[plane == self.ignore] = IGNORE_INDEX
        return slices, crop_target(torch.from_numpy(target), roi, self.storage_size, input_size)


def crop_target(target: Tensor, roi: RoiCrop, storage_size: int, input_size: int) -> Tensor:
    """Crop the label of each pixel of a slice (H, W) to (input_size, input_size), by nearest neighbour."""
    whole = pad_to_square(target, storage_size)
    part = whole[roi.row : roi.row + roi.edge, roi.column : roi.column + roi.edge]
    return F.interpolate(part[None, None].float(), size=(input_size, input_size), mode="nearest-exact")[0, 0].long()


def augment(drawn: Sequence[tuple[Tensor, Tensor]], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stack B slices (C * SLICES, px, px) and the label of each pixel (px, px); rotate them and change their intensity at random."""
    slices, target = torch.stack([s for s, _ in drawn]), torch.stack([t for _, t in drawn])
    count, px = len(drawn), slices.shape[-1]
    angle = (2 * torch.rand(count, generator=rng) - 1) * _ROTATION
    zero = torch.zeros(count)
    matrix = torch.stack([torch.stack([angle.cos(), -angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)], 1)
    grid = F.affine_grid(matrix, [count, 1, px, px], align_corners=False)
    slices = F.grid_sample(slices, grid, align_corners=False)
    rotated = F.grid_sample(target[:, None].float() - IGNORE_INDEX, grid, mode="nearest", align_corners=False)[:, 0]
    return _augment_intensity(slices, rng), rotated.round().long() + IGNORE_INDEX  # beyond the crop all is ignored


def jitter(roi: RoiCrop, rng: np.random.Generator, storage_size: int) -> RoiCrop:
    """Scale and shift a crop at random."""
    edge = int(min(storage_size, max(8, round(roi.edge * math.exp(rng.uniform(-_SCALE, _SCALE))))))
    row, column = (round(place + roi.edge / 2 - edge / 2 + roi.edge * rng.uniform(-_SHIFT, _SHIFT)) for place in (roi.row, roi.column))
    return RoiCrop(min(max(row, 0), storage_size - edge), min(max(column, 0), storage_size - edge), edge)


def _augment_intensity(slices: Tensor, rng: torch.Generator) -> Tensor:
    """Change gamma, contrast, brightness and noise of every slice."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((len(slices), 1, 1, 1), generator=rng)

    changed = slices.clamp(0, 1) ** torch.exp(between(-0.4, 0.4))
    changed = (changed - 0.5) * torch.exp(between(-0.25, 0.25)) + 0.5 + between(-0.1, 0.1)
    return changed + torch.randn(slices.shape, generator=rng) * between(0.0, 0.05)


def label_unet_loss(logits: Tensor, target: Tensor, unknown: Tensor | None = None) -> Tensor:
    """Compute cross-entropy + soft Dice, averaged over labels; one number. logits (B, 1 + K, h, w); target (B, h, w): 0 to K, or -1.

    unknown (B, K) bool: labels of which nothing is known on a slice. They may be wherever no known label is: there, their probability
    counts as that of background.
    """
    if unknown is not None:
        hidden = F.pad(unknown, (1, 0))[:, :, None, None]  # (B, 1 + K, 1, 1), False for background
        others = F.pad(~unknown, (1, 0))[:, :, None, None]
        background = logits.masked_fill(others, _NO_LOGIT).logsumexp(dim=1, keepdim=True)
        logits = torch.cat([background, logits.masked_fill(hidden, _NO_LOGIT)[:, 1:]], dim=1)
    valid = (target != IGNORE_INDEX).float()[:, None]
    entropy = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum") / valid.sum().clamp(min=1)
    predicted = logits.softmax(1)[:, 1:] * valid
    masks = F.one_hot(target.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2)[:, 1:].float() * valid
    soft_dice = (2 * (predicted * masks).sum((0, 2, 3)) + 1) / (predicted.sum((0, 2, 3)) + masks.sum((0, 2, 3)) + 1)
    return entropy + (1 - soft_dice).mean()


def label_unet_input_size(edges: Sequence[int]) -> int:
    """Return the edge in pixels at which a label U-Net sees ROI crops of these edges: their median, within limits."""
    return int(min(MAX_LABEL_UNET_SIZE, max(MIN_LABEL_UNET_SIZE, 16 * math.ceil(float(np.median(edges)) / 16))))


class Sampler(Protocol):
    """What a new label U-Net is made for: label values, which of them are connected, and the edge of its input in pixels."""

    values: tuple[int, ...]

    @property
    def one_piece(self) -> list[bool]: ...

    @property
    def input_size(self) -> int: ...


def new_label_unet(sampler: Sampler, channels: int, seed: int) -> LabelUNet:
    """Build a label U-Net with random weights at the input size of these volumes; narrower at large sizes, for the same cost."""
    torch.manual_seed(seed)
    size = sampler.input_size
    label_unet = LabelUNet(channels, sampler.values, size, LABEL_UNET_WIDTH if size <= NARROW_LABEL_UNET_SIZE else LABEL_UNET_WIDTH // 2)
    label_unet.one_piece.copy_(torch.tensor(sampler.one_piece))
    return label_unet
