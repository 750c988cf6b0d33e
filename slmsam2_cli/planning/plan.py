"""The plan: every decision about a data set, as one frozen value and one JSON file a person can read, compare and edit.

Decides nothing (see rules.py). Refuses what it does not know: misspelt keys, impossible sizes, files written by a newer major format.

The part of a plan that says which network runs: size, memory policy, fuser.

The policies are pictured in docs/explanation/memory.md. Their options are written to a plan only where they differ from
their default, so that a plan shows what somebody chose.

How many channels the network is shown: up to three as colours, more through a learned projection to three.

What every rule returns.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from slmsam2_cli.dataset.slices import SliceAxis
from slmsam2_cli.errors import PlanError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.strict_json import explain

NetworkSize = Literal["nano", "tiny", "small", "base_plus", "large"]
PolicyName = Literal["fifo", "shortlong", "selfsort", "shortlong+selfsort"]
FuserName = Literal["gated", "sum"]
_ALWAYS_WRITTEN = {"size", "policy", "fuser"}


class NetworkPlan(BaseModel):
    """Which network, and how it remembers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: NetworkSize = Field(default="nano", description="network size; nano is made for CPUs, the others are SAM 2.1's")
    policy: PolicyName = Field(
        default="shortlong",
        description="memory policy: fifo (SAM 2), shortlong (SLM-SAM 2), selfsort (MedSAM-2's bank), shortlong+selfsort (both)",
    )
    fuser: FuserName = Field(default="gated", description="how the two streams meet: gated (exact SAM 2 at step 0) or sum (as published)")
    object_score_gate: bool = Field(default=False, description="read only slices that surely hold the object, and the slice just passed")
    shared_memory: bool = Field(
        default=False, description="a pass may read what the passes in the other direction have written, as in SAM 2"
    )
    bank_slices: int = Field(default=16, description="selfsort: tracked slices in the bank, at most", ge=1, le=1024)
    bank_read: int = Field(default=6, description="selfsort: slices read from the bank, the most similar ones", ge=1, le=64)
    bank_confidence: float = Field(
        default=0.5,
        description="selfsort: confidence, calibrated or else predicted IoU, from which on a slice may enter the bank",
        ge=0,
        le=1,
    )
    bank_similarity: float = Field(default=0.5, description="selfsort: similarity to an anchor from which on it may enter", ge=-1, le=1)

    @property
    def has_short_stream(self) -> bool:
        """Whether the network carries a short memory-attention stack and a fuser."""
        return self.policy.startswith("shortlong")

    @property
    def has_bank(self) -> bool:
        """Whether the long stream reads a self-sorting bank."""
        return self.policy.endswith("selfsort")

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        options = type(self).model_fields
        return {name: v for name, v in whole(self).items() if name in _ALWAYS_WRITTEN or v != options[name].default}


COLOURS = 3  # red, green, blue
MOST_CHANNELS = 16


