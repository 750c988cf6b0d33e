"""What is noted of every stored slice, and how it becomes the plain numbers that a policy is told.

An object's vector is the mean of the top-level embedding over its mask, so that similarity compares objects and not
backgrounds. A slice that is still to be segmented has no mask; its similarity is the mean over as many positions, the most
similar ones, as the object covered where it is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.memory.policy import MemoryScores


@dataclass(frozen=True)
class ObjectStats:
    """Of B objects on one slice: object_score (B,) logit; confidence (B,) predicted IoU, 0 to 1; vector (B, C) of unit length, 0 where
    nothing was seen; area (B,): positions of the embedding that the object covers.
    """

    object_score: Tensor
    confidence: Tensor
    vector: Tensor
    area: Tensor

    def at(self, index: Tensor) -> ObjectStats:
        """Those of some of the B objects."""
        return ObjectStats(self.object_score[index], self.confidence[index], self.vector[index], self.area[index])


@torch.no_grad()
def object_stats(top: Tensor, cover: Tensor, object_score: Tensor, confidence: Tensor) -> ObjectStats:
    """top (B, C, h, w); cover (B, 1, H, W): share of each pixel that is the object's; object_score (B, 1); confidence (B,)."""
    weight = F.adaptive_avg_pool2d(cover.float(), (top.shape[-2], top.shape[-1]))
    vector = F.normalize((top.float() * weight).sum(dim=(-2, -1)), dim=1)
    return ObjectStats(object_score.float().flatten(), confidence.float().clamp(0, 1), vector, weight.sum(dim=(-3, -2, -1)))


@torch.no_grad()
def memory_scores(traces: Mapping[int, ObjectStats], of: int, top: Tensor | None = None) -> MemoryScores:
    """What is known of the object of index `of` on all stored slices. top (B, C, h, w): the slice to be segmented, if there is one."""
    slices = list(traces)
    if not slices:
        return MemoryScores()
    object_score, confidence, area = (
        torch.stack([getattr(t, n)[of] for t in traces.values()]) for n in ("object_score", "confidence", "area")
    )
    vectors = torch.stack([t.vector[of] for t in traces.values()])
    with torch.autocast(vectors.device.type, enabled=False):  # half precision would make unlike slices equal
        table = (vectors @ vectors.T).tolist()
        here = similarity(vectors, area, top[of]).tolist() if top is not None else []
    alike = {(one, other): table[i][j] for i, one in enumerate(slices) for j, other in enumerate(slices)}
    return MemoryScores(dict(zip(slices, object_score.tolist())), dict(zip(slices, confidence.tolist())), dict(zip(slices, here)), alike)


def similarity(vectors: Tensor, areas: Tensor, top: Tensor) -> Tensor:
    """Mean cosine of each vector with its `area` best positions. vectors (S, C), areas (S,), top (C, h, w) -> (S,)."""
    cosines = vectors @ F.normalize(top.float().flatten(1), dim=0)
    ranked, rank = cosines.sort(dim=1, descending=True).values, torch.arange(cosines.shape[1], device=top.device)
    count = areas.round().long().clamp(1, len(rank))
    return (ranked * (rank < count[:, None])).sum(dim=1) / count
