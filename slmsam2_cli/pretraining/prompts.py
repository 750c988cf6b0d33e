"""Boxes, points and masks that are nearly right: drawn from a mask in training, turned into a mask by SAM 2's prompt encoder.

Labels are SAM 2's: 1 inside, 0 outside, 2 and 3 the two corners of a box; coordinates are pixels (x, y) of the network's
frame (Ravi et al., "SAM 2", arXiv:2408.00714). A network that carries masks (`carry_gain`) takes the inside of a box, as it
takes a mask that is nearly right, for one that was carried: so it has to improve on a mask and not to find one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.refiner import PriorSlice
from slmsam2_cli.model.slmsam2 import MASK_LOGIT, RefinerInput, SliceFeatures, SliceOutput, SlmSam2

OUTSIDE, INSIDE, CORNERS = 0, 1, (2, 3)


def segment_from_points(model: SlmSam2, features: SliceFeatures, points: Tensor, labels: Tensor) -> SliceOutput:
    """Segment B objects on one slice from N points each, without memory. points (B, N, 2), labels (B, N).

    One point may mean several things: then there are three candidates, as in SAM 2.
    """
    return _prompted(model, features, points, labels, None)


def segment_from_boxes(model: SlmSam2, features: SliceFeatures, boxes: Tensor) -> SliceOutput:
    """Segment B objects on one slice from a box each, without memory. boxes (B, 2, 2): left top, right bottom."""
    labels = torch.tensor([CORNERS], device=boxes.device).expand(len(boxes), 2)
    inside = to_mask_logits(model, filled(boxes, model.input_size)) if model.carry_gain is not None else None
    return _prompted(model, features, boxes, labels, inside)


def refine_masks(model: SlmSam2, features: SliceFeatures, masks: Tensor) -> SliceOutput:
    """Segment B objects on one slice from masks that are nearly right, without memory. masks (B, 1, H, W).

    A refiner takes them for masks of a slice just passed that looks the same: so it learns to find borders where they are.
    """
    carried, seen = to_mask_logits(model, masks), None
    if features.refiner_features is not None:
        sight = PriorSlice(features.refiner_features, carried.sigmoid(), torch.ones(len(masks), 1, device=masks.device))
        seen = RefinerInput(features.refiner_features, sight, [sight])
    return model.decode(without_memory(model, features), features.fine, carried, seen)


def _prompted(model: SlmSam2, features: SliceFeatures, points: Tensor, labels: Tensor, rough: Tensor | None) -> SliceOutput:
    coarse = model.downsample_logits(rough) if rough is not None else None
    sparse, dense = model.sam_prompt_encoder(points=(points, labels), boxes=None, masks=coarse)
    candidates, iou, tokens, object_score = model.sam_mask_decoder(
        image_embeddings=without_memory(model, features),
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=model._use_multimask(True, {"point_labels": labels}),
        repeat_image=False,
        high_res_features=list(features.fine),
    )
    candidates = model.upsample_logits(candidates.float())
    if rough is not None and model.carry_gain is not None:
        candidates = candidates + model.carry_gain * rough
    return model._choose(candidates, iou, tokens, object_score)


def without_memory(model: SlmSam2, features: SliceFeatures) -> Tensor:
    """What takes the place of memory attention where there is no memory. (B, C, h, w)."""
    conditioned: Tensor = features.top + model.no_mem_embed.view(1, -1, 1, 1)
    return conditioned


def to_mask_logits(model: SlmSam2, masks: Tensor) -> Tensor:
    """Masks (B, 1, H, W) as logits of +-10 at the size of those that the network draws."""
    size = (model.mask_size, model.mask_size)
    return F.interpolate(masks * (2 * MASK_LOGIT) - MASK_LOGIT, size=size, mode="bilinear", align_corners=False, antialias=True)


def box_of(masks: Tensor, rng: torch.Generator, jitter: float) -> Tensor:
    """The box around each mask, its corners shifted by at most `jitter` of its edges. masks (B, 1, H, W), none empty -> (B, 2, 2)."""
    held = masks[:, 0] > 0.5
    edges = torch.stack([_extent(held.any(dim=1)), _extent(held.any(dim=2))], dim=2)  # (B, 2 ends, xy)
    size = edges[:, 1:] - edges[:, :1] + 1
    shift = _between(-jitter, jitter, edges.shape, rng).to(masks.device)
    limit = torch.tensor([masks.shape[-1] - 1, masks.shape[-2] - 1], device=masks.device)
    return torch.minimum((edges + shift * size).clamp(min=0), limit)


def _extent(line: Tensor) -> Tensor:
    """First and last place that is True. (B, L) bool -> (B, 2) float."""
    first = line.float().argmax(dim=1)
    last = line.shape[1] - 1 - line.flip(1).float().argmax(dim=1)
    return torch.stack([first, last], dim=1).float()


def filled(boxes: Tensor, input_size: int) -> Tensor:
    """Boxes (B, 2, 2) as masks (B, 1, input_size, input_size)."""
    x = torch.arange(input_size, device=boxes.device)
    left, top, right, bottom = boxes.round().flatten(1).unbind(1)
    across = (x >= left[:, None]) & (x <= right[:, None])
    down = (x >= top[:, None]) & (x <= bottom[:, None])
    return (down[:, :, None] & across[:, None, :])[:, None].float()


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


def nearly(masks: Tensor, rng: torch.Generator, shift: float, scale: float) -> Tensor:
    """Masks like the ones given, as that of a neighbouring slice might be: moved by at most `shift` of their size, and larger or
    smaller by at most `scale` times. masks (B, 1, H, W), none empty -> the same shape, in {0, 1}; size is the root of the area.
    """
    batch, edge = len(masks), masks.shape[-1]
    place = torch.arange(edge, device=masks.device, dtype=torch.float32)
    mass = masks[:, 0]
    area = mass.sum(dim=(1, 2)).clamp(min=1)
    centre = torch.stack([(mass.sum(1) * place).sum(1) / area, (mass.sum(2) * place).sum(1) / area], dim=1)
    moved = centre + _between(-shift, shift, (batch, 2), rng).to(masks.device) * area.sqrt()[:, None]
    zoom = torch.exp(_between(-1.0, 1.0, (batch, 1), rng).to(masks.device) * math.log(scale))
    y, x = torch.meshgrid(place, place, indexing="ij")
    source = (torch.stack([x, y], dim=-1) - moved[:, None, None]) / zoom[:, None, None] + centre[:, None, None]
    found = F.grid_sample(masks, (2 * source + 1) / edge - 1, mode="nearest", align_corners=False)
    return torch.where(found.flatten(1).any(dim=1)[:, None, None, None], found, masks)


def _between(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng, device=rng.device)
