"""Model files: safetensors whose header records what the weights are, where they come from, and the plan they were trained for.

Reading is strict: a missing, unexpected or misshapen tensor is an error that names it. Weights of other projects go through convert.py.
An adapter file holds one modality's adapter and names the base (`RequiredBase`) whose weights it needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slmsam2_cli.errors import PlanError, WeightsError
from slmsam2_cli.io import atomic
from slmsam2_cli.model import adapters, convert, zoo
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.convert import State, first_line
from slmsam2_cli.model.label_unet import PREFIX as LABEL_UNET_PREFIX
from slmsam2_cli.model.label_unet import LabelUNet, label_unet_from, without_label_unet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.model.zoo import BUNDLED_WEIGHTS as BUNDLED_WEIGHTS
from slmsam2_cli.planning.plan import RGB_CHANNELS, NetworkPlan, Plan, parse_plan
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 2
RANDOM = "random"
RANDOM_WARNING = "the model descends from random weights: for trials and tests, not for clinical data"
_MAX_BYTES = 4 * 2**30
_SHORT = ("short_memory_attention.", "stream_fuser.")


class HeldOutResult(BaseModel):
    """Result of cross-validation.

    held_out: the cases of the short runs that were not trained on. pretrained, fine_tuned: mean Dice on them before and after. steps: of
    the final run on all cases, 0 where there was none. label_unet: whether the label U-Net improved the Dice; None without one. kept:
    which of the two the file holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: tuple[str, ...]
    pretrained: float
    fine_tuned: float
    steps: int
    label_unet: bool | None = None
    kept: Literal["pretrained", "fine_tuned"]


class Provenance(BaseModel):
    """Where weights come from.

    pretrained: name of the weights that training started from, or that were imported. pretrained_digest: their digest (the file's
    SHA-256 for imported weights), or "". licence: of these weights, or "". random: whether the first ancestor was random.
    object_score_offset: what pretraining subtracted from the object score at its end. seed, steps, seconds: of training. training: ids
    of all cases that these weights or their ancestors were trained on. training_image_digests: SHA-256 of their image files. versions:
    of libraries. validation: None without cross-validation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pretrained: str
    pretrained_digest: str = ""
    licence: str = ""
    random: bool = False
    object_score_offset: float = 0.0
    seed: int | None = None
    steps: int = 0
    seconds: float = 0.0
    training: tuple[str, ...] = ()
    training_image_digests: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    validation: HeldOutResult | None = None


class RequiredBase(BaseModel):
    """The weights that an adapter file needs: their name when it was trained, and their digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str

    def __str__(self) -> str:
        return f"is an adapter for the base {self.name} (weights {self.digest[:12]}), not a whole model"


@dataclass(frozen=True)
class Header:
    """What a model file records besides its tensors. notes: further entries, which no reader relies on."""

    network: NetworkPlan
    provenance: Provenance
    plan: Plan | None = None
    calibration: Calibration | None = None
    required_base: RequiredBase | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    digest: SHA-256 of names, shapes and values. plan, provenance: None for files of other projects. required_base: None for whole
    models. family: layout of the file. notes: what was changed to convert it.
    """

    name: str
    state: State
    digest: str
    network: NetworkPlan | None = None
    plan: Plan | None = None
    provenance: Provenance | None = None
    calibration: Calibration | None = None
    required_base: RequiredBase | None = None
    family: str = "slmsam2"
    notes: tuple[str, ...] = ()

    @property
    def base_digest(self) -> str:
        """Return the digest of the weights without adapters and label U-Net."""
        base = without_label_unet(adapters.split(self.state)[0])
        return tensors_digest(base) if len(base) < len(self.state) else self.digest

    @property
    def modalities(self) -> tuple[str, ...]:
        """List the modalities with an adapter; a projection of channels alone does not count."""
        return tuple(modality for modality, own in adapters.split(self.state)[1].items() if set(own) != {adapters.INPUT})

    def calibration_for(self, modality: str) -> Calibration | None:
        """Return the calibration if it was fitted on images of this modality."""
        return self.calibration if self.plan is not None and self.plan.modality == modality else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """List the warnings for everything that is made with these weights."""
        return (RANDOM_WARNING,) if self.provenance and self.provenance.random else ()


def tensors_digest(state: State) -> str:
    """Compute the SHA-256 (hex) of tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, calibration: Calibration | None = None) -> str:
    """Write a model with its adapters, its label U-Net and its plan; return the digest of the weights.

    Raises: OutputError when the file cannot be written completely.
    """
    return save_weights(path, adapters.full_state(model), Header(model.network, provenance, plan, calibration))


