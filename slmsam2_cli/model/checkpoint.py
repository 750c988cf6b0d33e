"""Models on disk: safetensors with a JSON header that says what they are, where they come from, and for which plan.

Loading is strict: a missing, unexpected or misshapen tensor is refused by name. Files of others pass through convert.py.

What a tuned model and its base were worth on volumes that neither had learned from, as the model's file records it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from slmsam2_cli.model.label_unet import LabelUNet, label_unet_from_state, without_label_unet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.model.zoo import BUNDLED_WEIGHTS as BUNDLED_WEIGHTS
from slmsam2_cli.planning.plan import NetworkPlan, Plan, parse_plan
from slmsam2_cli.version import VERSION


class Validation(BaseModel):
    """left_out: what nothing was learned from, in each short run; base, tuned: mean Dice there, before and after; steps: of the run on
    everything that these led to, 0 where there was none; label U-Net: whether it helped there, None where there is none; kept: which of
    the two the file holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    left_out: tuple[str, ...]
    base: float
    tuned: float
    steps: int
    label_unet: bool | None = None
    kept: Literal["base", "tuned"]


FORMAT_VERSION = 2
RANDOM = "random"
RANDOM_WARNING = "the model descends from random weights: for trials and tests, not for clinical data"
_MOST_BYTES = 4 * 2**30
_SHORT = ("short_memory_attention.", "stream_fuser.")


class Provenance(BaseModel):
    """Where weights come from. base: name of the weights training started from, or of those converted; base_digest: their
    digest (the file's SHA-256 where it was converted) or ""; licence: what the base may be used for, as published, or "";
    object_score_offset: by how much their object score was lowered once they were trained; random: whether any ancestor was random; seed,
    steps and seconds of training; training: ids of the data set's cases that
    these weights or their ancestors learned from; learned_from: SHA-256 of every image file they learned from;
    versions of libraries; validation: what they and their base were worth on volumes left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    base_digest: str = ""
    licence: str = ""
    random: bool = False
    object_score_offset: float = 0.0
    seed: int | None = None
    steps: int = 0
    seconds: float = 0.0
    training: tuple[str, ...] = ()
    learned_from: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    validation: Validation | None = None


class Needs(BaseModel):
    """The base that a file of adapters was made for: the name it had, and the digest of its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read. digest: SHA-256 over names, shapes and values; plan and provenance are None for files of others.

    calibration: what its confidence is worth, if that was measured; needs: for adapters alone, the base they belong on.
    family: whose layout it was in; notes: what was changed to bring it into ours.
    """

    name: str
    state: State
    digest: str
    network: NetworkPlan | None = None
    plan: Plan | None = None
    provenance: Provenance | None = None
    calibration: Calibration | None = None
    needs: Needs | None = None
    family: str = "slmsam2"
    notes: tuple[str, ...] = ()

    @property
    def base_digest(self) -> str:
        """The digest of the weights without adapters and label U-Net."""
        base = without_label_unet(adapters.split(self.state)[0])
        return tensors_digest(base) if len(base) < len(self.state) else self.digest

    @property
    def modalities(self) -> tuple[str, ...]:
        """For which modalities there are adapters inside; a projection of channels alone is none."""
        return tuple(modality for modality, own in adapters.split(self.state)[1].items() if set(own) != {adapters.INPUT})

    def calibration_for(self, modality: str) -> Calibration | None:
        """The table, where it was fitted on images of this modality."""
        return self.calibration if self.plan is not None and self.plan.modality == modality else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every artefact made with these weights has to say."""
        return (RANDOM_WARNING,) if self.provenance and self.provenance.random else ()


def tensors_digest(state: State) -> str:
    """SHA-256 (hex) over the tensors in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(
            tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def save_checkpoint(path: Path, model: SlmSam2, plan: Plan, provenance: Provenance, calibration: Calibration | None = None) -> str:
    """Write a model with its adapters and its plan; returns the weights' digest. OutputError when it cannot be written whole."""
    return save_weights(path, _plain(adapters.full_state(model)), model.network, provenance, plan, calibration)


def save_adapter(
    path: Path, model: SlmSam2, modality: str, plan: Plan, provenance: Provenance, needs: Needs, calibration: Calibration | None = None
) -> str:
    """Write one modality's adapter alone, to be put on its base by `combine_with_base`, and the label U-Net. Like `save_checkpoint`."""
    state = {f"{adapters.PREFIX}{modality}.{name}": tensor for name, tensor in adapters.adapter_state(model, modality).items()}
    own = model.label_unet.state_dict() if model.label_unet is not None else {}
    state |= {f"{LABEL_UNET_PREFIX}{name}": tensor for name, tensor in own.items()}
    return save_weights(path, _plain(state), model.network, provenance, plan, calibration, needs)


