"""Low-rank adapters: small trainable additions for one modality beside frozen weights, as in LoRA (Hu et al., arXiv:2106.09685).

An adapter has a low-rank pair on every linear map of Hiera's attention (q, k and v apart) and of both memory-attention stacks. At
step 0 it changes nothing. Nothing connects slices in the encoder, so features of a slice can still be cached. A modality also has its
own copy of some small parts that are trained in full (`tuned_parameters`), and for images of more than three channels a projection to
three (adapter_layers.py), with or without an adapter. The projection cannot be merged into the weights, so it outlives the adapter.

One modality is in use at a time; `use(model, None)` is the network without adapters. Linear maps are not replaced: forward hooks add
the pairs, so the network keeps its keys. Saved files hold `adapters.<modality>.<linear map>.down` and `.up`,
`adapters.<modality>.tuned.<parameter>` and `adapters.<modality>.input.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model.adapter_layers import LowRank, Projection, channel_means
from slmsam2_cli.planning.plan import RGB_CHANNELS, AdapterPlan

PREFIX = "adapters."
INPUT = "input.weight"
_TUNED = "tuned."
_SITE = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.attn\.(qkv|proj)\Z|(short_)?memory_attention\.")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")
State = dict[str, Tensor]


class Adapters(nn.Module):
    """The adapters of all modalities.

    branches: modality -> name of a linear map -> pair. active: the modality whose pairs are in use. stored_values: the tuned parameters
    of the modalities that are not in use (None: those of the network without adapters). projections: of modalities with more than three
    channels. active_projection: the modality whose projection is in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.branches: dict[str, dict[str, LowRank]] = {}
        self.stored_values: dict[str | None, State] = {}
        self.projections: dict[str, Projection] = {}
        self.active_projection: str | None = None

    def register(self, path: str, module: nn.Module) -> None:
        """Add a module under a dotted path, so that its parameters have that name."""
        folder: nn.Module = self
        for part in path.split(".")[:-1]:
            if part not in folder._modules:
                folder.add_module(part, nn.Module())
            folder = folder.get_submodule(part)
        folder.add_module(path.rpartition(".")[2], module)


@dataclass(eq=False)
class _Hook:
    """Forward hook of the linear map `site`; it is copied along with the model."""

    adapters: Adapters
    site: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add what the pair in use computes for the linear map's input (..., in) to its output (..., out)."""
        active = self.adapters.active
        branch = self.adapters.branches[active].get(self.site) if active is not None else None
        return output if branch is None else branch(inputs[0], output)


