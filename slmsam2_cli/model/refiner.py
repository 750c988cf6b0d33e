"""The refiner: a small U-Net per object that corrects mask logits at full resolution, from this slice and the previous one.

SAM 2 compares slices at stride 16, where a slice of 128 px has 8 x 8 positions, too few to follow a border, and predicts masks at
stride 4, which alone costs small structures a tenth of their Dice (docs/explanation/nano.md). The refiner works at stride 4 and
predicts 4 x 4 pixels at every position. It reads, per object: the mask of the previous slice, warped by block matching; the foreground
likelihood of the intensities under that mask and under the annotated ones (block_matching.py); the decoder's logits; and the similarity
of the slice's feature codes to those inside the known masks (as in Voigtlaender et al., "FEELVOS", arXiv:1902.09513). It adds to the
mask logits, to the object score and to the predicted IoU. What depends on the slice alone is computed once per slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn

from slmsam2_cli.model.block_matching import foreground_likelihood

REFINER_UPSCALE = 4  # pixels of a refined mask along the edge of one pixel of the decoder's
# Input maps: warped mask and two likelihoods at full resolution; previous mask, logits, intensity change, two matched masks, two
# prototype similarities, object score
_MAPS = 3 * REFINER_UPSCALE**2 + 8
_LOGIT_SCALE = 1.0  # logits enter as tanh(logit / (2 * scale))
_MIN_AREA = 1e-3


@dataclass
class RefinerFeatures:
    """What the refiner keeps of B slices.

    current, previous (B, C, 4h, 4w): maps that are added for the slice to be refined and for the slice before it. codes (B, K, 4h, 4w)
    and coarse_codes (B, K, 2h, 2w): of unit length, compared between slices. grey (B, 1, H, W): intensities.
    """

    current: Tensor
    previous: Tensor
    codes: Tensor
    coarse_codes: Tensor
    grey: Tensor


@dataclass
class PriorSlice:
    """A slice on which the B objects are known. inside (B, 1, H, W) and present (B, 1): probabilities."""

    features: RefinerFeatures
    inside: Tensor
    present: Tensor


def _block(read: int, write: int, stride: int = 1) -> nn.Sequential:
    """Build a 3x3 convolution with layer norm and GELU: (B, read, H, W) -> (B, write, H / stride, W / stride)."""
    return nn.Sequential(nn.Conv2d(read, write, 3, stride=stride, padding=1), LayerNorm2d(write), nn.GELU())


class Refiner(nn.Module):
    """fine: channels of the encoder's maps at stride 4. top: of its maps at stride 16. codes: channels of the feature codes.

    The attributes are keys of saved weights and keep their names.
    """

    def __init__(self, fine: int, top: int, width: int = 32, codes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 16, stride=2), _block(16, 16, stride=2))
        self.here, self.passed = (nn.Conv2d(fine + 16, width, 3, padding=1) for _ in range(2))
        self.code = nn.Conv2d(fine + 16, codes, 3, padding=1)
        self.sharpness = nn.Parameter(torch.tensor([2.0, 2.0]))  # log; of the match with the previous, with the conditioning slices
        self.nearness = nn.Parameter(torch.tensor([4.0, 2.0]))  # log; per squared distance in input edges
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
        for parameter in (*self.logits.parameters(), *scores.parameters()):  # a new refiner changes nothing
            nn.init.zeros_(parameter)

    def extract_features(self, frames: Tensor, fine: Tensor, grey: Tensor) -> RefinerFeatures:
        """Compute what depends on the slice alone, of B slices.

        frames (B, 3, H, W): normalised as for the image encoder. fine (B, C, H/4, W/4). grey (B, 1, H, W): intensities in [0, 1].
        """
        features = torch.cat([fine, self.stem(frames)], dim=1)
        code = self.code(features)
        coarse = F.normalize(F.avg_pool2d(code, 2), dim=1)
        return RefinerFeatures(self.here(features), self.passed(features), F.normalize(code, dim=1), coarse, grey)

    def forward(
        self,
        current: RefinerFeatures,
        top: Tensor,
        logits: Tensor,
        warped: Tensor,
        previous: PriorSlice,
        conditioning: Sequence[PriorSlice],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what to add to the mask logits (B, 1, H, W), the object score (B, 1) and the logit of the predicted IoU (B, 1).

        top (B, C, h, w). warped (B, 2, H, W): mask (probability) and intensities of the previous slice, warped to this one.
        """
        near = transfer_masks(current, [previous], self.sharpness[0].exp(), self.nearness[0].exp())
        known = transfer_masks(current, conditioning, self.sharpness[1].exp(), self.nearness[1].exp())
        inside, outside = _prototype_similarity(current, conditioning)
        before = 2 * previous.present - 1
        score = before[:, :, None, None].expand_as(near)
        mask, grey = warped[:, :1], warped[:, 1:]
        full = [F.pixel_unshuffle(2 * mask - 1, REFINER_UPSCALE)]
        for slices in ([previous], conditioning):  # stacked along the rows
            grey_known, inside_known = torch.cat([s.features.grey for s in slices], dim=2), torch.cat([s.inside for s in slices], dim=2)
            likelihood = foreground_likelihood(current.grey, grey_known, inside_known)
            full.append(F.pixel_unshuffle(2 * likelihood - 1, REFINER_UPSCALE))
        decoded = F.avg_pool2d((logits / (2 * _LOGIT_SCALE)).tanh(), REFINER_UPSCALE)
        unwarped = F.avg_pool2d(previous.inside, REFINER_UPSCALE)
        change = 4 * F.avg_pool2d((current.grey - grey).abs(), REFINER_UPSCALE)
        maps = torch.cat([*full, 2 * unwarped - 1, decoded, change, 2 * near - 1, 2 * known - 1, inside, outside, score], dim=1)
        x = self.enter(current.current + previous.features.previous + self.maps(maps))
        middle = self.down(x)
        low = self.merge(self.bottom(middle) + self.top(top))
        up = low
        for skip, reduce, leave in zip((middle, x), self.up, self.leave):
            up = leave(F.interpolate(reduce(up), scale_factor=2.0) + skip)
        delta: Tensor = F.pixel_shuffle(self.logits(up), REFINER_UPSCALE)
        refined = (logits + delta).sigmoid()
        features = torch.cat([up, maps], dim=1)
        shares = [F.avg_pool2d(one, REFINER_UPSCALE) for one in (mask, refined)]
        pooled = [(features * share).sum((2, 3)) / share.sum((2, 3)).clamp(min=1.0) for share in shares]
        summary = [low.mean((2, 3)), low.amax((2, 3)), *pooled, refined.mean((2, 3)), refined.amax((2, 3)), before]
        object_score, iou = self.scores(torch.cat(summary, dim=1)).split(1, dim=1)
        return delta, object_score, iou


