"""Choose which part of the network is trained: all, all but the trunk, decoder and memory, or an adapter.

Few-shot studies favour training few parameters, but none of them is on propagation (docs/explanation/adapters.md), so the default is to
train all, and the other strategies are there to be measured.
"""

from __future__ import annotations

from slmsam2_cli.model import adapters
from slmsam2_cli.model.label_unet import PREFIX as LABEL_UNET_PREFIX
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import TrainingPlan

LABEL_UNET_RATE = 1e-3  # peak; it starts from random weights
MIN_NEW_RATE = 1e-4  # at least, for parameters that start at zero
_NEW = (adapters.PREFIX, "stream_fuser.")
_TRUNK = "image_encoder.trunk."
_NOT_DECODER_OR_MEMORY = ("image_encoder.", "sam_prompt_encoder.")


def prepare(model: SlmSam2, plan: TrainingPlan, modality: str, channels: int = 1) -> tuple[str, ...]:
    """Make exactly those parameters trainable that the plan's strategy trains. Returns lines for the log.

    Strategy `adapters` adds an adapter for the modality, or continues the one that the pretrained model has. Every other strategy merges
    the modality's adapter into the weights and drops those of other modalities. The projection of more than three channels is trained
    under every strategy. New parameters are drawn from the plan's seed.

    Raises: WeightsError when the adapter cannot be merged, or the projection is for other channels.
    """
    notes = []
    known, adapted = adapters.modalities(model), modality in adapters.adapted(model)
    if plan.strategy == "adapters":
        if not adapted:
            adapters.add(model, modality, plan.adapters, plan.seed)
        adapters.use(model, modality)
        size = adapters.count(adapters.branch_parameters(model, modality))
        others = adapters.count(adapters.tuned_parameters(model).values())
        kind = "the" if adapted else "a new"
        notes.append(f"training {kind} adapter for {modality}: {size} parameters, and {others} of decoder heads and fuser")
    else:
        adapters.use(model, modality if modality in known else None)
        adapters.merge(model)
        if adapted:
            notes.append(f"the pretrained model's adapter for {modality} was merged")
        if dropped := [name for name in known if name != modality]:
            notes.append(f"adapters for {', '.join(dropped)} were dropped")
    if adapters.ensure_projection(model, modality, channels, "the pretrained model"):
        notes.append(f"training a new projection of {channels} channels of {modality} to 3")
    trained = set(trainable_names(model, plan, modality))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return tuple(notes)


def trainable_names(model: SlmSam2, plan: TrainingPlan, modality: str) -> list[str]:
    """List the parameters that the plan's strategy trains."""
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
    """Group the trainable parameters for the optimiser by weight decay and learning rate; `scale` is a factor on the plan's rate.

    Weight decay applies to matrices and kernels, but not to biases, norms, gates, codes and projections of channels, which it would
    darken. Unless all parameters are trained, adapters and fuser are trained at MIN_NEW_RATE or more; a label U-Net at LABEL_UNET_RATE.
    """
    groups: dict[tuple[float, bool], list[object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith(LABEL_UNET_PREFIX):
            scale = LABEL_UNET_RATE / plan.learning_rate
        elif plan.strategy != "full" and name.startswith(_NEW):
            scale = max(1.0, MIN_NEW_RATE / plan.learning_rate)
        without_decay = parameter.ndim <= 1 or name.endswith(f".{adapters.INPUT}")
        groups.setdefault((scale, without_decay), []).append(parameter)
    return [
        {"params": groups[scale, without_decay], "weight_decay": 0.0 if without_decay else plan.weight_decay, "scale": scale}
        for scale, without_decay in sorted(groups)
    ]
