"""The recipe of pretrained weights: one JSON file that, with the same version of the code, reproduces them.

Unknown keys, invalid values and files of another format version are rejected; the message names the key.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from slmsam2_cli.errors import PlanError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.strict_json import explain
from slmsam2_cli.planning.plan import POLICY_STREAMS, FrozenModel, NetworkPlan, PolicyName, digest_of
from slmsam2_cli.pretraining.volumes import VolumesRecipe

FORMAT_VERSION = 2
_ASSETS = Path(__file__).parents[1] / "assets"
NANO = _ASSETS / "nano.json"
SMOKE = _ASSETS / "nano-smoke.json"
_BUDGET = {"steps", "minutes"}
InputSize = Annotated[int, Field(ge=32, le=1024, multiple_of=32)]


class Phase(FrozenModel):
    """One part of the schedule."""

    until: float = Field(description="share of the run at which the phase ends", gt=0, le=1)
    lengths: tuple[int, ...] = Field(description="slices per clip, all equally likely; 1: single images", min_length=1)
    masks_only: bool = Field(default=False, description="whether the prompt of every clip is a mask")
    ends_in_clip: float | None = Field(
        default=None,
        description="share of structures with an end within the clip, without ending_weight; null: as in volumes",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Phase:
        if not all(1 <= length <= 64 for length in self.lengths):
            raise ValueError("lengths: a clip must have 1 to 64 slices")
        return self


class PromptsRecipe(FrozenModel):
    """Prompts on the first slice. The rest are masks: the true mask in clips, a perturbed mask in single images."""

    box: float = Field(default=0.15, description="share of box prompts", ge=0, le=1)
    points: float = Field(default=0.1, description="share of point prompts", ge=0, le=1)
    mask_shift: float = Field(default=0.25, description="maximum shift of a perturbed mask, share of its size", ge=0, le=1)
    mask_scale: float = Field(default=1.4, description="maximum factor by which a perturbed mask is larger or smaller", ge=1, le=4)
    max_points: int = Field(default=3, description="maximum number of points, of which the first is inside the mask", ge=1, le=16)
    box_jitter: float = Field(default=0.1, description="maximum shift of a box's corners, share of its edges", ge=0, le=0.5)

    @model_validator(mode="after")
    def _check_shares(self) -> PromptsRecipe:
        if self.box + self.points > 1:
            raise ValueError(f"box and points must not exceed 1 together, found {self.box + self.points:g}")
        return self


class MemoryReading(FrozenModel):
    """How memory is read and what is left out of it, so that the network relies on no policy and no single memory."""

    policies: dict[PolicyName, float] = Field(description="memory policy -> relative frequency")
    drop_tracked: float = Field(default=0.15, description="share of tracked slices that are missing from memory", ge=0, le=1)
    drop_previous_mask: float = Field(default=0.15, description="share of slices without the previous mask", ge=0, le=1)
    previous_mask_only: float = Field(default=0.05, description="share of slices with the previous mask and no memory", ge=0, le=1)
    two_conditioning_slices: float = Field(
        default=0.15, description="share of clips of at least 4 slices whose last slice is annotated too", ge=0, le=1
    )

    @model_validator(mode="after")
    def _check_policies(self) -> MemoryReading:
        if not self.policies or min(self.policies.values()) < 0 or sum(self.policies.values()) <= 0:
            raise ValueError("policies: frequencies must be 0 or greater, and at least one of them greater than 0")
        return self


class ValidationRecipe(FrozenModel):
    """Validation during the run, on clips that are not used for training."""

    every_minutes: float = Field(default=5.0, description="minutes of training between two validations", gt=0)
    windows: int = Field(default=12, description="windows of slices", ge=1, le=1024)
    length: int = Field(default=16, description="slices per window", ge=2, le=256)
    seed: int = Field(default=1_000_003, description="seed of the validation volumes", ge=0, lt=2**32)


class LossRecipe(FrozenModel):
    """Weights of the terms of the loss."""

    pixels: float = Field(default=0.3, description="of the cross-entropy, to which inside and outside contribute one half each", ge=0)
    absent: float = Field(default=10.0, description="factor on the cross-entropy where the object is absent", ge=0)
    dice: float = Field(default=1.0, description="of soft Dice, where the object is present", ge=0)
    iou: float = Field(default=1.0, description="of the error of the predicted IoU, where the object is present", ge=0)
    object_score: float = Field(default=1.0, description="of the cross-entropy of the object score", ge=0)


class Recipe(FrozenModel):
    """Everything that determines the pretrained weights."""

    format_version: Literal[2] = Field(default=2, description="version of this file's format")
    network: NetworkPlan = Field(default_factory=NetworkPlan, description="network; its policy determines which memory streams it has")
    input_size: InputSize = Field(default=128, description="edge of the slices in pixels, a multiple of 32")
    other_input_sizes: dict[InputSize, float] = Field(
        default_factory=dict, description="other edges in pixels -> share of the steps; fewer slices, so that pixels stay the same"
    )
    steps: int = Field(description="maximum number of optimiser steps", ge=1, le=10_000_000)
    minutes: float | None = Field(default=None, description="maximum training time in minutes; null: no limit", gt=0)
    seed: int = Field(default=0, description="seed of the initial weights and of all random draws", ge=0, lt=2**32)
    slices_per_step: int = Field(default=64, description="slices per step, in few long clips or many short ones", ge=1, le=8192)
    parts: int = Field(default=2, description="parts of a step, each with its own clip length, prompt and policy", ge=1, le=64)
    max_windows: int = Field(default=24, description="maximum number of windows per step", ge=1, le=1024)
    tracks_per_window: float = Field(default=2.0, description="objects tracked per window", gt=0, le=16)
    learning_rate: float = Field(default=1e-3, description="peak learning rate of AdamW", gt=0, le=1)
    warmup_steps: int = Field(default=200, description="steps over which the learning rate rises to its peak", ge=0)
    weight_decay: float = Field(default=0.05, description="decoupled weight decay of AdamW", ge=0, le=1)
    ema_decay: float = Field(default=0.999, description="maximum decay of the moving average of the weights", ge=0, lt=1)
    object_score_shift: float = Field(
        default=0.0, description="added to the object score of the saved weights; below 0, uncertain slices become empty", ge=-10, le=10
    )
    compile: bool = Field(default=False, description="compile the larger modules on a GPU")
    phases: tuple[Phase, ...] = Field(description="schedule, such as single images, short clips, long clips", min_length=1)
    prompts: PromptsRecipe = Field(default_factory=PromptsRecipe, description="prompts on the first slice")
    memory: MemoryReading = Field(description="how memory is read")
    losses: LossRecipe = Field(default=LossRecipe(), description="weights of the terms of the loss")
    validation: ValidationRecipe = Field(default_factory=ValidationRecipe, description="validation during the run")
    volumes: VolumesRecipe = Field(default=VolumesRecipe(), description="procedurally generated volumes")

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"phases: until must increase from phase to phase and end at 1, found {', '.join(f'{end:g}' for end in ends)}")
        if min(self.other_input_sizes.values(), default=0) < 0 or sum(self.other_input_sizes.values()) > 1:
            raise ValueError("other_input_sizes: shares must be 0 or greater and must not exceed 1 together")
        short = [name for name in self.memory.policies if POLICY_STREAMS[name].has_short_stream]
        if short and not self.network.has_short_stream:
            raise ValueError(f"memory.policies: {short[0]} needs a short memory stream, which network.policy {self.network.policy} lacks")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that must stay the same when a run is resumed; only its length may change."""
        return digest_of(self.model_dump(mode="json", exclude=_BUDGET))

    def volumes_at(self, done: float) -> VolumesRecipe:
        """Return the settings of the generator at this share of the run."""
        ends = self.phase(done).ends_in_clip
        if ends is None:
            return self.volumes
        anatomy = self.volumes.anatomy.model_copy(update={"ends_in_clip": ends})
        return self.volumes.model_copy(update={"anatomy": anatomy, "ending_weight": 1.0})

    def phase(self, done: float) -> Phase:
        """Return the phase at this share of the run."""
        return next((phase for phase in self.phases if done < phase.until), self.phases[-1])


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a file.

    Raises: PlanError, with file and key, when the file is missing, no JSON, of another format_version or invalid.
    """
    remedy = "Correct it, or omit --recipe to use the bundled recipe"
    if not path.is_file():
        raise PlanError(f"no recipe at {path}. Use --recipe FILE, or omit it to use the bundled recipe")
    try:
        value: Any = atomic.read_json(path, "recipe")
        version = value.get("format_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            age = "of an earlier slmsam2 is no longer supported" if version < FORMAT_VERSION else "is newer than this slmsam2 supports"
            todo = "Rename its keys as in the bundled recipe, nano.json" if version < FORMAT_VERSION else "Update slmsam2"
            raise PlanError(f"{path.name} (recipe): format_version {version} {age} (supported: {FORMAT_VERSION}). {todo}")
        return Recipe.model_validate_json(json.dumps(value))
    except atomic.JsonError as error:
        raise PlanError(f"{error}. {remedy}") from None
    except ValidationError as error:
        raise PlanError(f"{path.name} (recipe): {explain(error, Recipe)}. {remedy}") from None