def transfer_masks(current: RefinerFeatures, priors: Sequence[PriorSlice], sharpness: Tensor, nearness: Tensor) -> Tensor:
    """Transfer the masks of known slices by attention between coarse codes, nearer positions first -> (B, 1, 4h, 4w).

    sharpness: weight of the similarity of two codes. nearness: cost of a squared distance of 1 input edge. Both are scalars.
    """
    codes = current.coarse_codes
    batch, _, height, width = codes.shape
    rows, columns = (torch.arange(n, device=codes.device, dtype=codes.dtype).add(0.5) / n for n in (height, width))
    position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (2h * 2w, 2), in input edges
    distance = (position[:, None] - position[None]).square().sum(-1) * -nearness
    query = codes.flatten(2).transpose(1, 2) * sharpness
    keys = torch.cat([prior.features.coarse_codes.flatten(2) for prior in priors], dim=2)
    values = torch.cat([F.avg_pool2d(prior.inside, 2 * REFINER_UPSCALE).flatten(2) for prior in priors], dim=2)
    weight = torch.softmax(query @ keys + distance.repeat(1, len(priors)), dim=2)
    found = (weight @ values.transpose(1, 2)).transpose(1, 2).reshape(batch, 1, height, width)
    return F.interpolate(found, scale_factor=2.0, mode="bilinear", align_corners=False)


def _prototype_similarity(current: RefinerFeatures, conditioning: Sequence[PriorSlice]) -> tuple[Tensor, Tensor]:
    """Compute the similarity of every position's code to the mean code inside and outside the annotated masks: each (B, 1, 4h, 4w)."""
    codes = torch.cat([prior.features.codes.flatten(2) for prior in conditioning], dim=2)
    inside = torch.cat([F.avg_pool2d(prior.inside, REFINER_UPSCALE).flatten(2) for prior in conditioning], dim=2)
    found = []
    for share in (inside, 1 - inside):
        mean = (codes * share).sum(2) / share.sum(2).clamp(min=_MIN_AREA)
        found.append((current.codes * mean[:, :, None, None]).sum(1, keepdim=True))
    return found[0], found[1]
