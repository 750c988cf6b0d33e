"""Where a person marked the end, the mask tapers towards it: what is known without looking at the image.

Between an annotated slice and an end mark a structure is about as an ellipsoid: a share u of the way there, its outline has moved
inwards by 1 - sqrt(1 - u²) of the distance from the outline to the middle; it lies where the network's mask lies. Mixed with what the
network says, before the slice is remembered, it brings back masks that vanish too early and shrinks those that would stay. SHARE, STEEP
and ENOUGH were chosen on the cases that docs/decisions.md names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from slmsam2_cli.inference.label_prior import SURE
from slmsam2_cli.model.slmsam2 import SliceOutput, with_mask

SHARE = 0.35  # what the taper counts; the network counts the rest
SLOPE = 40.0  # logits from the outline to the middle
MIN_AREA_RATIO = 0.25  # area of the network's mask over what is expected, from which on it says where the structure is


class EndTaper:
    """From the mask (px, px) of slice `start` to nothing on slice `end`, for a network that draws masks of edge `edge`.

    Where the mask meets the edge of the frame, its outline stays: it may go on behind it.
    """

    def __init__(self, mask: Tensor, start: int, end: int, edge: int) -> None:
        cover = F.adaptive_avg_pool2d(mask[None].float(), edge)[0]
        held = ((cover >= cover.max().clamp(max=0.5)) & (cover > 0)).numpy()  # too thin for its pixels, it keeps the best of them
        depth = np.ones(held.shape) if held.all() else distance_transform_edt(held) - distance_transform_edt(~held)
        self.depth = torch.from_numpy(depth / depth.max()).float()[None, None]
        self.start, self.end = start, end

    def logits(self, t: int, seen: Tensor | None = None) -> Tensor:
        """(1, 1, n, n) on slice t, within ±SURE; moved to where the mask `seen` (n, n) lies, where it is large enough to tell."""
        way = abs(t - self.start) / abs(self.end - self.start)
        depth = self.depth - 1 + math.sqrt(max(0.0, 1 - way**2))
        expected = depth[0, 0] > 0
        if seen is not None and expected.any() and int(seen.sum()) >= MIN_AREA_RATIO * int(expected.sum()):
            (row, column), (from_row, from_column) = _middle(seen), _middle(expected)
            depth = _moved(depth, round(row - from_row), round(column - from_column))
        return (SLOPE * depth).clamp(-SURE, SURE)

    def followed(self, output: SliceOutput, t: int) -> SliceOutput:
        """The output of one object on slice t, with the taper mixed in."""
        expected = self.logits(t, output.chosen[0, 0].cpu() > 0).to(output.chosen)
        chosen = torch.lerp(output.chosen.clamp(-SURE, SURE), expected, SHARE)
        object_score = torch.lerp(
            output.object_score.float().clamp(-SURE, SURE), expected.max().float().expand_as(output.object_score), SHARE
        )
        return with_mask(output, chosen, object_score)


def _middle(mask: Tensor) -> tuple[float, float]:
    """Row and column of the centre of a mask (n, n) that is not empty."""
    row, column = mask.nonzero().float().mean(dim=0).tolist()
    return row, column


def _moved(depth: Tensor, rows: int, columns: int) -> Tensor:
    """(1, 1, n, n), moved by whole pixels; what comes in from outside is as deep as the rim it comes over."""
    edge = depth.shape[-1]
    place = torch.arange(edge)
    return depth[..., (place - rows).clamp(0, edge - 1), :][..., (place - columns).clamp(0, edge - 1)]
