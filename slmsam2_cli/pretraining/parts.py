"""What a part of a step is wrong by, and its gradient. A step is the mean of its parts, in whichever process each is computed.

Every part draws its own clips, length, prompt and policy, all from the recipe's seed, the step and the part's number: so a
resumed run needs no stored generator.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.device import half_precision
from slmsam2_cli.finetuning.clips import Clips
from slmsam2_cli.finetuning.learner import means, total_of
from slmsam2_cli.finetuning.loop import followed
from slmsam2_cli.finetuning.losses import SliceLoss, Weights, slice_loss
from slmsam2_cli.model.framing import set_frame
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.pretraining.prompting import box_of, boxed, improved, nearly, pointed, points_of
from slmsam2_cli.pretraining.reading import Reader
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import draw_clips

_CLIPS, _VOLUMES, _CHANCE, _PROMPTS = range(4)  # what is drawn from a seed of its own


@dataclass(frozen=True)
class Part:
    """What a part was: slices per clip, clips, and the means of its losses, none of which is there when they were not finite."""

    length: int
    clips: int
    losses: dict[str, float]


Kind = Literal["mask", "nearly", "box", "points"]


def seed_of(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, unlike that of any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def compute(model: SlmSam2, recipe: Recipe, step: int, part: int, done: float) -> Part:
    """Add a part's share of the step's gradient to that of the parameters. done: share of the run at this step."""
    clips = drawn(recipe, step, part, done, model.device)
    chance = random.Random(seed_of(recipe.seed, step, part, _CHANCE))
    rng = torch.Generator(model.device).manual_seed(seed_of(recipe.seed, step, part, _PROMPTS))
    with half_precision(model.device):
        given = given_as(recipe, len(clips.masks), done, chance)
        losses = clip_losses(model, clips, recipe, given, chance, rng)
    total = total_of(losses)
    length, windows = clips.frames.shape[:2]
    if not torch.isfinite(total):
        return Part(length, windows, {})
    (total / recipe.parts).backward()  # type: ignore[no-untyped-call]
    return Part(length, windows, means(losses))


def drawn(recipe: Recipe, step: int, part: int, done: float, device: torch.device) -> Clips:
    """The clips of a part."""
    chance = random.Random(seed_of(recipe.seed, step, part, _CLIPS))
    length, frame_px = chance.choice(recipe.phase(done).lengths), _frame_px(recipe, chance)
    slices = recipe.slices_per_step * recipe.frame_px**2 // (frame_px**2 * recipe.parts)  # as many pixels, whatever the frame
    windows = max(1, min(recipe.most_windows // recipe.parts, slices // length))
    rng = torch.Generator(device).manual_seed(seed_of(recipe.seed, step, part, _VOLUMES))
    tracks = max(1, round(windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes_at(done), rng, windows, length, tracks, frame_px, device)


def _frame_px(recipe: Recipe, chance: random.Random) -> int:
    others = recipe.other_frames
    (frame_px,) = chance.choices([recipe.frame_px, *others], [1 - sum(others.values()), *others.values()])
    return frame_px


def clip_losses(
    model: SlmSam2, clips: Clips, recipe: Recipe, given: Kind, chance: random.Random, rng: torch.Generator
) -> Sequence[SliceLoss]:
    """Give the first slice, track the others; one loss per slice that the model had to draw."""
    length = len(clips.masks)
    set_frame(model, clips.frames.shape[-1])
    features = model.encode(clips.frames.flatten(0, 1))
    first, weights, losses = features.at(clips.feature_index(0)), Weights(balanced=True, **recipe.losses.model_dump()), []
    if given == "mask":
        bank = MemoryBank({0: _annotated(model, first, clips, 0)})
    else:
        output = _prompted(model, first, clips.masks[0], given, recipe, chance, rng)
        if length == 1:  # always there, of which nothing is to be learned but that it always is
            return [slice_loss(output, clips.masks[0], weights=replace(weights, presence=0.0))]
        losses.append(slice_loss(output, clips.masks[0], weights=weights))
        bank = MemoryBank({0: model.remember(first, output)})
    until = length
    if length >= 4 and chance.random() < recipe.reading.two_anchors:
        until = length - 1
        bank.anchors[until] = _annotated(model, features.at(clips.feature_index(until)), clips, until)
    reader = Reader(model, recipe, clips.slices, chance)
    return losses + followed(model, clips, features, bank, reader.track, until, weights)


def given_as(recipe: Recipe, length: int, done: float, chance: random.Random) -> Kind:
    """What the first of `length` slices is given as. done: share of the run."""
    prompts, draw = recipe.prompts, chance.random()
    if length > 1 and recipe.phase(done).masks_only:
        return "mask"
    if draw < prompts.box + prompts.points:
        return "box" if draw < prompts.box else "points"
    return "mask" if length > 1 else "nearly"  # of a single image, the mask would be the answer


def _prompted(
    model: SlmSam2, here: SliceFeatures, truth: Tensor, given: Kind, recipe: Recipe, chance: random.Random, rng: torch.Generator
) -> SliceOutput:
    """What the model makes of a prompt drawn from the masks (M, 1, H, W)."""
    prompts = recipe.prompts
    if given == "nearly":
        return improved(model, here, nearly(truth, rng, prompts.shift, prompts.scale))
    if given == "box":
        return boxed(model, here, box_of(truth, rng, prompts.jitter))
    return pointed(model, here, *points_of(truth, chance.randint(1, prompts.most_points), rng))


def _annotated(model: SlmSam2, here: SliceFeatures, clips: Clips, t: int) -> Memory:
    """A slice whose masks were given; an empty one says that the object has ended."""
    return model.remember(here, model.anchor(here, clips.masks[t]), clips.masks[t])
