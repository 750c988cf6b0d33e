"""What the model can do so far, on procedural clips that it never learns from: the same ones at every check.

One mask on the first slice, all others tracked by the network's own policy. Dice is that of a track's tracked slices taken
together, so that a slice beyond the end counts against it; tracks of which nothing is left to track are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.masks import dice
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.pretraining.prompts import without_memory
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import draw_clips
from slmsam2_cli.training.clips import Clips


@dataclass(frozen=True)
class Check:
    """Means over tracks or slices.

    dice: of the model; copy: of the first mask on every slice; carried: of the model with no memory but the carried mask;
    told: of the model, had it been told on which slices the object is; object_score: share of slices on which it was right about
    whether the object is there; beyond, missed: share of empty slices with a mask, of slices of the object without one.
    """

    dice: float
    copy: float
    carried: float
    told: float
    object_score: float
    beyond: float
    missed: float


def held_out(recipe: Recipe, device: torch.device) -> Clips:
    """The clips of every check of a recipe."""
    checks = recipe.checks
    rng = torch.Generator(device).manual_seed(checks.seed)
    tracks = max(1, round(checks.windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes, rng, checks.windows, checks.length, tracks, recipe.input_size, device)


@torch.no_grad()
def check(model: SlmSam2, clips: Clips) -> Check:
    """Measure a model, which has to be in evaluation mode."""
    truth = clips.masks[1:, :, 0] > 0.5
    there = truth.flatten(2).any(dim=2)
    chosen, object_score = _tracked(model, clips)
    masks = chosen & object_score[..., None, None]
    carried, still = _tracked(model, clips, previous_mask_only=True)
    drawn = masks.flatten(2).any(dim=2)
    return Check(
        dice=_dice(masks, truth),
        told=_dice(chosen & there[..., None, None], truth),
        copy=_dice((clips.masks[:1, :, 0] > 0.5).expand_as(truth), truth),
        carried=_dice(carried & still[..., None, None], truth),
        object_score=_share(object_score == there),
        beyond=_share(drawn[~there]),
        missed=_share(~drawn[there]),
    )


def _tracked(model: SlmSam2, clips: Clips, previous_mask_only: bool = False) -> tuple[Tensor, Tensor]:
    """Of the slices after the first: masks (T - 1, M, H, W), as if the object were there, and object score (T - 1, M); both bool."""
    length = len(clips.masks)
    features = model.encode(clips.frames.flatten(0, 1))
    first = features.at(clips.feature_index(0))
    bank, outputs = MemoryBank({0: model.remember(first, model.condition_on_mask(first, clips.masks[0]), clips.masks[0])}), []
    for t in range(1, length):
        here, moment = features.at(clips.feature_index(t)), ReadContext(t, 1, bank.conditioning, bank.tracked, clips.slices)
        if previous_mask_only:
            output = model.decode(without_memory(model, here), here.fine, bank[t - 1].chosen)
        else:
            output = model.track(here, bank, moment)
        bank.write(t, model.remember(here, output))
        model.prune(bank, moment)
        outputs.append(output)
    size = clips.masks.shape[-2:]
    masks = [F.interpolate(o.chosen.float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0 for o in outputs]
    return torch.stack(masks), torch.stack([o.object_score[:, 0] > 0 for o in outputs])


def _dice(masks: Tensor, truth: Tensor) -> float:
    """Mean over the tracks with any truth. (T, M, H, W) bool."""
    shared = (masks & truth).sum(dim=(0, 2, 3))
    found, real = masks.sum(dim=(0, 2, 3)), truth.sum(dim=(0, 2, 3))
    held = real > 0
    return float(dice(shared[held], found[held], real[held]).mean()) if held.any() else 0.0


def _share(flags: Tensor) -> float:
    return float(flags.float().mean()) if flags.numel() else 0.0
