"""Which part of the network learns: all of it, all but the trunk, what reads memory and draws masks, or an adapter.

Few-shot studies favour tuning little, but none of them is on propagation (docs/explanation/adapters.md), so everything is
the default and the rest is there to be measured.
"""

from __future__ import annotations

from slmsam2_cli.model import adapters
from slmsam2_cli.model.label_unet import PREFIX as LABEL_UNET_PREFIX
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import TrainingPlan

LABEL_UNET_RATE = 1e-3  # peak; it starts from nothing
MIN_NEW_RATE = 1e-4  # what starts at zero moves at least at this rate
_FRESH = (adapters.PREFIX, "stream_fuser.")
_TRUNK = "image_encoder.trunk."
_NOT_DECODER_OR_MEMORY = ("image_encoder.", "sam_prompt_encoder.")


def prepare(model: SlmSam2, plan: TrainingPlan, modality: str, channels: int = 1) -> tuple[str, ...]:
    """Let learn what the plan's strategy says, and nothing else; the seed is the plan's. Returns what is worth saying.

    Under `adapters` the modality's own adapter is added, or goes on learning where the base brings one. Under every other
    strategy that one is merged first, and those of other modalities are left out. The projection of more than three channels
    learns under every strategy. WeightsError when the adapter cannot be merged, or the projection is of other channels.
    """
    notes = _adapt(model, plan, modality) if plan.strategy == "adapters" else _plain(model, modality)
    if adapters.ensure_projection(model, modality, channels, "the base"):
        notes = (*notes, f"a projection of {channels} channels of {modality} to 3 is new and learns")
    learning = set(trainable_names(model, plan, modality))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return notes


def _adapt(model: SlmSam2, plan: TrainingPlan, modality: str) -> tuple[str, ...]:
    fresh = modality not in adapters.adapted(model)
    if fresh:
        adapters.add(model, modality, plan.adapters, plan.seed)
    adapters.use(model, modality)
    grown = adapters.count(adapters.branch_parameters(model, modality))
    tuned = adapters.count(adapters.tuned_parameters(model).values())
    return (f"{'a new' if fresh else 'the'} adapter for {modality} learns: {grown} parameters, and {tuned} of decoder heads and fuser",)


def _plain(model: SlmSam2, modality: str) -> tuple[str, ...]:
    known, adapted = adapters.modalities(model), modality in adapters.adapted(model)
    adapters.use(model, modality if modality in known else None)
    adapters.merge(model)
    merged = (f"the base's adapter for {modality} was merged",) if adapted else ()
    others = [name for name in known if name != modality]
    return (*merged, *([f"adapters for {', '.join(others)} are not carried on"] if others else []))


def trainable_names(model: SlmSam2, plan: TrainingPlan, modality: str) -> list[str]:
    """The parameters that the plan's strategy trains."""
    names = [name for name, _ in model.named_parameters()]
    if plan.strategy == "full":
        return names
    if plan.strategy == "frozen-encoder":
        return [name for name in names if not name.startswith(_TRUNK)]
    if plan.strategy == "decoder+memory":
        return [name for name in names if not name.startswith(_NOT_DECODER_OR_MEMORY)]
    tuned = adapters.tuned_parameters(model)
    return [name for name in names if name.startswith(f"{adapters.PREFIX}{modality}.") or name in tuned]


def parameter_groups(model: SlmSam2, plan: TrainingPlan) -> list[dict[str, object]]:
    """For the optimiser, what is trained: weight decay on matrices and kernels, none on biases, norms, gates, codes and
    projections of channels, which it would darken.

    `scale` times the plan's learning rate is the group's: unless everything is trained, adapters and fuser learn at least
    at MIN_NEW_RATE; a label U-Net learns at LABEL_UNET_RATE.
    """
    found: dict[tuple[float, bool], list[object]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(f".{adapters.INPUT}")
            found.setdefault((_scale(name, plan), plain), []).append(parameter)
    return [
        {"params": found[scale, plain], "weight_decay": 0.0 if plain else plan.weight_decay, "scale": scale}
        for scale, plain in sorted(found)
    ]


def _scale(name: str, plan: TrainingPlan) -> float:
    """How many times the plan's learning rate a parameter moves at."""
    if name.startswith(LABEL_UNET_PREFIX):
        return LABEL_UNET_RATE / plan.learning_rate
    fresh = plan.strategy != "full" and name.startswith(_FRESH)
    return max(1.0, MIN_NEW_RATE / plan.learning_rate) if fresh else 1.0
