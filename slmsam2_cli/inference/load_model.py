"""Which model segments, by which plan, and the network that comes of them: base, adapter of the plan's modality, merged.

Weights decide what network it is, and of how many channels; a plan that says otherwise is not followed in this, or refused.

A plan for images that nobody planned for: measured on these images, where they carry prompts.

The first prediction of a folder of scans should need no data set. What a plan decides can be seen in the images and in what was
painted on them, the slice axis too: it is the one along which the paint lies on few slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slmsam2_cli import console
from slmsam2_cli.dataset.checks import count_values
from slmsam2_cli.dataset.dataset_json import Case, Dataset
from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import CaseError, DatasetError, PlanError, SlmSam2Error, UsageError, WeightsError
from slmsam2_cli.inference.segment import PromptSource
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import read_labels
from slmsam2_cli.model import adapters
from slmsam2_cli.model.checkpoint import Checkpoint, label_unet_of, load_base_weights, load_weights, read_checkpoint, resolve_adapter
from slmsam2_cli.model.export import model_in
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import RGB_CHANNELS, Decision, FuserName, NetworkPlan, Plan, read_plan, with_digest, write_plan
from slmsam2_cli.planning.rules import AS_STORED, MIN_EMPTY_SLICES, decide
from slmsam2_cli.workspace import Workspace


def choose_model(
    workspace: Workspace | None,
    model: Path | None,
    weights: str | None,
    data: Dataset | None,
    make_plan: Callable[[NetworkPlan], Plan] | None = None,
) -> tuple[Checkpoint, Plan]:
    """--model, else --weights, else the workspace's tuned model, else the base; and the plan that goes with it.

    otherwise: makes a plan for weights of a known network where there is none.

    --model may name an adapter; --weights then is the base it belongs on. A model follows its own plan, a base the workspace's.
    UsageError, WeightsError, PlanError.
    """
    if model is not None:
        checkpoint = _named(model, weights)
        plan = checkpoint.plan or _workspace_plan(workspace, checkpoint, data)
    elif weights is None and workspace is not None and workspace.model.exists():
        checkpoint = read_checkpoint(workspace.model)
        plan = checkpoint.plan or _workspace_plan(workspace, checkpoint, data)
        if read_split(workspace).get("finished") is False:
            console.warn("the workspace's model comes from an unfinished run. Resume with slmsam2 finetune --continue")
    else:
        checkpoint = _base(weights)
        plan = _workspace_plan(workspace, checkpoint, data) or checkpoint.plan
    if plan is None and make_plan is not None and checkpoint.network is not None:
        plan = make_plan(checkpoint.network)
    if plan is None:
        raise PlanError(
            f"{checkpoint.name}: the plan is missing (weights made elsewhere carry none). "
            "Run slmsam2 plan on a data set like these images and name its workspace with -w"
        )
    _check_channels(checkpoint, plan, data)
    sees = f", squares {plan.geometry.roi_scale:g} times as wide as the prompt" if plan.geometry.roi_scale else ""
    console.say(
        f"model: {checkpoint.name}, weights {checkpoint.digest[:12]}, {plan.network.size} at {plan.geometry.input_size} px{sees}, "
        f"slices along {plan.geometry.slice_axis}"
    )
    for warning in warnings_of(checkpoint, plan):
        console.warn(warning)
    if told := _confidence_message(checkpoint, plan):
        console.say(told)
    return checkpoint, plan


def _named(model: Path, weights: str | None) -> Checkpoint:
    """The model in a file or folder; an adapter comes with its base."""
    checkpoint = read_checkpoint(model_in(model) if model.is_dir() else model)
    if checkpoint.required_base is None and weights is not None:
        raise UsageError("--model and --weights both name a model. Give one of them")
    return resolve_adapter(checkpoint, weights)


def _check_channels(checkpoint: Checkpoint, plan: Plan, data: Dataset | None) -> None:
    """PlanError for a data set of another number of channels; where their names differ, in a line, since their order counts."""
    if data is None or data.channels == plan.channels:
        return
    theirs, ours = ", ".join(data.channels), ", ".join(plan.channels)
    if len(data.channels) != len(plan.channels):
        raise PlanError(
            f"{checkpoint.name} reads {len(plan.channels)} channels ({ours}), the data set has {len(data.channels)} ({theirs}). "
            "Choose another model, or fine-tune one on this data set"
        )
    if len(plan.channels) > 1:
        console.warn(f"the channels of the data set, {theirs}, are taken for {ours}, in this order")


def warnings_of(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """What is to be said of masks that these weights make by this plan, one line each."""
    return (*checkpoint.warnings, *_modality_warning(checkpoint, plan), *_channels_warning(checkpoint, plan))


def _channels_warning(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """One line where more than three channels are to be read, and the weights have learned no projection of them."""
    count = len(plan.channels)
    if count <= RGB_CHANNELS or f"{adapters.PREFIX}{plan.modality}.{adapters.INPUT}" in checkpoint.state:
        return ()
    return (f"{checkpoint.name} has not learned to read {count} channels: means of them are shown to it. Fine-tune it first",)


def _modality_warning(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """One line where the model has adapters, but none for these images."""
    known = checkpoint.modalities
    if not known or plan.modality in known:
        return ()
    return (f"{checkpoint.name} has adapters for {', '.join(known)}, none for {plan.modality}: its base is used as it is",)


def _confidence_message(checkpoint: Checkpoint, plan: Plan) -> str:
    """Whether confidence is calibrated, and whether memory goes by it; "" when it is and memory does not ask."""
    asks = plan.network.has_bank or plan.network.object_score_gate
    if checkpoint.calibration_for(plan.modality) is None:
        memory = ", and memory admits slices by raw values" if asks else ""
        return f"confidence is uncalibrated: the model carries no table for images like these{memory}"
    return "confidence is calibrated, and memory admits slices by it" if asks else ""


def build_model(checkpoint: Checkpoint, plan: Plan) -> SlmSam2:
    """The plan's network with these weights and what they know of images like the plan's: adapter, projection, calibration.

    The adapter for the plan's modality is in force, merged where it can be. WeightsError.
    """
    model = SlmSam2(plan.network, plan.geometry.input_size)
    load_weights(model, checkpoint, plan.modality)
    adapters.ensure_projection(model, plan.modality, len(plan.channels), checkpoint.name)
    adapters.merge(model)
    model.calibration = checkpoint.calibration_for(plan.modality)
    model.label_unet = matching_label_unet(checkpoint, plan)
    return model


def matching_label_unet(checkpoint: Checkpoint, plan: Plan) -> LabelUNet | None:
    """The weights' own label U-Net, where the plan is of the labels and channels that it was learned from."""
    found, theirs = label_unet_of(checkpoint), checkpoint.plan
    same = theirs is not None and (theirs.labels, theirs.channels) == (plan.labels, plan.channels)
    return found if same else None


