"""Compute the parts of a training step: draw clips, segment the prompted slice, track the others, add up the gradient.

A step is the mean of its parts, in whichever process each of them is computed. Every part draws its own clips, clip length, prompt and
memory policy from the recipe's seed, the step and the part's number, so a resumed run needs no stored generator.

Memory is read by one of the policies, with some of it missing. The self-sorting bank selects slices for each object by learned
features, which is slow in a batch. What it requires of the weights are its temporal codes (every slice in the row of conditioning
slices, every pointer at the distance of an adjacent slice) and slices in any order. So in training a random choice stands in for it,
the same for all objects of a step.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from slmsam2_cli.device import half_precision
from slmsam2_cli.model.cpu_ops import optimise_for_cpu
from slmsam2_cli.model.memory.interface import MemoryPolicy, MemoryRead, ReadContext
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE
from slmsam2_cli.model.memory.shortlong import short_read
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2, set_input_size
from slmsam2_cli.planning.plan import POLICY_STREAMS
from slmsam2_cli.pretraining.prompts import (
    boxes_around,
    perturb_masks,
    refine_masks,
    sample_points,
    segment_from_boxes,
    segment_from_points,
    without_memory,
)
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import ClipShape, draw_clips
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.learner import means, total_loss
from slmsam2_cli.training.losses import LossWeights, SliceLoss, slice_loss
from slmsam2_cli.training.trainer import ClipState, track_losses

OBJECT_SCORE_BIAS = "sam_mask_decoder.pred_obj_score_head.layers.2.bias"
_CLIPS, _VOLUMES, _CHOICES, _PROMPTS = range(4)  # purposes, each with a seed of its own
PromptKind = Literal["mask", "perturbed", "box", "points"]


def build_model(recipe: Recipe, device: torch.device) -> SlmSam2:
    """Build the network of a recipe with random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = SlmSam2(recipe.network, recipe.input_size)
    model.to(device)
    optimise_for_cpu(model)
    return model


def export_state(model: SlmSam2, shift: float) -> dict[str, Tensor]:
    """Return the weights as they are saved: on the CPU, in half precision, with `shift` added to every object score."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state[OBJECT_SCORE_BIAS] = state[OBJECT_SCORE_BIAS] + shift
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class PartResult:
    """Slices per clip, number of clips, and the mean losses of a part; `losses` is empty when they were not finite."""

    length: int
    clips: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Generators:
    """Random generators of a part: `choices` for choices made in Python, `prompts` for tensors, on the model's device."""

    choices: random.Random
    prompts: torch.Generator


