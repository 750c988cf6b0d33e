"""Models on disk: safetensors with a JSON header that says what they are, where they come from, and for which plan.

Loading is strict: a missing, unexpected or misshapen tensor is refused by name. Files of others pass through foreign.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slmsam2_cli.data import store
from slmsam2_cli.errors import PlanError, WeightsError
from slmsam2_cli.model import foreign, zoo
from slmsam2_cli.model.foreign import State, first_line
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.model.zoo import EMBEDDED as EMBEDDED
from slmsam2_cli.planning.network import NetworkPlan
from slmsam2_cli.planning.plan import Plan, parse_plan
from slmsam2_cli.version import VERSION

FORMAT_VERSION = 1
RANDOM = "random"
RANDOM_WARNING = "the model descends from random weights: for trials and tests, not for clinical data"
_MOST_BYTES = 4 * 2**30
_SHORT = ("short_memory_attention.", "stream_fuser.")


class Provenance(BaseModel):
    """Where weights come from. base: name of the weights training started from, or of those converted; base_digest: their
    digest (the file's SHA-256 where it was converted) or ""; licence: what the base may be used for, as published, or "";
    random: whether any ancestor was random; seed, steps and seconds of training; training: ids of the data set's cases that
    these weights or their ancestors learned from; learned_from: SHA-256 of every image file they learned from;
    versions of libraries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    base_digest: str = ""
    licence: str = ""
    random: bool = False
    seed: int | None = None
    steps: int = 0
    seconds: float = 0.0
    training: tuple[str, ...] = ()
    learned_from: tuple[str, ...] = ()
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read. digest: SHA-256 over names, shapes and values; plan and provenance are None for files of others."""

    name: str
    state: State
    digest: str
    network: NetworkPlan | None = None
    plan: Plan | None = None
    provenance: Provenance | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every artefact made with these weights has to say."""
        return (RANDOM_WARNING,) if self.provenance and self.provenance.random else ()


def digest_of(state: State) -> str:
    """SHA-256 (hex) over the tensors in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(
            tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def save_checkpoint(path: Path, model: SlmSam2, plan: Plan, provenance: Provenance) -> str:
    """Write a model with its plan; returns the weights' digest. OutputError when it cannot be written whole."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save_weights(path, state, model.network, provenance, plan)


def save_weights(path: Path, state: State, network: NetworkPlan, provenance: Provenance, plan: Plan | None = None) -> str:
    """Write contiguous tensors, without a plan where they were made for none. Like `save_checkpoint`."""
    digest = digest_of(state)
    header = {
        "format_version": str(FORMAT_VERSION),
        "tool_version": VERSION,
        "digest": digest,
        "network": network.model_dump_json(),
        "provenance": provenance.model_dump_json(),
    }
    header |= {"plan": plan.model_dump_json()} if plan is not None else {}
    header |= {"warning": RANDOM_WARNING} if provenance.random else {}
    store.write_bytes(path, save(state, header))
    return digest


def read_checkpoint(path: Path) -> Checkpoint:
    """Weights of ours or of SAM 2.1. WeightsError names the file and the reason."""
    _refuse_what_is_no_checkpoint(path)
    try:
        return _read_own(path) if path.suffix == ".safetensors" else _of_others(path.name, foreign.read_pt(path))
    except OSError as error:
        raise WeightsError(f"{path.name}: cannot be read: {error.strerror or error}. Restore the file") from None


def _refuse_what_is_no_checkpoint(path: Path) -> None:
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
        parse_plan(store.read_json(path, "plan"), path.name)
        found = "is a plan"
    except (PlanError, store.JsonError) as error:
        found = f"is a plan at best ({error})"
    return f"{path.name}: {found}, not a model. Give the .safetensors file that slmsam2 finetune wrote"


def _read_own(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise WeightsError(
            f"{path.name}: not a whole checkpoint, corrupt or truncated ({first_line(error)}). Fetch or train it again"
        ) from None
    if "format_version" not in header:
        return _of_others(path.name, state)
    if not header["format_version"].isdecimal() or int(header["format_version"]) > FORMAT_VERSION:
        raise WeightsError(
            f"{path.name}: format version {header['format_version']} is newer than this tool's {FORMAT_VERSION}. Update slmsam2"
        )
    digest = digest_of(state)
    if digest != header.get("digest"):
        raise WeightsError(f"{path.name}: corrupt: its weights do not match the digest in its header. Fetch or train it again")
    try:
        network = NetworkPlan.model_validate_json(header["network"])
        provenance = Provenance.model_validate_json(header["provenance"])
        plan = parse_plan(json.loads(header["plan"]), f"{path.name} (plan inside)") if "plan" in header else None
    except (KeyError, ValidationError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path.name}: corrupt: its header is not readable ({first_line(error)})") from None
    return Checkpoint(path.name, state, digest, network, plan, provenance)


def _of_others(name: str, state: State) -> Checkpoint:
    """Weights made elsewhere, in our layout."""
    converted = foreign.convert(name, state)
    return Checkpoint(name, converted.state, digest_of(converted.state), converted.network)


def fit(model: SlmSam2, checkpoint: Checkpoint) -> None:
    """Load weights strictly. From weights without a short memory, the short stack starts as a copy of the long one.

    WeightsError names the first tensors that are missing, unexpected or of another shape.
    """
    wanted, given = model.state_dict(), checkpoint.state
    fresh = not any(name.startswith(_SHORT) for name in given)
    needed = {name: tensor.shape for name, tensor in wanted.items() if not (fresh and name.startswith(_SHORT))}
    if wrong := foreign.misfit(needed, given):
        made_for = checkpoint.network
        which = f": {made_for.size}, policy {made_for.policy}, fuser {made_for.fuser}" if made_for else ""
        raise WeightsError(
            f"{checkpoint.name}: does not fit network {model.network.size} ({model.network.policy}): {wrong}. "
            f"Choose the network it was made for{which} (slmsam2 plan --network SIZE, or network in plan.json)"
        )
    model.load_state_dict(wanted | given)
    if fresh and hasattr(model, "short_memory_attention"):
        model.copy_long_to_short()


def base_weights(name: str) -> Checkpoint | None:
    """The weights to start from: `auto` (the embedded model), `random` (None), a name of `slmsam2 weights list`, or a file.

    WeightsError when there are none.
    """
    if name == RANDOM:
        return None
    if name == "auto":
        if not EMBEDDED.is_file():
            raise WeightsError(
                "this release embeds no base weights yet. Start from SAM 2.1 (slmsam2 weights get sam2.1-tiny, "
                "then --weights sam2.1-tiny), from a checkpoint with --weights FILE, or from nothing with --weights random"
            )
        return read_checkpoint(EMBEDDED)
    entry = zoo.find(name)
    checkpoint = read_checkpoint(zoo.locate(name))
    if entry is None or checkpoint.provenance is not None:
        return checkpoint
    return replace(checkpoint, name=name, provenance=Provenance(base=name, base_digest=entry.sha256 or "", licence=entry.licence))
