"""The plan: all settings for a dataset as one frozen value and one JSON file that can be read, compared and edited by hand.

`Plan` holds the settings and the reasons for them; rules.py chooses them. Unknown keys, impossible values and files of another
format_version are rejected. Keys that are rarely changed are written only where they differ from their default. The memory policies of
`NetworkPlan` are pictured in docs/explanation/memory.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from slmsam2_cli.dataset.slices import SliceAxis
from slmsam2_cli.errors import PlanError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.strict_json import explain

FORMAT_VERSION = 2
RGB_CHANNELS = 3  # input channels of the image encoder
MAX_CHANNELS = 16
_NOT_IN_DIGEST = {"reasons", "overrides", "decided_digest", "tool_version"}
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryStreams:
    """What a memory policy needs: a second memory-attention stack for the previous slice, a self-sorting bank; method: for help texts."""

    method: str
    has_short_stream: bool
    has_bank: bool


POLICY_STREAMS = {  # the classes are in model/memory/registry.py
    "fifo": MemoryStreams("SAM 2", has_short_stream=False, has_bank=False),
    "shortlong": MemoryStreams("SLM-SAM 2", has_short_stream=True, has_bank=False),
    "selfsort": MemoryStreams("MedSAM-2", has_short_stream=False, has_bank=True),
    "shortlong+selfsort": MemoryStreams("both", has_short_stream=True, has_bank=True),
}


def _check_policy(name: str) -> str:
    if name not in POLICY_STREAMS:
        raise ValueError(f"must be one of {', '.join(POLICY_STREAMS)}")
    return name


PolicyName = Annotated[str, AfterValidator(_check_policy)]
NetworkSize = Literal["nano", "tiny", "small", "base_plus", "large"]
FuserName = Literal["gated", "sum"]
Strategy = Literal["full", "frozen-encoder", "decoder+memory", "adapters"]
ValidationScheme = Literal["cross-validation", "none"]
ObjectScoreTarget = Literal["ground_truth", "teacher"]
OverrideKey = Literal["geometry.slice_axis", "training.minutes", "training.clip_slices"]
Label = Annotated[int, Field(ge=1, le=65535)]


class FrozenModel(BaseModel):
    """Settings that cannot be changed after validation; unknown keys, NaN, infinity and type conversion are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SparseModel(FrozenModel):
    """Settings of which some are written only where they differ from their default."""

    omitted_at_default: ClassVar[frozenset[str]] = frozenset()

    def _omitted(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name in self.omitted_at_default if getattr(self, name) == fields[name].get_default(call_default_factory=True)}

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        omitted = self._omitted()
        return {name: value for name, value in serialize(self).items() if name not in omitted}


class NetworkPlan(SparseModel):
    """The network: size, memory policy, fuser."""

    model_config = ConfigDict(strict=False)  # api.build passes its keyword arguments here
    omitted_at_default = frozenset({"object_score_gate", "shared_memory", "bank_slices", "bank_read", "bank_confidence", "bank_similarity"})

    size: NetworkSize = Field(default="nano", description="network size: nano (for CPUs), or tiny, small, base_plus, large as in SAM 2.1")
    policy: PolicyName = Field(
        default="shortlong",
        description="memory policy: " + ", ".join(f"{name} ({streams.method})" for name, streams in POLICY_STREAMS.items()),
    )
    fuser: FuserName = Field(
        default="gated", description="how short and long memory are combined: gated (starts as SAM 2) or sum (as published)"
    )
    object_score_gate: bool = Field(
        default=False, description="whether memory reads only slices that contain the object with high confidence, and the previous slice"
    )
    shared_memory: bool = Field(default=False, description="whether both directions of propagation share one memory, as in SAM 2")
    bank_slices: int = Field(default=16, description="selfsort: maximum number of slices in the bank", ge=1, le=1024)
    bank_read: int = Field(default=6, description="selfsort: number of most similar slices read from the bank", ge=1, le=64)
    bank_confidence: float = Field(
        default=0.5,
        description="selfsort: minimum confidence of a slice that enters the bank (calibrated confidence, else predicted IoU)",
        ge=0,
        le=1,
    )
    bank_similarity: float = Field(
        default=0.5, description="selfsort: minimum similarity to an annotated slice of a slice that enters the bank", ge=-1, le=1
    )

    @property
    def has_short_stream(self) -> bool:
        """Whether the network has a second memory-attention stack for the previous slice, and a fuser."""
        return POLICY_STREAMS[self.policy].has_short_stream

    @property
    def has_bank(self) -> bool:
        """Whether the long memory is a self-sorting bank."""
        return POLICY_STREAMS[self.policy].has_bank


