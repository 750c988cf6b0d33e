"""The recipe of a base model: one JSON file that, with this version of the code, makes the same weights again.

Unknown keys, impossible values and files written by a newer format are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from slmsam2_cli.errors import PlanError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.strict_json import explain
from slmsam2_cli.planning.plan import POLICIES, FrozenModel, NetworkPlan, PolicyName, digest_of
from slmsam2_cli.pretraining.volumes import VolumesRecipe

_ASSETS = Path(__file__).parents[1] / "assets"
NANO = _ASSETS / "nano.json"
SMOKE = _ASSETS / "nano-smoke.json"
_BUDGET = {"steps", "minutes"}
Frame = Annotated[int, Field(ge=32, le=1024, multiple_of=32)]


class Phase(FrozenModel):
    """A part of the run."""

    until: float = Field(description="share of the run at which it ends", gt=0, le=1)
    lengths: tuple[int, ...] = Field(description="slices per clip, all equally likely; 1: single images", min_length=1)
    masks_only: bool = Field(default=False, description="whether the first of several slices is always given as a mask")
    ends: float | None = Field(
        default=None,
        description="share of structures with an end within the clip, then not preferred; null: as in volumes",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _possible(self) -> Phase:
        if not all(1 <= length <= 64 for length in self.lengths):
            raise ValueError("lengths: a clip has 1 to 64 slices")
        return self


class Prompts(FrozenModel):
    """How often the first slice is given as what; its mask takes the rest, or, of single images, another mask nearly like it."""

    box: float = Field(default=0.15, description="share of parts with a box", ge=0, le=1)
    points: float = Field(default=0.1, description="share of parts with points", ge=0, le=1)
    shift: float = Field(default=0.25, description="shift of a mask nearly like the true one, at most this share of its size", ge=0, le=1)
    scale: float = Field(default=1.4, description="its scale, at most this many times larger or smaller", ge=1, le=4)
    most_points: int = Field(default=3, description="1 to so many points, the first of them inside", ge=1, le=16)
    jitter: float = Field(default=0.1, description="shift of a box's corners, at most this share of its edges", ge=0, le=0.5)

    @model_validator(mode="after")
    def _shares(self) -> Prompts:
        if self.box + self.points > 1:
            raise ValueError(f"box and points are {self.box + self.points:g} of all steps together")
        return self


class Reading(FrozenModel):
    """How memory is read and what of it is missing, so that no policy and no single memory is relied upon."""

    policies: dict[PolicyName, float] = Field(description="memory policy -> how often a step reads by it, relative to the others")
    drop_tracked: float = Field(default=0.15, description="share of tracked memories that cannot be read", ge=0, le=1)
    drop_carried: float = Field(default=0.15, description="share of slices to which no mask is carried", ge=0, le=1)
    drop_all: float = Field(default=0.05, description="share of slices that have the carried mask alone", ge=0, le=1)
    two_conditioning_slices: float = Field(
        default=0.15, description="share of clips of at least 4 slices whose last one is annotated too", ge=0, le=1
    )

    @model_validator(mode="after")
    def _some(self) -> Reading:
        if not self.policies or min(self.policies.values()) < 0 or sum(self.policies.values()) <= 0:
            raise ValueError("policies: at least one has to be read by, none less often than never")
        return self


class Checks(FrozenModel):
    """What is measured during the run, on clips it never learns from."""

    every_minutes: float = Field(default=5.0, description="minutes of training between two checks", gt=0)
    windows: int = Field(default=12, description="windows of slices", ge=1, le=1024)
    length: int = Field(default=16, description="slices per window", ge=2, le=256)
    seed: int = Field(default=1_000_003, description="seed of their volumes", ge=0, lt=2**32)


class Losses(FrozenModel):
    """What each term of the loss counts."""

    pixels: float = Field(default=0.3, description="of the cross-entropy in which inside and outside count alike", ge=0)
    absent: float = Field(default=10.0, description="how many times that where the object is not", ge=0)
    dice: float = Field(default=1.0, description="of soft Dice, where the object is", ge=0)
    iou: float = Field(default=1.0, description="of the error of the predicted IoU, where the object is", ge=0)
    object_score: float = Field(default=1.0, description="of the cross-entropy of object score", ge=0)


class Recipe(FrozenModel):
    """Everything that decides how a base model comes out."""

    format_version: Literal[1] = Field(default=1, description="major version of this file's format")
    network: NetworkPlan = Field(default_factory=NetworkPlan, description="which network; its policy decides which stacks it has")
    input_size: Frame = Field(default=128, description="edge of the slices in pixels, a multiple of 32")
    other_input_sizes: dict[Frame, float] = Field(
        default_factory=dict, description="other edges in pixels -> share of the steps with slices of that size, which are fewer"
    )
    steps: int = Field(description="optimiser steps, at most", ge=1, le=10_000_000)
    minutes: float | None = Field(default=None, description="minutes of training, at most; null: no limit", gt=0)
    seed: int = Field(default=0, description="seed of the weights and of every draw", ge=0, lt=2**32)
    slices_per_step: int = Field(default=64, description="slices in one step: long clips are few, short ones many", ge=1, le=8192)
    parts: int = Field(default=2, description="parts of a step, each with a length, prompt and policy of its own", ge=1, le=64)
    most_windows: int = Field(default=24, description="windows in one step, at most", ge=1, le=1024)
    tracks_per_window: float = Field(default=2.0, description="objects tracked per window", gt=0, le=16)
    learning_rate: float = Field(default=1e-3, description="peak learning rate of AdamW", gt=0, le=1)
    warmup_steps: int = Field(default=200, description="steps over which it rises to its peak", ge=0)
    weight_decay: float = Field(default=0.05, description="decoupled weight decay of AdamW", ge=0, le=1)
    average: float = Field(default=0.999, description="how much of the moving average a step keeps, at most", ge=0, lt=1)
    object_score_shift: float = Field(
        default=0.0, description="added to the object score of the weights that are kept: below 0, doubt counts as absent", ge=-10, le=10
    )
    compile: bool = Field(default=False, description="compile the larger modules on a GPU")
    phases: tuple[Phase, ...] = Field(description="single images, short clips, long clips", min_length=1)
    prompts: Prompts = Field(default_factory=Prompts)
    reading: Reading
    losses: Losses = Field(default=Losses())
    checks: Checks = Field(default_factory=Checks)
    volumes: VolumesRecipe = Field(default=VolumesRecipe(), description="the procedural volumes")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"phases: until has to rise to 1, found {', '.join(f'{end:g}' for end in ends)}")
        if min(self.other_input_sizes.values(), default=0) < 0 or sum(self.other_input_sizes.values()) > 1:
            raise ValueError("other_input_sizes: shares of all steps, together at most 1")
        short = [name for name in self.reading.policies if POLICIES[name].has_short_stream]
        if short and not self.network.has_short_stream:
            raise ValueError(f"reading.policies: {short[0]} needs a short stack, which network.policy {self.network.policy} has not")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what may not change between two parts of a run; only its length may."""
        whole = self.model_dump(mode="json", exclude=_BUDGET)
        if not self.object_score_shift:  # what came later leaves the digests of earlier recipes as they were
            del whole["object_score_shift"]
        if not self.volumes.anatomy.through:
            for name in ("through", "thicker", "further"):
                del whole["volumes"]["anatomy"][name]
        return digest_of(whole)

    def volumes_at(self, done: float) -> VolumesRecipe:
        """What volumes are drawn from at this share of the run."""
        ends = self.phase(done).ends
        if ends is None:
            return self.volumes
        anatomy = self.volumes.anatomy.model_copy(update={"ends": ends})
        return self.volumes.model_copy(update={"anatomy": anatomy, "eager": 1.0})

    def phase(self, done: float) -> Phase:
        """The phase at this share of the run."""
        return next((phase for phase in self.phases if done < phase.until), self.phases[-1])


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. PlanError names the file and the key."""
    if not path.is_file():
        raise PlanError(f"no recipe at {path}. Name one with --recipe, or leave it out for the packaged one")
    try:
        return Recipe.model_validate_json(json.dumps(atomic.read_json(path, "recipe")))
    except atomic.JsonError as error:
        raise PlanError(f"{error}. Correct it, or leave --recipe out for the packaged one") from None
    except ValidationError as error:
        raise PlanError(f"{path.name} (recipe): {explain(error, Recipe)}. Correct it, or leave --recipe out for the packaged one") from None
