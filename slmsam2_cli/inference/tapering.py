"""Where a person marked the end, the mask tapers towards it: what is known without looking at the image.

Between an annotated slice and an end-stop a structure is about as an ellipsoid: a share u of the way there, its outline has moved
inwards by 1 - sqrt(1 - u²) of the distance from the outline to the middle. Mixed with what the network says, before the slice is
remembered, it brings back masks that vanish too early and holds those that would leave. SHARE and STEEP were chosen on the cases that
docs/decisions.md names.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from slmsam2_cli.model.slmsam2 import ABSENT_LOGIT, SliceOutput

SURE = 10.0  # the most a logit counts
SHARE = 0.35  # what the taper counts; the network counts the rest
STEEP = 20.0  # logits from the outline to the middle


class Taper:
    """From the mask (px, px) of slice `start` to nothing on slice `end`, for a network that draws masks of edge `edge`."""

    def __init__(self, mask: Tensor, start: int, end: int, edge: int) -> None:
        held = mask.numpy() != 0
        depth = torch.from_numpy(distance_transform_edt(held) - distance_transform_edt(~held)).float()
        depth = F.interpolate(depth[None, None], size=(edge, edge), mode="bilinear", align_corners=False)
        self.depth = depth / depth.max().clamp(min=1e-3)
        self.start, self.end = start, end

    def logits(self, t: int) -> Tensor:
        """(1, 1, n, n) on slice t, within ±SURE."""
        way = abs(t - self.start) / abs(self.end - self.start)
        inwards = 1 - math.sqrt(max(0.0, 1 - way**2))
        return (STEEP * (self.depth - inwards)).clamp(-SURE, SURE)

    def followed(self, output: SliceOutput, t: int) -> SliceOutput:
        """The output of one object on slice t, with the taper mixed in."""
        expected = self.logits(t).to(output.chosen)
        chosen = torch.lerp(output.chosen.clamp(-SURE, SURE), expected, SHARE)
        presence = torch.lerp(output.presence.clamp(-SURE, SURE), expected.max().expand_as(output.presence), SHARE)
        logits = torch.where((presence > 0)[..., None, None], chosen, ABSENT_LOGIT)
        return replace(output, chosen=chosen, logits=logits, presence=presence)
