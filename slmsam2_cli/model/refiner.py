"""A last look at mask logits: a small U-Net per object that sees this slice and the one just passed, and draws every pixel.

SAM 2 compares slices at stride 16, where a slice of 128 px has 8 x 8 places, too few to follow a border, and draws at stride
4, which alone costs small structures a tenth of their Dice (docs/explanation/nano.md). The refiner works at stride 4, on four
by four pixels a place. It reads, per object, the mask of the slice just passed, moved to where block matching finds it; how grey
values go with the inside of that mask and of the annotated ones (evidence.py); the decoder's logits; and where the slice's codes
resemble the inside of what is known (as in Voigtlaender et al., "FEELVOS", arXiv:1902.09513). It adds to the logits, to object score
and to the predicted IoU. What depends on the slice alone is computed once per slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from slmsam2_cli.model.block_matching import foreground_likelihood

REFINER_UPSCALE = 4  # pixels of a refined mask along the edge of one of the decoder's
_MAPS = (
    3 * REFINER_UPSCALE**2 + 8
)  # carried mask, two likelihoods; the mask unmoved, logits, change, two matches, two likenesses, object score
_NEAR = 1.0  # a logit of this size is half a certainty, for the network's input
_FEW = 1e-3


@dataclass
class RefinerFeatures:
    """What the refiner keeps of B slices: maps to add up, for the slice looked at and for the one passed, and codes to compare.

    here, passed (B, C, 4h, 4w); codes (B, K, 4h, 4w) and coarse (B, K, 2h, 2w), of unit length; grey (B, 1, H, W).
    """

    here: Tensor
    passed: Tensor
    codes: Tensor
    coarse: Tensor
    grey: Tensor

    def at(self, index: Tensor | slice) -> RefinerFeatures:
        """The same of some of the slices."""
        return RefinerFeatures(self.here[index], self.passed[index], self.codes[index], self.coarse[index], self.grey[index])


@dataclass
class PriorSlice:
    """Where B objects were on a slice. inside (B, 1, H, W), present (B, 1): probabilities."""

    detail: RefinerFeatures
    inside: Tensor
    present: Tensor


def _block(read: int, write: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, write, 3, stride=stride, padding=1), LayerNorm2d(write), nn.GELU())


class Refiner(nn.Module):
    """fine: channels of the encoder's maps at stride 4; top: of its maps at stride 16; codes: channels that are compared."""

    def __init__(self, fine: int, top: int, width: int = 32, codes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 16, stride=2), _block(16, 16, stride=2))
        self.here, self.passed = (nn.Conv2d(fine + 16, width, 3, padding=1) for _ in range(2))
        self.code = nn.Conv2d(fine + 16, codes, 3, padding=1)
        self.sharpness = nn.Parameter(torch.tensor([2.0, 2.0]))  # log, of the match with the slice passed, with the annotated ones
        self.nearness = nn.Parameter(torch.tensor([4.0, 2.0]))  # log, per squared distance in frame widths
        self.maps = nn.Conv2d(_MAPS, width, 3, padding=1)
        self.enter = nn.Sequential(LayerNorm2d(width), nn.GELU(), _block(width, width))
        self.down = nn.Sequential(_block(width, 2 * width, stride=2), _block(2 * width, 2 * width))
        self.bottom = nn.Sequential(_block(2 * width, 3 * width, stride=2), _block(3 * width, 3 * width))
        self.top = nn.Conv2d(top, 3 * width, 1)
        self.merge = _block(3 * width, 3 * width)
        self.up = nn.ModuleList([nn.Conv2d(3 * width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)])
        self.leave = nn.ModuleList([_block(2 * width, 2 * width), _block(width, width)])
        self.logits = nn.Conv2d(width, REFINER_UPSCALE**2, 3, padding=1)
        scores = nn.Linear(64, 2)
        self.scores = nn.Sequential(nn.Linear(8 * width + 2 * _MAPS + 3, 64), nn.GELU(), scores)
        for parameter in (*self.logits.parameters(), *scores.parameters()):  # at first it changes nothing
            nn.init.zeros_(parameter)

    def detail(self, frames: Tensor, fine: Tensor, grey: Tensor) -> RefinerFeatures:
        """frames (B, 3, H, W) as the encoder sees them; fine (B, C, H / 4, W / 4); grey (B, 1, H, W) in [0, 1]."""
        seen = torch.cat([fine, self.stem(frames)], dim=1)
        code = self.code(seen)
        coarse = F.normalize(F.avg_pool2d(code, 2), dim=1)
        return RefinerFeatures(self.here(seen), self.passed(seen), F.normalize(code, dim=1), coarse, grey)

    def forward(
        self, here: RefinerFeatures, top: Tensor, logits: Tensor, carried: Tensor, passed: PriorSlice, annotated: Sequence[PriorSlice]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What to add to logits (B, 1, H, W), object_score (B, 1) and the logit of the IoU (B, 1).

        top (B, C, h, w); carried (B, 2, H, W): the mask of the slice passed, as probability, and its grey values, where they have
        moved to.
        """
        nearby, known = self._matched(here, [passed], 0), self._matched(here, annotated, 1)
        inside, outside = _prototype_similarity(here, annotated)
        before = 2 * passed.present - 1
        there = before[:, :, None, None].expand_as(nearby)
        carried, grey = carried[:, :1], carried[:, 1:]
        alike = [foreground_likelihood(here.grey, *_concat_slices(sights)) for sights in ([passed], annotated)]
        fine = [F.pixel_unshuffle(2 * one - 1, REFINER_UPSCALE) for one in (carried, *alike)]
        drawn, unmoved = F.avg_pool2d((logits / (2 * _NEAR)).tanh(), REFINER_UPSCALE), F.avg_pool2d(passed.inside, REFINER_UPSCALE)
        change = 4 * F.avg_pool2d((here.grey - grey).abs(), REFINER_UPSCALE)
        maps = torch.cat([*fine, 2 * unmoved - 1, drawn, change, 2 * nearby - 1, 2 * known - 1, inside, outside, there], dim=1)
        x = self.enter(here.here + passed.detail.passed + self.maps(maps))
        middle = self.down(x)
        low = self.merge(self.bottom(middle) + self.top(top))
        above = low
        for skip, up, leave in zip((middle, x), self.up, self.leave):
            above = leave(F.interpolate(up(above), scale_factor=2.0) + skip)
        delta: Tensor = F.pixel_shuffle(self.logits(above), REFINER_UPSCALE)
        share = (logits + delta).sigmoid()
        seen = torch.cat([above, maps], dim=1)
        within = [_within(seen, F.avg_pool2d(mask, REFINER_UPSCALE)) for mask in (carried, share)]
        told = [low.mean((2, 3)), low.amax((2, 3)), *within, share.mean((2, 3)), share.amax((2, 3)), before]
        object_score, iou = self.scores(torch.cat(told, dim=1)).split(1, dim=1)
        return delta, object_score, iou

    def _matched(self, here: RefinerFeatures, sights: Sequence[PriorSlice], kind: int) -> Tensor:
        """Share of what every place resembles most that was inside, nearer places first. (B, 1, 4h, 4w)."""
        batch, _, height, width = here.coarse.shape
        place = _places(height, width, here.coarse)
        near = (place[:, None] - place[None]).square().sum(-1) * -self.nearness[kind].exp()
        query = here.coarse.flatten(2).transpose(1, 2) * self.sharpness[kind].exp()
        keys = torch.cat([sight.detail.coarse.flatten(2) for sight in sights], dim=2)
        values = torch.cat([F.avg_pool2d(sight.inside, 2 * REFINER_UPSCALE).flatten(2) for sight in sights], dim=2)
        weight = torch.softmax(query @ keys + near.repeat(1, len(sights)), dim=2)
        found = (weight @ values.transpose(1, 2)).transpose(1, 2).reshape(batch, 1, height, width)
        return F.interpolate(found, scale_factor=2.0, mode="bilinear", align_corners=False)


def _within(seen: Tensor, masks: Tensor) -> Tensor:
    """Means of (B, C, 4h, 4w) inside of masks (B, 1, 4h, 4w); (B, C)."""
    means: Tensor = (seen * masks).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1.0)
    return means


def _concat_slices(sights: Sequence[PriorSlice]) -> tuple[Tensor, Tensor]:
    """Grey values and masks of several slices, one below the other."""
    return torch.cat([sight.detail.grey for sight in sights], dim=2), torch.cat([sight.inside for sight in sights], dim=2)


def _prototype_similarity(here: RefinerFeatures, annotated: Sequence[PriorSlice]) -> tuple[Tensor, Tensor]:
    """Cosine of every place's code with the mean code inside and outside of what was annotated. Each (B, 1, 4h, 4w)."""
    codes = torch.cat([sight.detail.codes.flatten(2) for sight in annotated], dim=2)
    inside = torch.cat([F.avg_pool2d(sight.inside, REFINER_UPSCALE).flatten(2) for sight in annotated], dim=2)
    found = []
    for share in (inside, 1 - inside):
        mean = (codes * share).sum(2) / share.sum(2).clamp(min=_FEW)
        found.append((here.codes * mean[:, :, None, None]).sum(1, keepdim=True))
    return found[0], found[1]


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 2): the middle of every place, frame widths."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype).add(0.5) / n for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
