"""Estimate memory and run time of fine-tuning and prediction from the plan and the fingerprint alone, before the run.

The constants were measured on nano; benchmarks/cost.py compares the estimates with real runs. Other networks have no estimate.
Times are multiples of `seconds_per_slice`: the time that this machine takes to encode and segment one slice of one object at
REFERENCE_INPUT_SIZE (model/speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import (
    CHECKPOINTS,
    FOLD_FRACTION,
    FOLDS,
    LABEL_UNET_BATCH,
    LABEL_UNET_WIDTH,
    MAX_CACHED_BYTES,
    MAX_LABEL_UNET_SIZE,
    MIN_LABEL_UNET_SIZE,
    NARROW_LABEL_UNET_SIZE,
    ROI_SCALE,
    SINGLE_CASE_FRACTION,
    TRACKS_PER_CLIP,
    in_plane,
    propagated_slices,
    stack_length,
    training_for,
)

MIB = 2**20
SUPPORTED_SIZE = "nano"
REFERENCE_INPUT_SIZE = 128  # input edge at which the constants were measured; memory and time grow with its area
RUNTIME_BYTES = 440 * MIB  # interpreter, libraries and nano's weights
VOXEL_BYTES, CHANNEL_BYTES = 11, 8  # per voxel of volume and mask, and in addition per channel: as read, normalised and resampled
CACHED_BYTES_PER_SLICE = int(1.64 * MIB)  # features and memory
OPTIMISER_BYTES = 94 * MIB  # gradients, both moments and the moving average of nano's weights
ENCODED_BYTES, TRACKED_BYTES = 40 * MIB, 18 * MIB  # activations of a slice for backpropagation: encoder, and decoder with memory
LABEL_UNET_MAPS, FLOAT_BYTES = 25, 4  # feature maps of full size
TEACHER_BYTES = 80 * MIB  # the teacher and its outputs for one clip
STARTUP_SECONDS = 4.0  # libraries and weights
SECONDS_PER_VOXEL = 1.5e-7  # read, resample and write a volume
STEP_COST = 1.45  # training on one slice and pass, forward and backward, in units of seconds_per_slice
TEACHER_COST = 0.4  # the teacher's forward pass, in the same unit
LABEL_UNET_COST = 1.5e-6  # training the label U-Net per channel and pixel, in the same unit
CALIBRATION_PASSES = 2  # predictions of each training case for calibration
VALIDATION_PASSES = 2 * len(CHECKPOINTS) + 2  # predictions of a held-out case: with and without label U-Net, before training, overlay


@dataclass(frozen=True)
class Estimate:
    """memory_bytes: peak of the process, or of the GPU if there is one; seconds: None where the speed is unknown."""

    memory_bytes: int
    seconds: float | None = None


def estimate_prediction(
    plan: Plan, cases: Sequence[CaseFingerprint], seconds_per_slice: float | None = None, workers: int = 1
) -> Estimate | None:
    """Estimate the prediction of cases by so many processes; the largest case determines the memory of each.

    None for unsupported networks.
    """
    if plan.network.size != SUPPORTED_SIZE or not cases:
        return None
    seconds = None
    if seconds_per_slice is not None:
        each = [_prediction_seconds(plan, case, seconds_per_slice) for case in cases]
        seconds = STARTUP_SECONDS + max(sum(each) / workers, max(each))
    return Estimate(max(_case_bytes(plan, case) for case in cases), seconds)


def prediction_bytes(plan: Plan, shape: Sequence[int]) -> int:
    """Estimate the peak memory of predicting a volume of this shape in voxels, whatever its slice axis."""
    return _prediction_bytes(plan, math.prod(shape), max(shape, default=1))


def estimate_finetuning(
    plan: Plan, fingerprint: Fingerprint, count: int, seconds_per_slice: float | None = None, workers: int = 1
) -> Estimate | None:
    """Estimate fine-tuning on `count` cases, including preprocessing of all cases. None for unsupported networks.

    workers: processes that share folds and predictions; memory is that of one. The number of steps follows the rule for `count` cases,
    all other settings the plan.
    """
    cases, training = fingerprint.cases, plan.training
    if plan.network.size != SUPPORTED_SIZE or not cases:
        return None
    rule = training_for(plan, count)
    has_teacher = rule.object_score_target == "teacher"
    encoded, tracked = training.clip_slices, (training.clip_slices - 1) * min(TRACKS_PER_CLIP, 2 * len(plan.labels))
    size, width = label_unet_size(plan, cases)
    maps = LABEL_UNET_BATCH * width * size**2 if training.label_unet else 0
    clips = training.clips_per_step * (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    learning = RUNTIME_BYTES + OPTIMISER_BYTES + clips * (encoded * ENCODED_BYTES + tracked * TRACKED_BYTES)
    learning = learning + LABEL_UNET_MAPS * FLOAT_BYTES * maps + (TEACHER_BYTES if has_teacher else 0)
    calibrating = OPTIMISER_BYTES + max(_case_bytes(plan, case) for case in cases)
    seconds = None
    if seconds_per_slice is not None:
        cost = STEP_COST + (TEACHER_COST if has_teacher else 0)
        step = seconds_per_slice * (clips * (encoded + tracked) * cost + maps * LABEL_UNET_COST)
        per_case = sum(_prediction_seconds(plan, case, seconds_per_slice) for case in cases) / len(cases)
        folds, fraction = (0, 0.0) if training.validation == "none" else (1, SINGLE_CASE_FRACTION) if count == 1 else (FOLDS, FOLD_FRACTION)
        seconds = STARTUP_SECONDS + sum(math.prod(case.shape) for case in cases) * SECONDS_PER_VOXEL
        side_by_side = max(1, min(workers, folds))
        seconds += rule.steps * (1 + folds * fraction / side_by_side) * step
        seconds += (CALIBRATION_PASSES * count / min(workers, count) + VALIDATION_PASSES * folds / side_by_side) * per_case
        seconds = min(seconds, training.minutes * 60) if training.minutes is not None else seconds
    return Estimate(int(max(learning, calibrating)), seconds)


def longest_clip(plan: Plan, fingerprint: Fingerprint, available_bytes: int) -> int | None:
    """Find the largest training.clip_slices, at most the plan's, with which fine-tuning fits in memory; None where even 2 do not."""
    for slices in range(plan.training.clip_slices, 1, -1):
        shorter = plan.model_copy(update={"training": plan.training.model_copy(update={"clip_slices": slices})})
        estimate = estimate_finetuning(shorter, fingerprint, 1)
        if estimate is not None and estimate.memory_bytes <= available_bytes:
            return slices
    return None


