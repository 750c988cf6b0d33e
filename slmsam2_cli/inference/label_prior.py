"""The label prior of a volume: the label U-Net's prediction, mixed into propagation by a weight that grows with its Dice on the prompts.

The annotated slices test the label U-Net on the volume itself: where it segments them well, it counts as much as propagation; where it
segments something else, it counts little or nothing. The prior is mixed in slice by slice, before the slice enters memory, so that later
slices read the corrected mask. Weights and bounds were chosen on the cases named in docs/experiments/2026-11-26-label-unet.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.model.label_unet import REACH, LabelUNet, label_unet_roi, with_adjacent_slices
from slmsam2_cli.model.roi import InputSlices, RoiCrop
from slmsam2_cli.model.slmsam2 import SliceOutput, with_mask

MAX_LOGIT = 10.0  # logits are clamped to this before they are mixed
MAX_WEIGHT = 0.5  # of the label prior; propagation has the rest
MAX_LEARNED_WEIGHT = 0.3  # the same where the label U-Net learned from annotated slices of other volumes
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


Annotated = Mapping[int, Sequence[tuple[int, Tensor]]]  # label -> (slice, mask (S, S) bool)


@torch.inference_mode()
def compute_label_priors(
    label_unet: LabelUNet, frames: Tensor | InputSlices, annotated: Annotated, wanted: Collection[int] | None = None
) -> dict[int, LabelPrior]:
    """Compute the prior of every annotated label that the label U-Net was trained on.

    frames (T, C or more, S, S) in [0, 1]; annotated: label -> (slice, mask (S, S) bool), empty masks included. wanted: some of these
    labels; None: all.
    """
    held = _held(label_unet, annotated)
    values = [value for value in held if wanted is None or value in wanted]
    if not values:
        return {}
    storage_size = frames.shape[-1]
    roi = label_unet_roi([mask for masks in held.values() for _, mask in masks], storage_size)
    margins = _margins(label_unet, _cropped(label_unet, frames, roi, range(len(frames))), values)
    priors = {}
    for value in values:
        masks = held[value]
        prompt_dice = _prompt_dice(roi, masks, [margins[value][t] for t, _ in masks])
        area = sum(int(mask.sum()) / len(masks) for _, mask in masks)
        priors[value] = LabelPrior(margins[value], roi, storage_size, prompt_dice, area, label_unet.can_add)
    return priors


def best_label_priors(
    label_unet: LabelUNet | None, learned: LabelUNet | None, frames: Tensor | InputSlices, annotated: Annotated
) -> dict[int, LabelPrior]:
    """Compute the prior of every label by the one of two label U-Nets that has the higher Dice on its annotated slices.

    learned: the one that learned from annotated slices of other volumes; the rest as in `compute_label_priors`.
    """
    if label_unet is None or learned is None:
        one = label_unet or learned
        priors = compute_label_priors(one, frames, annotated) if one is not None else {}
        return {value: replace(prior, learned=learned is not None) for value, prior in priors.items()}
    own, others = (_prompt_dices(each, frames, annotated) for each in (label_unet, learned))
    better = {value for value, score in others.items() if score > own.get(value, -1.0)}
    mine = compute_label_priors(label_unet, frames, annotated, annotated.keys() - better)
    theirs = compute_label_priors(learned, frames, annotated, better)
    return mine | {value: replace(prior, learned=True) for value, prior in theirs.items()}


@torch.inference_mode()
def _prompt_dices(label_unet: LabelUNet, frames: Tensor | InputSlices, annotated: Annotated) -> dict[int, float]:
    """Compute the Dice of a label U-Net on the annotated slices of every label, from these slices alone."""
    held, scores = _held(label_unet, annotated), dict[int, float]()
    drawn = [mask for masks in held.values() for _, mask in masks]
    for value, masks in held.items():
        roi = label_unet_roi(drawn, frames.shape[-1])
        found = []
        for t, _ in masks:
            around = [min(max(t + offset, 0), len(frames) - 1) for offset in range(-REACH, REACH + 1)]
            found.append(_margins(label_unet, _cropped(label_unet, frames, roi, around), [value], REACH)[value][0])
        scores[value] = _prompt_dice(roi, masks, found)
    return scores


def _held(label_unet: LabelUNet, annotated: Annotated) -> dict[int, list[tuple[int, Tensor]]]:
    """Return the annotated slices that hold their label, of labels that the label U-Net knows."""
    held = {value: [(t, mask) for t, mask in masks if bool(mask.any())] for value, masks in annotated.items()}
    return {value: masks for value, masks in held.items() if masks and value in label_unet.values}


def _cropped(label_unet: LabelUNet, frames: Tensor | InputSlices, roi: RoiCrop, slices: Sequence[int]) -> Tensor:
    """Crop slices to the network's input (T, C, px, px)."""
    blocks = []
    for start in range(0, len(slices), _BATCH):
        part = slices[start : start + _BATCH]
        block = frames[part[0] : part[-1] + 1]
        blocks.append(roi.crop(block[[t - part[0] for t in part]][:, : label_unet.channels].float(), label_unet.input_size))
    return torch.cat(blocks)


def _prompt_dice(roi: RoiCrop, masks: Sequence[tuple[int, Tensor]], margins: Sequence[Tensor]) -> float:
    """Compute the mean Dice of annotated masks (S, S) and the margins (px, px) on their slices."""
    total = 0.0
    for (_, mask), margin in zip(masks, margins, strict=True):
        predicted = roi.paste(margin.float(), mask.shape[-1], -MAX_LOGIT) > 0
        total += dice(int((predicted & mask).sum()), int(predicted.sum()), int(mask.sum())) / len(masks)
    return total


def _margins(label_unet: LabelUNet, stack: Tensor, values: Sequence[int], only: int | None = None) -> dict[int, Tensor]:
    """Predict a stack (T, C, px, px): label -> (T, px, px) float16 on the CPU, log p - log(1 - p) within ±MAX_LOGIT, mean over SCALES.

    only: the one slice to predict; None: all.
    """
    found: dict[int, list[Tensor]] = {value: [] for value in values}
    wanted = range(len(stack)) if only is None else range(only, only + 1)
    for start in range(0, len(wanted), _BATCH):
        slices = torch.stack([with_adjacent_slices(stack, t) for t in wanted[start : start + _BATCH]])
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
