"""What a run will need, before it runs: bytes of memory and seconds, from the plan and the fingerprint alone.

The constants were measured on nano (benchmarks/cost.py prints them against what a run really takes); of other networks nothing is
foretold. A pace is the seconds that this machine takes to encode and track one slice of one object at REFERENCE_INPUT_SIZE (model/speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import in_plane, propagated_slices, stack_length, training_for

MIB = 2**20
KNOWN = "nano"
REFERENCE_INPUT_SIZE = 128  # the frame at which the constants were measured; what is kept of a slice grows with its area
RUNTIME_BYTES = 440 * MIB  # interpreter, libraries and nano's weights
VOXEL_BYTES, CHANNEL_BYTES = 11, 8  # of a volume and its mask, and of every channel of it, as read, normalised and brought into view
CACHED_BYTES_PER_SLICE = int(1.64 * MIB)  # features and memory of one slice
MAX_CACHED_BYTES = 2**31  # as inference/propagation.py
OPTIMISER_BYTES = 94 * MIB  # gradients, two moments and the moving average of nano's weights
ENCODED_BYTES, TRACKED_BYTES = 40 * MIB, 18 * MIB  # of a slice that is encoded, or tracked, for the way back through the network
MAPS, NUMBER_BYTES, BATCH = 25, 4, 16  # feature maps that the recogniser keeps at full size, for so many slices
TRACKS = 4  # at most, through each clip
MAX_LABEL_UNET_SIZE, MIN_LABEL_UNET_SIZE, NARROW_LABEL_UNET_SIZE = 128, 48, 64  # as training/label_unet.py
LABEL_UNET_ROI_SCALE = 2.0  # the recogniser's square, in widths of everything that is annotated
STARTUP_SECONDS = 4.0  # libraries and weights
SECONDS_PER_VOXEL = 1.5e-7  # to read, bring into view and back, and write; a second for some seven million voxels
STEP_COST = 1.45  # to learn from one slice and track, forwards and backwards, in paces
TEACHER_BYTES = 80 * MIB  # the base, and what it makes of a clip
TEACHER_COST = 0.4  # to ask the base about the same, which nothing is learned of
LABEL_UNET_COST = 1.5e-6  # to learn from a channel and pixel that the recogniser sees
CALIBRATION_PASSES = 2  # times a volume that was learned from is segmented, to calibrate confidence
FOLDS, SHARE, SINGLE_CASE_FRACTION = 2, 0.3, 0.2  # short runs, and their share of the steps, as training/cross_validation.py
VALIDATION_PASSES = (
    8  # times the volume that a fold left out is segmented: three looks with and without recogniser, before, and for a picture
)


@dataclass(frozen=True)
class Estimate:
    """memory_bytes: peak of the process, or of the device where that is not the CPU; seconds: None where the pace is not known."""

    memory_bytes: int
    seconds: float | None = None


def estimate_prediction(plan: Plan, cases: Sequence[CaseFingerprint], seconds_per_slice: float | None = None) -> Estimate | None:
    """Of all these cases, one after the other; memory is that of the largest. None for a network that nothing is known of."""
    if plan.network.size != KNOWN or not cases:
        return None
    seconds = (
        None if seconds_per_slice is None else STARTUP_SECONDS + sum(_prediction_seconds(plan, case, seconds_per_slice) for case in cases)
    )
    return Estimate(max(_prediction_bytes(plan, case) for case in cases), seconds)


def estimate_finetuning(plan: Plan, fingerprint: Fingerprint, count: int, seconds_per_slice: float | None = None) -> Estimate | None:
    """Of fine-tuning on `count` of the cases, by the plan's settings but the rule's steps, and of preparing all of them.

    None for a network that nothing is known of.
    """
    cases = fingerprint.cases
    if plan.network.size != KNOWN or not cases:
        return None
    training, area = plan.training, (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    tracks = min(TRACKS, 2 * len(plan.labels))
    encoded, tracked = training.clip_slices, (training.clip_slices - 1) * tracks
    px, width = label_unet_size(plan, cases)
    maps = BATCH * width * px**2 if training.label_unet else 0
    clips = training.clips_per_step * area
    learning = RUNTIME_BYTES + OPTIMISER_BYTES + clips * (encoded * ENCODED_BYTES + tracked * TRACKED_BYTES) + MAPS * NUMBER_BYTES * maps
    calibrating = OPTIMISER_BYTES + max(_prediction_bytes(plan, case) for case in cases)
    rule = training_for(plan, count)
    learning += TEACHER_BYTES if rule.object_score_target == "teacher" else 0
    seconds = None
    if seconds_per_slice is not None:
        paces = STEP_COST + (TEACHER_COST if rule.object_score_target == "teacher" else 0)
        step = seconds_per_slice * (clips * (encoded + tracked) * paces + maps * LABEL_UNET_COST)
        apart = sum(_prediction_seconds(plan, case, seconds_per_slice) for case in cases) / len(cases)
        folds, share = (0, 0.0) if training.validation == "none" else (1, SINGLE_CASE_FRACTION) if count == 1 else (FOLDS, SHARE)
        looks = (CALIBRATION_PASSES * count + VALIDATION_PASSES * folds) * apart
        seconds = (
            STARTUP_SECONDS
            + sum(math.prod(case.shape) for case in cases) * SECONDS_PER_VOXEL
            + rule.steps * (1 + folds * share) * step
            + looks
        )
        seconds = min(seconds, training.minutes * 60) if training.minutes is not None else seconds
    return Estimate(int(max(learning, calibrating)), seconds)


def longest_clip(plan: Plan, fingerprint: Fingerprint, available_bytes: int) -> int | None:
    """training.clip_slices with which fine-tuning fits, at most the plan's; None where even two slices do not, or nothing is known."""
    for slices in range(plan.training.clip_slices, 1, -1):
        shorter = plan.model_copy(update={"training": plan.training.model_copy(update={"clip_slices": slices})})
        cost = estimate_finetuning(shorter, fingerprint, 1)
        if cost is not None and cost.memory_bytes <= available_bytes:
            return slices
    return None