def save_adapter(
    path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, required_base: RequiredBase, calibration: Calibration | None = None
) -> str:
    """Write the adapter of the plan's modality and the label U-Net; return the digest of the weights.

    Raises: OutputError when the file cannot be written completely.
    """
    own = adapters.adapter_state(model, plan.modality)
    state = {f"{adapters.PREFIX}{plan.modality}.{name}": tensor for name, tensor in own.items()}
    if model.label_unet is not None:
        state |= {f"{LABEL_UNET_PREFIX}{name}": tensor for name, tensor in model.label_unet.state_dict().items()}
    return save_weights(path, state, Header(model.network, provenance, plan, calibration, required_base))


def save_weights(path: Path, state: State, header: Header) -> str:
    """Write tensors and a header; return the digest of the weights.

    Raises: OutputError when the file cannot be written completely.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    digest = tensors_digest(state)
    entries = dict(header.notes) | {"format_version": str(FORMAT_VERSION), "tool_version": VERSION, "digest": digest}
    for name in ("network", "provenance", "plan", "calibration", "required_base"):
        if (part := getattr(header, name)) is not None:
            entries[name] = part.model_dump_json()
    if header.provenance.random:
        entries["warning"] = RANDOM_WARNING
    atomic.write_bytes(path, save(state, entries))
    return digest


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a model file of slmsam2, or weights of another project that convert.py knows.

    Raises: WeightsError, with the file and the reason, when it cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Name a model file or its folder with --model, or run slmsam2 finetune")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path.name}: the file is empty, not a checkpoint. Download or train it again")
    if size > _MAX_BYTES:
        raise WeightsError(f"{path.name}: {size} bytes are too large for a model file of slmsam2")
    if path.suffix == ".json":
        try:
            parse_plan(atomic.read_json(path, "plan"), path.name)
            found = "is a plan, not a model"
        except (PlanError, atomic.JsonError) as error:
            found = f"is no model, and no valid plan ({error})"
        raise WeightsError(f"{path.name}: {found}. Name the .safetensors file that slmsam2 finetune wrote")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        else:
            header, state = {}, convert.read_pt(path)
    except OSError as error:
        raise WeightsError(f"{path.name}: cannot be read: {error.strerror or error}. Restore the file") from None
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) and path.suffix != ".safetensors":  # whose damaged header may ask for any amount
            raise
        raise WeightsError(f"{path.name}: corrupt or truncated ({first_line(error)}). Download or train it again") from None
    if "format_version" in header:
        return _read_header(path.name, state, header)
    converted = convert.convert_state(path.name, state)
    digest = tensors_digest(converted.state)
    return Checkpoint(path.name, converted.state, digest, converted.network, family=converted.family, notes=converted.notes)


def _read_header(name: str, state: State, header: Mapping[str, str]) -> Checkpoint:
    """Read the header of a model file of slmsam2 and compare it with the tensors. name: of the file, for messages.

    Raises: WeightsError when the format version is another, the digest differs, or an entry is damaged or does not fit the tensors.
    """
    version = header["format_version"]
    if version.isdecimal() and int(version) < FORMAT_VERSION:
        raise WeightsError(
            f"{name}: format version {version} was written by an earlier slmsam2 and is no longer supported "
            f"(supported: {FORMAT_VERSION}). Fine-tune again, or use the slmsam2 that wrote it"
        )
    if version != str(FORMAT_VERSION):
        raise WeightsError(f"{name}: format version {version} is newer than the supported {FORMAT_VERSION}. Update slmsam2")
    digest = tensors_digest(state)
    if digest != header.get("digest"):
        raise WeightsError(f"{name}: corrupt: its weights do not match the digest in its header. Download or train it again")
    try:
        network = NetworkPlan.model_validate_json(header["network"])
        provenance = Provenance.model_validate_json(header["provenance"])
        if "recipe" in header:  # of pretraining
            offset = -float(json.loads(header["recipe"]).get("object_score_shift", 0.0))
            provenance = provenance.model_copy(update={"object_score_offset": offset})
        plan = parse_plan(json.loads(header["plan"]), f"{name} (plan inside)") if "plan" in header else None
        calibration = Calibration.model_validate_json(header["calibration"]) if "calibration" in header else None
        required_base = RequiredBase.model_validate_json(header["required_base"]) if "required_base" in header else None
    except (KeyError, ValidationError, json.JSONDecodeError) as error:
        raise WeightsError(f"{name}: corrupt: its header is not readable ({first_line(error)})") from None
    if plan is not None:
        key, channels = f"{adapters.PREFIX}{plan.modality}.{adapters.INPUT}", len(plan.channels)
        read = state[key].shape[1] if key in state and state[key].ndim > 1 else None  # by the projection
        if read != (channels if channels > RGB_CHANNELS else None):
            wrong = f"the plan has {channels} channels, {key} reads {read or 'none'}"
            raise WeightsError(f"{name}: corrupt: {wrong}. Download or train it again")
    return Checkpoint(name, state, digest, network, plan, provenance, calibration, required_base)


def load_weights(model: SlmSam2, checkpoint: Checkpoint, modality: str | None = None) -> None:
    """Load weights and all adapters strictly, and switch to the adapter of `modality` if there is one. The label U-Net is not loaded.

    From weights without a short memory, the short stack starts as a copy of the long one.

    Raises: WeightsError, with the first tensors that are missing, unexpected or of another shape.
    """
    if checkpoint.required_base is not None:
        raise WeightsError(f"{checkpoint.name}: {checkpoint.required_base}. Name that base with --weights")
    given, added = adapters.split(without_label_unet(checkpoint.state))
    wanted = without_label_unet(model.state_dict())
    fresh = not any(name.startswith(_SHORT) for name in given)
    needed = {name: tensor.shape for name, tensor in wanted.items() if not (fresh and name.startswith(_SHORT))}
    if wrong := convert.shape_mismatch(needed, given):
        made_for, refused = checkpoint.network, f"{checkpoint.name}: does not fit network {model.network.size} ({model.network.policy})"
        if made_for is not None and made_for.size != model.network.size:
            plan = f"slmsam2 plan --network {made_for.size} --overwrite"
            raise WeightsError(f"{refused}: its network is {made_for.size}. Run {plan}, or use other weights")
        which = f" ({made_for.policy}, {made_for.fuser})" if made_for else ""
        raise WeightsError(f"{refused}: {wrong}. Set policy and fuser under network in plan.json to those of the weights{which}")
    model.load_state_dict(model.state_dict() | given)
    if fresh and hasattr(model, "short_memory_attention"):
        model.short_memory_attention.load_state_dict(model.memory_attention.state_dict())
    for name, state in added.items():
        adapters.attach(model, name, state, checkpoint.name)
    if modality in added:
        adapters.use(model, modality)


def label_unet_of(checkpoint: Checkpoint) -> LabelUNet | None:
    """Build the label U-Net of a checkpoint; None if it has none.

    Raises: WeightsError when its tensors are missing, unexpected or misshapen.
    """
    own = {name.removeprefix(LABEL_UNET_PREFIX): t for name, t in checkpoint.state.items() if name.startswith(LABEL_UNET_PREFIX)}
    if not own:
        return None
    try:
        label_unet = label_unet_from(own)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        wrong = f"the label U-Net is incomplete ({str(error).splitlines()[0][:120]})"
        raise WeightsError(f"{checkpoint.name}: corrupt: {wrong}. Download or train it again") from None
    except ValueError as error:
        raise WeightsError(f"{checkpoint.name}: corrupt: {error}. Download or train it again") from None
    if checkpoint.plan is not None:
        training = checkpoint.plan.training
        label_unet.can_add = training.object_score_target != "teacher" if training.can_add is None else training.can_add
    return label_unet


def combine_with_base(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Combine an adapter with the base that it was trained for into a whole model.

    Raises: WeightsError, with both names, when it is another base.
    """
    required = adapter.required_base
    if required is None:
        return adapter
    if required.digest != base.base_digest:
        raise WeightsError(
            f"{adapter.name}: {required}; {base.name} has the weights {base.base_digest[:12]}. Name the right base with --weights"
        )
    state = without_label_unet(base.state) | adapter.state
    return replace(adapter, state=state, digest=tensors_digest(state), required_base=None)


