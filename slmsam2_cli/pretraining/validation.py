"""Score the model during pretraining on generated clips that are not used for training, the same ones at every validation.

The first slice has its true mask as prompt, all others are tracked by the network's own memory policy. Dice is computed over all
tracked slices of a track together, so a mask beyond the end of the structure lowers it; tracks without any structure after the first
slice are excluded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.pretraining.prompts import without_memory
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import ClipShape, draw_clips
from slmsam2_cli.training.clips import Clips


@dataclass(frozen=True)
class ValidationScores:
    """Means over tracks or slices; the columns of checks.csv.

    dice: of the model; dice_copied: of the first mask copied to every slice; dice_mask_only: of the model with the previous mask but
    no memory; dice_known_extent: of the model if the slices with the object were known; object_score_accuracy: share of slices with a
    correct object score; false_positive_rate, missed_rate: share of empty slices with a mask, of the object's slices without one.
    """

    dice: float
    dice_copied: float
    dice_mask_only: float
    dice_known_extent: float
    object_score_accuracy: float
    false_positive_rate: float
    missed_rate: float


def validation_clips(recipe: Recipe, device: torch.device) -> Clips:
    """Draw the validation clips of a recipe, the same ones in every call."""
    settings = recipe.validation
    rng = torch.Generator(device).manual_seed(settings.seed)
    tracks = max(1, round(settings.windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes, rng, ClipShape(settings.windows, settings.length, tracks, recipe.input_size), device)


@torch.no_grad()
def score_clips(model: SlmSam2, clips: Clips) -> ValidationScores:
    """Score a model, which must be in evaluation mode, on clips."""
    truth = clips.masks[1:, :, 0] > 0.5
    present = truth.flatten(2).any(dim=2)
    masks, object_score = _track(model, clips)
    gated = masks & object_score[..., None, None]
    mask_only, mask_only_score = _track(model, clips, previous_mask_only=True)
    predicted = gated.flatten(2).any(dim=2)
    return ValidationScores(
        dice=_mean_dice(gated, truth),
        dice_copied=_mean_dice((clips.masks[:1, :, 0] > 0.5).expand_as(truth), truth),
        dice_mask_only=_mean_dice(mask_only & mask_only_score[..., None, None], truth),
        dice_known_extent=_mean_dice(masks & present[..., None, None], truth),
        object_score_accuracy=_fraction(object_score == present),
        false_positive_rate=_fraction(predicted[~present]),
        missed_rate=_fraction(~predicted[present]),
    )


def _track(model: SlmSam2, clips: Clips, previous_mask_only: bool = False) -> tuple[Tensor, Tensor]:
    """Track the slices after the first. Return ungated masks (T - 1, M, H, W) and whether the object score is positive (T - 1, M)."""
    length = len(clips.masks)
    features = model.encode(clips.frames.flatten(0, 1))
    first = features.at(clips.feature_index(0))
    bank, outputs = MemoryBank({0: model.remember(first, model.condition_on_mask(first, clips.masks[0]), clips.masks[0])}), []
    for t in range(1, length):
        here, context = features.at(clips.feature_index(t)), ReadContext(t, 1, bank.conditioning, bank.tracked, clips.slices)
        if previous_mask_only:
            output = model.decode(without_memory(model, here), here.fine, bank[t - 1].chosen)
        else:
            output = model.track(here, bank, context)
        bank.write(t, model.remember(here, output))
        model.prune(bank, context)
        outputs.append(output)
    size = clips.masks.shape[-2:]
    masks = [F.interpolate(o.chosen.float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0 for o in outputs]
    return torch.stack(masks), torch.stack([o.object_score[:, 0] > 0 for o in outputs])


def _mean_dice(masks: Tensor, truth: Tensor) -> float:
    """Compute the mean Dice over the tracks with any ground truth. (T, M, H, W) bool."""
    shared = (masks & truth).sum(dim=(0, 2, 3))
    predicted, true = masks.sum(dim=(0, 2, 3)), truth.sum(dim=(0, 2, 3))
    held = true > 0
    return float(dice(shared[held], predicted[held], true[held]).mean()) if held.any() else 0.0


def _fraction(flags: Tensor) -> float:
    return float(flags.float().mean()) if flags.numel() else 0.0
