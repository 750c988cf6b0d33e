"""How a base model learns from nothing: draw procedural clips, give their first slice, track, descend; one screen.

Every draw of a step comes from the recipe's seed and the step's number, so a resumed run needs no stored generator, and
the next clips may be drawn before their turn.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.finetuning.clips import Clips
from slmsam2_cli.finetuning.learner import PATIENCE, SKIPPED, Learner, Progress, average_of, descend, learning_rate, share_done
from slmsam2_cli.finetuning.loop import followed
from slmsam2_cli.finetuning.losses import SliceLoss, slice_loss
from slmsam2_cli.model.faster import make_faster
from slmsam2_cli.model.framing import set_frame
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SlmSam2
from slmsam2_cli.pretraining.prompting import box_of, points_of, prompted
from slmsam2_cli.pretraining.reading import Reader
from slmsam2_cli.pretraining.recipe import Recipe
from slmsam2_cli.pretraining.volumes import draw_clips

_COMPILED = ("image_encoder", "memory_encoder", "sam_mask_decoder")


@dataclass(kw_only=True)
class Pretrainer(Learner):
    """A learner without generators of its own."""

    command: ClassVar[str] = "slmsam2 pretrain"
    settings: ClassVar[str] = "recipe or seed"


@dataclass(kw_only=True)
class Step(Progress):
    """What one step was: slices per clip, clips, seconds."""

    length: int
    clips: int
    seconds: float


@dataclass(frozen=True)
class Given:
    """How the first slice is given: as what, and by how many points."""

    kind: Literal["mask", "box", "points"]
    points: int
    jitter: float


def new_learner(recipe: Recipe, device: torch.device) -> Pretrainer:
    """A learner at step 0, with random weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    model = SlmSam2(recipe.network, recipe.frame_px).to(device)
    make_faster(model)
    average = average_of(model)
    if recipe.compile and device.type == "cuda":
        for name in _COMPILED:
            getattr(model, name).compile()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases, norms, gates
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return Pretrainer(model=model, average=average, optimiser=torch.optim.AdamW(groups, lr=recipe.learning_rate))


def seed_of(*numbers: int) -> int:
    """One seed of 64 bits from several numbers, unlike that of any other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def train(learner: Pretrainer, recipe: Recipe, stop: Callable[[], bool]) -> Iterator[Step]:
    """Train until the recipe's steps or minutes are used up or `stop` says so; yields after every step.

    A step without a finite loss and gradient changes nothing; after 20 such steps in a row TrainingError is raised.
    """
    skipped = 0
    learner.model.train()
    while (done := share_done(learner, recipe)) < 1 and not stop():
        started = time.monotonic()
        clips = drawn(recipe, learner.step, done, learner.model.device)
        rate = learning_rate(learner.step, done, recipe.learning_rate, recipe.warmup_steps)
        losses = _step(learner, clips, recipe, rate)
        skipped = skipped + 1 if SKIPPED in losses else 0
        if skipped >= PATIENCE:
            raise TrainingError(
                f"training diverged at step {learner.step}. Lower learning_rate in the recipe (now {recipe.learning_rate:g})"
            )
        learner.step += 1
        took = time.monotonic() - started
        learner.seconds += took
        length, windows = clips.frames.shape[:2]
        yield Step(learner.step, share_done(learner, recipe), losses, rate, length=length, clips=windows, seconds=took)


def drawn(recipe: Recipe, step: int, done: float, device: torch.device) -> Clips:
    """The clips of a step."""
    chance = random.Random(seed_of(recipe.seed, step, 0))
    length, frame_px = chance.choice(recipe.phase(done).lengths), _frame_px(recipe, chance)
    slices = recipe.slices_per_step * recipe.frame_px**2 // frame_px**2  # as many pixels, whatever the frame
    windows = max(1, min(recipe.most_windows, slices // length))
    rng = torch.Generator(device).manual_seed(seed_of(recipe.seed, step, 1))
    tracks = max(1, round(windows * recipe.tracks_per_window))
    return draw_clips(recipe.volumes, rng, windows, length, tracks, frame_px, device)


def _frame_px(recipe: Recipe, chance: random.Random) -> int:
    others = recipe.other_frames
    (frame_px,) = chance.choices([recipe.frame_px, *others], [1 - sum(others.values()), *others.values()])
    return frame_px


def _step(learner: Pretrainer, clips: Clips, recipe: Recipe, rate: float) -> dict[str, float]:
    device = learner.model.device
    chance = random.Random(seed_of(recipe.seed, learner.step, 2))
    rng = torch.Generator(device).manual_seed(seed_of(recipe.seed, learner.step, 3))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = clip_losses(learner.model, clips, recipe, chance, rng)
    return descend(learner, losses, rate, recipe.average)


def clip_losses(model: SlmSam2, clips: Clips, recipe: Recipe, chance: random.Random, rng: torch.Generator) -> list[SliceLoss]:
    """Give the first slice, track the others; one loss per slice that the model had to draw."""
    length = len(clips.masks)
    set_frame(model, clips.frames.shape[-1])
    features = model.encode(clips.frames.flatten(0, 1))
    memory, losses = _first(model, features.at(clips.feature_index(0)), clips, _given(recipe, length, chance), rng)
    bank = MemoryBank({0: memory})
    until = length
    if length >= 4 and chance.random() < recipe.reading.two_anchors:
        until = length - 1
        bank.anchors[until] = _annotated(model, features.at(clips.feature_index(until)), clips, until)
    reader = Reader(model, recipe, clips.slices, chance)
    return losses + followed(model, clips, features, bank, reader.track, until)


def _given(recipe: Recipe, length: int, chance: random.Random) -> Given:
    prompts, draw = recipe.prompts, chance.random()
    if length == 1:  # a mask would be the answer
        draw *= prompts.box + prompts.points
    kind: Literal["mask", "box", "points"] = "box" if draw < prompts.box else "points" if draw < prompts.box + prompts.points else "mask"
    return Given(kind, chance.randint(1, prompts.most_points), prompts.jitter)


def _first(model: SlmSam2, here: SliceFeatures, clips: Clips, given: Given, rng: torch.Generator) -> tuple[Memory, list[SliceLoss]]:
    """What is remembered of the first slice, and what the model got wrong where it had to draw the mask itself."""
    if given.kind == "mask":
        return _annotated(model, here, clips, 0), []
    truth = clips.masks[0]
    points, labels = box_of(truth, rng, given.jitter) if given.kind == "box" else points_of(truth, given.points, rng)
    output = prompted(model, here, points, labels)
    return model.remember(here, output), [slice_loss(output, truth)]


def _annotated(model: SlmSam2, here: SliceFeatures, clips: Clips, t: int) -> Memory:
    """A slice whose masks were given; an empty one says that the object has ended."""
    return model.remember(here, model.anchor(here, clips.masks[t]), clips.masks[t])
