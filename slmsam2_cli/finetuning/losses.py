"""What a tracked slice is wrong by: focal, Dice, predicted IoU and presence, weighted 20 : 1 : 1 : 1 as SAM 2 does.

Dice and IoU count only where the object is present; with several candidates the best one carries them
(Ravi et al., "SAM 2", arXiv:2408.00714; Chen et al., arXiv:2505.01854, section III). Published training drops the
focal term too where the object is absent; here it stays, so that a mask learns to vanish by itself and a wrong
presence score is not the only thing that can end a structure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.model.slmsam2 import SliceOutput

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, PRESENCE_WEIGHT = 20.0, 1.0, 1.0, 1.0
_ALPHA, _GAMMA = 0.25, 2.0


@dataclass(frozen=True)
class SliceLoss:
    """Mean losses over the B objects of one slice; `total` is what is minimised."""

    focal: Tensor
    dice: Tensor
    iou: Tensor
    presence: Tensor

    @property
    def total(self) -> Tensor:
        return FOCAL_WEIGHT * self.focal + DICE_WEIGHT * self.dice + IOU_WEIGHT * self.iou + PRESENCE_WEIGHT * self.presence


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


def slice_loss(output: SliceOutput, target: Tensor, known: Tensor | None = None) -> SliceLoss:
    """Loss of B objects on one slice. target (B, 1, H, W) in {0, 1}; candidates are brought to its size.

    known (B, 1, H, W): 0 where nobody looked (the ignore label), where no term counts; presence counts where the object was
    seen, or all of the slice was looked at.
    """
    candidates = F.interpolate(output.candidates, size=target.shape[-2:], mode="bilinear", align_corners=False)
    truth = target.expand_as(candidates)
    present = (target.flatten(1).amax(dim=1) > 0).float()
    seen = known.expand_as(candidates) if known is not None else None
    focals, dices = focal(candidates, truth, seen), soft_dice(candidates, truth, seen)
    rows, best = torch.arange(len(truth), device=truth.device), (FOCAL_WEIGHT * focals + DICE_WEIGHT * dices).argmin(dim=1)
    iou_error = (output.iou.float() - true_iou(candidates.detach(), truth, seen)).abs().mean(dim=1)
    held = present.sum().clamp(min=1)
    return SliceLoss(
        focal=focals[rows, best].mean(),
        dice=(dices[rows, best] * present).sum() / held,
        iou=(iou_error * present).sum() / held,
        presence=_presence(output.presence.float().squeeze(1), present, known),
    )


def _presence(logits: Tensor, present: Tensor, known: Tensor | None) -> Tensor:
    """Cross-entropy of presence (B,) over the objects whose presence is known; 0 when none is."""
    each = F.binary_cross_entropy_with_logits(logits, present, reduction="none")
    sure = torch.ones_like(present) if known is None else torch.maximum(present, known.flatten(1).amin(dim=1))
    return (each * sure).sum() / sure.sum().clamp(min=1)
