"""Choose the model and the plan of a prediction, and build the network: weights with the adapter of the plan's modality merged.

The weights fix the network and its number of channels. Where a plan differs in this, the weights' setting is used, or the plan refused.

The first prediction of a folder of scans needs no data set: a plan is made from the images and their prompts. Its slice axis is the one
along which the annotation lies on the fewest slices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slmsam2_cli import console
from slmsam2_cli.dataset.checks import count_values
from slmsam2_cli.dataset.dataset_json import Case, Dataset
from slmsam2_cli.dataset.prompts import read_label_descriptions
from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import CaseError, DatasetError, PlanError, SlmSam2Error, UsageError, WeightsError
from slmsam2_cli.inference.segment import PromptSource
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import is_ignored_name
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
    """Choose --model, else --weights, else the workspace's fine-tuned model, else the bundled one. Returns it with its plan.

    --model may name an adapter; --weights then names its pretrained weights. A fine-tuned model uses its own plan, pretrained weights the
    workspace's. make_plan: makes a plan for weights of a known network where there is none.
    Raises: UsageError, WeightsError, PlanError.
    """
    if model is not None:
        checkpoint = _named(model, weights)
        plan = checkpoint.plan or _workspace_plan(workspace, checkpoint, data)
    elif weights is None and workspace is not None and workspace.model.exists():
        checkpoint = read_checkpoint(workspace.model)
        plan = checkpoint.plan or _workspace_plan(workspace, checkpoint, data)
        if read_split(workspace).get("finished") is False:
            console.warn("the workspace's model is from an unfinished run. Resume it with: slmsam2 finetune --continue")
    else:
        checkpoint = _base(weights)
        plan = _workspace_plan(workspace, checkpoint, data) or checkpoint.plan
    if plan is None and make_plan is not None and checkpoint.network is not None:
        plan = make_plan(checkpoint.network)
    if plan is None:
        raise PlanError(
            f"{checkpoint.name}: no plan (imported weights have none). "
            "Run slmsam2 plan on a data set like these images and use its workspace with -w"
        )
    _check_channels(checkpoint, plan, data)
    roi = f", ROI: {plan.geometry.roi_scale:g} times the prompt's bounding box" if plan.geometry.roi_scale else ""
    console.say(
        f"model: {plan.network.size} ({checkpoint.name}, weights {checkpoint.digest[:12]}), input {plan.geometry.input_size} px{roi}, "
        f"slice axis {plan.geometry.slice_axis}"
    )
    for warning in warnings_of(checkpoint, plan):
        console.warn(warning)
    used = plan.network.has_bank or plan.network.object_score_gate
    if checkpoint.calibration_for(plan.modality) is None:
        memory = "; the memory policy uses raw values too" if used else ""
        console.say(f"the model is not calibrated for this modality; confidence values are raw{memory}")
    elif used:
        console.say("confidence is calibrated; the memory policy uses calibrated values")
    return checkpoint, plan


def _named(model: Path, weights: str | None) -> Checkpoint:
    """Read the model of a file or folder; an adapter is put on its pretrained weights."""
    checkpoint = read_checkpoint(model_in(model) if model.is_dir() else model)
    if checkpoint.required_base is None and weights is not None:
        raise UsageError("--model and --weights cannot be combined, unless --model is an adapter")
    return resolve_adapter(checkpoint, weights)


def _check_channels(checkpoint: Checkpoint, plan: Plan, data: Dataset | None) -> None:
    """Warn when the channels of the data set have other names than the plan's. Raises: PlanError when their number differs."""
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
    """List the warnings about masks that these weights make with this plan, one line each."""
    warnings, known, channels = list(checkpoint.warnings), checkpoint.modalities, len(plan.channels)
    if known and plan.modality not in known:
        warnings.append(f"{checkpoint.name} has adapters for {', '.join(known)}, none for {plan.modality}: it is used without an adapter")
    if channels > RGB_CHANNELS and f"{adapters.PREFIX}{plan.modality}.{adapters.INPUT}" not in checkpoint.state:
        warnings.append(f"{checkpoint.name} was not trained on {channels} channels: it gets their means. Fine-tune it first")
    return tuple(warnings)


