"""Small trainable additions, one set per modality, beside weights that stay as they are.

`lora`: a low-rank pair on every linear map of Hiera's attention (q, k and v apart) and of both memory-attention stacks
(Hu et al., arXiv:2106.09685). `bottleneck`: two residual adapters in every Hiera block instead (Houlsby et al.,
arXiv:1902.00751), with the same low-rank pairs in the memory stacks. Both end in zeros, so that at step 0 the model is the
base. Nothing reaches across slices, so a slice's features may still be kept.

A modality also owns its version of the small parts that are tuned as a whole (`tuned_parameters`). One modality is in use
at a time; `use(model, None)` is the base again. Linear maps are not replaced but hooked, so the base keeps its keys, and
what is added lies under `adapters.<modality>.`. There lies also the projection of a modality of more than three channels
(projection.py), `input.weight`, with or without anything beside it: it cannot be merged, so it outlives the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model.adapter_layers import Bottleneck, LowRank, Projection, fits, low_rank, means, saved_bottleneck
from slmsam2_cli.planning.plan import RGB_CHANNELS, AdapterPlan, Plan

PREFIX = "adapters."
INPUT = "input.weight"
_TUNED = "tuned."
_STACKS = ("memory_attention", "short_memory_attention")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")
State = dict[str, Tensor]


class Adapters(nn.Module):
    """All modalities' branches by site, the one in use, and the tuned values of those that are not (None: the base's).

    projections: of modalities with more than three channels; shown: the one that slices go through, None where it takes none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.branches: dict[str, dict[str, nn.Module]] = {}
        self.stored_values: dict[str | None, State] = {}
        self.projections: dict[str, Projection] = {}
        self.shown: str | None = None

    def put(self, modality: str, branches: Mapping[str, nn.Module]) -> None:
        """Register branches under `<modality>.<site>`."""
        for site, branch in branches.items():
            self._register(f"{modality}.{site}", branch)
        self.branches[modality] = dict(branches)

    def project(self, modality: str, projection: Projection) -> None:
        """Register a projection under `<modality>.input`."""
        self._register(f"{modality}.input", projection)
        self.projections[modality] = projection

    def _register(self, path: str, module: nn.Module) -> None:
        folder: nn.Module = self
        for part in path.split(".")[:-1]:
            if part not in folder._modules:
                folder.add_module(part, nn.Module())
            folder = folder.get_submodule(part)
        folder.add_module(path.rpartition(".")[2], module)


class _Hook:
    """What a linear map asks after every call; copied along with the model."""

    def __init__(self, adapters: Adapters, site: str) -> None:
        self.adapters, self.site = adapters, site

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        active = self.adapters.active
        branch = self.adapters.branches[active].get(self.site) if active is not None else None
        return output if branch is None else branch(inputs[0], output)


def encoder_sites(model: nn.Module, kind: str) -> dict[str, int]:
    """Linear maps of the Hiera blocks that take an adapter, with the number of parts each consists of."""
    found: dict[str, int] = {}
    for index, block in enumerate(model.get_submodule("image_encoder.trunk.blocks").children()):
        here = f"image_encoder.trunk.blocks.{index}"
        last = len(list(block.get_submodule("mlp.layers").children())) - 1
        lora = {f"{here}.attn.qkv": 3, f"{here}.attn.proj": 1}
        found |= lora if kind == "lora" else {f"{here}.attn.proj": 1, f"{here}.mlp.layers.{last}": 1}
    return found


def memory_sites(model: nn.Module) -> dict[str, int]:
    """Every linear map of the memory-attention stacks: q, k, v, out of self and cross attention, and the feed-forward."""
    stacks = [(name, child) for name, child in model.named_children() if name in _STACKS]
    return {f"{stack}.{name}": 1 for stack, child in stacks for name, inner in child.named_modules() if isinstance(inner, nn.Linear)}


def _linear(model: nn.Module, site: str) -> nn.Linear:
    found = model.get_submodule(site)
    assert isinstance(found, nn.Linear)
    return found


def of(model: nn.Module) -> Adapters | None:
    """The model's adapters; None when it never had one."""
    found = model._modules.get("adapters")
    return found if isinstance(found, Adapters) else None


def modalities(model: nn.Module) -> tuple[str, ...]:
    """For which modalities there are adapters, or a projection alone."""
    found = of(model)
    return tuple(dict.fromkeys([*found.branches, *found.projections])) if found is not None else ()


def adapted(model: nn.Module) -> tuple[str, ...]:
    """For which modalities there are adapters, whatever number of channels they read."""
    found = of(model)
    return tuple(found.branches) if found is not None else ()


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The small parts a modality owns whole: the mask decoder but for its transformer, the fuser, the gain of the carried mask."""

    def owned(name: str) -> bool:
        head = name.startswith("sam_mask_decoder.") and not name.startswith("sam_mask_decoder.transformer.")
        return head or name.startswith("stream_fuser.") or name == "carry_gain"

    return {name: parameter for name, parameter in model.named_parameters() if owned(name)}


def branch_parameters(model: nn.Module, modality: str) -> list[nn.Parameter]:
    """What an adapter adds, without the tuned parts and the projection."""
    found = of(model)
    return [p for branch in found.branches[modality].values() for p in branch.parameters()] if found is not None else []


def to_rgb(model: nn.Module, frames: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): through the projection in use; where there is none, C is 3. ValueError for another C."""
    found = of(model)
    projection = found.projections[found.shown] if found is not None and found.shown is not None else None
    reads = projection.channels if projection is not None else RGB_CHANNELS
    if frames.shape[1] != reads:
        raise ValueError(f"slices of {frames.shape[1]} channels, where the network reads {reads}")
    return projection(frames) if projection is not None else frames