def groups(channels: int) -> tuple[range, ...]:
    """Which of more than three channels each colour starts as the mean of: neighbours, the larger groups first (4: 2, 1, 1)."""
    least, larger = divmod(channels, COLOURS)
    starts = [colour * least + min(colour, larger) for colour in range(COLOURS + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


FORMAT_VERSION = 2
_NOT_IN_DIGEST = {"reasons", "overrides", "decided_digest", "tool_version"}
Strategy = Literal["full", "frozen-encoder", "decoder+memory", "adapters"]
ValidationScheme = Literal["cross-validation", "none"]
ObjectScoreTarget = Literal["ground_truth", "teacher"]
OverrideKey = Literal["geometry.slice_axis", "training.minutes", "training.clip_slices"]
Label = Annotated[int, Field(ge=1, le=65535)]


class FrozenModel(BaseModel):
    """Values that never change and never carry a key nobody knows; no NaN, no infinity, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ChannelIntensity(FrozenModel):
    """How one channel becomes 0…1."""

    name: str = Field(description="the channel's name in dataset.json")
    scheme: Literal["ct", "percentile"] = Field(
        description="ct: one window in HU for all volumes; percentile: each volume by its own percentiles"
    )
    lower: float = Field(description="becomes 0; HU, or a percentile of the volume's non-zero voxels", ge=-1e6, le=1e6)
    upper: float = Field(description="becomes 1; HU, or a percentile of the volume's non-zero voxels", ge=-1e6, le=1e6)

    @model_validator(mode="after")
    def _ordered(self) -> ChannelIntensity:
        if self.upper <= self.lower:
            raise ValueError(f"upper {self.upper:g} must be above lower {self.lower:g}")
        if self.scheme == "percentile" and not (self.lower >= 0 and self.upper <= 100):
            raise ValueError("percentiles lie between 0 and 100")
        return self


class GeometryPlan(FrozenModel):
    """How volumes become stacks of slices."""

    slice_axis: SliceAxis = Field(description="the anatomical axis that becomes time: SI, AP or LR")
    in_plane_mm: float = Field(description="edge of a network pixel in mm", gt=1e-3, le=1000)
    through_plane_mm: float | None = Field(description="distance between slices after resampling in mm; null: as stored", gt=1e-3, le=1000)
    input_size: int = Field(description="edge of the network's square input in pixels, a multiple of 32", ge=32, le=2048, multiple_of=32)
    crop_to_nonzero: bool = Field(description="cut away the border where every channel is 0")
    roi_scale: float | None = Field(
        default=None, description="the network sees a square so many times as wide as what is annotated; null: whole slices", ge=1.1, le=16
    )
    adjacent_slices: bool = Field(
        default=False, description="of one channel, the network is shown as its colours the slice, the one before and the one after"
    )
    storage_size: int | None = Field(
        default=None,
        description="edge of the slices from which these squares are cut, in pixels, a multiple of 32; null: input_size",
        ge=32,
        le=2048,
        multiple_of=32,
    )

    @property
    def stack_size(self) -> int:
        """Edge of the slices as they are stored, in pixels."""
        return self.storage_size or self.input_size

    @model_validator(mode="after")
    def _slices(self) -> GeometryPlan:
        if self.roi_scale is None and self.storage_size not in (None, self.input_size):
            raise ValueError(
                f"storage_size is {self.storage_size}, but without roi_scale the network sees whole slices of input_size, {self.input_size}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Focus, storage_size and adjacent_slices are written only where somebody chose them."""
        usual = {"roi_scale": None, "storage_size": None, "adjacent_slices": False}
        return {name: value for name, value in whole(self).items() if name not in usual or value != usual[name]}


class AdapterPlan(FrozenModel):
    """What is added to the network for one modality; read only where `training.strategy` is adapters."""

    kind: Literal["lora", "bottleneck"] = Field(
        default="lora", description="lora: low-rank pairs, which can be merged; bottleneck: two residual adapters in every encoder block"
    )
    rank: int = Field(default=8, description="rank of the low-rank pairs", ge=1, le=256)
    ratio: float = Field(default=0.25, description="width of a bottleneck over that of its block", gt=0, le=1)


class TrainingPlan(FrozenModel):
    """How the network is adapted."""

    steps: int = Field(description="optimiser steps", ge=1, le=10_000_000)
    clip_slices: int = Field(default=8, description="consecutive slices in a training clip", ge=2, le=64)
    clips_per_step: int = Field(description="clips in one optimiser step", ge=1, le=256)
    learning_rate: float = Field(description="peak learning rate of AdamW", gt=0, le=1)
    warmup_steps: int = Field(description="steps over which the learning rate rises to its peak", ge=0)
    weight_decay: float = Field(description="decoupled weight decay of AdamW", ge=0, le=1)
    seed: int = Field(default=0, description="seed of every random draw", ge=0, lt=2**32)
    workers: int = Field(default=1, description="GPUs, or processes on a CPU, that share each step, a clip or more each", ge=1, le=64)
    minutes: float | None = Field(default=None, description="stop after this many minutes even if steps remain; null: no limit", gt=0)
    strategy: Strategy = Field(
        default="full", description="what is trained: full, frozen-encoder, decoder+memory, or adapters for the plan's modality"
    )
    adapters: AdapterPlan = Field(default_factory=AdapterPlan, description="their kind and size")
    label_unet: bool = Field(default=True, description="whether a second, small network learns what the labels look like")
    can_add: bool | None = Field(
        default=None,
        description="whether the recogniser may find a structure where propagation sees none; null: by the number of volumes",
    )
    object_score_target: ObjectScoreTarget = Field(
        default="ground_truth",
        description="what the presence score learns: truth, the labels; base, what the base believes, so that ends stay where it sees them",
    )
    validation: ValidationScheme = Field(
        default="none",
        description="cross-validation: short runs first, each without one volume, so that the worse of base and tuned model is never kept; none",
    )

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Strategy, adapters, label_unet, can_add, object_score_target, validation and workers are written only where they are not as ever."""
        usual = {
            "strategy": "full",
            "adapters": AdapterPlan().model_dump(),
            "label_unet": True,
            "can_add": None,
            "object_score_target": "ground_truth",
        }
        usual |= {"validation": "none", "workers": 1}
        return {name: value for name, value in whole(self).items() if name not in usual or value != usual[name]}


class InferencePlan(FrozenModel):
    """How the network is walked through a volume."""

    batch_slices: int = Field(default=8, description="slices encoded at a time", ge=1, le=256)
    max_empty_slices: int | None = Field(
        default=None, description="a pass ends after so many slices without its object; null: at the end of the volume", ge=1, le=100_000
    )


class EvaluationPlan(FrozenModel):
    """How masks are judged."""

    nsd_tolerance_mm: float = Field(default=2.0, description="borders closer than this count as equal in NSD, in mm", gt=0, le=100)


class Plan(FrozenModel):
    """Every decision about one data set."""

    format_version: Literal[2] = Field(default=2, description="major version of this file's format")
    tool_version: str = Field(description="the version of slmsam2 that decided")
    dataset_name: str = Field(description="name in dataset.json")
    modality: str = Field(description="CT, MR, PET, … of the first channel, after looking at the values")
    channels: tuple[str, ...] = Field(description="channel names in order", min_length=1, max_length=MOST_CHANNELS)
    labels: dict[Label, str] = Field(description="foreground label value -> name")
    ignore: int | None = Field(default=None, description="label value that means: not annotated; null: none", ge=1, le=65535)
    geometry: GeometryPlan
    intensity: tuple[ChannelIntensity, ...] = Field(description="one entry a channel")
    network: NetworkPlan
    training: TrainingPlan
    inference: InferencePlan = Field(default_factory=InferencePlan)
    evaluation: EvaluationPlan = Field(default_factory=EvaluationPlan)
    reasons: dict[str, str] = Field(default_factory=dict, description="decision key -> why; not part of the digest")
    overrides: tuple[OverrideKey, ...] = Field(default=(), description="decision keys that an option settled; kept when planning anew")
    fingerprint_digest: str = Field(description="SHA-256 of the measurements the decisions rest on")
    decided_digest: str = Field(default="", description="digest of the tool's own decisions; differs from the plan's digest after an edit")

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if len(self.intensity) != len(self.channels):
            raise ValueError(f"intensity: {len(self.intensity)} entries for {len(self.channels)} channels")
        if self.geometry.adjacent_slices and len(self.channels) > 1:
            raise ValueError(
                f"geometry.adjacent_slices is true, but {len(self.channels)} channels leave no colour free for neighbouring slices"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was asked for is written only where something was, and inference where it is not as ever."""
        usual: dict[str, Any] = {"overrides": (), "inference": InferencePlan().model_dump()}
        return {name: value for name, value in whole(self).items() if name not in usual or (value and value != usual[name])}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the decisions: canonical JSON without reasons and without decided_digest."""
        return digest_of(self.model_dump(mode="json", exclude=_NOT_IN_DIGEST))

    @property
    def edited(self) -> bool:
        """Whether somebody changed a decision after the tool made it."""
        return self.decided_digest != self.digest


def digest_of(value: object) -> str:
    """SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def signed(plan: Plan) -> Plan:
    """The plan with the digest of its own decisions inside, so that later edits show."""
    return plan.model_copy(update={"decided_digest": plan.digest})


def read_plan(path: Path) -> Plan:
    """The plan in a file. PlanError names the file and the key."""
    return parse_plan(read_document(path, "plan"), path.name)


def parse_plan(value: object, name: str) -> Plan:
    """The plan in a JSON value that came from the file `name`. PlanError names the file and the key."""
    checked = check_document(value, name, "plan")
    try:
        return Plan.model_validate_json(json.dumps(checked))
    except ValidationError as error:
        raise PlanError(f"{name}: {explain(error, Plan)}. Correct it, or run slmsam2 plan --overwrite for a fresh one") from None


def write_plan(path: Path, plan: Plan) -> None:
    """Write the plan so that a crash leaves the old one or the new one."""
    atomic.write_json(path, plan.model_dump(mode="json"))


def flatten_plan(plan: Plan) -> dict[str, Any]:
    """Every decision by its dotted key, as plain JSON values; lists count as one decision."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value and prefix != "labels":
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = value

    whole = plan.model_dump(mode="json", exclude=_NOT_IN_DIGEST | {"fingerprint_digest"})
    walk("", whole | {"inference": plan.inference.model_dump()})  # also where it is as ever
    return found


def differences(mine: Plan, theirs: Plan) -> list[tuple[str, Any, Any]]:
    """(key, my value, their value) of every decision on which two plans differ."""
    left, right = flatten_plan(mine), flatten_plan(theirs)
    return [(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)]


def keep_edits(previous: Plan | None, decided: Plan) -> Plan:
    """Which plan holds: an edited one as long as the data are the same, otherwise the fresh one.

    PlanError names the edited keys when the data changed: neither the edits nor the fresh decisions can then be trusted in silence.
    """
    if previous is None or not previous.edited:
        return decided
    if previous.fingerprint_digest == decided.fingerprint_digest:
        return previous
    changed = ", ".join(f"{key} is {mine} where the data now ask for {theirs}" for key, mine, theirs in differences(previous, decided))
    raise PlanError(
        f"plan.json was edited by hand and the data have changed since: {changed or 'the decisions agree'}. "
        "Run slmsam2 plan --overwrite for fresh decisions, then edit them again"
    )


def read_document(path: Path, what: str) -> dict[str, Any]:
    """A JSON object whose format_version this tool knows; PlanError otherwise."""
    if not path.exists():
        raise PlanError(f"no {what} at {path}. Run slmsam2 plan first")
    try:
        value = atomic.read_json(path, what)
    except atomic.JsonError as error:
        raise PlanError(f"{error}. Correct it, or run slmsam2 plan --overwrite for a fresh one") from None
    return check_document(value, path.name, what)


def check_document(value: object, name: str, what: str) -> dict[str, Any]:
    """The value, when it is a JSON object of a format this tool knows; PlanError otherwise."""
    if not isinstance(value, dict):
        raise PlanError(f"{name}: the {what} must be a JSON object. Run slmsam2 plan --overwrite for a fresh one")
    version = value.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise PlanError(
            f"{name}: format_version {version} was written by an earlier slmsam2; this version reads {FORMAT_VERSION}. "
            "Run slmsam2 plan --overwrite for a fresh one"
        )
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PlanError(f"{name}: format_version {version} is newer than this tool's {FORMAT_VERSION}. Update slmsam2, or plan anew")
    return value


T = TypeVar("T")


@dataclass(frozen=True)
class Decision(Generic[T]):
    """A value and why it was chosen."""

    value: T
    reason: str