def resolve_adapter(adapter: Checkpoint, weights: str | None) -> Checkpoint:
    """Combine an adapter with the base that `weights` names; None: with the base that its file names, else with the bundled model.

    Raises: WeightsError when there is no base, or when it is another one.
    """
    required = adapter.required_base
    if required is None:
        return adapter
    if weights is None:
        known = zoo.NAME.fullmatch(required.name) and zoo.installed_path(required.name)
        if not known and not BUNDLED_WEIGHTS.is_file():
            raise WeightsError(f"{adapter.name}: {required}. Name that base with --weights")
        weights = required.name if known else "auto"
    base = load_base_weights(weights)
    if base is None:
        raise WeightsError(f"{adapter.name}: {required}. Random weights are not that base")
    return combine_with_base(adapter, base)


def load_base_weights(name: str) -> Checkpoint | None:
    """Read the weights to start from: `auto` (the bundled model), `random` (None), a name of `slmsam2 weights list`, or a file.

    Raises: WeightsError when there are none.
    """
    if name == RANDOM:
        return None
    if name == "auto":
        if not BUNDLED_WEIGHTS.is_file():
            raise WeightsError(
                "the bundled model is missing. Reinstall slmsam2, or start from SAM 2.1 (slmsam2 weights get sam2.1-tiny, then --weights "
                "sam2.1-tiny), from a checkpoint (--weights FILE), or from random weights (--weights random)"
            )
        return read_checkpoint(BUNDLED_WEIGHTS)
    entry = zoo.find(name)
    checkpoint = read_checkpoint(zoo.locate(name))
    if entry is None or checkpoint.provenance is not None:
        return checkpoint
    provenance = Provenance(pretrained=name, pretrained_digest=entry.sha256 or "", licence=entry.licence)
    return replace(checkpoint, name=name, provenance=provenance)