def _plain(state: State) -> State:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_weights(
    path: Path,
    state: State,
    network: NetworkPlan,
    provenance: Provenance,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    needs: Needs | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """Write contiguous tensors, without a plan where they were made for none. Like `save_checkpoint`.

    notes: more entries of the header, which no reader relies on.
    """
    digest = tensors_digest(state)
    parts = {"network": network, "provenance": provenance, "plan": plan, "calibration": calibration, "needs": needs}
    header = dict(notes or {}) | {"format_version": str(FORMAT_VERSION), "tool_version": VERSION, "digest": digest}
    header |= {name: part.model_dump_json() for name, part in parts.items() if part is not None}
    header |= {"warning": RANDOM_WARNING} if provenance.random else {}
    atomic.write_bytes(path, save(state, header))
    return digest


def read_checkpoint(path: Path) -> Checkpoint:
    """Weights of ours or of SAM 2.1. WeightsError names the file and the reason."""
    _check_file(path)
    try:
        return _read_native(path) if path.suffix == ".safetensors" else _read_external(path.name, convert.read_pt(path))
    except OSError as error:
        raise WeightsError(f"{path.name}: cannot be read: {error.strerror or error}. Restore the file") from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Name a model file or its folder with --model, or run slmsam2 finetune")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path.name}: is empty, not a checkpoint. Fetch or train it again")
    if size > _MOST_BYTES:
        raise WeightsError(f"{path.name}: {size} bytes is too large for a model of ours")
    if path.suffix == ".json":
        raise WeightsError(_json_reason(path))


def _json_reason(path: Path) -> str:
    """A plan given where weights belong: say what is wrong with it as a plan too, if anything is."""
    try:
        parse_plan(atomic.read_json(path, "plan"), path.name)
        found = "is a plan"
    except (PlanError, atomic.JsonError) as error:
        found = f"is a plan at best ({error})"
    return f"{path.name}: {found}, not a model. Give the .safetensors file that slmsam2 finetune wrote"


