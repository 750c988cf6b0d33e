"""Every decision, as a pure function from the fingerprint to a value and its reason. Nothing is read, written or printed here.

How slices are walked through: how far apart they are, how many are encoded at a time, and when a pass gives up.

What these rules rest on was measured (benchmarks/plan_passes.py; docs/reference/benchmarks.md).
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
    COLOURS,
    MOST_CHANNELS,
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
    groups,
    signed,
)
from slmsam2_cli.planning.resolution import choose_roi_input_size, refuse_to_lose, thinnest_structure
from slmsam2_cli.version import VERSION

LONG = 48  # slices; structures over more of them lose at each step, so that twice the step is better
EMPTY_SLICES_PER_GAP = 2  # times the longest gap that was seen in a training label
MIN_EMPTY_SLICES = 6
BATCH, BATCH_PX = 8, 256  # so many slices at a time, while they are not larger than this
AS_STORED = "slices are left as stored, so that a person's slice is a slice of the network"


def choose_through_plane_mm(cases: Sequence[CaseFingerprint], axis: SliceAxis) -> Decision[float | None]:
    """As stored; but a multiple of the spacing where structures run over more than LONG slices, at which they run over fewer.

    Never less than the largest spacing of any case, and never finer than stored: what lies between two slices nobody has seen.
    """
    stacks = [case for case in cases if 1 not in case.shape]
    lengths = [extent.last - extent.first + 1 for case in stacks for extent in _extents(case, axis)]
    if not lengths or median(lengths) <= LONG:
        return Decision(None, AS_STORED)
    spacings = [_through_mm(case, axis) for case in stacks]
    times = math.ceil(median(lengths) / LONG)
    wanted = float(f"{times * median(spacings):.5g}")
    long = f"structures run over {median(lengths):g} slices, more than {LONG}"
    if wanted < max(spacings):
        return Decision(None, f"{AS_STORED}; {long}, but the slices of some case are {max(spacings):.3g} mm apart")
    return Decision(wanted, f"{long}: about {times} slices each are joined")


def choose_inference(cases: Sequence[CaseFingerprint], axis: SliceAxis, input_size: int) -> Decision[InferencePlan]:
    """Slices encoded at a time, by their size; and after how many slices without its object a pass ends, by the gaps in the labels."""
    batch = max(1, min(BATCH, math.floor(BATCH * (BATCH_PX / input_size) ** 2)))
    gaps = [extent.gap for case in cases if 1 not in case.shape for extent in _extents(case, axis)]
    if not gaps:
        return Decision(InferencePlan(batch_slices=batch), "no label was measured, so every slice is tracked")
    max_empty_slices = max(MIN_EMPTY_SLICES, EMPTY_SLICES_PER_GAP * max(gaps))
    seen = f"labels have gaps of up to {max(gaps)} slices" if max(gaps) else "no label has a gap"
    return Decision(
        InferencePlan(batch_slices=batch, max_empty_slices=max_empty_slices),
        f"{seen}: a pass ends {max_empty_slices} slices after its object has",
    )


def stack_length(case: CaseFingerprint, axis: SliceAxis, through_mm: float | None) -> int:
    """How many slices the network is given of a case."""
    slices = case.shape[AXES.index(case.axis(axis))]
    return slices if through_mm is None else max(1, round(slices * _through_mm(case, axis) / through_mm))


def propagated_slices(
    case: CaseFingerprint, value: int, axis: SliceAxis, max_empty_slices: int | None, through_mm: float | None = None
) -> int:
    """About how many of these are walked through for a label of a case."""
    slices, stored = stack_length(case, axis, through_mm), case.shape[AXES.index(case.axis(axis))]
    extent = case.labels[value].extents.get(case.axis(axis))
    if extent is None or max_empty_slices is None:
        return slices
    first, last = round(extent.first * slices / stored), round((extent.last + 1) * slices / stored)
    return min(slices, last + max_empty_slices) - max(0, first - max_empty_slices)


def _extents(case: CaseFingerprint, axis: SliceAxis) -> list[Extent]:
    cut = case.axis(axis)
    return [label.extents[cut] for label in case.labels.values() if cut in label.extents]


def _through_mm(case: CaseFingerprint, axis: SliceAxis) -> float:
    return case.spacing_mm[AXES.index(case.axis(axis))]


MANY = 20  # training cases; more do not lengthen the run
MAX_CASES_WITHOUT_ADDING = 2  # volumes; a recogniser of so few takes for the structure what only looks like it
ANISOTROPY_RATIO = 1.5  # an axis is coarse when its spacing is this many times that of the next
OVERLAP_MARGIN = 0.03  # neighbouring overlaps closer than this are equal, see docs/decisions.md
MASK_STRIDE = 4  # network pixels along the edge of one pixel of the mask the network predicts
MAX_VOXELS_PER_MASK_PIXEL = 1.5  # the most voxels one such pixel should span
MIN_INPUT_SIZE = 128
FOCUS = 2.0  # edge of nano's square, in widths of what is annotated
MAX_STORAGE_SIZE = 512
NATIVE_SIZES: dict[NetworkSize, int] = {"nano": 256, "tiny": 1024, "small": 1024, "base_plus": 1024, "large": 1024}
NSD_TOLERANCE_MM = 2.0
TRAINING = "training."
# A change of these leaves steps and rates to the rule.
_SETTINGS = ("strategy", "adapters", "label_unet", "can_add", "object_score_target", "validation", "workers")
THIN = 3.0  # a tolerance of more than one part in so many of a structure's radius forgives nearly everything


def decide(
    fingerprint: Fingerprint,
    network: str | None = None,
    fuser: FuserName = "gated",
    axis: Decision[SliceAxis] | None = None,
    overrides: tuple[OverrideKey, ...] = (),
) -> Plan:
    """The plan for a data set; fuser: that of the weights it starts from; axis: where that is settled already; overrides: the keys that an
    option settled. DatasetError when no case is usable, UsageError when the network is unknown.
    """
    cases = fingerprint.cases
    if not cases:
        raise DatasetError("no training case is usable, so nothing can be planned")
    if len(fingerprint.channels) > MOST_CHANNELS:
        raise DatasetError(
            f"{fingerprint.dataset_name}: {len(fingerprint.channels)} channels ({', '.join(fingerprint.channels)}), but the network reads "
            f"{MOST_CHANNELS} at most. Make a data set of the {MOST_CHANNELS} that show the structures best"
        )
    modalities = [choose_modality(fingerprint, index) for index in range(len(fingerprint.channels))]
    size = choose_network(network)
    axis = axis or choose_slice_axis(fingerprint)
    crop = choose_crop(cases, modalities[0].value)
    fov = field_of_view_mm(cases, axis.value, crop.value)
    spacing = in_plane_spacing_mm(cases, axis.value)
    roi_scale, finest = choose_roi_scale(size.value), finest_in_plane_mm(cases, axis.value)
    slices = choose_storage_size(fov, finest) if roi_scale.value else None
    if roi_scale.value and slices is not None:
        pixel = choose_storage_mm(fov, finest, slices.value)
        frame = choose_roi_input_size(fingerprint, axis.value, roi_scale.value, pixel.value)
    else:
        frame = choose_input_size(fov, spacing, size.value)
        pixel = choose_in_plane_mm(fov, spacing, frame.value)
    refuse_to_lose(
        thinnest_structure(fingerprint, axis.value, size.value, frame.value, roi_scale.value, pixel.value), size.value, roi_scale.value
    )
    through, inference = choose_through_plane_mm(cases, axis.value), choose_inference(cases, axis.value, frame.value)
    intensity = [choose_intensity(fingerprint, index, kind.value) for index, kind in enumerate(modalities)]
    training = choose_training(size.value, len(cases))
    tolerance = choose_nsd_tolerance_mm(fingerprint, axis.value, spacing)
    reasons = {
        "modality": "; ".join(f"{name}: {kind.reason}" for name, kind in zip(fingerprint.channels, modalities, strict=True)),
        **projection_reason(fingerprint.channels),
        "geometry.slice_axis": axis.reason,
        "geometry.crop_to_nonzero": crop.reason,
        "geometry.roi_scale": roi_scale.reason,
        **({"geometry.storage_size": slices.reason} if slices is not None else {}),
        "geometry.input_size": frame.reason,
        "geometry.in_plane_mm": pixel.reason,
        "geometry.through_plane_mm": through.reason,
        "intensity": "; ".join(f"{name}: {chosen.reason}" for name, chosen in zip(fingerprint.channels, intensity, strict=True)),
        "network.size": size.reason,
        "training": training.reason,
        "inference": inference.reason,
        "evaluation.nsd_tolerance_mm": tolerance.reason,
    }
    plan = Plan(
        tool_version=VERSION,
        dataset_name=fingerprint.dataset_name,
        modality=modalities[0].value,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        ignore=fingerprint.ignore,
        geometry=GeometryPlan(
            slice_axis=axis.value,
            in_plane_mm=pixel.value,
            through_plane_mm=through.value,
            input_size=frame.value,
            crop_to_nonzero=crop.value,
            roi_scale=roi_scale.value,
            storage_size=slices.value if slices is not None else None,
        ),
        intensity=tuple(chosen.value for chosen in intensity),
        network=NetworkPlan(size=size.value, policy="shortlong", fuser=fuser),
        training=training.value,
        inference=inference.value,
        evaluation=EvaluationPlan(nsd_tolerance_mm=tolerance.value),
        reasons=reasons,
        overrides=overrides,
        fingerprint_digest=fingerprint.digest,
    )
    return signed(plan)


def projection_reason(channels: Sequence[str]) -> dict[str, str]:
    """What becomes of more than three channels; nothing to be said of fewer."""
    if len(channels) <= COLOURS:
        return {}
    shown = " | ".join(" + ".join(channels[index] for index in group) for group in groups(len(channels)))
    return {"channels": f"more than {COLOURS}: a projection to {COLOURS} is learned, which starts as the means of {shown}"}


def requested_axis(fingerprint: Fingerprint, axis: SliceAxis) -> Decision[SliceAxis]:
    """What was asked for, and what the measurements say to it."""
    own = choose_slice_axis(fingerprint)
    agree = "the measurements agree" if own.value == axis else f"the measurements speak for {own.value}: {own.reason}"
    return Decision(axis, f"asked for; {agree}")


def choose_slice_axis(fingerprint: Fingerprint) -> Decision[SliceAxis]:
    """Propagate along the coarse axis; without one, along the axis whose neighbouring masks overlap most and vanish least.

    Axes within OVERLAP_MARGIN of the best overlap count as equal; among them the one whose middle slice, copied to all slices, fits best
    (structures are long and steady along it, so fewer ends have to be found). Ties: SI, AP, LR.
    """
    cases = fingerprint.cases
    stacks = [case for case in cases if 1 not in case.shape]
    if not stacks:
        singles = [sum(case.shape[index] == 1 for case in cases) for index in range(3)]
        return Decision(AXES[singles.index(max(singles))], "every case is a single slice")
    spacings = [median(case.spacing_mm[index] for case in stacks) for index in range(3)]
    shown = ", ".join(f"{axis} {mm:.3g}" for axis, mm in zip(AXES, spacings, strict=True))
    coarsest = spacings.index(max(spacings))
    ratio = spacings[coarsest] / max(mm for index, mm in enumerate(spacings) if index != coarsest)
    if ratio > ANISOTROPY_RATIO:
        return Decision(AXES[coarsest], f"the coarse axis: median spacing {shown} mm, {ratio:.2g} times the next")
    overlaps = {axis: round(axis_mean(stacks, axis, "overlap"), 3) for axis in AXES}
    copies = {axis: round(axis_mean(stacks, axis, "copied"), 3) for axis in AXES}
    rivals = [axis for axis in AXES if overlaps[axis] >= max(overlaps.values()) - OVERLAP_MARGIN]
    best = max(rivals, key=lambda axis: (copies[axis], -AXES.index(axis)))
    known = ", ".join(f"{axis} {overlaps[axis]:.3f}" for axis in AXES)
    rest = f"; of {' and '.join(rivals)}, its middle slice stands best for all ({copies[best]:.3f})" if len(rivals) > 1 else ""
    return Decision(best, f"no coarse axis (median spacing {shown} mm); neighbouring masks overlap most along it (mean Dice {known}){rest}")


def axis_mean(cases: list[CaseFingerprint], axis: SliceAxis, measured: Literal["overlap", "copied"]) -> float:
    """Mean over cases of the mean over labels of a Dice measured along an axis; 0 without any label."""
    each = [[getattr(label, measured)[axis] for label in case.labels.values() if axis in getattr(label, measured)] for case in cases]
    means = [sum(found) / len(found) for found in each if found]
    return sum(means) / len(means) if means else 0.0


def choose_crop(cases: tuple[CaseFingerprint, ...], modality: str) -> Decision[bool]:
    """Zero means nothing was measured, except in CT, where it is water."""
    if modality == "CT":
        return Decision(False, "0 HU is water, not the outside")
    kept = [math.prod(case.content_mm) / math.prod(case.extent_mm) for case in cases]
    return Decision(True, f"zeros around the content lie outside the scan; it fills {min(kept):.0%} to {max(kept):.0%} of the volumes")


def in_plane(case: CaseFingerprint, axis: SliceAxis) -> tuple[int, int]:
    """Indices of the two axes (of S, P, L) that span a slice."""
    through = AXES.index(case.axis(axis))
    first, second = (index for index in range(3) if index != through)
    return first, second


def field_of_view_mm(cases: tuple[CaseFingerprint, ...], axis: SliceAxis, crop: bool) -> float:
    """The longest edge of any training slice, after the crop."""
    extents = [case.content_mm if crop else case.extent_mm for case in cases]
    return max(extent[index] for case, extent in zip(cases, extents, strict=True) for index in in_plane(case, axis))


def in_plane_spacing_mm(cases: tuple[CaseFingerprint, ...], axis: SliceAxis) -> float:
    """Median over cases of the finer in-plane spacing."""
    return median(min(case.spacing_mm[index] for index in in_plane(case, axis)) for case in cases)


def finest_in_plane_mm(cases: tuple[CaseFingerprint, ...], axis: SliceAxis) -> float:
    """The finest in-plane spacing of any case, so that none loses voxels."""
    return min(case.spacing_mm[index] for case in cases for index in in_plane(case, axis))


def choose_roi_scale(size: NetworkSize) -> Decision[float | None]:
    """nano looks at a square around what is annotated; the others, made for whole pictures of 1024 px, at whole slices."""
    if size != "nano":
        return Decision(None, f"{size} sees whole slices")
    return Decision(FOCUS, f"nano sees a square {FOCUS:g} times as wide as what is annotated, so that a structure has pixels enough")


def choose_storage_size(fov_mm: float, spacing_mm: float) -> Decision[int]:
    """The smallest multiple of 32 in which a slice keeps its voxels, at most MAX_STORAGE_SIZE."""
    wanted = 32 * math.ceil(round(fov_mm / spacing_mm, 6) / 32)
    basis = f"{fov_mm:.4g} mm wide slices of {spacing_mm:.3g} mm voxels are stored at {min(wanted, MAX_STORAGE_SIZE)} px"
    return Decision(min(wanted, MAX_STORAGE_SIZE), basis + (", the most that is stored" if wanted > MAX_STORAGE_SIZE else ""))


def choose_storage_mm(fov_mm: float, spacing_mm: float, storage_size: int) -> Decision[float]:
    """A voxel a pixel; fewer only where the slice would not fit. Rounded up, so that all fits."""
    filling = fov_mm / storage_size
    reason = "a voxel a pixel" if filling <= spacing_mm else f"the largest training slice fills {storage_size} px"
    return Decision(round_up(max(filling, spacing_mm)), reason)


def choose_input_size(fov_mm: float, spacing_mm: float, size: NetworkSize) -> Decision[int]:
    """The smallest multiple of 32 for which a pixel of the predicted mask spans at most 1.5 voxels, within [128, native size]."""
    native = NATIVE_SIZES[size]
    wanted = 32 * math.ceil(round(fov_mm / spacing_mm * MASK_STRIDE / MAX_VOXELS_PER_MASK_PIXEL, 6) / 32)
    chosen = min(max(wanted, MIN_INPUT_SIZE), native)
    basis = f"{fov_mm:.4g} mm wide slices of {spacing_mm:.3g} mm voxels need {wanted} px for mask pixels of {MAX_VOXELS_PER_MASK_PIXEL:g} voxels"
    if wanted > native:
        return Decision(chosen, f"{basis}; {size} takes at most {native}")
    return Decision(chosen, basis if wanted >= MIN_INPUT_SIZE else f"{basis}; the smallest useful is {MIN_INPUT_SIZE}")


def choose_in_plane_mm(fov_mm: float, spacing_mm: float, input_size: int) -> Decision[float]:
    """The field of view fills the frame, but no voxel is blown up beyond one pixel of the predicted mask. Rounded up, so that all fits."""
    filling, finest = fov_mm / input_size, spacing_mm / MASK_STRIDE
    reason = "the largest training slice fills the frame" if filling >= finest else f"a voxel is spread over {MASK_STRIDE} pixels at most"
    return Decision(round_up(max(filling, finest)), reason)


def round_up(value: float, digits: int = 5) -> float:
    """To so many significant digits, never down."""
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    rounded = float(f"{math.ceil(value / step) * step:.{digits}g}")
    return rounded if rounded >= value else float(f"{(math.ceil(value / step) + 1) * step:.{digits}g}")


def choose_network(asked: str | None) -> Decision[NetworkSize]:
    """What was asked for, else the network that comes with the tool and runs anywhere."""
    if asked in (None, "nano"):
        return Decision("nano", "comes with the tool and runs on a CPU")
    if asked not in NATIVE_SIZES:
        raise UsageError(f"--network {asked}: no such network. Choose one of {', '.join(NATIVE_SIZES)}")
    return Decision(asked, "asked for")


def choose_training(size: NetworkSize, cases: int, from_scratch: bool = False) -> Decision[TrainingPlan]:
    """More volumes, more steps, up to a limit; the published recipe for the big networks, a faster one for the small.

    From random weights everything has to be learned, so the run is longer and its rate higher. From its base nano keeps what it
    knows of where structures end: one and five volumes taught it no better, more were not tried.
    """
    counted = min(cases, MANY)
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
    basis = (
        "from random weights"
        if from_scratch
        else f"and {cases} training case{'s' if cases != 1 else ''}; fine-tuning with fewer takes fewer steps"
    )
    return Decision(plan, f"for {size} {basis}")


def training_for(plan: Plan, used: int, from_scratch: bool = False) -> TrainingPlan:
    """A person's own training settings, or the rule's for the number of volumes that are really used, with what an option settled.

    Whether the recogniser may find, where nobody said, goes by that number in either case.
    """
    asked = [key.removeprefix(TRAINING) for key in plan.overrides if key.startswith(TRAINING)]
    rules = [choose_training(plan.network.size, count).value for count in range(1, MANY + 1)]
    decided = next((rule for rule in rules if rule.steps == plan.training.steps), plan.training)
    own = [name for name in _SETTINGS if plan.edited and getattr(plan.training, name) != getattr(decided, name)]
    chosen = {name: getattr(plan.training, name) for name in (*own, *asked)}
    is_by_rule = not plan.edited or plan.training == decided.model_copy(update=chosen) and decided in rules
    by_rule = choose_training(plan.network.size, used, from_scratch).value
    settled = by_rule.model_copy(update=chosen) if is_by_rule else plan.training
    can_add = plan.network.size != "nano" or used > MAX_CASES_WITHOUT_ADDING or from_scratch
    return settled if settled.can_add is not None else settled.model_copy(update={"can_add": can_add})


def override_training(plan: Plan, asked: Mapping[str, float]) -> Plan:
    """The plan with training settings that an option settled, by their names, as the tool's own decisions."""
    if not asked:
        return plan
    settings = TrainingPlan.model_validate(plan.training.model_dump() | dict(asked))
    reason = f"{plan.reasons['training']}; asked for: {', '.join(f'{name} {value}' for name, value in asked.items())}"
    keys = tuple(TRAINING + name for name in sorted(asked))
    changed = {"training": settings, "overrides": (*plan.overrides, *keys), "reasons": plan.reasons | {"training": reason}}
    return signed(plan.model_copy(update=changed))