def adapter_sites(model: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
    """List the linear maps that take a pair, with the number of parts of each.

    In Hiera: q, k and v (three parts) and the output projection. In the memory-attention stacks: all of self-attention, cross-attention
    and feed-forward.
    """
    found = ((name, module) for name, module in model.named_modules() if _SITE.match(name))
    return {name: (module, 3 if name.endswith(".qkv") else 1) for name, module in found if isinstance(module, nn.Linear)}


def adapters_of(model: nn.Module) -> Adapters | None:
    """Return the adapters of a model; None if it has none."""
    found = model._modules.get("adapters")
    return found if isinstance(found, Adapters) else None


def modalities(model: nn.Module) -> tuple[str, ...]:
    """List the modalities with an adapter, a projection, or both."""
    found = adapters_of(model)
    return tuple(dict.fromkeys([*found.branches, *found.projections])) if found is not None else ()


def adapted(model: nn.Module) -> tuple[str, ...]:
    """List the modalities with an adapter."""
    found = adapters_of(model)
    return tuple(found.branches) if found is not None else ()


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the small parts that a modality trains in full: the mask decoder without its transformer, the fuser, `carry_gain`."""
    owned = ("sam_mask_decoder.", "stream_fuser.", "carry_gain")
    transformer = "sam_mask_decoder.transformer."
    return {name: p for name, p in model.named_parameters() if name.startswith(owned) and not name.startswith(transformer)}


def branch_parameters(model: nn.Module, modality: str) -> list[nn.Parameter]:
    """List the parameters of a modality's low-rank pairs."""
    found = adapters_of(model)
    return [p for branch in found.branches[modality].values() for p in branch.parameters()] if found is not None else []


def to_rgb(model: nn.Module, frames: Tensor) -> Tensor:
    """Project frames (B, C, H, W) -> (B, 3, H, W) with the projection in use; without one, return them.

    Raises: ValueError when C is not what the projection reads, or not 3 without a projection.
    """
    found = adapters_of(model)
    projection = found.projections[found.active_projection] if found is not None and found.active_projection is not None else None
    expected = projection.channels if projection is not None else RGB_CHANNELS
    if frames.shape[1] != expected:
        raise ValueError(f"slices have {frames.shape[1]} channels, but the network reads {expected}")
    return projection(frames) if projection is not None else frames


def ensure_projection(model: nn.Module, modality: str, channels: int, source: str) -> bool:
    """Let the model read this number of channels; return whether that took a new projection. Up to three channels take none.

    Raises: WeightsError when the modality's projection reads another number of channels.
    """
    found = adapters_of(model)
    existing = found.projections.get(modality) if found is not None else None
    if existing is not None and existing.channels != channels:
        raise WeightsError(
            f"{source}: fine-tuned on {existing.channels} channels of {modality}, but the plan has {channels}. "
            f"Use other weights, or a dataset with the same {existing.channels} channels"
        )
    if channels <= RGB_CHANNELS:
        return False
    if existing is None:
        _add_projection(model, modality, Projection(channel_means(channels)))
    _get_or_create(model).active_projection = modality
    return existing is None


def _add_projection(model: nn.Module, modality: str, projection: Projection) -> None:
    """Register the projection of a modality; it is not in use."""
    adapters = _get_or_create(model)
    adapters.register(f"{checked_name(modality)}.input", projection.to(next(model.parameters())))
    adapters.projections[modality] = projection


def _get_or_create(model: nn.Module) -> Adapters:
    """Return the adapters of a model, and give it an empty set if it has none."""
    found = adapters_of(model)
    if found is None:
        found = Adapters()
        model.add_module("adapters", found)
    return found


def add(model: nn.Module, modality: str, plan: AdapterPlan, seed: int = 0) -> None:
    """Add a new adapter that changes nothing yet; it is not in use.

    The first matrix of a pair is uniform in +-1 / sqrt(width of the input), drawn on the CPU; the second is zero.

    Raises: ValueError when the modality has an adapter; WeightsError when its name cannot be part of a tensor's name.
    """
    rng = torch.Generator().manual_seed(seed)
    branches = {}
    for site, (linear, parts) in adapter_sites(model).items():
        down = (2 * torch.rand(parts, plan.rank, linear.in_features, generator=rng) - 1) / linear.in_features**0.5
        up = linear.weight.new_zeros(parts, linear.out_features // parts, plan.rank)
        branches[site] = LowRank(down.to(linear.weight), up)
    _install(model, modality, branches, {})


def attach(model: nn.Module, modality: str, state: Mapping[str, Tensor], source: str) -> None:
    """Add an adapter as it was saved, a projection, or both; they are not in use.

    source: name of the file, for messages.

    Raises: WeightsError, with the name of a tensor, when they do not fit the network.
    """

    def misfit(name: str) -> WeightsError:
        return WeightsError(f"{source}: the adapter for {modality} does not fit this network: {name}. Use the weights it was trained on")

    tuned = {name.removeprefix(_TUNED): tensor for name, tensor in state.items() if name.startswith(_TUNED)}
    known = {name: parameter.shape for name, parameter in tuned_parameters(model).items()}
    if wrong := [name for name, tensor in tuned.items() if known.get(name) != tensor.shape]:
        raise misfit(_TUNED + wrong[0])
    sites, branches = adapter_sites(model), dict[str, LowRank]()
    for site in sorted({name.rpartition(".")[0] for name in state if not name.startswith(_TUNED) and name != INPUT}):
        pair = {name.removeprefix(f"{site}."): tensor for name, tensor in state.items() if name.startswith(f"{site}.")}
        if site not in sites or set(pair) != {"down", "up"} or pair["down"].ndim != 3:
            raise misfit(site or min(name for name in state if "." not in name))
        (linear, expected), (parts, rank, width) = sites[site], pair["down"].shape
        if (parts, width) != (expected, linear.in_features) or pair["up"].shape != (parts, linear.out_features // parts, rank):
            raise misfit(site)
        branches[site] = LowRank(pair["down"].to(linear.weight), pair["up"].to(linear.weight))
    try:
        projection = Projection(state[INPUT].clone()) if INPUT in state else None
    except ValueError:
        raise misfit(INPUT) from None
    if branches or tuned:
        _install(model, modality, branches, tuned)
    if projection is not None:
        _add_projection(model, modality, projection)


def _install(model: nn.Module, modality: str, branches: dict[str, LowRank], tuned: State) -> None:
    """Register the pairs of a modality, its tuned parameters, and with the first adapter the hooks.

    Raises: ValueError when the modality has an adapter; WeightsError when its name cannot be part of a tensor's name.
    """
    adapters = _get_or_create(model)
    if not adapters.branches:
        for site, (linear, _) in adapter_sites(model).items():
            linear.register_forward_hook(_Hook(adapters, site))
    if modality in adapters.branches:
        raise ValueError(f"the network has an adapter for {modality}")
    checked_name(modality)
    for site, branch in branches.items():
        adapters.register(f"{modality}.{site}", branch)
    adapters.branches[modality] = branches
    base = adapters.stored_values[None] if adapters.active is not None else _tuned_values(model)
    adapters.stored_values[modality] = {name: value.clone() for name, value in base.items()} | tuned


def checked_name(modality: str) -> str:
    """Return a modality that can be part of a tensor's name.

    Raises: WeightsError when it cannot.
    """
    if not _NAME.match(modality) or hasattr(Adapters(), modality):
        raise WeightsError(f"modality {modality[:40]!r} cannot name an adapter. Use letters, digits, - and _, as in MR")
    return modality


def _tuned_values(model: nn.Module) -> State:
    """Copy the values of the tuned parameters."""
    return {name: parameter.detach().clone() for name, parameter in tuned_parameters(model).items()}


@torch.no_grad()
def use(model: nn.Module, modality: str | None) -> None:
    """Switch to the adapter and the projection of a modality, as far as it has them; None: to the network without adapters.

    Raises: ValueError when the modality has neither.
    """
    adapters = adapters_of(model)
    if modality is not None and modality not in modalities(model):
        raise ValueError(f"there is no adapter for {modality}")
    if adapters is None:
        return
    adapters.active_projection = modality if modality in adapters.projections else None
    wanted = modality if modality in adapters.branches else None
    if wanted == adapters.active:
        return
    adapters.stored_values[adapters.active] = _tuned_values(model)
    parameters = tuned_parameters(model)
    for name, value in adapters.stored_values.pop(wanted).items():
        parameters[name].copy_(value)
    adapters.active = wanted


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the pairs in use to the weights and remove all adapters; tuned parameters and projection in use stay."""
    found = adapters_of(model)
    if found is None:
        return
    sites = adapter_sites(model)
    for site, branch in (found.branches[found.active] if found.active is not None else {}).items():
        weight = sites[site][0].weight
        weight.add_(branch.delta().to(weight))
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
    del model._modules["adapters"]
    if found.active_projection is not None:
        _add_projection(model, found.active_projection, found.projections[found.active_projection])
        _get_or_create(model).active_projection = found.active_projection


def adapter_state(model: nn.Module, modality: str) -> State:
    """Return the tensors of a modality under the names that they have in a file, without `adapters.<modality>.`."""
    adapters = adapters_of(model)
    assert adapters is not None
    projection = {INPUT: adapters.projections[modality].weight.detach()} if modality in adapters.projections else {}
    if modality not in adapters.branches:
        return projection
    tuned = _tuned_values(model) if adapters.active == modality else adapters.stored_values[modality]
    pairs = {f"{site}.{name}": t for site, branch in adapters.branches[modality].items() for name, t in branch.state_dict().items()}
    return projection | pairs | {_TUNED + name: value for name, value in tuned.items()}


def full_state(model: nn.Module) -> State:
    """Return the tensors of the network without adapters, and those of every adapter under `adapters.<modality>.`."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIX)}
    adapters = adapters_of(model)
    if adapters is None:
        return state
    if adapters.active is not None:
        state |= adapters.stored_values[None]
    return state | {f"{PREFIX}{m}.{name}": tensor for m in modalities(model) for name, tensor in adapter_state(model, m).items()}


def split(state: Mapping[str, Tensor]) -> tuple[State, dict[str, State]]:
    """Split the tensors of a file into those of the network and, by modality, those of the adapters.

    Raises: WeightsError when a modality has a name that it could not have been saved under.
    """
    base = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    found: dict[str, State] = {}
    for name in sorted(set(state) - set(base)):
        modality, _, rest = name.removeprefix(PREFIX).partition(".")
        found.setdefault(checked_name(modality), {})[rest] = state[name]
    return base, found


def count(parameters: Iterable[Tensor]) -> int:
    """Count the numbers in tensors."""
    return sum(parameter.numel() for parameter in parameters)