def build_model(checkpoint: Checkpoint, plan: Plan) -> SlmSam2:
    """Build the plan's network with these weights, and with their adapter, projection and calibration for the plan's modality.

    Raises: WeightsError when the weights do not fit.
    """
    model = SlmSam2(plan.network, plan.geometry.input_size)
    load_weights(model, checkpoint, plan.modality)
    adapters.ensure_projection(model, plan.modality, len(plan.channels), checkpoint.name)
    adapters.merge(model)
    model.calibration = checkpoint.calibration_for(plan.modality)
    model.label_unet = matching_label_unet(checkpoint, plan)
    return model


def matching_label_unet(checkpoint: Checkpoint, plan: Plan) -> LabelUNet | None:
    """Return the weights' label U-Net when it was trained on the labels and channels of the plan, else None."""
    found, theirs = label_unet_of(checkpoint), checkpoint.plan
    same = theirs is not None and (theirs.labels, theirs.channels) == (plan.labels, plan.channels)
    return found if same else None


def _workspace_plan(workspace: Workspace | None, base: Checkpoint, data: Dataset | None) -> Plan | None:
    """Read the workspace's plan for pretrained weights, with the network of the weights; None without a plan for these channels."""
    if workspace is None or not workspace.plan.exists():
        return None
    plan = read_plan(workspace.plan)
    if data is not None and data.channels != plan.channels:
        console.warn(
            f"plan.json has the channels {plan.channels}, the data set {data.channels}: plan.json is not used. Run slmsam2 plan --overwrite"
        )
        return None
    console.detail(f"{base.name} uses the workspace's plan.json")
    if base.network is None:
        return plan
    if base.network.size != plan.network.size:
        console.warn(
            f"plan.json is for network {plan.network.size}: its {plan.geometry.input_size} px may not suit {base.name}, of network "
            f"{base.network.size}. Run slmsam2 plan --network {base.network.size} --overwrite"
        )
    return match_fuser(plan, base).model_copy(update={"network": base.network})


def match_fuser(plan: Plan, weights: Checkpoint) -> Plan:
    """Return the plan with the fuser of the weights; warn when the plan names another."""
    theirs = fuser_of(weights)
    if theirs is None or not plan.network.has_short_stream or theirs == plan.network.fuser:
        return plan
    console.warn(f"plan.json has network.fuser {plan.network.fuser}, but {weights.name} has {theirs}: using {theirs}")
    return plan.model_copy(update={"network": plan.network.model_copy(update={"fuser": theirs})})


def fuser_of(weights: Checkpoint) -> FuserName | None:
    """Return the fuser of the weights; None when they have none."""
    return weights.network.fuser if weights.network is not None and weights.network.has_short_stream else None


def read_split(workspace: Workspace) -> dict[str, Any]:
    """Read split.json of the workspace; empty when there is none."""
    split = atomic.read_json(workspace.split, "the split") if workspace.split.exists() else {}
    return split if isinstance(split, dict) else {}


def _base(weights: str | None) -> Checkpoint:
    try:
        base = load_base_weights(weights or "auto")
    except WeightsError as error:
        raise WeightsError(f"no fine-tuned model here, and {error}" if weights is None else str(error)) from None
    if base is None:
        raise UsageError("--weights random cannot predict. Fine-tune first: slmsam2 finetune --weights random")
    return base


MAX_MEASURED = 20  # images; more would not change the plan
FILE = "plan.json"