def choose_nsd_tolerance_mm(fingerprint: Fingerprint, axis: SliceAxis, pixel_mm: float) -> Decision[float]:
    """2 mm; for a thin structure a third of its radius, but never less than a pixel, below which nobody can draw.

    The radius is that of a circle as large as the thinnest label's median cross-section; pixel_mm: in-plane spacing.
    """
    by_label = {label: radii for label in fingerprint.labels if (radii := _radii_mm(fingerprint.cases, label, axis))}
    if not by_label:
        return Decision(NSD_TOLERANCE_MM, "the usual 2 mm; no label was measured")
    radius, label = min((median(radii), label) for label, radii in by_label.items())
    thin, name = radius / THIN, fingerprint.labels[label]
    if pixel_mm > min(thin, NSD_TOLERANCE_MM):
        return Decision(_two_digits(pixel_mm), f"a pixel of {pixel_mm:.3g} mm, the least that can be drawn")
    if thin < NSD_TOLERANCE_MM:
        return Decision(_two_digits(thin), f"a third of the radius of {name} ({radius:.1f} mm), the thinnest")
    return Decision(NSD_TOLERANCE_MM, f"the usual 2 mm; {name}, the thinnest, has a radius of {radius:.1f} mm")


def _radii_mm(cases: tuple[CaseFingerprint, ...], label: int, axis: SliceAxis) -> list[float]:
    """Of every case that holds the label, the radius of a circle as large as its mean cross-section."""
    found = []
    for case in cases:
        measured = case.labels.get(label)
        cut = case.axis(axis)
        extent = measured.extents.get(cut) if measured is not None else None
        if measured is not None and extent is not None:
            pixel_mm2 = math.prod(mm for one, mm in zip(AXES, case.spacing_mm) if one != cut)
            found.append(math.sqrt(measured.voxels / extent.slices * pixel_mm2 / math.pi))
    return found


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
