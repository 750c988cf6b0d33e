"""Simulate prompts from masks (boxes, points, perturbed masks) and segment from them with SAM 2's prompt encoder.

Labels of points are SAM 2's: 1 inside, 0 outside, 2 and 3 the two corners of a box; coordinates are pixels (x, y) of the network's
input (Ravi et al., "SAM 2", arXiv:2408.00714). A network that carries masks (`carry_gain`) takes the inside of a box, and a perturbed
mask, for a carried mask. So it learns to improve a mask instead of finding one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.refiner import PriorSlice
from slmsam2_cli.model.slmsam2 import MASK_LOGIT, RefinerInput, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.pretraining.random_fields import Draw

OUTSIDE, INSIDE, CORNERS = 0, 1, (2, 3)


def segment_from_points(
    model: SlmSam2, features: SliceFeatures, points: Tensor, labels: Tensor, carried: Tensor | None = None
) -> SliceOutput:
    """Segment B objects on one slice from N points each, without memory. points (B, N, 2), labels (B, N).

    A single point is ambiguous, so it results in three candidates, as in SAM 2.
    carried: mask logits (B, 1, H, W) as a dense prompt; a network that carries masks adds them to its result.
    """
    coarse = model.downsample_logits(carried) if carried is not None else None
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
    if carried is not None and model.carry_gain is not None:
        candidates = candidates + model.carry_gain * carried
    return model.choose_candidate(candidates, iou, tokens, object_score)


def segment_from_boxes(model: SlmSam2, features: SliceFeatures, boxes: Tensor) -> SliceOutput:
    """Segment B objects on one slice from a box each, without memory. boxes (B, 2, 2): left top, right bottom corner."""
    labels = torch.tensor([CORNERS], device=boxes.device).expand(len(boxes), 2)
    inside = to_mask_logits(model, boxes_to_masks(boxes, model.input_size)) if model.carry_gain is not None else None
    return segment_from_points(model, features, boxes, labels, inside)


def refine_masks(model: SlmSam2, features: SliceFeatures, masks: Tensor) -> SliceOutput:
    """Segment B objects on one slice from perturbed masks, without memory. masks (B, 1, H, W).

    The refiner gets them as masks of a previous slice with the same image, so it learns to move borders to where they are visible.
    """
    carried, refiner_input = to_mask_logits(model, masks), None
    if features.refiner_features is not None:
        prior = PriorSlice(features.refiner_features, carried.sigmoid(), torch.ones(len(masks), 1, device=masks.device))
        refiner_input = RefinerInput(features.refiner_features, prior, [prior])
    return model.decode(without_memory(model, features), features.fine, carried, refiner_input)


def without_memory(model: SlmSam2, features: SliceFeatures) -> Tensor:
    """Return the features of a slice as conditioned by no memory, (B, C, h, w)."""
    conditioned: Tensor = features.top + model.no_mem_embed.view(1, -1, 1, 1)
    return conditioned


def to_mask_logits(model: SlmSam2, masks: Tensor) -> Tensor:
    """Convert masks (B, 1, H, W) in {0, 1} to logits of +-10 at the size of the network's masks."""
    size = (model.mask_size, model.mask_size)
    return F.interpolate(masks * (2 * MASK_LOGIT) - MASK_LOGIT, size=size, mode="bilinear", align_corners=False, antialias=True)


def boxes_around(masks: Tensor, rng: torch.Generator, jitter: float) -> Tensor:
    """Return a box around each mask, its corners shifted by at most `jitter` of its edges.

    masks (B, 1, H, W), none empty -> (B, 2, 2): x and y of the first and of the last pixel.
    """
    held = masks[:, 0] > 0.5
    edges = torch.stack([_first_and_last(held.any(dim=1)), _first_and_last(held.any(dim=2))], dim=2)  # (B, 2 ends, xy)
    size = edges[:, 1:] - edges[:, :1] + 1
    shift = Draw(rng).uniform((-jitter, jitter), *edges.shape).to(masks.device)
    limit = torch.tensor([masks.shape[-1] - 1, masks.shape[-2] - 1], device=masks.device)
    return torch.minimum((edges + shift * size).clamp(min=0), limit)


def _first_and_last(line: Tensor) -> Tensor:
    """Return the first and the last index that is True, (B, L) bool -> (B, 2) float; stays on the device, unlike dataset.mask_measures."""
    first = line.float().argmax(dim=1)
    last = line.shape[1] - 1 - line.flip(1).float().argmax(dim=1)
    return torch.stack([first, last], dim=1).float()


def boxes_to_masks(boxes: Tensor, input_size: int) -> Tensor:
    """Fill boxes (B, 2, 2): masks (B, 1, input_size, input_size)."""
    x = torch.arange(input_size, device=boxes.device)
    left, top, right, bottom = boxes.round().flatten(1).unbind(1)
    in_columns = (x >= left[:, None]) & (x <= right[:, None])
    in_rows = (x >= top[:, None]) & (x <= bottom[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None].float()


def sample_points(masks: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample `count` points per mask, the first one inside, the others inside or outside. masks (B, 1, H, W), none empty.

    Returns points (B, count, 2) and labels (B, count).
    """
    batch, width = len(masks), masks.shape[-1]
    inside = torch.rand(batch, count, generator=rng, device=rng.device).to(masks.device) < 0.6
    inside[:, 0] = True
    flat = masks.flatten(1) > 0.5
    inside |= flat.all(dim=1, keepdim=True)
    score = torch.rand(batch, count, flat.shape[1], generator=rng, device=rng.device).to(masks.device)
    index = torch.where(flat[:, None] == inside[..., None], score, -1.0).argmax(dim=2)
    points = torch.stack([index % width, index // width], dim=2).float()
    return points, torch.where(inside, INSIDE, OUTSIDE)


def perturb_masks(masks: Tensor, rng: torch.Generator, shift: float, scale: float) -> Tensor:
    """Shift and scale masks at random, as the mask of an adjacent slice might differ.

    masks (B, 1, H, W), none empty -> the same shape, in {0, 1}. shift: at most this share of the mask's size, the root of its area;
    scale: at most this factor larger or smaller. A mask that would leave the image stays as it is.
    """
    batch, edge = len(masks), masks.shape[-1]
    pixels = torch.arange(edge, device=masks.device, dtype=torch.float32)
    mass = masks[:, 0]
    area = mass.sum(dim=(1, 2)).clamp(min=1)
    centre = torch.stack([(mass.sum(1) * pixels).sum(1) / area, (mass.sum(2) * pixels).sum(1) / area], dim=1)
    moved = centre + Draw(rng).uniform((-shift, shift), batch, 2).to(masks.device) * area.sqrt()[:, None]
    zoom = torch.exp(Draw(rng).uniform((-1.0, 1.0), batch, 1).to(masks.device) * math.log(scale))
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    source = (torch.stack([x, y], dim=-1) - moved[:, None, None]) / zoom[:, None, None] + centre[:, None, None]
    result = F.grid_sample(masks, (2 * source + 1) / edge - 1, mode="nearest", align_corners=False)
    return torch.where(result.flatten(1).any(dim=1)[:, None, None, None], result, masks)
