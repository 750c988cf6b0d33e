"""The label prior of a volume: the label U-Net's prediction, mixed into propagation by a weight that grows with its Dice on the prompts.

The annotated slices test the label U-Net on the volume itself: where it segments them well, it counts as much as propagation; where it
segments something else, it counts little or nothing. The prior is mixed in slice by slice, before the slice enters memory, so that later
slices read the corrected mask. Weights and bounds were chosen on the cases named in docs/experiments/2026-11-26-label-unet.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.model.label_unet import LabelUNet, label_unet_roi, with_adjacent_slices
from slmsam2_cli.model.roi import InputSlices, RoiCrop
from slmsam2_cli.model.slmsam2 import SliceOutput, with_mask

MAX_LOGIT = 10.0  # logits are clamped to this before they are mixed
MAX_WEIGHT = 0.5  # of the label prior; propagation has the rest
MAX_LEARNED_WEIGHT = 0.3  # of that of a label U-Net that learned from annotated slices of other volumes
FULL_WEIGHT_DICE = 0.7  # Dice on the annotated slices from which on the label prior has its full weight
MIN_AREA_FRACTION = 0.1  # of the annotated area that must be predicted for the structure to be present
SCALES = (1.0, 0.87, 1.15)  # of the image at which the label U-Net predicts; the mean is better than one prediction
_BATCH = 16
_MIN_PIXELS = 4


@dataclass(frozen=True)
class LabelPrior:
    """The label U-Net's prediction of one label.

    margins (T, px, px): logits of the label against all others, in the crop `roi`; prompt_dice: Dice with the annotated masks, mean over
    the annotated slices; area: of the annotated masks in pixels, mean; can_add: whether it may add the structure where propagation
    predicts none; learned: whether the label U-Net learned from annotated slices of other volumes.
    """

    margins: Tensor
    roi: RoiCrop
    storage_size: int
    prompt_dice: float
    area: float
    can_add: bool = True
    learned: bool = False

    @property
    def weight(self) -> float:
        """Weight of the prior in the mix, from 0 to its maximum."""
        return (MAX_LEARNED_WEIGHT if self.learned else MAX_WEIGHT) * min(1.0, self.prompt_dice / FULL_WEIGHT_DICE) ** 2

    def weighted(self, output: SliceOutput, t: int, roi: RoiCrop | None) -> SliceOutput:
        """Mix the prior into the output of one object on slice t, which is of the crop `roi` or of the whole slice."""
        if self.weight == 0:
            return output
        place = roi or RoiCrop(0, 0, self.storage_size)
        margins = self.margins[t].float().clamp(-MAX_LOGIT, MAX_LOGIT)
        both = [self.roi.paste(values, self.storage_size, 0.0) for values in (margins, torch.ones_like(margins))]
        cropped = place.crop(torch.stack(both)[:, None], output.chosen.shape[-1])
        margins, seen = cropped[:1], (cropped[1:] > 0.99).float()  # seen: 1 where the label U-Net predicted
        if not seen.any():
            return output
        margins, weights = margins.to(output.chosen), self.weight * seen.to(output.chosen)
        chosen = torch.lerp(output.chosen.clamp(-MAX_LOGIT, MAX_LOGIT), margins, weights)
        pixels = max(_MIN_PIXELS, int(MIN_AREA_FRACTION * self.area * (chosen.shape[-1] / place.edge) ** 2))
        present = torch.where(seen.to(weights) > 0, margins, -MAX_LOGIT).flatten().topk(min(pixels, margins.numel())).values.mean()
        propagated = output.object_score.float().clamp(-MAX_LOGIT, MAX_LOGIT)
        object_score = torch.lerp(propagated, present.float().expand_as(output.object_score), self.weight)
        if not self.can_add:
            object_score = torch.minimum(object_score, propagated)
        return with_mask(output, chosen, object_score)


@torch.inference_mode()
def compute_label_priors(
    label_unet: LabelUNet, frames: Tensor | InputSlices, annotated: Mapping[int, Sequence[tuple[int, Tensor]]]
) -> dict[int, LabelPrior]:
    """Compute the prior of every annotated label that the label U-Net was trained on.

    frames (T, C or more, S, S) in [0, 1]; annotated: label -> (slice, mask (S, S) bool), empty masks included.
    """
    held = {value: [(t, mask) for t, mask in masks if bool(mask.any())] for value, masks in annotated.items()}
    held = {value: masks for value, masks in held.items() if masks and value in label_unet.values}
    if not held:
        return {}
    storage_size = frames.shape[-1]
    roi = label_unet_roi([mask for masks in held.values() for _, mask in masks], storage_size)
    blocks = [frames[start : start + _BATCH][:, : label_unet.channels].float() for start in range(0, len(frames), _BATCH)]
    margins = _margins(label_unet, torch.cat([roi.crop(block, label_unet.input_size) for block in blocks]), list(held))
    priors = {}
    for value, masks in held.items():
        prompt_dice, area = 0.0, 0.0
        for t, mask in masks:
            predicted = roi.paste(margins[value][t].float(), storage_size, -MAX_LOGIT) > 0
            prompt_dice += dice(int((predicted & mask).sum()), int(predicted.sum()), int(mask.sum())) / len(masks)
            area += int(mask.sum()) / len(masks)
        priors[value] = LabelPrior(margins[value], roi, storage_size, prompt_dice, area, label_unet.can_add)
    return priors


def best_label_priors(
    label_unet: LabelUNet | None,
    learned: LabelUNet | None,
    frames: Tensor | InputSlices,
    annotated: Mapping[int, Sequence[tuple[int, Tensor]]],
) -> dict[int, LabelPrior]:
    """Compute the priors of two label U-Nets, and keep for each label the one with the higher Dice on the annotated slices.

    learned: the one that learned from annotated slices of other volumes; the rest as in `compute_label_priors`.
    """
    priors = compute_label_priors(label_unet, frames, annotated) if label_unet is not None else {}
    others = compute_label_priors(learned, frames, annotated) if learned is not None else {}
    for value, other in others.items():
        if value not in priors or other.prompt_dice > priors[value].prompt_dice:
            priors[value] = replace(other, learned=True)
    return priors


def _margins(label_unet: LabelUNet, stack: Tensor, values: Sequence[int]) -> dict[int, Tensor]:
    """Predict a stack (T, C, px, px): label -> (T, px, px) float16 on the CPU, log p - log(1 - p) within ±MAX_LOGIT, mean over SCALES."""
    found: dict[int, list[Tensor]] = {value: [] for value in values}
    for start in range(0, len(stack), _BATCH):
        slices = torch.stack([with_adjacent_slices(stack, t) for t in range(start, min(start + _BATCH, len(stack)))])
        predicted = []
        for scale in SCALES:
            logits = label_unet(_scaled(slices, scale).to(label_unet.labels.device)).float()
            margins = []
            for row in (1 + label_unet.values.index(value) for value in values):
                others = torch.cat([logits[:, :row], logits[:, row + 1 :]], dim=1)
                margins.append(logits[:, row] - others.logsumexp(dim=1))
            predicted.append(_scaled(torch.stack(margins, dim=1).clamp(-MAX_LOGIT, MAX_LOGIT).cpu(), 1 / scale))
        for column, value in enumerate(values):
            found[value].append(torch.stack([one[:, column] for one in predicted]).mean(dim=0).half())
    return {value: torch.cat(parts) for value, parts in found.items()}


def _scaled(slices: Tensor, scale: float) -> Tensor:
    """Enlarge slices (T, C, px, px) `scale` times around their centre; outside of the image its border is repeated."""
    if scale == 1:
        return slices
    matrix = torch.tensor([[1 / scale, 0.0, 0.0], [0.0, 1 / scale, 0.0]], device=slices.device).expand(len(slices), -1, -1)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="border", align_corners=False)
