"""What a part of a step is wrong by, and its gradient. A step is the mean of its parts, in whichever process each is computed.

Every part draws its own clips, length, prompt and policy, all from the recipe's seed, the step and the part's number: so a
resumed run needs no stored generator.

The network of a recipe with its first, random weights; and its weights as they are written.

How a training step reads memory: by one of the policies, with parts of it missing.

The self-sorting bank chooses for each object by what it has learned, which makes a batch slow. What its reading asks of the
weights are its codes (every slice in the row of anchors, every pointer a neighbour's) and slices in any order from
anywhere; so in training it is a random choice of the bank, the same for all objects of a step.
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
from slmsam2_cli.model.memory.policy import MemoryPolicy, MemoryRead, ReadContext
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE
from slmsam2_cli.model.memory.shortlong import short_read
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2, set_input_size
from slmsam2_cli.planning.plan import POLICIES
from slmsam2_cli.pretraining.prompts import box_of, nearly, points_of, refine_masks, segment_from_boxes, segment_from_points, without_memory
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import draw_clips
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.learner import means, total_loss
from slmsam2_cli.training.losses import SliceLoss, Weights, slice_loss
from slmsam2_cli.training.trainer import followed

OBJECT_SCORE_BIAS = "sam_mask_decoder.pred_obj_score_head.layers.2.bias"


def build(recipe: Recipe, device: torch.device) -> SlmSam2:
    """Weights are drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = SlmSam2(recipe.network, recipe.input_size)
    model.to(device)
    optimise_for_cpu(model)
    return model