def _workspace_plan(workspace: Workspace | None, base: Checkpoint, data: Dataset | None) -> Plan | None:
    """What was decided for these images, for a base that was made for others; the network stays the one the weights are of.

    None when there is no plan, or only one for other channels than the data set has.
    """
    if workspace is None or not workspace.plan.exists():
        return None
    plan = read_plan(workspace.plan)
    if data is not None and data.channels != plan.channels:
        console.warn(
            f"plan.json knows the channels {plan.channels}, the data set has {data.channels}: not used. Run slmsam2 plan --overwrite"
        )
        return None
    console.detail(f"{base.name} follows the workspace's plan.json")
    if base.network is None:
        return plan
    if base.network.size != plan.network.size:
        console.warn(
            f"plan.json is for network {plan.network.size}: its {plan.geometry.input_size} px may not suit {base.name}, of network "
            f"{base.network.size}. Run slmsam2 plan --network {base.network.size} --overwrite"
        )
    return match_fuser(plan, base).model_copy(update={"network": base.network})


def match_fuser(plan: Plan, weights: Checkpoint) -> Plan:
    """The plan with the fuser that the weights bring, which no other one fits; said where the plan names another."""
    theirs = fuser_of(weights)
    if theirs is None or not plan.network.has_short_stream or theirs == plan.network.fuser:
        return plan
    console.warn(f"plan.json says network.fuser {plan.network.fuser}, but {weights.name} has {theirs}: {theirs} is used")
    return plan.model_copy(update={"network": plan.network.model_copy(update={"fuser": theirs})})


def fuser_of(weights: Checkpoint) -> FuserName | None:
    """The fuser that the weights bring; None where they bring none."""
    return weights.network.fuser if weights.network is not None and weights.network.has_short_stream else None


def read_split(workspace: Workspace) -> dict[str, Any]:
    """What finetune says of its run; empty when there was none."""
    split = atomic.read_json(workspace.split, "the split") if workspace.split.exists() else {}
    return split if isinstance(split, dict) else {}


