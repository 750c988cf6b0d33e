"""Boxes and points instead of masks: drawn from a mask in training, turned into a mask by SAM 2's prompt encoder.

Labels are SAM 2's: 1 inside, 0 outside, 2 and 3 the two corners of a box; coordinates are pixels (x, y) of the network's
frame (Ravi et al., "SAM 2", arXiv:2408.00714).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmsam2_cli.model.slmsam2 import SliceFeatures, SliceOutput, SlmSam2

OUTSIDE, INSIDE, CORNERS = 0, 1, (2, 3)


def prompted(model: SlmSam2, features: SliceFeatures, points: Tensor, labels: Tensor) -> SliceOutput:
    """Segment B objects on one slice from N points each, without memory. points (B, N, 2), labels (B, N).

    One point may mean several things: then there are three candidates, as in SAM 2.
    """
    sparse, dense = model.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)
    candidates, iou, tokens, presence = model.sam_mask_decoder(
        image_embeddings=without_memory(model, features),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=model._use_multimask(True, {"point_labels": labels}),
        repeat_image=False,
        high_res_features=list(features.fine),
    )
    return model._choose(candidates.float(), iou, tokens, presence)


def without_memory(model: SlmSam2, features: SliceFeatures) -> Tensor:
    """What takes the place of memory attention where there is no memory. (B, C, h, w)."""
    conditioned: Tensor = features.top + model.no_mem_embed.view(1, -1, 1, 1)
    return conditioned


def box_of(masks: Tensor, rng: torch.Generator, jitter: float) -> tuple[Tensor, Tensor]:
    """The two corners of each mask's box, shifted by at most `jitter` of its edges. masks (B, 1, H, W), none empty.

    Returns points (B, 2, 2) and labels (B, 2).
    """
    held = masks[:, 0] > 0.5
    edges = torch.stack([_extent(held.any(dim=1)), _extent(held.any(dim=2))], dim=2)  # (B, 2 ends, xy)
    size = edges[:, 1:] - edges[:, :1] + 1
    shift = (2 * torch.rand(edges.shape, generator=rng, device=rng.device) - 1) * jitter
    limit = torch.tensor([masks.shape[-1] - 1, masks.shape[-2] - 1], device=masks.device)
    points = torch.minimum((edges + shift.to(masks.device) * size).clamp(min=0), limit)
    return points, torch.tensor([CORNERS], device=masks.device).expand(len(masks), 2)


def _extent(line: Tensor) -> Tensor:
    """First and last place that is True. (B, L) bool -> (B, 2) float."""
    first = line.float().argmax(dim=1)
    last = line.shape[1] - 1 - line.flip(1).float().argmax(dim=1)
    return torch.stack([first, last], dim=1).float()


def points_of(masks: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random points: the first inside, the others inside or outside. masks (B, 1, H, W), none empty.

    Returns points (B, count, 2) and labels (B, count).
    """
    batch, width = len(masks), masks.shape[-1]
    inside = torch.rand(batch, count, generator=rng, device=rng.device).to(masks.device) < 0.6
    inside[:, 0] = True
    flat = masks.flatten(1) > 0.5
    inside |= flat.all(dim=1, keepdim=True)
    score = torch.rand(batch, count, flat.shape[1], generator=rng, device=rng.device).to(masks.device)
    place = torch.where(flat[:, None] == inside[..., None], score, -1.0).argmax(dim=2)
    points = torch.stack([place % width, place // width], dim=2).float()
    return points, torch.where(inside, INSIDE, OUTSIDE)