def _read_native(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise WeightsError(
            f"{path.name}: not a whole checkpoint, corrupt or truncated ({first_line(error)}). Fetch or train it again"
        ) from None
    if "format_version" not in header:
        return _read_external(path.name, state)
    if not header["format_version"].isdecimal() or int(header["format_version"]) > FORMAT_VERSION:
        raise WeightsError(
            f"{path.name}: format version {header['format_version']} is newer than this tool's {FORMAT_VERSION}. Update slmsam2"
        )
    if int(header["format_version"]) < FORMAT_VERSION:
        raise WeightsError(
            f"{path.name}: format version {header['format_version']} is of an earlier slmsam2; this one reads {FORMAT_VERSION}. "
            "Fine-tune again"
        )
    digest = tensors_digest(state)
    if digest != header.get("digest"):
        raise WeightsError(f"{path.name}: corrupt: its weights do not match the digest in its header. Fetch or train it again")
    try:
        network = NetworkPlan.model_validate_json(header["network"])
        provenance = _with_recipe(Provenance.model_validate_json(header["provenance"]), header)
        plan = parse_plan(json.loads(header["plan"]), f"{path.name} (plan inside)") if "plan" in header else None
        calibration = Calibration.model_validate_json(header["calibration"]) if "calibration" in header else None
        needs = Needs.model_validate_json(header["needs"]) if "needs" in header else None
    except (KeyError, ValidationError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path.name}: corrupt: its header is not readable ({first_line(error)})") from None
    if plan is not None and (wrong := adapters.channel_mismatch(state, plan)):
        raise WeightsError(f"{path.name}: corrupt: {wrong}. Fetch or train it again")
    return Checkpoint(path.name, state, digest, network, plan, provenance, calibration, needs)


def _with_recipe(provenance: Provenance, header: Mapping[str, str]) -> Provenance:
    """What a recipe of pre-training says of the object score. KeyError, JSONDecodeError."""
    if "recipe" not in header:
        return provenance
    return provenance.model_copy(update={"object_score_offset": -float(json.loads(header["recipe"]).get("object_score_shift", 0.0))})


def _read_external(name: str, state: State) -> Checkpoint:
    """Weights made elsewhere, in our layout."""
    converted = convert.convert(name, state)
    digest = tensors_digest(converted.state)
    return Checkpoint(name, converted.state, digest, converted.network, family=converted.family, notes=converted.notes)


def fit(model: SlmSam2, checkpoint: Checkpoint, modality: str | None = None) -> None:
    """Load weights strictly, and all adapters; the one for `modality` is put in force where there is one. No label U-Net.

    From weights without a short memory, the short stack starts as a copy of the long one. WeightsError names the first
    tensors that are missing, unexpected or of another shape.
    """
    if checkpoint.needs is not None:
        raise WeightsError(f"{checkpoint.name}: {_which_base(checkpoint.needs)}. Name that base with --weights")
    given, added = adapters.split(without_label_unet(checkpoint.state))
    wanted = without_label_unet(model.state_dict())
    fresh = not any(name.startswith(_SHORT) for name in given)
    needed = {name: tensor.shape for name, tensor in wanted.items() if not (fresh and name.startswith(_SHORT))}
    if wrong := convert.shape_mismatch(needed, given):
        raise WeightsError(_which_network(checkpoint, model.network, wrong))
    model.load_state_dict(model.state_dict() | given)
    if fresh and hasattr(model, "short_memory_attention"):
        model.copy_long_to_short()
    for name, state in added.items():
        adapters.attach(model, name, state, checkpoint.name)
    if modality in added:
        adapters.use(model, modality)


def label_unet_of(checkpoint: Checkpoint) -> LabelUNet | None:
    """What knows the labels these weights were tuned on, if anything does. WeightsError when it is damaged."""
    try:
        found = label_unet_from_state(checkpoint.state)
    except ValueError as error:
        raise WeightsError(f"{checkpoint.name}: corrupt: {error}. Fetch or train it again") from None
    if found is not None and checkpoint.plan is not None:
        training = checkpoint.plan.training
        found.raises = (
            training.object_score_target != "teacher" if training.can_add is None else training.can_add
        )  # None: written before it was a setting
    return found


def _which_network(checkpoint: Checkpoint, network: NetworkPlan, wrong: str) -> str:
    """Why weights do not fit: another size says it all, else tensors by name."""
    made_for, refused = checkpoint.network, f"{checkpoint.name}: does not fit network {network.size} ({network.policy})"
    if made_for is not None and made_for.size != network.size:
        return f"{refused}: it is of network {made_for.size}. Run slmsam2 plan --network {made_for.size} --overwrite, or choose others"
    which = f" ({made_for.policy}, {made_for.fuser})" if made_for else ""
    return f"{refused}: {wrong}. Choose the policy and fuser it was made for{which} under network in plan.json"


def _which_base(needs: Needs) -> str:
    return f"is an adapter for the base {needs.name} (weights {needs.digest[:12]}), not a whole model"


def combine_with_base(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """An adapter on the base it was made for, as one whole. WeightsError names both when it is another base."""
    needs = adapter.needs
    if needs is None:
        return adapter
    if needs.digest != base.base_digest:
        raise WeightsError(
            f"{adapter.name}: {_which_base(needs)}; {base.name} has the weights {base.base_digest[:12]}. "
            f"Give the base that it was made for with --weights"
        )
    state = without_label_unet(base.state) | adapter.state
    return replace(adapter, state=state, digest=tensors_digest(state), needs=None)


def resolve_adapter(adapter: Checkpoint, weights: str | None) -> Checkpoint:
    """An adapter on the base that `weights` names; on the one known by its name, or the embedded one, when None. WeightsError."""
    needs = adapter.needs
    if needs is None:
        return adapter
    if weights is None:
        known = zoo.NAME.fullmatch(needs.name) and zoo.installed_path(needs.name)
        if not known and not BUNDLED_WEIGHTS.is_file():
            raise WeightsError(f"{adapter.name}: {_which_base(needs)}. Name that base with --weights")
        weights = needs.name if known else "auto"
    base = load_base_weights(weights)
    if base is None:
        raise WeightsError(f"{adapter.name}: {_which_base(needs)}. Random weights are not it")
    return combine_with_base(adapter, base)


def load_base_weights(name: str) -> Checkpoint | None:
    """The weights to start from: `auto` (the embedded model), `random` (None), a name of `slmsam2 weights list`, or a file.

    WeightsError when there are none.
    """
    if name == RANDOM:
        return None
    if name == "auto":
        if not BUNDLED_WEIGHTS.is_file():
            raise WeightsError(
                "the base that comes with the package is missing. Install slmsam2 again, or start from SAM 2.1 (slmsam2 weights get "
                "sam2.1-tiny, then --weights sam2.1-tiny), from a checkpoint with --weights FILE, or from nothing with --weights random"
            )
        return read_checkpoint(BUNDLED_WEIGHTS)
    entry = zoo.find(name)
    checkpoint = read_checkpoint(zoo.locate(name))
    if entry is None or checkpoint.provenance is not None:
        return checkpoint
    return replace(checkpoint, name=name, provenance=Provenance(base=name, base_digest=entry.sha256 or "", licence=entry.licence))
