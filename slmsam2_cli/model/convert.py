"""Weights made elsewhere: loaded without running code, recognised by their keys, brought into our layout.

A family is known by which tensors it has, a size by the shape of its trunk; whatever has a tensor too many, too few or of
another shape is refused by name. SAM 2.0 differs from 2.1 in three tensors that it lacks: it adds no code to pointers and
no vector to empty memories, which is what zeros in their place do, exactly. The layout of tuned SLM-SAM 2 models is known
by the names of their tensors alone.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, NetworkSize

State = dict[str, Tensor]
_NAMES_SHOWN = 5
_TRUNK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_PATCHES = "image_encoder.trunk.patch_embed.proj.weight"
_SIZES: dict[tuple[int, int], NetworkSize] = {
    (96, 12): "tiny",
    (96, 16): "small",
    (112, 24): "base_plus",
    (144, 48): "large",
    (32, 8): "nano",
}
_ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
_UNUSED_KEY = "rec_maskmem_tpos_enc"
_FUSER = re.compile(r"recent_memory_fuser\.(?:layers\.)?(\d+)\.(.+)")


@dataclass(frozen=True)
class Converted:
    """A state in our layout. family: whose layout it was in; network: what it fits; notes: what was changed, to be said."""

    family: str
    network: NetworkPlan
    state: State
    notes: tuple[str, ...] = ()


def read_pt(path: Path) -> State:
    """The tensors of a `.pt`: {"model": state} or the state itself. WeightsError for anything else; no code in it is run."""
    _check_zip(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path.name}: not a checkpoint that can be loaded safely, refused ({first_line(error)})") from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path.name}: not a checkpoint: no format version and no tensors inside, the model is missing")
    if not all(
        isinstance(n, str) and v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized for n, v in state.items()
    ):
        raise WeightsError(f"{path.name}: not a checkpoint: it holds tensors that are not plain numbers")
    if sum(v.numel() * v.element_size() for v in state.values()) > 2 * path.stat().st_size:
        raise WeightsError(f"{path.name}: corrupt or unsafe: its tensors claim to be larger than the file")
    return dict(state)


def first_line(error: Exception) -> str:
    """An error of a library, short enough for a message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _check_zip(path: Path) -> None:
    """Members must be stored, not compressed, and small enough to fit the file (no bombs)."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            cut_zip = file.read(4) == b"PK\x03\x04"
        if cut_zip:
            raise WeightsError(f"{path.name}: corrupt or truncated. Fetch it again")
        raise WeightsError(f"{path.name}: not a checkpoint of torch's zip format, refused as unsafe")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path.name}: corrupt or truncated ({first_line(error)}). Fetch it again") from None
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > path.stat().st_size for m in members):
        raise WeightsError(f"{path.name}: corrupt or unsafe: a member is compressed or too large")


def convert(name: str, state: State) -> Converted:
    """Weights of a known family in our layout. WeightsError when they are of none, or not whole; `name` is the file's."""
    size = _size_of(name, state)
    state, family, notes = _renamed(state)
    if not any(key in state for key in _ONLY_IN_2_1):
        state, added = _with_zeros(name, state)
        notes, family = (*notes, added), "SAM 2.0" if family == "SAM 2.1" else family
    network = _network_of(size, state)
    if wrong := shape_mismatch(layout(network), state):
        raise WeightsError(f"{name}: looks like {family} {size}, but is not whole: {wrong}. Fetch it again, or ask whoever made it")
    return Converted(family, network, state, notes)


def _size_of(name: str, state: Mapping[str, Tensor]) -> NetworkSize:
    blocks = {int(found[1]) for key in state if (found := _TRUNK.match(key))}
    patches = state.get(_PATCHES)
    if patches is None or not blocks or not any(key.startswith("memory_attention.") for key in state):
        raise WeightsError(
            f"{name}: of no family known here (SAM 2.0, SAM 2.1 and what is tuned from it, SLM-SAM 2); "
            f"its tensors are called {', '.join(list(state)[:3])} …"
        )
    size = _SIZES.get((len(patches), len(blocks)))
    if size is None:
        raise WeightsError(f"{name}: of no size known here: {len(patches)} channels and {len(blocks)} blocks in the trunk")
    return size


def _renamed(state: State) -> tuple[State, str, tuple[str, ...]]:
    """Tensors under our names, the family, and what was left out."""
    if any(key.startswith("recent_memory_") for key in state):
        kept = {_map_name(key): tensor for key, tensor in state.items() if key != _UNUSED_KEY}
        return kept, "SLM-SAM 2", (f"{_UNUSED_KEY} left out: the model does not use it",) if _UNUSED_KEY in state else ()
    ours = any(key.startswith("short_memory_attention.") for key in state)
    return dict(state), "slmsam2" if ours else "SAM 2.1", ()


def _map_name(key: str) -> str:
    if fuser := _FUSER.fullmatch(key):
        return f"stream_fuser.blocks.{fuser[1]}.{'gamma' if fuser[2] == 'weight' else fuser[2]}"
    return key.replace("recent_memory_attention.", "short_memory_attention.", 1) if key.startswith("recent_memory_attention.") else key


def _with_zeros(name: str, state: State) -> tuple[State, str]:
    """SAM 2.0 adds nothing where 2.1 adds these: zeros add nothing either."""
    try:
        memory, hidden = state["maskmem_tpos_enc"].shape[-1], state["no_mem_embed"].shape[-1]
    except (KeyError, IndexError):
        raise WeightsError(f"{name}: not whole: maskmem_tpos_enc or no_mem_embed is missing. Fetch it again") from None
    shapes = ((1, memory), (memory, hidden), (memory,))
    zeros = {key: torch.zeros(shape) for key, shape in zip(_ONLY_IN_2_1, shapes)}
    return state | zeros, f"{', '.join(_ONLY_IN_2_1)} are zero: exactly what SAM 2.0 does without them"


def _network_of(size: NetworkSize, state: Mapping[str, Tensor]) -> NetworkPlan:
    if not any(key.startswith(("short_memory_attention.", "stream_fuser.")) for key in state):
        return NetworkPlan.model_validate({"size": size, "policy": "fifo"})
    fuser = "gated" if "stream_fuser.gate" in state else "sum"
    return NetworkPlan.model_validate({"size": size, "policy": "shortlong", "fuser": fuser})


class _LinspaceOnCpu(TorchFunctionMode):
    """SAM 2's trunk reads numbers out of a linspace while it is built, which a tensor without memory has none of."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.linspace:
            named["device"] = "cpu"
        return func(*args, **named)


def layout(network: NetworkPlan) -> dict[str, torch.Size]:
    """The shape of every tensor of a network, by name; nothing is allocated. The edge of a slice has no part in it."""
    with torch.device("meta"), _LinspaceOnCpu():
        return {name: tensor.shape for name, tensor in SlmSam2(network, 64).state_dict().items()}


def shape_mismatch(wanted: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> str:
    """Which tensors are missing, unexpected or of another shape, the first few by name; "" when all fit."""
    kinds = {
        "missing": [n for n in wanted if n not in given],
        "unexpected": [n for n in given if n not in wanted],
        "of another shape": [
            f"{n} {list(given[n].shape)} for {list(wanted[n])}" for n in wanted if n in given and given[n].shape != wanted[n]
        ],
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
