"""The planning rules: pure functions from the fingerprint to a setting and the reason for it. Nothing is read, written or printed.

`decide` applies all of them and returns the plan. The numbers behind the rules are in docs/benchmarks.md; those on slice
spacing and empty slices come from benchmarks/plan_passes.py. Values that training and inference share with estimate.py are defined here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal

from slmsam2_cli.dataset.slices import AXES, SliceAxis
from slmsam2_cli.errors import DatasetError, UsageError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Extent, Fingerprint
from slmsam2_cli.planning.modality import choose_intensity, choose_modality
from slmsam2_cli.planning.plan import (
    MAX_CHANNELS,
    RGB_CHANNELS,
    ChannelIntensity,
    Decision,
    EvaluationPlan,
    FuserName,
    GeometryPlan,
    InferencePlan,
    NetworkPlan,
    NetworkSize,
    OverrideKey,
    Plan,
    TrainingPlan,
    channel_groups,
    with_digest,
)
from slmsam2_cli.planning.resolution import check_resolvable, choose_roi_input_size, thinnest_structure
from slmsam2_cli.version import VERSION

# Shared with training and inference
ROI_SCALE = 2.0  # edge of nano's ROI crop and of the label U-Net's, relative to the bounding box of the annotation
MAX_CACHED_BYTES = 2**31  # of slice features that propagation keeps
TRACKS_PER_CLIP = 4  # maximum number of passes through a training clip
LABEL_UNET_BATCH = 16  # slices per step
LABEL_UNET_WIDTH = 32  # channels up to an input of NARROW_LABEL_UNET_SIZE pixels; half as many above
MIN_LABEL_UNET_SIZE, NARROW_LABEL_UNET_SIZE, MAX_LABEL_UNET_SIZE = 48, 64, 128  # input edge in pixels
FOLDS = 2  # of cross-validation
FOLD_FRACTION, SINGLE_CASE_FRACTION = 0.3, 0.2  # steps of a fold relative to the final run: usually, and with one training case
CHECKPOINTS = (1 / 3, 2 / 3, 1.0)  # fractions of a fold's steps after which it is scored

LONG_STRUCTURE = 48  # slices; longer structures are segmented better with slices merged
EMPTY_SLICES_PER_GAP = 2  # max_empty_slices relative to the longest gap in a training label
MIN_EMPTY_SLICES = 6
BATCH_SLICES, BATCH_INPUT_SIZE = 8, 256  # slices encoded at a time, up to this input size
AS_STORED = "native slice spacing is kept, so each annotated slice maps to one network slice"
MAX_COUNTED_CASES = 20  # more training cases do not add steps
MAX_CASES_WITHOUT_ADDING = 2  # a label U-Net trained on so few cases adds false structures
ANISOTROPY_RATIO = 1.5  # an axis is coarse when its spacing is this many times that of the next
OVERLAP_MARGIN = 0.03  # differences in adjacent-slice overlap below this are ignored, see docs/experiments/2026-11-22-slice-axis.md
MASK_STRIDE = 4  # input pixels along the edge of a pixel of the predicted mask
MAX_VOXELS_PER_MASK_PIXEL = 1.5
MIN_INPUT_SIZE = 128
MAX_STORAGE_SIZE = 512
NATIVE_SIZES: dict[NetworkSize, int] = {"nano": 256, "tiny": 1024, "small": 1024, "base_plus": 1024, "large": 1024}
NSD_TOLERANCE_MM = 2.0
NSD_RADIUS_FRACTION = 3.0  # with a tolerance above radius / 3 of a thin structure, nearly every mask scores 1
TRAINING = "training."
_EDITABLE = ("strategy", "adapters", "label_unet", "can_add", "object_score_target", "validation", "workers")  # steps still follow the rule


def decide(
    fingerprint: Fingerprint,
    network: str | None = None,
    fuser: FuserName = "gated",
    axis: Decision[SliceAxis] | None = None,
    overrides: tuple[OverrideKey, ...] = (),
) -> Plan:
    """Apply all rules to a dataset.

    network, axis: as requested by the user; fuser: of the pretrained weights; overrides: keys that a command-line option set.

    Raises: DatasetError when no case is usable, there are too many channels or a structure is too thin; UsageError for unknown networks.
    """
    if not (cases := fingerprint.cases):
        raise DatasetError("no training case is usable, so no plan can be made")
    modality, intensity, channel_reasons = _choose_channels(fingerprint)
    size, axis = choose_network(network), axis or choose_slice_axis(fingerprint)
    geometry, geometry_reasons = _choose_geometry(fingerprint, size.value, axis.value, modality)
    training, inference = choose_training(size.value, len(cases)), choose_inference(cases, axis.value, geometry.input_size)
    tolerance = choose_nsd_tolerance_mm(fingerprint, axis.value, in_plane_spacing_mm(cases, axis.value))
    reasons = {**channel_reasons, "geometry.slice_axis": axis.reason, **geometry_reasons, "network.size": size.reason}
    reasons |= {"training": training.reason, "inference": inference.reason, "evaluation.nsd_tolerance_mm": tolerance.reason}
    plan = Plan(
        tool_version=VERSION,
        dataset_name=fingerprint.dataset_name,
        modality=modality,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        ignore=fingerprint.ignore,
        geometry=geometry,
        intensity=intensity,
        network=NetworkPlan(size=size.value, policy="shortlong", fuser=fuser),
        training=training.value,
        inference=inference.value,
        evaluation=EvaluationPlan(nsd_tolerance_mm=tolerance.value),
        reasons=reasons,
        overrides=overrides,
        fingerprint_digest=fingerprint.digest,
    )
    return with_digest(plan)


def _choose_channels(fingerprint: Fingerprint) -> tuple[str, tuple[ChannelIntensity, ...], dict[str, str]]:
    """Choose the modality of the first channel and the normalisation of every channel; returns them with the reasons by plan key."""
    channels = fingerprint.channels
    if len(channels) > MAX_CHANNELS:
        raise DatasetError(
            f"{fingerprint.dataset_name}: {len(channels)} channels ({', '.join(channels)}), but at most {MAX_CHANNELS} are supported. "
            f"Make a dataset of the {MAX_CHANNELS} that show the structures best"
        )
    modalities = [choose_modality(fingerprint, index) for index in range(len(channels))]
    intensity = [choose_intensity(fingerprint, index, kind.value) for index, kind in enumerate(modalities)]
    reasons = {"modality": "; ".join(f"{name}: {kind.reason}" for name, kind in zip(channels, modalities, strict=True))}
    if len(channels) > RGB_CHANNELS:
        means = " | ".join(" + ".join(channels[index] for index in group) for group in channel_groups(len(channels)))
        reasons["channels"] = (
            f"more than {RGB_CHANNELS}: the network learns a projection to {RGB_CHANNELS}, initialised as means of {means}"
        )
    reasons["intensity"] = "; ".join(f"{name}: {chosen.reason}" for name, chosen in zip(channels, intensity, strict=True))
    return modalities[0].value, tuple(chosen.value for chosen in intensity), reasons


def _choose_geometry(fingerprint: Fingerprint, size: NetworkSize, axis: SliceAxis, modality: str) -> tuple[GeometryPlan, dict[str, str]]:
    """Choose crop, resolution and sizes of slices; returns them with the reasons by plan key."""
    cases = fingerprint.cases
    crop, roi_scale, storage = choose_crop(cases, modality), choose_roi_scale(size), None
    fov = field_of_view_mm(cases, axis, crop.value)
    if roi_scale.value:
        finest = min(case.spacing_mm[index] for case in cases for index in in_plane(case, axis))  # so that no case loses voxels
        storage = choose_storage_size(fov, finest)
        pixel = choose_storage_mm(fov, finest, storage.value)
        edge = choose_roi_input_size(fingerprint, axis, roi_scale.value, pixel.value)
    else:
        spacing = in_plane_spacing_mm(cases, axis)
        edge = choose_input_size(fov, spacing, size)
        pixel = choose_in_plane_mm(fov, spacing, edge.value)
    check_resolvable(thinnest_structure(fingerprint, axis, size, edge.value, roi_scale.value, pixel.value), size, roi_scale.value)
    through = choose_through_plane_mm(cases, axis)
    geometry = GeometryPlan(
        slice_axis=axis,
        in_plane_mm=pixel.value,
        through_plane_mm=through.value,
        input_size=edge.value,
        crop_to_nonzero=crop.value,
        roi_scale=roi_scale.value,
        storage_size=storage.value if storage is not None else edge.value,
    )
    return geometry, {
        "geometry.crop_to_nonzero": crop.reason,
        "geometry.roi_scale": roi_scale.reason,
        **({"geometry.storage_size": storage.reason} if storage is not None else {}),
        "geometry.input_size": edge.reason,
        "geometry.in_plane_mm": pixel.reason,
        "geometry.through_plane_mm": through.reason,
    }


def requested_axis(fingerprint: Fingerprint, axis: SliceAxis) -> Decision[SliceAxis]:
    """Take the slice axis that the user requested, and note which one the data suggest."""
    suggested = choose_slice_axis(fingerprint)
    note = "the data suggest the same axis" if suggested.value == axis else f"the data suggest {suggested.value}: {suggested.reason}"
    return Decision(axis, f"set by the user; {note}")


def choose_slice_axis(fingerprint: Fingerprint) -> Decision[SliceAxis]:
    """Choose the coarse axis; without one, the axis along which masks of adjacent slices overlap most.

    Axes within OVERLAP_MARGIN of the best overlap count as equal. Among them the one is taken whose middle slice, copied to all slices,
    has the highest Dice: structures change least along it, and fewer ends have to be found. Ties: SI, AP, LR.
    """
    cases = fingerprint.cases
    stacks = [case for case in cases if 1 not in case.shape]
    if not stacks:
        singles = [sum(case.shape[index] == 1 for case in cases) for index in range(3)]
        return Decision(AXES[singles.index(max(singles))], "every case is a single slice")
    spacings = [median(case.spacing_mm[index] for case in stacks) for index in range(3)]
    spacing_text = ", ".join(f"{axis} {mm:.3g}" for axis, mm in zip(AXES, spacings, strict=True))
    coarsest = spacings.index(max(spacings))
    ratio = spacings[coarsest] / max(mm for index, mm in enumerate(spacings) if index != coarsest)
    if ratio > ANISOTROPY_RATIO:
        return Decision(AXES[coarsest], f"coarsest axis: median spacing {spacing_text} mm, {ratio:.2g} times the next")
    overlaps = {axis: round(axis_mean(stacks, axis, "overlap"), 3) for axis in AXES}
    copies = {axis: round(axis_mean(stacks, axis, "copied"), 3) for axis in AXES}
    candidates = [axis for axis in AXES if overlaps[axis] >= max(overlaps.values()) - OVERLAP_MARGIN]
    best = max(candidates, key=lambda axis: (copies[axis], -AXES.index(axis)))
    reason = (
        f"no coarse axis (median spacing {spacing_text} mm); masks of adjacent slices overlap most along this axis "
        f"(mean Dice {', '.join(f'{axis} {overlaps[axis]:.3f}' for axis in AXES)})"
    )
    if len(candidates) > 1:
        reason += (
            f"; {' and '.join(candidates)} are similar, and structures change least along {best} (middle slice copied: {copies[best]:.3f})"
        )
    return Decision(best, reason)


def axis_mean(cases: list[CaseFingerprint], axis: SliceAxis, measured: Literal["overlap", "copied"]) -> float:
    """Compute the mean over cases of the mean over labels of a Dice measured along an axis; 0 without any label."""
    per_case = [[getattr(label, measured)[axis] for label in case.labels.values() if axis in getattr(label, measured)] for case in cases]
    means = [sum(scores) / len(scores) for scores in per_case if scores]
    return sum(means) / len(means) if means else 0.0


def choose_crop(cases: tuple[CaseFingerprint, ...], modality: str) -> Decision[bool]:
    """Crop volumes to their non-zero voxels, except in CT, where 0 HU is water."""
    if modality == "CT":
        return Decision(False, "0 HU is water, so zero voxels are kept")
    kept = [math.prod(case.content_mm) / math.prod(case.extent_mm) for case in cases]
    return Decision(
        True, f"zero voxels around the content lie outside the scan; content fills {min(kept):.0%} to {max(kept):.0%} of the volumes"
    )


def in_plane(case: CaseFingerprint, axis: SliceAxis) -> tuple[int, int]:
    """Return the indices of the two axes (of S, P, L) that span a slice."""
    through = AXES.index(case.axis(axis))
    first, second = (index for index in range(3) if index != through)
    return first, second


def field_of_view_mm(cases: tuple[CaseFingerprint, ...], axis: SliceAxis, crop: bool) -> float:
    """Return the longest edge of any training slice in mm, after the crop."""
    extents = [case.content_mm if crop else case.extent_mm for case in cases]
    return max(extent[index] for case, extent in zip(cases, extents, strict=True) for index in in_plane(case, axis))


def in_plane_spacing_mm(cases: tuple[CaseFingerprint, ...], axis: SliceAxis) -> float:
    """Return the median over cases of the finer in-plane spacing in mm."""
    return median(min(case.spacing_mm[index] for index in in_plane(case, axis)) for case in cases)


def choose_roi_scale(size: NetworkSize) -> Decision[float | None]:
    """Use ROI crops with nano; the other networks were trained on whole images of 1024 pixels and see whole slices."""
    if size != "nano":
        return Decision(None, f"{size} sees whole slices")
    return Decision(ROI_SCALE, f"ROI: {ROI_SCALE:g}x the prompt's bounding box, so that small structures keep enough pixels")


def choose_storage_size(fov_mm: float, spacing_mm: float) -> Decision[int]:
    """Choose the smallest multiple of 32 pixels in which a slice keeps its voxels, at most MAX_STORAGE_SIZE."""
    needed = 32 * math.ceil(round(fov_mm / spacing_mm, 6) / 32)
    size = min(needed, MAX_STORAGE_SIZE)
    limit = ", the maximum" if needed > MAX_STORAGE_SIZE else ""
    return Decision(size, f"slices up to {fov_mm:.4g} mm wide with {spacing_mm:.3g} mm voxels are stored at {size} pixels{limit}")


def choose_storage_mm(fov_mm: float, spacing_mm: float, storage_size: int) -> Decision[float]:
    """Store one voxel per pixel, or less where the slice would not fit. Rounded up, so that every slice fits."""
    filling = fov_mm / storage_size
    reason = "one voxel per pixel" if filling <= spacing_mm else f"the largest training slice fills {storage_size} pixels"
    return Decision(round_up(max(filling, spacing_mm)), reason)


def choose_input_size(fov_mm: float, spacing_mm: float, size: NetworkSize) -> Decision[int]:
    """Choose the smallest multiple of 32 for which a mask pixel spans at most 1.5 voxels, within MIN_INPUT_SIZE and the native size."""
    native = NATIVE_SIZES[size]
    needed = 32 * math.ceil(round(fov_mm / spacing_mm * MASK_STRIDE / MAX_VOXELS_PER_MASK_PIXEL, 6) / 32)
    reason = (
        f"slices up to {fov_mm:.4g} mm wide with {spacing_mm:.3g} mm voxels need {needed} pixels "
        f"for mask pixels of {MAX_VOXELS_PER_MASK_PIXEL:g} voxels"
    )
    if needed > native:
        reason += f"; the maximum for {size} is {native}"
    elif needed < MIN_INPUT_SIZE:
        reason += f"; the minimum is {MIN_INPUT_SIZE}"
    return Decision(min(max(needed, MIN_INPUT_SIZE), native), reason)


def choose_in_plane_mm(fov_mm: float, spacing_mm: float, input_size: int) -> Decision[float]:
    """Fill the input with the field of view, but enlarge no voxel beyond one mask pixel. Rounded up, so that every slice fits."""
    filling, finest = fov_mm / input_size, spacing_mm / MASK_STRIDE
    reason = "the largest training slice fills the input" if filling >= finest else f"one voxel covers at most {MASK_STRIDE} input pixels"
    return Decision(round_up(max(filling, finest)), reason)


def round_up(value: float, digits: int = 5) -> float:
    """Round to the given number of significant digits, never down."""
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    rounded = float(f"{math.ceil(value / step) * step:.{digits}g}")
    return rounded if rounded >= value else float(f"{(math.ceil(value / step) + 1) * step:.{digits}g}")


def _extents(cases: Sequence[CaseFingerprint], axis: SliceAxis) -> list[Extent]:
    """List where labels lie along the slice axis, over all labels of all cases with more than one slice."""
    stacks = [case for case in cases if 1 not in case.shape]
    return [label.extents[case.axis(axis)] for case in stacks for label in case.labels.values() if case.axis(axis) in label.extents]


def choose_through_plane_mm(cases: Sequence[CaseFingerprint], axis: SliceAxis) -> Decision[float | None]:
    """Keep the spacing of slices; merge slices where structures extend over a median of more than LONG_STRUCTURE.

    Slices are never resampled to less than the largest spacing of any case, since nothing is known between two slices.
    """
    lengths = [extent.last - extent.first + 1 for extent in _extents(cases, axis)]
    if not lengths or median(lengths) <= LONG_STRUCTURE:
        return Decision(None, AS_STORED)
    spacings = [case.spacing_mm[AXES.index(case.axis(axis))] for case in cases if 1 not in case.shape]
    times = math.ceil(median(lengths) / LONG_STRUCTURE)
    wanted = float(f"{times * median(spacings):.5g}")
    long = f"structures extend over {median(lengths):g} slices (median), more than {LONG_STRUCTURE}"
    if wanted < max(spacings):
        return Decision(None, f"{AS_STORED}; {long}, but some cases have a slice spacing of {max(spacings):.3g} mm")
    return Decision(wanted, f"{long}: about {times} slices are merged into one")


def choose_inference(cases: Sequence[CaseFingerprint], axis: SliceAxis, input_size: int) -> Decision[InferencePlan]:
    """Choose the batch by the input size, and max_empty_slices by the longest gap in a training label."""
    batch = max(1, min(BATCH_SLICES, math.floor(BATCH_SLICES * (BATCH_INPUT_SIZE / input_size) ** 2)))
    gaps = [extent.gap for extent in _extents(cases, axis)]
    if not gaps:
        return Decision(InferencePlan(batch_slices=batch), "no label was measured, so propagation runs through all slices")
    stop = max(MIN_EMPTY_SLICES, EMPTY_SLICES_PER_GAP * max(gaps))
    seen = f"labels have gaps of up to {max(gaps)} slices" if max(gaps) else "labels have no gaps"
    return Decision(InferencePlan(batch_slices=batch, max_empty_slices=stop), f"{seen}: propagation stops after {stop} empty slices")


def stack_length(case: CaseFingerprint, axis: SliceAxis, through_mm: float | None) -> int:
    """Return the number of a case's slices after resampling to through_mm (None: as stored)."""
    index = AXES.index(case.axis(axis))
    return case.shape[index] if through_mm is None else max(1, round(case.shape[index] * case.spacing_mm[index] / through_mm))