def _base(weights: str | None) -> Checkpoint:
    try:
        base = load_base_weights(weights or "auto")
    except WeightsError as error:
        raise WeightsError(f"no tuned model here, and {error}" if weights is None else str(error)) from None
    if base is None:
        raise UsageError("--weights random predicts noise. Fine-tune first: slmsam2 finetune --weights random")
    return base


MAX_MEASURED = 20  # images; more would not change a decision
FILE = "plan.json"


def plan_from_prompts(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan, masks: Path, again: bool = False) -> Plan:
    """The plan by which an earlier run into the folder `masks` went, or, `again`, one measured on these cases, written there.

    DatasetError when no case can be measured, PlanError for a plan that cannot be read, OutputError.
    """
    if (masks / FILE).exists() and not again:
        console.say(f"plan: {masks / FILE}, as before (--overwrite plans again)")
        return read_plan(masks / FILE)
    prompted = [replace(case, label=file) for case in cases if (file := prompts.file(case)) is not None][:MAX_MEASURED]
    plan = _decided(prompted, prompts, network)
    write_plan(masks / FILE, plan)
    console.say(f"planned on {len(prompted)} of these images: {plan.modality}, slices along {plan.geometry.slice_axis}: {masks / FILE}")
    return plan


def _decided(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan) -> Plan:
    problems: list[CaseError] = []
    labels = _labels(cases, prompts.folder, problems)
    if not labels:
        why = f"{prompts.folder}: no image has a painted mask of its own name, so nothing can be planned"
        raise DatasetError(f"{why}. Save each mask under its image's name", tuple(problems))
    channels = tuple(f"channel {i}" if i else "image" for i in range(len(cases[0].images)))
    data = Dataset(prompts.folder, prompts.folder.resolve().name, channels, labels, None, ".nii.gz", tuple(cases), (), (), ())
    with console.progress("measuring", len(cases)) as advance:
        fingerprint, found = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{prompts.folder}: none of the {len(found)} prompted images can be measured", found)
    painted = None if prompts.simulated else _annotated_axis(fingerprint, cases, prompts.folder)
    plan = decide(fingerprint, network.size, axis=painted)
    if not prompts.simulated:  # a slice or two tell nothing of how long structures are, and of gaps in them
        plan = plan.model_copy(
            update={
                "geometry": plan.geometry.model_copy(update={"through_plane_mm": None}),
                "inference": plan.inference.model_copy(update={"max_empty_slices": MIN_EMPTY_SLICES}),
                "reasons": plan.reasons
                | {
                    "geometry.through_plane_mm": AS_STORED,
                    "inference": f"default: propagation stops after {MIN_EMPTY_SLICES} empty slices",
                },
            }
        )
    return with_digest(plan.model_copy(update={"network": network}))


def _labels(cases: Sequence[Case], root: Path, problems: list[CaseError]) -> dict[int, str]:
    """The values that occur in any of the masks; masks that cannot be read are problems."""
    values: set[int] = set()
    for case in cases:
        assert case.label is not None
        try:
            values |= set(count_values(read_labels(case.label, case=case.id, root=root).voxels)) - {0}
        except CaseError as problem:
            problems.append(problem)
    return {value: f"label {value}" for value in sorted(values)}


def _annotated_axis(fingerprint: Fingerprint, cases: Sequence[Case], folder: Path) -> Decision[SliceAxis] | None:
    """The axis that a list of slices names, else the one along which the paint lies on the fewest slices; None when that is a tie."""
    listed = {axis for case in cases if (axis := _listed_axis(folder / f"{case.id}.prompts.json")) is not None}
    if len(listed) == 1:
        (axis,) = listed
        return Decision(axis, "named by the lists of annotated slices")
    extents = [label.extents for case in fingerprint.cases for label in case.labels.values()]
    slices = np.array([[extent[axis].slices for axis in AXES] for extent in extents]).sum(axis=0)
    fewest = [axis for axis, count in zip(AXES, slices.tolist()) if count == slices.min()]
    return Decision(fewest[0], f"the paint lies on {slices.min()} slices along it, on more along the others") if len(fewest) == 1 else None


def _listed_axis(path: Path) -> SliceAxis | None:
    """What CASE.prompts.json says of the axis; None when it says nothing that can be used, which is an error where it is read."""
    if not path.exists():
        return None
    try:
        value = atomic.read_json(path, "list of annotated slices")
    except SlmSam2Error:
        return None
    said = value.get("axis") if isinstance(value, dict) else None
    return next((axis for axis in AXES if axis == said), None)