def ensure_projection(model: nn.Module, modality: str, channels: int, source: str) -> bool:
    """Let the model in use read so many channels of a modality; whether that took a new projection, made of means of channels.

    Up to three take none. WeightsError names `source` when the modality's projection reads another number of channels.
    """
    found = of(model)
    there = found.projections.get(modality) if found is not None else None
    if there is not None and there.channels != channels:
        raise WeightsError(
            f"{source}: was tuned on {there.channels} channels of {modality}, the plan has {channels}. "
            f"Choose other weights, or a data set with the same {there.channels} channels"
        )
    if channels <= RGB_CHANNELS:
        return False
    if there is None:
        _project(model, modality, means(channels))
    _get_or_create(model).shown = modality
    return there is None


def _project(model: nn.Module, modality: str, weight: Tensor) -> None:
    _get_or_create(model).project(checked_name(modality), Projection(weight.to(next(model.parameters()))))


def _get_or_create(model: nn.Module) -> Adapters:
    """The model's adapters; made when there are none yet."""
    found = of(model)
    if found is None:
        found = Adapters()
        model.add_module("adapters", found)
    return found


def add(model: nn.Module, modality: str, plan: AdapterPlan, seed: int = 0) -> None:
    """Give the model an adapter that changes nothing yet; it is not in use. ValueError for a second one of the same modality."""
    rng = torch.Generator().manual_seed(seed)
    branches: dict[str, nn.Module] = {}
    for site, parts in encoder_sites(model, "lora").items():
        linear = _linear(model, site)
        branches[site] = low_rank(linear, parts, plan.rank, rng)
    for site, parts in memory_sites(model).items():
        branches[site] = low_rank(_linear(model, site), parts, plan.rank, rng)
    _install(model, modality, branches, {})


def attach(model: nn.Module, modality: str, state: Mapping[str, Tensor], source: str) -> None:
    """Give the model an adapter as it was saved, or a projection alone. WeightsError names `source` and what does not fit."""
    state = dict(state)
    weight = state.pop(INPUT, None)
    if weight is not None and not fits(weight):
        raise WeightsError(_mismatch_message(source, modality, INPUT))
    if state:
        _attach_branches(model, modality, state, source)
    if weight is not None:
        _project(model, modality, weight.clone())


def _attach_branches(model: nn.Module, modality: str, state: State, source: str) -> None:
    tuned = {name.removeprefix(_TUNED): tensor for name, tensor in state.items() if name.startswith(_TUNED)}
    known = {name: parameter.shape for name, parameter in tuned_parameters(model).items()}
    if wrong := [name for name, tensor in tuned.items() if known.get(name) != tensor.shape]:
        raise WeightsError(_mismatch_message(source, modality, _TUNED + wrong[0]))
    sites = {name.removesuffix(".weight").removesuffix(".down") for name in state if name.endswith((".down", ".down.weight"))}
    branches = {site: _saved_branch(model, modality, site, state, source) for site in sorted(sites)}
    given = {name for name in state if not name.startswith(_TUNED)}
    if extra := given - {f"{site}.{name}" for site, branch in branches.items() for name in branch.state_dict()}:
        raise WeightsError(_mismatch_message(source, modality, min(extra)))
    _install(model, modality, branches, tuned)