def propagated_slices(
    case: CaseFingerprint, value: int, axis: SliceAxis, max_empty_slices: int | None, through_mm: float | None = None
) -> int:
    """Estimate through how many slices a label of a case is propagated."""
    slices, stored = stack_length(case, axis, through_mm), case.shape[AXES.index(case.axis(axis))]
    extent = case.labels[value].extents.get(case.axis(axis))
    if extent is None or max_empty_slices is None:
        return slices
    first, last = round(extent.first * slices / stored), round((extent.last + 1) * slices / stored)
    return min(slices, last + max_empty_slices) - max(0, first - max_empty_slices)


def choose_network(requested: str | None) -> Decision[NetworkSize]:
    """Take the requested network, else the bundled one.

    Raises: UsageError when the network is unknown.
    """
    if requested in (None, "nano"):
        return Decision("nano", "default: bundled model, runs on CPU")
    if requested not in NATIVE_SIZES:
        raise UsageError(f"--network {requested}: unknown network. Choose one of {', '.join(NATIVE_SIZES)}")
    return Decision(requested, "set by the user")


def choose_training(size: NetworkSize, cases: int, from_scratch: bool = False) -> Decision[TrainingPlan]:
    """Choose steps by the number of cases; the large networks use the published recipe, nano a faster one.

    Training from random weights takes more steps and a higher learning rate. Pretrained nano keeps its own object score (teacher):
    fine-tuning on one and on five cases did not improve it; larger numbers were not tested.
    """
    counted = min(cases, MAX_COUNTED_CASES)
    if size == "nano":
        steps, clips, rate, decay = (1500, 2, 6e-4, 0.01) if from_scratch else (min(200 + 80 * counted, 300 + 60 * counted), 1, 1e-4, 0.01)
    else:
        steps, clips, rate, decay = 100 * counted, 1, 1e-4, 0.1
    plan = TrainingPlan(
        steps=steps,
        clips_per_step=clips,
        learning_rate=rate,
        warmup_steps=max(5, steps // 20),
        weight_decay=decay,
        object_score_target="teacher" if size == "nano" and not from_scratch else "ground_truth",
        validation="cross-validation",
    )
    if from_scratch:
        return Decision(plan, f"defaults for {size} trained from random weights")
    plural = "s" if cases != 1 else ""
    return Decision(plan, f"defaults for {size} and {cases} training case{plural}; fine-tuning on fewer cases takes fewer steps")


def training_for(plan: Plan, used: int, from_scratch: bool = False) -> TrainingPlan:
    """Adapt the plan's training settings to the number of cases that are used, keeping manual edits and options.

    After a manual edit of steps or rates the settings stay as edited. can_add, unless set, depends on the number of cases either way.
    """
    optional = [key.removeprefix(TRAINING) for key in plan.overrides if key.startswith(TRAINING)]
    rules = [choose_training(plan.network.size, count).value for count in range(1, MAX_COUNTED_CASES + 1)]
    decided = next((rule for rule in rules if rule.steps == plan.training.steps), plan.training)
    edited = [name for name in _EDITABLE if plan.edited and getattr(plan.training, name) != getattr(decided, name)]
    chosen = {name: getattr(plan.training, name) for name in (*edited, *optional)}
    is_by_rule = not plan.edited or plan.training == decided.model_copy(update=chosen) and decided in rules
    by_rule = choose_training(plan.network.size, used, from_scratch).value
    settings = by_rule.model_copy(update=chosen) if is_by_rule else plan.training
    can_add = plan.network.size != "nano" or used > MAX_CASES_WITHOUT_ADDING or from_scratch
    return settings if settings.can_add is not None else settings.model_copy(update={"can_add": can_add})


def override_training(plan: Plan, settings: Mapping[str, float]) -> Plan:
    """Return the plan with training settings of command-line options, by field name; they do not count as manual edits."""
    if not settings:
        return plan
    training = TrainingPlan.model_validate(plan.training.model_dump() | dict(settings))
    reason = f"{plan.reasons['training']}; set by the user: {', '.join(f'{name} {value}' for name, value in settings.items())}"
    keys = tuple(TRAINING + name for name in sorted(settings))
    changed = {"training": training, "overrides": (*plan.overrides, *keys), "reasons": plan.reasons | {"training": reason}}
    return with_digest(plan.model_copy(update=changed))


def choose_nsd_tolerance_mm(fingerprint: Fingerprint, axis: SliceAxis, pixel_mm: float) -> Decision[float]:
    """Choose 2 mm, or a third of the radius of a thin structure, but never less than a pixel, the finest border that can be drawn.

    The radius is that of a circle with the area of the thinnest label's mean cross-section (median over cases). pixel_mm: in-plane spacing.
    """
    found = []
    for value, name in fingerprint.labels.items():
        radii = []
        for case in (case for case in fingerprint.cases if value in case.labels):
            label, cut = case.labels[value], case.axis(axis)
            if (extent := label.extents.get(cut)) is not None:
                pixel_mm2 = math.prod(mm for one, mm in zip(AXES, case.spacing_mm) if one != cut)
                radii.append(math.sqrt(label.voxels / extent.slices * pixel_mm2 / math.pi))
        if radii:
            found.append((median(radii), value, name))
    if not found:
        return Decision(NSD_TOLERANCE_MM, "default of 2 mm; no label was measured")
    radius, _, name = min(found)
    thin = radius / NSD_RADIUS_FRACTION
    if pixel_mm > min(thin, NSD_TOLERANCE_MM):
        return Decision(float(f"{pixel_mm:.2g}"), f"one pixel ({pixel_mm:.3g} mm), the finest border that can be drawn")
    if thin < NSD_TOLERANCE_MM:
        return Decision(float(f"{thin:.2g}"), f"a third of the radius of {name} ({radius:.1f} mm), the thinnest structure")
    return Decision(NSD_TOLERANCE_MM, f"default of 2 mm; {name}, the thinnest structure, has a radius of {radius:.1f} mm")