def plan_from_prompts(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan, masks: Path, again: bool = False) -> Plan:
    """Read the plan of an earlier run in the folder `masks`, or make one from these cases and write it there (always when `again`).

    Raises: DatasetError when no case can be measured, PlanError for a plan that cannot be read, OutputError.
    """
    if (masks / FILE).exists() and not again:
        console.say(f"plan: using {masks / FILE} (--overwrite makes a new one)")
        try:
            return read_plan(masks / FILE)
        except PlanError as error:  # its own remedy is for workspaces
            what = re.split(r"\. (?:Correct it, or |Update slmsam2, or )?[Rr]un slmsam2 plan", str(error))[0]
            raise PlanError(f"{what}. Run slmsam2 predict with --overwrite to make a new plan in {masks}") from None
    if all(case.prompts.mask is None for case in cases):
        raise DatasetError(_without_masks([case.id for case in cases], prompts.folder))
    prompted = [replace(case, label=file) for case in cases if (file := case.prompts.mask) is not None][:MAX_MEASURED]
    plan = _decided(prompted, prompts, network)
    write_plan(masks / FILE, plan)
    console.say(
        f"plan: made from {len(prompted)} images with prompts ({plan.modality}, slice axis {plan.geometry.slice_axis}): {masks / FILE}"
    )
    return plan


def _without_masks(cases: Sequence[str], folder: Path) -> str:
    """Say that no image has a prompt mask, what was found in the folder instead, and what the names should be."""
    names = [path.name for path in sorted(folder.iterdir()) if not is_ignored_name(path.name)]
    seen = f"it holds {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "it is empty"
    images = f"{', '.join(cases[:3])}{f' and {len(cases) - 3} more' if len(cases) > 3 else ''}"
    return (
        f"{folder}: no image has a prompt mask of the same name; {seen}, and the images are {images}. "
        f"Save each mask under its image's name, such as {cases[0]}.nii.gz"
    )


def _decided(cases: Sequence[Case], prompts: PromptSource, network: NetworkPlan) -> Plan:
    problems: list[CaseError] = []
    labels = _labels(cases, prompts.folder, problems)
    if not labels:
        raise DatasetError(f"{prompts.folder}: no prompt mask can be used", tuple(problems))
    channels = tuple(f"channel {i}" if i else "image" for i in range(len(cases[0].images)))
    data = Dataset(prompts.folder, prompts.folder.resolve().name, channels, labels, None, ".nii.gz", tuple(cases), (), (), ())
    with console.progress("Analysing dataset", len(cases)) as advance:
        fingerprint, found = measure(data, advance)
    if not fingerprint.cases:
        raise DatasetError(f"{prompts.folder}: no image with a prompt can be used", found)
    axis = None if prompts.simulated else _annotated_axis(fingerprint, cases)
    plan = decide(fingerprint, network.size, axis=axis)
    if not prompts.simulated:  # a few annotated slices do not show how long structures are, nor their gaps
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
    """List the values in the masks as labels; masks that cannot be read are appended to `problems`."""
    values: set[int] = set()
    names = read_label_descriptions(root)
    for case in cases:
        assert case.label is not None
        try:
            labels = read_labels(case.label, case=case.id, root=root)
        except CaseError as problem:
            problems.append(problem)
            continue
        values |= set(count_values(labels.voxels)) - {0}
        names = {segment.value: segment.name for segment in labels.source.segments} | names
    named = {value: names.get(value, f"label {value}") for value in sorted(values)}
    return {value: name if list(named.values()).count(name) == 1 else f"{name} {value}" for value, name in named.items()}


def _annotated_axis(fingerprint: Fingerprint, cases: Sequence[Case]) -> Decision[SliceAxis] | None:
    """Return the axis that CASE.prompts.json names, else the one along which the annotation lies on the fewest slices; None for a tie.

    A list that cannot be used names none; it is an error when the prompts are read.
    """
    listed = set[Any]()
    for path in (case.prompts.listing for case in cases if case.prompts.listing is not None):
        with suppress(SlmSam2Error):
            value = atomic.read_json(path, "list of annotated slices")
            listed |= {axis for axis in AXES if isinstance(value, dict) and value.get("axis") == axis}
    if len(listed) == 1:
        (axis,) = listed
        return Decision(axis, "given in CASE.prompts.json")
    extents = [label.extents for case in fingerprint.cases for label in case.labels.values()]
    slices = np.array([[extent[axis].slices for axis in AXES] for extent in extents]).sum(axis=0)
    fewest = [axis for axis, count in zip(AXES, slices.tolist()) if count == slices.min()]
    return (
        Decision(fewest[0], f"the annotation lies on {slices.min()} slices along it, fewer than along the others")
        if len(fewest) == 1
        else None
    )