def format_estimate(cost: Estimate) -> tuple[str, str]:
    """Time and memory, as roughly as they are known."""
    if cost.seconds is None:
        span = "-"
    elif cost.seconds < 90:
        span = f"{max(1, float(f'{cost.seconds:.1g}')):.0f} s"
    else:
        span = f"{cost.seconds / 60:.0f} min" if cost.seconds < 5400 else f"{cost.seconds / 3600:.1f} h"
    return span, f"{cost.memory_bytes / 1e9:.1f} GB"


def _prediction_seconds(plan: Plan, case: CaseFingerprint, seconds_per_slice: float) -> float:
    axis, through_mm = plan.geometry.slice_axis, plan.geometry.through_plane_mm
    tracked = sum(propagated_slices(case, value, axis, plan.inference.max_empty_slices, through_mm) for value in case.labels)
    area = (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    return tracked * seconds_per_slice * area + math.prod(case.shape) * SECONDS_PER_VOXEL


def _prediction_bytes(plan: Plan, case: CaseFingerprint) -> int:
    through = stack_length(case, plan.geometry.slice_axis, plan.geometry.through_plane_mm)
    area = (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    kept = min(through * CACHED_BYTES_PER_SLICE * area, MAX_CACHED_BYTES)
    return int(RUNTIME_BYTES + math.prod(case.shape) * (VOXEL_BYTES + CHANNEL_BYTES * len(plan.channels)) + kept)


def label_unet_size(plan: Plan, cases: Sequence[CaseFingerprint]) -> tuple[int, int]:
    """Edge in pixels and width in channels, from the extent of all labels together; that of one slice may be a little less."""
    edges = []
    for case in cases:
        spans = []
        for index in in_plane(case, plan.geometry.slice_axis):
            extents = [label.extents[AXES[index]] for label in case.labels.values() if AXES[index] in label.extents]
            if extents:
                span = max(extent.last for extent in extents) - min(extent.first for extent in extents) + 1
                spans.append(span * case.spacing_mm[index] / plan.geometry.in_plane_mm)
        if spans:
            edges.append(min(LABEL_UNET_ROI_SCALE * max(spans), plan.geometry.stack_size))
    edge = 16 * math.ceil(median(edges) / 16) if edges else MIN_LABEL_UNET_SIZE
    px = min(MAX_LABEL_UNET_SIZE, max(MIN_LABEL_UNET_SIZE, edge))
    return px, 32 if px <= NARROW_LABEL_UNET_SIZE else 16
