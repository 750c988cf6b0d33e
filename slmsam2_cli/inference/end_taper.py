"""Taper a mask towards an end mark: the mask expected between an annotated slice and the slice on which the structure has ended.

Between the two, a structure is roughly an ellipsoid: at a fraction u of the way, its outline has moved inwards by 1 - sqrt(1 - u²) of
the distance from the outline to the middle. The expected mask is centred on the network's mask and mixed into it before the slice enters
memory: masks that vanish too early come back, masks that would stay shrink. SHARE, SLOPE and MIN_AREA_RATIO were chosen on the cases
named in docs/experiments/2026-11-26-end-taper.md.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from slmsam2_cli.inference.label_prior import MAX_LOGIT
from slmsam2_cli.model.slmsam2 import SliceOutput, with_mask

SHARE = 0.35  # weight of the taper; the network has the rest
SLOPE = 40.0  # logits from the outline to the middle
MIN_AREA_RATIO = 0.25  # area of the network's mask over the expected area from which on the taper is centred on that mask


class EndTaper:
    """The expected masks (edge, edge) from the annotated mask (px, px) of slice `start` to the empty slice `end`.

    Where the mask meets the edge of the image its outline stays, since the structure may continue outside.
    """

    def __init__(self, mask: Tensor, start: int, end: int, edge: int) -> None:
        cover = F.adaptive_avg_pool2d(mask[None].float(), edge)[0]
        held = ((cover >= cover.max().clamp(max=0.5)) & (cover > 0)).numpy()  # a structure too thin for the pixels keeps the best of them
        depth = np.ones(held.shape) if held.all() else distance_transform_edt(held) - distance_transform_edt(~held)
        self.depth = torch.from_numpy(depth / depth.max()).float()[None, None]
        self.start, self.end = start, end

    def logits(self, t: int, seen: Tensor | None = None) -> Tensor:
        """Compute the logits (1, 1, n, n) of slice t within ±MAX_LOGIT, centred on the mask `seen` (n, n) if that is large enough."""
        way = abs(t - self.start) / abs(self.end - self.start)
        depth = self.depth - 1 + math.sqrt(max(0.0, 1 - way**2))
        expected = depth[0, 0] > 0
        if seen is not None and expected.any() and int(seen.sum()) >= MIN_AREA_RATIO * int(expected.sum()):
            (row, column), (from_row, from_column) = _middle(seen), _middle(expected)
            place = torch.arange(depth.shape[-1])  # pixels from outside repeat the border
            rows, columns = ((place - round(by)).clamp(0, len(place) - 1) for by in (row - from_row, column - from_column))
            depth = depth[..., rows, :][..., columns]
        return (SLOPE * depth).clamp(-MAX_LOGIT, MAX_LOGIT)

    def weighted(self, output: SliceOutput, t: int) -> SliceOutput:
        """Mix the taper into the output of one object on slice t."""
        expected = self.logits(t, output.chosen[0, 0].cpu() > 0).to(output.chosen)
        chosen = torch.lerp(output.chosen.clamp(-MAX_LOGIT, MAX_LOGIT), expected, SHARE)
        object_score = torch.lerp(
            output.object_score.float().clamp(-MAX_LOGIT, MAX_LOGIT), expected.max().float().expand_as(output.object_score), SHARE
        )
        return with_mask(output, chosen, object_score)


def _middle(mask: Tensor) -> tuple[float, float]:
    """Compute row and column of the centre of a mask (n, n) that is not empty."""
    row, column = mask.nonzero().float().mean(dim=0).tolist()
    return row, column