def _saved_branch(model: nn.Module, modality: str, site: str, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The branch whose tensors are `<site>.…` in the state, of the kind that their names and shapes say."""
    own = {name.removeprefix(f"{site}."): tensor for name, tensor in state.items() if name.startswith(f"{site}.")}
    allowed = encoder_sites(model, "lora") | encoder_sites(model, "bottleneck") | memory_sites(model)
    if site not in allowed:
        raise WeightsError(_mismatch_message(source, modality, site))
    linear = _linear(model, site)
    branch: LowRank | Bottleneck | None = None
    if set(own) == {"down", "up"} and own["down"].ndim == 3:
        parts, rank, width = own["down"].shape
        if parts == allowed[site] and width == linear.in_features and own["up"].shape == (parts, linear.out_features // parts, rank):
            branch = LowRank(own["down"].to(linear.weight), own["up"].to(linear.weight))
    elif "down.weight" in own and own["down.weight"].ndim == 2:
        branch = saved_bottleneck(linear, own)
    if branch is None:
        raise WeightsError(_mismatch_message(source, modality, site))
    return branch


def _mismatch_message(source: str, modality: str, name: str) -> str:
    return f"{source}: its adapter for {modality} does not fit this network: {name}. Choose the base it was made for"


def _install(model: nn.Module, modality: str, branches: Mapping[str, nn.Module], tuned: State) -> None:
    adapters = _get_or_create(model)
    if not adapters.branches:
        for site in encoder_sites(model, "lora") | encoder_sites(model, "bottleneck") | memory_sites(model):
            _linear(model, site).register_forward_hook(_Hook(adapters, site))
    if modality in adapters.branches:
        raise ValueError(f"there is an adapter for {modality} already")
    adapters.put(checked_name(modality), branches)
    base = adapters.stored_values[None] if adapters.active is not None else _values(model)
    adapters.stored_values[modality] = {name: value.clone() for name, value in base.items()} | tuned


def checked_name(modality: str) -> str:
    """A modality as it may stand in a tensor's name; WeightsError when it may not."""
    if not _NAME.match(modality) or hasattr(Adapters(), modality):
        raise WeightsError(f"modality {modality[:40]!r} cannot name an adapter. Use letters, digits, - and _, as in MR")
    return modality


def _values(model: nn.Module) -> State:
    return {name: parameter.detach().clone() for name, parameter in tuned_parameters(model).items()}


@torch.no_grad()
def use(model: nn.Module, modality: str | None) -> None:
    """Put in force what there is for one modality: adapter, projection or both; None: the base alone. ValueError for an unknown one."""
    adapters = of(model)
    if modality is not None and modality not in modalities(model):
        raise ValueError(f"there is no adapter for {modality}")
    if adapters is None:
        return
    adapters.shown = modality if modality in adapters.projections else None
    wanted = modality if modality in adapters.branches else None
    if wanted == adapters.active:
        return
    adapters.stored_values[adapters.active] = _values(model)
    live = tuned_parameters(model)
    for name, value in adapters.stored_values.pop(wanted).items():
        live[name].copy_(value)
    adapters.active = wanted


def can_merge(model: nn.Module) -> bool:
    """Whether the adapter in use is nothing but additions to weights."""
    found = of(model)
    return found is None or found.active is None or all(isinstance(b, LowRank) for b in found.branches[found.active].values())


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold the adapter in use into the weights and drop all adapters: the model is a plain one again, but for the projection in use.

    ValueError for bottlenecks.
    """
    adapters = of(model)
    if adapters is None:
        return
    branches = adapters.branches[adapters.active] if adapters.active is not None else {}
    if not can_merge(model):
        raise ValueError("bottleneck adapters are not linear and cannot be merged")
    for site, branch in branches.items():
        assert isinstance(branch, LowRank)
        weight = _linear(model, site).weight
        weight.add_(branch.delta().to(weight))
    drop(model)


def drop(model: nn.Module) -> None:
    """Forget all adapters; the tuned parts stay as they are in use, and the projection in use stays."""
    found = of(model)
    if found is None:
        return
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]:
            del module._forward_hooks[key]
    del model._modules["adapters"]
    if found.shown is not None:
        left = _get_or_create(model)
        left.project(found.shown, found.projections[found.shown])
        left.shown = found.shown


def adapter_state(model: nn.Module, modality: str) -> State:
    """An adapter's tensors: `<site>.down`, `<site>.up`, …, `tuned.<parameter>`, and `input.weight` for more than three channels."""
    adapters = of(model)
    assert adapters is not None
    shown = {INPUT: adapters.projections[modality].weight.detach()} if modality in adapters.projections else {}
    if modality not in adapters.branches:
        return shown
    branches = adapters.branches[modality]
    tuned = _values(model) if adapters.active == modality else adapters.stored_values[modality]
    added = {f"{site}.{name}": tensor for site, branch in branches.items() for name, tensor in branch.state_dict().items()}
    return shown | added | {_TUNED + name: value for name, value in tuned.items()}


def full_state(model: nn.Module) -> State:
    """The base's tensors under their own names, and every adapter's under `adapters.<modality>.`; whichever is in use."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIX)}
    adapters = of(model)
    if adapters is None:
        return state
    if adapters.active is not None:
        state |= adapters.stored_values[None]
    return state | {f"{PREFIX}{m}.{name}": tensor for m in modalities(model) for name, tensor in adapter_state(model, m).items()}


def split(state: Mapping[str, Tensor]) -> tuple[State, dict[str, State]]:
    """A file's tensors as those of the base, and by modality those of the adapters."""
    base = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    found: dict[str, State] = {}
    for name in sorted(set(state) - set(base)):
        modality, _, rest = name.removeprefix(PREFIX).partition(".")
        found.setdefault(checked_name(modality), {})[rest] = state[name]
    return base, found


def channel_mismatch(state: Mapping[str, Tensor], plan: Plan) -> str:
    """What is wrong with a file's projection for the channels of its own plan; "" when it fits."""
    name = f"{PREFIX}{plan.modality}.{INPUT}"
    wanted = len(plan.channels) if len(plan.channels) > RGB_CHANNELS else None
    found = state[name].shape[1] if name in state and state[name].ndim > 1 else None
    return f"its plan has {len(plan.channels)} channels, {name} reads {found or 'none'}" if found != wanted else ""


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers there are in all."""
    return sum(parameter.numel() for parameter in parameters)