def derive_seed(*numbers: int) -> int:
    """Derive one seed of 64 bits from several numbers; other numbers give other seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def compute_part(model: SlmSam2, recipe: Recipe, step: int, part: int, done: float) -> PartResult:
    """Add a part's share of the step's gradient to the gradients of the parameters. done: share of the run."""
    clips = draw_part_clips(recipe, step, part, done, model.device)
    choices = random.Random(derive_seed(recipe.seed, step, part, _CHOICES))
    generators = Generators(choices, torch.Generator(model.device).manual_seed(derive_seed(recipe.seed, step, part, _PROMPTS)))
    with half_precision(model.device):
        prompt = choose_prompt_kind(recipe, len(clips.masks), done, choices)
        losses = clip_losses(model, clips, recipe, prompt, generators)
    total = total_loss(losses)
    length, windows = clips.frames.shape[:2]
    if not torch.isfinite(total):
        return PartResult(length, windows, {})
    (total / recipe.parts).backward()  # type: ignore[no-untyped-call]
    return PartResult(length, windows, means(losses))


def draw_part_clips(recipe: Recipe, step: int, part: int, done: float, device: torch.device) -> Clips:
    """Draw the clips of a part. Larger slices are fewer, so that every part has about the same number of pixels."""
    choices = random.Random(derive_seed(recipe.seed, step, part, _CLIPS))
    length, others = choices.choice(recipe.phase(done).lengths), recipe.other_input_sizes
    (input_size,) = choices.choices([recipe.input_size, *others], [1 - sum(others.values()), *others.values()])
    slices = recipe.slices_per_step * recipe.input_size**2 // (input_size**2 * recipe.parts)
    windows = max(1, min(recipe.max_windows // recipe.parts, slices // length))
    rng = torch.Generator(device).manual_seed(derive_seed(recipe.seed, step, part, _VOLUMES))
    tracks = max(1, round(windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes_at(done), rng, ClipShape(windows, length, tracks, input_size), device)


def choose_prompt_kind(recipe: Recipe, length: int, done: float, choices: random.Random) -> PromptKind:
    """Choose the kind of prompt for the first of `length` slices. done: share of the run."""
    prompts, number = recipe.prompts, choices.random()
    if length > 1 and recipe.phase(done).masks_only:
        return "mask"
    if number < prompts.box + prompts.points:
        return "box" if number < prompts.box else "points"
    return "mask" if length > 1 else "perturbed"  # the true mask of a single image would be its answer


def clip_losses(model: SlmSam2, clips: Clips, recipe: Recipe, prompt: PromptKind, generators: Generators) -> Sequence[SliceLoss]:
    """Prompt the first slice and track the others. Return one loss per slice that the model has segmented."""
    length, choices = len(clips.masks), generators.choices
    set_input_size(model, clips.frames.shape[-1])
    features = model.encode(clips.frames.flatten(0, 1))
    first, weights, losses = features.at(clips.feature_index(0)), LossWeights(balanced=True, **recipe.losses.model_dump()), []
    if prompt == "mask":
        bank = MemoryBank({0: _remember_mask(model, first, clips, 0)})
    else:
        output = _segment_from_prompt(model, first, clips.masks[0], recipe, prompt, generators)
        if length == 1:  # the object is always present here, so its score is not trained
            return [slice_loss(output, clips.masks[0], weights=replace(weights, object_score=0.0))]
        losses.append(slice_loss(output, clips.masks[0], weights=weights))
        bank = MemoryBank({0: model.remember(first, output)})
    until = length
    if length >= 4 and choices.random() < recipe.memory.two_conditioning_slices:
        until = length - 1
        bank.conditioning[until] = _remember_mask(model, features.at(clips.feature_index(until)), clips, until)
    reader = MemoryReader(model, recipe, clips.slices, choices)
    return losses + track_losses(model, ClipState(clips, features, bank, reader.track, until), weights)


def _segment_from_prompt(
    model: SlmSam2, here: SliceFeatures, masks: Tensor, recipe: Recipe, prompt: PromptKind, generators: Generators
) -> SliceOutput:
    """Segment a slice from a prompt simulated from its masks (M, 1, H, W)."""
    settings, rng = recipe.prompts, generators.prompts
    if prompt == "perturbed":
        return refine_masks(model, here, perturb_masks(masks, rng, settings.mask_shift, settings.mask_scale))
    if prompt == "box":
        return segment_from_boxes(model, here, boxes_around(masks, rng, settings.box_jitter))
    return segment_from_points(model, here, *sample_points(masks, generators.choices.randint(1, settings.max_points), rng))


def _remember_mask(model: SlmSam2, here: SliceFeatures, clips: Clips, t: int) -> Memory:
    """Encode slice t with its true masks for memory; an empty mask means that the object has ended."""
    return model.remember(here, model.condition_on_mask(here, clips.masks[t]), clips.masks[t])


@dataclass(frozen=True)
class RandomBank:
    """A policy that stands in for the self-sorting bank: it reads the slices that it is given, in the given order.

    temporal_row: of the table of temporal codes; nearest: number of slices read; short: whether there is a short stream.
    """

    temporal_row: int
    nearest: int
    short: bool
    name: str = "random bank"
    needs_scores: bool = False
    shared_memory: bool = False

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Read the conditioning slices and the last `nearest` tracked slices."""
        slices = [*context.conditioning, *list(context.tracked)[-self.nearest :]]
        long = MemoryRead(tuple((s, self.temporal_row) for s in slices), tuple((s, POINTER_DISTANCE) for s in slices))
        return (long, short_read(context, 1)) if self.short else (long,)

    def keep(self, context: ReadContext) -> Collection[int]:
        """Keep all slices."""
        return context.tracked


class MemoryReader:
    """Tracks objects slice by slice with a memory policy that is drawn once, and drops parts of memory at random."""

    def __init__(self, model: SlmSam2, recipe: Recipe, slices: int, choices: random.Random) -> None:
        self.model, self.settings, self.slices, self.choices = model, recipe.memory, slices, choices
        policies = recipe.memory.policies
        (name,) = choices.choices(list(policies), list(policies.values()))
        self.short = POLICY_STREAMS[name].has_short_stream
        self.policy: MemoryPolicy
        if POLICY_STREAMS[name].has_bank:
            self.policy = RandomBank(model.num_maskmem - 1, recipe.network.bank_read, self.short)
        else:
            network = recipe.network.model_copy(update={"policy": name})
            self.policy = build_policy(network, model.num_maskmem, model.max_obj_ptrs_in_encoder)

    def track(self, here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        """Segment all objects on slice `t` from the part of memory that is not dropped."""
        previous_mask_only = self.choices.random() < self.settings.previous_mask_only
        carries = previous_mask_only or self.choices.random() >= self.settings.drop_previous_mask
        previous = bank[t - 1] if carries and self.model.carry_gain is not None else None
        if previous_mask_only and previous is not None:
            return self.model.decode(without_memory(self.model, here), here.fine, previous.chosen)
        context = ReadContext(t, 1, bank.conditioning, self.readable(list(bank.tracked), t), self.slices)
        return self.model.decode_after(self.model.condition(here, bank, context, self.policy), here, bank, previous)

    def readable(self, tracked: Sequence[int], t: int) -> list[int]:
        """Return the tracked slices without the dropped ones; a short stream always keeps the previous slice. Shuffled for a bank."""
        kept = [s for s in tracked if (self.short and s == t - 1) or self.choices.random() >= self.settings.drop_tracked]
        return self.choices.sample(kept, len(kept)) if isinstance(self.policy, RandomBank) else kept