def format_estimate(estimate: Estimate) -> tuple[str, str]:
    """Format time and memory, rounded to the accuracy of an estimate: ("13 min", "1.5 GB")."""
    if estimate.seconds is None:
        time = "-"
    elif estimate.seconds < 90:
        time = f"{max(1, float(f'{estimate.seconds:.1g}')):.0f} s"
    else:
        time = f"{estimate.seconds / 60:.0f} min" if estimate.seconds < 5400 else f"{estimate.seconds / 3600:.1f} h"
    return time, f"{estimate.memory_bytes / 1e9:.1f} GB"


def _prediction_seconds(plan: Plan, case: CaseFingerprint, seconds_per_slice: float) -> float:
    """Estimate the time of predicting all labels of a case, without start-up."""
    axis, through_mm = plan.geometry.slice_axis, plan.geometry.through_plane_mm
    slices = sum(propagated_slices(case, value, axis, plan.inference.max_empty_slices, through_mm) for value in case.labels)
    area = (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    return slices * seconds_per_slice * area + math.prod(case.shape) * SECONDS_PER_VOXEL


def _case_bytes(plan: Plan, case: CaseFingerprint) -> int:
    """Estimate the peak memory of predicting a case."""
    return _prediction_bytes(plan, math.prod(case.shape), stack_length(case, plan.geometry.slice_axis, plan.geometry.through_plane_mm))


def _prediction_bytes(plan: Plan, voxels: int, slices: int) -> int:
    """Estimate the peak memory of predicting a volume."""
    area = (plan.geometry.input_size / REFERENCE_INPUT_SIZE) ** 2
    cached = min(slices * CACHED_BYTES_PER_SLICE * area, MAX_CACHED_BYTES)
    return int(RUNTIME_BYTES + voxels * (VOXEL_BYTES + CHANNEL_BYTES * len(plan.channels)) + cached)


def label_unet_size(plan: Plan, cases: Sequence[CaseFingerprint]) -> tuple[int, int]:
    """Estimate the label U-Net's input edge in pixels and its width in channels from the extent of all labels together.

    The true size follows from single slices and may be smaller.
    """
    edges = []
    for case in cases:
        spans = []
        for index in in_plane(case, plan.geometry.slice_axis):
            extents = [label.extents[AXES[index]] for label in case.labels.values() if AXES[index] in label.extents]
            if extents:
                span = max(extent.last for extent in extents) - min(extent.first for extent in extents) + 1
                spans.append(span * case.spacing_mm[index] / plan.geometry.in_plane_mm)
        if spans:
            edges.append(min(ROI_SCALE * max(spans), plan.geometry.storage_size))
    edge = 16 * math.ceil(median(edges) / 16) if edges else MIN_LABEL_UNET_SIZE
    size = min(MAX_LABEL_UNET_SIZE, max(MIN_LABEL_UNET_SIZE, edge))
    return size, LABEL_UNET_WIDTH if size <= NARROW_LABEL_UNET_SIZE else LABEL_UNET_WIDTH // 2