def channel_groups(channels: int) -> tuple[range, ...]:
    """Split more than three channels into three groups of neighbours, larger groups first (4 channels: 2, 1, 1).

    The learned projection to three channels starts as the mean of each group.
    """
    smallest, larger = divmod(channels, RGB_CHANNELS)
    starts = [group * smallest + min(group, larger) for group in range(RGB_CHANNELS + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


class ChannelIntensity(FrozenModel):
    """How the values of one channel are normalised to 0...1."""

    name: str = Field(description="channel name from dataset.json")
    scheme: Literal["ct", "percentile"] = Field(
        description="ct: one window in HU for all volumes; percentile: percentiles of each volume's non-zero voxels"
    )
    lower: float = Field(description="value mapped to 0, in HU or as a percentile", ge=-1e6, le=1e6)
    upper: float = Field(description="value mapped to 1, in HU or as a percentile", ge=-1e6, le=1e6)

    @model_validator(mode="after")
    def _ordered(self) -> ChannelIntensity:
        if self.upper <= self.lower:
            raise ValueError(f"upper {self.upper:g} must be above lower {self.lower:g}")
        if self.scheme == "percentile" and not (self.lower >= 0 and self.upper <= 100):
            raise ValueError("percentiles must lie between 0 and 100")
        return self


class GeometryPlan(SparseModel):
    """How volumes become stacks of slices."""

    omitted_at_default = frozenset({"roi_scale", "adjacent_slices"})

    slice_axis: SliceAxis = Field(description="anatomical axis of propagation: SI, AP or LR")
    in_plane_mm: float = Field(description="in-plane spacing after resampling, in mm", gt=1e-3, le=1000)
    through_plane_mm: float | None = Field(
        description="through-plane spacing after resampling, in mm; null: as in the image", gt=1e-3, le=1000
    )
    input_size: int = Field(description="edge of the network's square input in pixels, a multiple of 32", ge=32, le=2048, multiple_of=32)
    crop_to_nonzero: bool = Field(description="whether volumes are cropped to their non-zero voxels")
    roi_scale: float | None = Field(
        default=None, description="edge of the ROI crop relative to the prompt's bounding box; null: whole slices", ge=1.1, le=16
    )
    adjacent_slices: bool = Field(
        default=False, description="whether the slices before and after fill the other two input channels (images with one channel only)"
    )
    storage_size: int = Field(
        default=0,
        description="edge of the preprocessed slices in pixels, from which ROI crops are taken, a multiple of 32; default: input_size",
        ge=32,
        le=2048,
        multiple_of=32,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, fields: Any) -> Any:
        absent = isinstance(fields, dict) and fields.get("storage_size", 0) is None
        return {name: value for name, value in fields.items() if name != "storage_size"} if absent else fields

    def _omitted(self) -> set[str]:
        return super()._omitted() | ({"storage_size"} if self.roi_scale is None else set())

    @model_validator(mode="after")
    def _consistent_sizes(self) -> GeometryPlan:
        if not self.storage_size:
            object.__setattr__(self, "storage_size", self.input_size)
        if self.roi_scale is None and self.storage_size != self.input_size:
            raise ValueError(
                f"storage_size is {self.storage_size}, but without roi_scale the network sees whole slices of input_size, {self.input_size}"
            )
        return self


class AdapterPlan(FrozenModel):
    """Low-rank adapters for one modality; used only where `training.strategy` is adapters."""

    rank: int = Field(default=8, description="rank of the low-rank adapters (LoRA)", ge=1, le=256)


class TrainingPlan(SparseModel):
    """How the network is fine-tuned."""

    omitted_at_default = frozenset({"strategy", "adapters", "label_unet", "can_add", "object_score_target", "validation", "workers"})

    steps: int = Field(description="number of optimiser steps", ge=1, le=10_000_000)
    clip_slices: int = Field(default=8, description="number of consecutive slices in a training clip", ge=2, le=64)
    clips_per_step: int = Field(description="number of clips per optimiser step", ge=1, le=256)
    learning_rate: float = Field(description="peak learning rate of AdamW", gt=0, le=1)
    warmup_steps: int = Field(description="number of steps over which the learning rate rises to its peak", ge=0)
    weight_decay: float = Field(description="decoupled weight decay of AdamW", ge=0, le=1)
    seed: int = Field(default=0, description="random seed", ge=0, lt=2**32)
    workers: int = Field(
        default=1, description="number of GPUs, or of processes on a CPU, that share each step; each takes at least one clip", ge=1, le=64
    )
    minutes: float | None = Field(default=None, description="maximum training time in minutes; null: no limit", gt=0)
    strategy: Strategy = Field(
        default="full", description="which weights are trained: full, frozen-encoder, decoder+memory, or adapters for the plan's modality"
    )
    adapters: AdapterPlan = Field(default_factory=AdapterPlan, description="size of the adapters")
    label_unet: bool = Field(
        default=True, description="whether a small U-Net is trained as well, which segments the labels without a prompt"
    )
    can_add: bool | None = Field(
        default=None,
        description="whether the label U-Net may add a structure where propagation predicts none; null: depends on the number of cases",
    )
    object_score_target: ObjectScoreTarget = Field(
        default="ground_truth",
        description="what the object score is trained on: ground_truth (the labels) or teacher (the pretrained network's object score)",
    )
    validation: ValidationScheme = Field(
        default="none",
        description="cross-validation (short runs on held-out cases; the pretrained model is kept if it scores higher) or none",
    )


class InferencePlan(FrozenModel):
    """How masks are propagated through a volume."""

    batch_slices: int = Field(default=8, description="number of slices encoded at a time", ge=1, le=256)
    max_empty_slices: int | None = Field(
        default=None,
        description="propagation stops after this many consecutive slices without the object; null: at the end of the volume",
        ge=1,
        le=100_000,
    )


class EvaluationPlan(FrozenModel):
    """How masks are scored."""

    nsd_tolerance_mm: float = Field(default=2.0, description="surface distance in mm up to which borders agree in NSD", gt=0, le=100)


class Plan(SparseModel):
    """All settings for one dataset."""

    omitted_at_default = frozenset({"overrides", "inference"})

    format_version: Literal[2] = Field(default=2, description="version of this file's format")
    tool_version: str = Field(description="version of slmsam2 that wrote the plan")
    dataset_name: str = Field(description="name from dataset.json")
    modality: str = Field(description="modality of the first channel, from its name and values: CT, MR, PET, ...")
    channels: tuple[str, ...] = Field(description="channel names in order", min_length=1, max_length=MAX_CHANNELS)
    labels: dict[Label, str] = Field(description="label value -> structure name")
    ignore: int | None = Field(default=None, description="label value of voxels that are not annotated; null: none", ge=1, le=65535)
    geometry: GeometryPlan
    intensity: tuple[ChannelIntensity, ...] = Field(description="normalisation, one entry per channel")
    network: NetworkPlan
    training: TrainingPlan
    inference: InferencePlan = Field(default_factory=InferencePlan)
    evaluation: EvaluationPlan = Field(default_factory=EvaluationPlan)
    reasons: dict[str, str] = Field(default_factory=dict, description="key -> reason for its value; not part of the digest")
    overrides: tuple[OverrideKey, ...] = Field(default=(), description="keys set by a command-line option; later runs of plan keep them")
    fingerprint_digest: str = Field(description="SHA-256 of the measurements on which the plan is based")
    decided_digest: str = Field(default="", description="digest of the plan as slmsam2 wrote it; a manual edit makes the two differ")

    @model_validator(mode="after")
    def _consistent_channels(self) -> Plan:
        if len(self.intensity) != len(self.channels):
            raise ValueError(f"intensity: {len(self.intensity)} entries for {len(self.channels)} channels")
        if self.geometry.adjacent_slices and len(self.channels) > 1:
            raise ValueError(
                f"geometry.adjacent_slices is true, but {len(self.channels)} image channels leave no input channel for adjacent slices"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the settings: canonical JSON without reasons, overrides, tool version and decided_digest."""
        return digest_of(self.model_dump(mode="json", exclude=_NOT_IN_DIGEST))

    @property
    def edited(self) -> bool:
        """Whether a setting was changed by hand after slmsam2 wrote the plan."""
        return self.decided_digest != self.digest


def digest_of(value: object) -> str:
    """Compute the SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def with_digest(plan: Plan) -> Plan:
    """Return the plan with its own digest as decided_digest, so that later edits can be detected."""
    return plan.model_copy(update={"decided_digest": plan.digest})


def read_plan(path: Path) -> Plan:
    """Read plan.json.

    Raises: PlanError, with file and key, when the file is missing, no JSON, of another format_version or invalid.
    """
    return parse_plan(read_document(path, "plan"), path.name)


def parse_plan(value: object, name: str) -> Plan:
    """Validate a JSON value read from the file `name` as a plan.

    Raises: PlanError, with file and key, when the value is of another format_version or invalid.
    """
    document = check_document(value, name, "plan")
    try:
        return Plan.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise PlanError(f"{name}: {explain(error, Plan)}. Correct it, or run slmsam2 plan --overwrite to create a new plan") from None


def write_plan(path: Path, plan: Plan) -> None:
    """Write plan.json atomically: after a crash the old or the new file is there."""
    atomic.write_json(path, plan.model_dump(mode="json"))


def flatten_plan(plan: Plan) -> dict[str, Any]:
    """Return every setting under its dotted key, as plain JSON values; a list counts as one setting, and so do the labels."""
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value and prefix != "labels":
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = value

    settings = plan.model_dump(mode="json", exclude=_NOT_IN_DIGEST | {"fingerprint_digest"})
    add("", settings | {"inference": plan.inference.model_dump()})  # even where it is omitted from the file
    return found


def differences(first: Plan, second: Plan) -> list[tuple[str, Any, Any]]:
    """List (key, value in the first, value in the second) for every setting in which two plans differ."""
    left, right = flatten_plan(first), flatten_plan(second)
    return [(key, left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)]


def keep_edits(previous: Plan | None, decided: Plan) -> Plan:
    """Return the previous plan if it was edited by hand and the dataset is unchanged, else the newly decided one.

    Raises: PlanError, with the edited keys, when the previous plan was edited and the dataset has changed since.
    """
    if previous is None or not previous.edited:
        return decided
    if previous.fingerprint_digest == decided.fingerprint_digest:
        return previous
    changed = ", ".join(f"{key} is {old} (new default: {new})" for key, old, new in differences(previous, decided))
    raise PlanError(
        f"plan.json has manual edits, but the dataset has changed since: {changed or 'no setting differs'}. "
        "Run slmsam2 plan --overwrite to create a new plan, then repeat the edits"
    )


def read_document(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object of the supported format_version. what: "plan" or "fingerprint", for messages.

    Raises: PlanError when the file is missing, no JSON object, or of another format_version.
    """
    if not path.exists():
        raise PlanError(f"no {what} at {path}. Run slmsam2 plan first")
    try:
        value = atomic.read_json(path, what)
    except atomic.JsonError as error:
        raise PlanError(f"{error}. Correct it, or run slmsam2 plan --overwrite to create a new {what}") from None
    return check_document(value, path.name, what)


def check_document(value: object, name: str, what: str) -> dict[str, Any]:
    """Return a JSON value read from the file `name` if it is an object of the supported format_version.

    Raises: PlanError when it is not.
    """
    if not isinstance(value, dict):
        raise PlanError(f"{name}: the {what} must be a JSON object. Run slmsam2 plan --overwrite to create a new one")
    version = value.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise PlanError(
            f"{name}: format_version {version} of an earlier slmsam2 is no longer supported (supported: {FORMAT_VERSION}). "
            f"Run slmsam2 plan --overwrite to create a new {what}"
        )
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PlanError(
            f"{name}: format_version {version} is newer than the supported {FORMAT_VERSION}. "
            f"Update slmsam2, or run slmsam2 plan --overwrite to create a new {what}"
        )
    return value


@dataclass(frozen=True)
class Decision(Generic[T]):
    """The value of a setting and the reason for it, as every rule returns them."""

    value: T
    reason: str
