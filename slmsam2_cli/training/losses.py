"""What a tracked slice is wrong by: focal, Dice, predicted IoU and object score, weighted 20 : 1 : 1 : 1 as SAM 2 does.

Dice and IoU count only where the object is present; with several candidates the best one carries them
(Ravi et al., "SAM 2", arXiv:2408.00714; Chen et al., arXiv:2505.01854, section III). Published training drops the
focal term too where the object is absent; here it stays, so that a mask learns to vanish by itself and a wrong
object score is not the only thing that can end a structure.

From nothing, the focal term teaches the empty mask: most pixels are background, and its weight on the others is a quarter. So
pre-training replaces it by a cross-entropy in which inside and outside count alike (docs/explanation/pretraining.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.slmsam2 import SliceOutput

_ALPHA, _GAMMA = 0.25, 2.0
_NONE = 1e-6  # in place of a count of 0, where the sum is 0, too
_SMALLEST = 1e-3  # share of a slice below which an object counts no more than that share


@dataclass(frozen=True)
class Weights:
    """What each term counts. pixels: of the term over pixels, which is focal, or balanced cross-entropy when `balanced`.

    absent: how many times that where the object is not, and Dice says nothing. object_score_offset: by how much the
    object score of the initial weights was lowered after training; the loss adds it back, or fine-tuning would raise the score again.
    """

    pixels: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    object_score: float = 1.0
    balanced: bool = False
    absent: float = 1.0
    object_score_offset: float = 0.0


SAM2 = Weights()
NANO = Weights(pixels=0.3, balanced=True, absent=2.0)  # as nano was pre-trained


@dataclass(frozen=True)
class SliceLoss:
    """Mean losses over the B objects of one slice; `total` is what is minimised."""

    pixels: Tensor
    dice: Tensor
    iou: Tensor
    object_score: Tensor
    weights: Weights = SAM2

    @property
    def total(self) -> Tensor:
        w = self.weights
        return w.pixels * self.pixels + w.dice * self.dice + w.iou * self.iou + w.object_score * self.object_score


def focal(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Sigmoid focal loss per mask, mean over the known pixels. logits, target, known (..., H, W) -> (...)."""
    wrong = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    missed = 1 - (probability * target + (1 - probability) * (1 - target))
    weight = _ALPHA * target + (1 - _ALPHA) * (1 - target)
    each = weight * missed**_GAMMA * wrong
    if known is None:
        return each.mean(dim=(-2, -1))
    return (each * known).sum(dim=(-2, -1)) / known.sum(dim=(-2, -1)).clamp(min=1)


def balanced(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Cross-entropy per mask over the known pixels; inside and outside count one half each, whatever their size. (..., H, W) -> (...)."""
    wrong = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    seen = torch.ones_like(target) if known is None else known
    all_ = seen.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    inside = (target * seen).sum(dim=(-2, -1), keepdim=True) / all_
    weight = target / (2 * inside.clamp(min=_SMALLEST)) + (1 - target) / (2 * (1 - inside).clamp(min=_SMALLEST))
    return (weight * wrong * seen / all_).sum(dim=(-2, -1))


def soft_dice(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """1 - soft Dice per mask over the known pixels, with 1 added to both counts. (..., H, W) -> (...)."""
    probability = logits.sigmoid() if known is None else logits.sigmoid() * known
    shared = 2 * (probability * target).sum(dim=(-2, -1)) + 1
    return 1 - shared / (probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1)) + 1)


def true_iou(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """IoU of the hard masks over the known pixels. (..., H, W) -> (...); two empty masks count as 1."""
    predicted, real = logits > 0, target > 0.5
    if known is not None:
        predicted = predicted & (known > 0.5)
    union = (predicted | real).sum(dim=(-2, -1))
    return torch.where(union > 0, (predicted & real).sum(dim=(-2, -1)) / union.clamp(min=1), torch.ones_like(union, dtype=torch.float32))


def slice_loss(
    output: SliceOutput,
    target: Tensor,
    known: Tensor | None = None,
    weights: Weights = SAM2,
    counts: Tensor | None = None,
    target_scores: Tensor | None = None,
) -> SliceLoss:
    """Loss of B objects on one slice. target (B, 1, H, W) in {0, 1}; candidates are brought to its size.

    known (B, 1, H, W): 0 where nobody looked (the ignore label), where no term counts; object score counts where the object was
    seen, or all of the slice was looked at. counts: what sums over the objects are divided by, `object_counts` of these, or the mean of
    those of several processes, each of which sees some of the objects. target_scores (B,): how probable it is that each is there, for
    object score to learn instead of the truth.
    """
    candidates = F.interpolate(output.candidates, size=target.shape[-2:], mode="bilinear", align_corners=False)
    truth = target.expand_as(candidates)
    present = (target.flatten(1).amax(dim=1) > 0).float()
    seen = known.expand_as(candidates) if known is not None else None
    pixels = (balanced if weights.balanced else focal)(candidates, truth, seen)
    dices = soft_dice(candidates, truth, seen)
    rows, best = torch.arange(len(truth), device=truth.device), (weights.pixels * pixels + weights.dice * dices).argmin(dim=1)
    iou_error = (output.iou.float() - true_iou(candidates.detach(), truth, seen)).abs().mean(dim=1)
    objects, held, sure = object_counts(target, known) if counts is None else counts
    return SliceLoss(
        pixels=(pixels[rows, best] * torch.where(present > 0, 1.0, weights.absent)).sum() / objects,
        dice=(dices[rows, best] * present).sum() / held.clamp(min=_NONE),
        iou=(iou_error * present).sum() / held.clamp(min=_NONE),
        object_score=_object_score_loss(
            output.object_score.float().squeeze(1) + weights.object_score_offset, present, _valid_objects(present, known), sure
        )
        if target_scores is None
        else _object_score_loss(output.object_score.float().squeeze(1), target_scores, torch.ones_like(present), objects),
        weights=weights,
    )


def object_counts(target: Tensor, known: Tensor | None = None) -> Tensor:
    """(3,): of the objects of one slice, how many there are, how many of them lie on it, and of how many that is known."""
    present = (target.flatten(1).amax(dim=1) > 0).float()
    return torch.stack([torch.ones_like(present).sum(), present.sum(), _valid_objects(present, known).sum()])


def _object_score_loss(logits: Tensor, chance: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy of object score over the objects that count, 0 when none does. logits, chance, counted (B,)."""
    each = F.binary_cross_entropy_with_logits(logits, chance, reduction="none")
    return (each * counted).sum() / count.clamp(min=_NONE)


def _valid_objects(present: Tensor, known: Tensor | None) -> Tensor:
    """1 for every object whose object score is known, (B,)."""
    return torch.ones_like(present) if known is None else torch.maximum(present, known.flatten(1).amin(dim=1))
