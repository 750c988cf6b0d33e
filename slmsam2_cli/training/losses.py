"""Losses of a tracked slice: focal, Dice, predicted IoU and object score, weighted 20 : 1 : 1 : 1 as in SAM 2.

Dice and IoU count only where the object is present; of several candidate masks the best one is trained (Ravi et al., "SAM 2",
arXiv:2408.00714; Chen et al., arXiv:2505.01854, section III). Published training drops the focal term, too, where the object is absent.
Here it stays, so that an empty mask is learned as well and the object score is not all that can end a structure.

From random weights, the focal term teaches the empty mask: most pixels are background, and foreground has a quarter of the weight. So
pretraining replaces it by a cross-entropy in which inside and outside count alike (docs/explanation/pretraining.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.slmsam2 import SliceOutput

_ALPHA, _GAMMA = 0.25, 2.0
_MIN_COUNT = 1e-6  # divides a sum over no objects, which is 0
_MIN_FRACTION = 1e-3  # of a slice: an object smaller than this is weighted as if it were this large


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term. pixels: of the term over pixels, which is focal, or balanced cross-entropy when `balanced`.

    absent: factor on `pixels` where the object is absent and Dice does not count. object_score_offset: by how much the object score of
    the initial weights was lowered after training; the loss adds it back, or fine-tuning would raise the score again.
    """

    pixels: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    object_score: float = 1.0
    balanced: bool = False
    absent: float = 1.0
    object_score_offset: float = 0.0


SAM2 = LossWeights()
NANO = LossWeights(pixels=0.3, balanced=True, absent=2.0)  # as in its pretraining


@dataclass(frozen=True)
class SliceLoss:
    """Mean losses over the B objects of one slice; `total` is what is minimised."""

    pixels: Tensor
    dice: Tensor
    iou: Tensor
    object_score: Tensor
    weights: LossWeights = SAM2

    @property
    def total(self) -> Tensor:
        """The weighted sum of the terms."""
        w = self.weights
        return w.pixels * self.pixels + w.dice * self.dice + w.iou * self.iou + w.object_score * self.object_score


def focal(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the sigmoid focal loss per mask, mean over the valid pixels. logits, target, valid (..., H, W) -> (...)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    missed = 1 - (probability * target + (1 - probability) * (1 - target))
    weight = _ALPHA * target + (1 - _ALPHA) * (1 - target)
    loss = weight * missed**_GAMMA * entropy
    if valid is None:
        return loss.mean(dim=(-2, -1))
    return (loss * valid).sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1)).clamp(min=1)


def balanced(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute cross-entropy per mask over the valid pixels; inside and outside count one half each, whatever their size.

    logits, target, valid (..., H, W) -> (...).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    valid = torch.ones_like(target) if valid is None else valid
    pixels = valid.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    inside = (target * valid).sum(dim=(-2, -1), keepdim=True) / pixels
    weight = target / (2 * inside.clamp(min=_MIN_FRACTION)) + (1 - target) / (2 * (1 - inside).clamp(min=_MIN_FRACTION))
    return (weight * entropy * valid / pixels).sum(dim=(-2, -1))


def soft_dice(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute 1 - soft Dice per mask over the valid pixels, with 1 added to both counts. (..., H, W) -> (...)."""
    probability = logits.sigmoid() if valid is None else logits.sigmoid() * valid
    shared = 2 * (probability * target).sum(dim=(-2, -1)) + 1
    return 1 - shared / (probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)


def true_iou(logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute IoU of the thresholded masks over the valid pixels. (..., H, W) -> (...); two empty masks count as 1."""
    predicted, real = logits > 0, target > 0.5
    if valid is not None:
        predicted = predicted & (valid > 0.5)
    union = (predicted | real).sum(dim=(-2, -1))
    return torch.where(union > 0, (predicted & real).sum(dim=(-2, -1)) / union.clamp(min=1), torch.ones_like(union, dtype=torch.float32))


def slice_loss(
    output: SliceOutput,
    target: Tensor,
    valid: Tensor | None = None,
    weights: LossWeights = SAM2,
    counts: Tensor | None = None,
    target_scores: Tensor | None = None,
) -> SliceLoss:
    """Compute the losses of B objects on one slice. target (B, 1, H, W) in {0, 1}; candidates are resized to it.

    valid (B, 1, H, W): 0 under the ignore label, where no term counts; the object score counts where the object is annotated, or no pixel
    of the slice is ignored. counts: what sums over objects are divided by: `object_counts` of these objects, or the mean over several
    processes that have some of the objects each. target_scores (B,): the probability that each object is present, as target of the
    object score instead of the ground truth.
    """
    candidates = F.interpolate(output.candidates, size=target.shape[-2:], mode="bilinear", align_corners=False)
    target_masks = target.expand_as(candidates)
    present = (target.flatten(1).amax(dim=1) > 0).float()
    valid_masks = valid.expand_as(candidates) if valid is not None else None
    pixels = (balanced if weights.balanced else focal)(candidates, target_masks, valid_masks)
    dices = soft_dice(candidates, target_masks, valid_masks)
    best = (weights.pixels * pixels + weights.dice * dices).argmin(dim=1)
    rows = torch.arange(len(best), device=best.device)
    iou_error = (output.iou.float() - true_iou(candidates.detach(), target_masks, valid_masks)).abs().mean(dim=1)
    objects, present_objects, scored = object_counts(target, valid) if counts is None else counts
    scores = output.object_score.float().squeeze(1)
    if target_scores is None:
        object_score = _object_score_loss(scores + weights.object_score_offset, present, _valid_objects(present, valid), scored)
    else:
        object_score = _object_score_loss(scores, target_scores, torch.ones_like(present), objects)
    return SliceLoss(
        pixels=(pixels[rows, best] * torch.where(present > 0, 1.0, weights.absent)).sum() / objects,
        dice=(dices[rows, best] * present).sum() / present_objects.clamp(min=_MIN_COUNT),
        iou=(iou_error * present).sum() / present_objects.clamp(min=_MIN_COUNT),
        object_score=object_score,
        weights=weights,
    )


def object_counts(target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Count the objects of one slice: all, those that are on it, and those for which this is annotated; (3,)."""
    present = (target.flatten(1).amax(dim=1) > 0).float()
    return torch.stack([torch.ones_like(present).sum(), present.sum(), _valid_objects(present, valid).sum()])


def _object_score_loss(logits: Tensor, target: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Compute cross-entropy of the object score, summed over objects by weight and divided by `count`. logits, target, weight (B,)."""
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * weight).sum() / count.clamp(min=_MIN_COUNT)


def _valid_objects(present: Tensor, valid: Tensor | None) -> Tensor:
    """Return 1 for every object that is annotated on the slice, or absent from a slice without ignored pixels; (B,)."""
    return torch.ones_like(present) if valid is None else torch.maximum(present, valid.flatten(1).amin(dim=1))
