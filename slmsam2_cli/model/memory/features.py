"""Statistics of the object on every stored slice, and the scores of stored slices computed from them for a memory policy.

An object's vector is the mean of the top-level embedding over its mask, so that similarity compares objects and not backgrounds.
A slice that is still to be segmented has no mask; its similarity to a stored slice is the mean over its most similar positions, as
many of them as the object covers on the stored slice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.memory.interface import MemoryScores


@dataclass(frozen=True)
class ObjectStats:
    """Statistics of B objects on one slice.

    object_score (B,): logit. confidence (B,): predicted IoU, 0 to 1. vector (B, C): of unit length, 0 for an empty mask. area (B,):
    positions of the embedding that the object covers.
    """

    object_score: Tensor
    confidence: Tensor
    vector: Tensor
    area: Tensor


@torch.no_grad()
def object_stats(top: Tensor, cover: Tensor, object_score: Tensor, confidence: Tensor) -> ObjectStats:
    """Compute the statistics of B objects on a slice.

    top (B, C, h, w): embedding. cover (B, 1, H, W): share of each pixel that the object covers. object_score (B, 1). confidence (B,).
    """
    weight = F.adaptive_avg_pool2d(cover.float(), (top.shape[-2], top.shape[-1]))
    vector = F.normalize((top.float() * weight).sum(dim=(-2, -1)), dim=1)
    return ObjectStats(object_score.float().flatten(), confidence.float().clamp(0, 1), vector, weight.sum(dim=(-3, -2, -1)))


@torch.no_grad()
def memory_scores(stats: Mapping[int, ObjectStats], obj: int, top: Tensor | None = None) -> MemoryScores:
    """Compute the scores of object `obj` on all stored slices. top (B, C, h, w): embedding of the slice to be segmented, if any."""
    slices = list(stats)
    if not slices:
        return MemoryScores()
    object_score = torch.stack([one.object_score[obj] for one in stats.values()]).tolist()
    confidence = torch.stack([one.confidence[obj] for one in stats.values()]).tolist()
    vectors, areas = (torch.stack([getattr(one, name)[obj] for one in stats.values()]) for name in ("vector", "area"))
    with torch.autocast(vectors.device.type, enabled=False):  # bfloat16 would round different similarities to the same value
        table = (vectors @ vectors.T).tolist()
        to_query = similarity(vectors, areas, top[obj]).tolist() if top is not None else []
    pairwise = {(one, other): table[i][j] for i, one in enumerate(slices) for j, other in enumerate(slices)}
    return MemoryScores(dict(zip(slices, object_score)), dict(zip(slices, confidence)), dict(zip(slices, to_query)), pairwise)


def similarity(vectors: Tensor, areas: Tensor, top: Tensor) -> Tensor:
    """Average the cosine of each vector with its `area` most similar positions. vectors (S, C), areas (S,), top (C, h, w) -> (S,)."""
    cosines = vectors @ F.normalize(top.float().flatten(1), dim=0)
    ranked, rank = cosines.sort(dim=1, descending=True).values, torch.arange(cosines.shape[1], device=top.device)
    count = areas.round().long().clamp(1, len(rank))
    return (ranked * (rank < count[:, None])).sum(dim=1) / count