def kept(model: SlmSam2, shift: float) -> dict[str, Tensor]:
    """Name -> weights on the CPU, in half precision, as they are written; `shift` is added to every object score."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state[OBJECT_SCORE_BIAS] = state[OBJECT_SCORE_BIAS] + shift
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class RandomBank:
    """A self-sorting bank that holds what it is told. row: of the temporal table; nearest: slices read; short: for a short stack."""

    row: int
    nearest: int
    short: bool
    name: str = "anywhere"
    needs_scores: bool = False
    shared_memory: bool = False

    def read(self, moment: ReadContext) -> tuple[MemoryRead, ...]:
        """Anchors, and the last of what was tracked in the order told."""
        read = [*moment.conditioning, *list(moment.tracked)[-self.nearest :]]
        long = MemoryRead(tuple((s, self.row) for s in read), tuple((s, POINTER_DISTANCE) for s in read))
        return (long, short_read(moment, 1)) if self.short else (long,)

    def keep(self, moment: ReadContext) -> Collection[int]:
        """Everything."""
        return moment.tracked


class Reader:
    """Tracks one clip after another slice by slice, reading by a policy drawn once."""

    def __init__(self, model: SlmSam2, recipe: Recipe, slices: int, chance: random.Random) -> None:
        self.model, self.reading, self.slices, self.chance = model, recipe.reading, slices, chance
        names, weights = list(recipe.reading.policies), list(recipe.reading.policies.values())
        (self.name,) = chance.choices(names, weights)
        self.policy = self._policy(recipe)

    def _policy(self, recipe: Recipe) -> MemoryPolicy:
        if not POLICIES[self.name].has_bank:
            named = recipe.network.model_copy(update={"policy": self.name})
            return build_policy(named, self.model.num_maskmem, self.model.max_obj_ptrs_in_encoder)
        return RandomBank(self.model.num_maskmem - 1, recipe.network.bank_read, POLICIES[self.name].has_short_stream)

    def track(self, here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        """Segment all objects on slice `t` from what of the memory can be read."""
        previous_mask_only = self.chance.random() < self.reading.drop_all
        carries = previous_mask_only or self.chance.random() >= self.reading.drop_carried
        passed = bank[t - 1] if carries and self.model.carry_gain is not None else None
        if previous_mask_only and passed is not None:
            return self.model.decode(without_memory(self.model, here), here.fine, passed.chosen)
        moment = ReadContext(t, 1, bank.conditioning, self._readable(list(bank.tracked), t), self.slices)
        return self.model.decode_after(self.model.condition(here, bank, moment, self.policy), here, bank, passed)

    def _readable(self, tracked: Sequence[int], t: int) -> list[int]:
        """The tracked slices without those that are missing; a short stack always has the one just passed."""
        needed = POLICIES[self.name].has_short_stream
        kept = [s for s in tracked if (needed and s == t - 1) or self.chance.random() >= self.reading.drop_tracked]
        return self.chance.sample(kept, len(kept)) if isinstance(self.policy, RandomBank) else kept


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
        given = choose_prompt_kind(recipe, len(clips.masks), done, chance)
        losses = clip_losses(model, clips, recipe, given, chance, rng)
    total = total_loss(losses)
    length, windows = clips.frames.shape[:2]
    if not torch.isfinite(total):
        return Part(length, windows, {})
    (total / recipe.parts).backward()  # type: ignore[no-untyped-call]
    return Part(length, windows, means(losses))


def drawn(recipe: Recipe, step: int, part: int, done: float, device: torch.device) -> Clips:
    """The clips of a part."""
    chance = random.Random(seed_of(recipe.seed, step, part, _CLIPS))
    length, input_size = chance.choice(recipe.phase(done).lengths), _draw_input_size(recipe, chance)
    slices = recipe.slices_per_step * recipe.input_size**2 // (input_size**2 * recipe.parts)  # as many pixels, whatever the frame
    windows = max(1, min(recipe.most_windows // recipe.parts, slices // length))
    rng = torch.Generator(device).manual_seed(seed_of(recipe.seed, step, part, _VOLUMES))
    tracks = max(1, round(windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes_at(done), rng, windows, length, tracks, input_size, device)


def _draw_input_size(recipe: Recipe, chance: random.Random) -> int:
    others = recipe.other_input_sizes
    (input_size,) = chance.choices([recipe.input_size, *others], [1 - sum(others.values()), *others.values()])
    return input_size


def clip_losses(
    model: SlmSam2, clips: Clips, recipe: Recipe, given: Kind, chance: random.Random, rng: torch.Generator
) -> Sequence[SliceLoss]:
    """Give the first slice, track the others; one loss per slice that the model had to draw."""
    length = len(clips.masks)
    set_input_size(model, clips.frames.shape[-1])
    features = model.encode(clips.frames.flatten(0, 1))
    first, weights, losses = features.at(clips.feature_index(0)), Weights(balanced=True, **recipe.losses.model_dump()), []
    if given == "mask":
        bank = MemoryBank({0: _annotated(model, first, clips, 0)})
    else:
        output = _prompted(model, first, clips.masks[0], given, recipe, chance, rng)
        if length == 1:  # always there, of which nothing is to be learned but that it always is
            return [slice_loss(output, clips.masks[0], weights=replace(weights, object_score=0.0))]
        losses.append(slice_loss(output, clips.masks[0], weights=weights))
        bank = MemoryBank({0: model.remember(first, output)})
    until = length
    if length >= 4 and chance.random() < recipe.reading.two_conditioning_slices:
        until = length - 1
        bank.conditioning[until] = _annotated(model, features.at(clips.feature_index(until)), clips, until)
    reader = Reader(model, recipe, clips.slices, chance)
    return losses + followed(model, clips, features, bank, reader.track, until, weights)


def choose_prompt_kind(recipe: Recipe, length: int, done: float, chance: random.Random) -> Kind:
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
        return refine_masks(model, here, nearly(truth, rng, prompts.shift, prompts.scale))
    if given == "box":
        return segment_from_boxes(model, here, box_of(truth, rng, prompts.jitter))
    return segment_from_points(model, here, *points_of(truth, chance.randint(1, prompts.most_points), rng))


def _annotated(model: SlmSam2, here: SliceFeatures, clips: Clips, t: int) -> Memory:
    """A slice whose masks were given; an empty one says that the object has ended."""
    return model.remember(here, model.condition_on_mask(here, clips.masks[t]), clips.masks[t])
