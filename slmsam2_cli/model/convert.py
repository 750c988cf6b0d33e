"""Weights of other projects: loaded without running code, recognised by their tensors, converted to this project's layout.

The names of the tensors decide the family, the shape of the trunk the size. A tensor too many, too few or of another shape is an error
that names it. SAM 2.0 lacks three tensors of SAM 2.1: it adds no encoding to pointers and no vector to empty memories, so zeros in their
place are exact. Only the names of the tensors of fine-tuned SLM-SAM 2 models are used.
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
# (channels, blocks) of the trunk
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
    """Weights in this project's layout. family: of the file. network: that they fit. notes: what was changed."""

    family: str
    network: NetworkPlan
    state: State
    notes: tuple[str, ...] = ()


def read_pt(path: Path) -> State:
    """Read the tensors of a `.pt` file, {"model": state} or the state itself, without running code in it.

    Only torch's zip format is read, and no zip with compressed members or members larger than the file (zip bombs).

    Raises: WeightsError when it is anything else.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(4) == b"PK\x03\x04"
        if truncated:
            raise WeightsError(f"{path.name}: corrupt or truncated. Download it again")
        raise WeightsError(f"{path.name}: not a checkpoint in torch's zip format, rejected as unsafe")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path.name}: corrupt or truncated ({first_line(error)}). Download it again") from None
    size = path.stat().st_size
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size > size for m in members):
        raise WeightsError(f"{path.name}: corrupt or unsafe: a member is compressed or too large")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path.name}: rejected, this checkpoint cannot be loaded safely ({first_line(error)})") from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path.name}: not a checkpoint: it contains no tensors")
    for name, v in state.items():
        if not isinstance(name, str) or v.layout != torch.strided or v.device.type != "cpu" or v.is_quantized:
            raise WeightsError(f"{path.name}: not a checkpoint: it contains sparse, quantised or empty (meta) tensors")
    if sum(v.numel() * v.element_size() for v in state.values()) > 2 * size:
        raise WeightsError(f"{path.name}: corrupt or unsafe: its tensors claim to be larger than the file")
    return dict(state)


def first_line(error: Exception) -> str:
    """Shorten a library's error message to 160 characters of its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def convert_state(name: str, state: State) -> Converted:
    """Convert the tensors of a known family. name: of the file, for messages.

    Raises: WeightsError when the family or the size is unknown, or when tensors are missing, unexpected or misshapen.
    """
    blocks = {int(found[1]) for key in state if (found := _TRUNK.match(key))}
    patches = state.get(_PATCHES)
    if patches is None or not blocks or not any(key.startswith("memory_attention.") for key in state):
        raise WeightsError(
            f"{name}: unsupported checkpoint (supported: SAM 2.0, SAM 2.1 and models fine-tuned from it, SLM-SAM 2); "
            f"first tensors: {', '.join(list(state)[:3])} …"
        )
    size = _SIZES.get((len(patches), len(blocks)))
    if size is None:
        raise WeightsError(f"{name}: unsupported size: {len(patches)} channels and {len(blocks)} blocks in the trunk")
    state, family, notes = _rename(state)
    if not any(key in state for key in _ONLY_IN_2_1):
        try:
            memory, hidden = state["maskmem_tpos_enc"].shape[-1], state["no_mem_embed"].shape[-1]
        except (KeyError, IndexError):
            raise WeightsError(f"{name}: incomplete: maskmem_tpos_enc or no_mem_embed is missing. Download it again") from None
        state |= {key: torch.zeros(shape) for key, shape in zip(_ONLY_IN_2_1, ((1, memory), (memory, hidden), (memory,)))}
        notes = (*notes, f"{', '.join(_ONLY_IN_2_1)} are set to zero, which is exact for SAM 2.0")
        family = "SAM 2.0" if family == "SAM 2.1" else family
    settings = {"size": size, "policy": "fifo"}
    if any(key.startswith(("short_memory_attention.", "stream_fuser.")) for key in state):
        settings |= {"policy": "shortlong", "fuser": "gated" if "stream_fuser.gate" in state else "sum"}
    network = NetworkPlan.model_validate(settings)
    if wrong := shape_mismatch(expected_shapes(network), state):
        raise WeightsError(f"{name}: recognised as {family} {size}, but not complete: {wrong}. Download it again, or ask its provider")
    return Converted(family, network, state, notes)


def _rename(state: State) -> tuple[State, str, tuple[str, ...]]:
    """Give the tensors of SLM-SAM 2 this project's names. Returns them with the family and notes on tensors that were left out."""
    if not any(key.startswith("recent_memory_") for key in state):
        native = any(key.startswith("short_memory_attention.") for key in state)
        return dict(state), "slmsam2" if native else "SAM 2.1", ()
    renamed = {}
    for key, tensor in state.items():
        if fuser := _FUSER.fullmatch(key):
            key = f"stream_fuser.blocks.{fuser[1]}.{'gamma' if fuser[2] == 'weight' else fuser[2]}"
        renamed[re.sub(r"^recent_memory_attention\.", "short_memory_attention.", key)] = tensor
    left_out = renamed.pop(_UNUSED_KEY, None)
    return renamed, "SLM-SAM 2", () if left_out is None else (f"{_UNUSED_KEY} left out: the model does not use it",)


class _LinspaceOnCpu(TorchFunctionMode):
    """Build linspace tensors on the CPU: SAM 2's trunk reads their numbers while it is built, and meta tensors have none."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call a torch function, `linspace` on the CPU."""
        named = dict(kwargs or {})
        if func is torch.linspace:
            named["device"] = "cpu"
        return func(*args, **named)


def expected_shapes(network: NetworkPlan) -> dict[str, torch.Size]:
    """List the shape of every tensor of a network by name, without allocating it; the input size does not matter."""
    with torch.device("meta"), _LinspaceOnCpu():
        return {name: tensor.shape for name, tensor in SlmSam2(network, 64).state_dict().items()}


def shape_mismatch(wanted: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> str:
    """Describe which tensors are missing, unexpected or of another shape, the first few by name; "" if all fit."""
    kinds = {
        "missing": [n for n in wanted if n not in given],
        "unexpected": [n for n in given if n not in wanted],
        "of another shape": [
            f"{n} {list(given[n].shape)} for {list(wanted[n])}" for n in wanted if n in given and given[n].shape != wanted[n]
        ],
    }
    parts = []
    for kind, names in kinds.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        parts += [f"{kind}: {', '.join(names[:_NAMES_SHOWN])}{more}"] if names else []
    return "; ".join(parts)
