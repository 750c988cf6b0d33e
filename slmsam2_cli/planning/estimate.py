"""What a run will need, before it runs: bytes of memory and seconds, from the plan and the fingerprint alone.

The constants were measured on nano (benchmarks/cost.py prints them against what a run really takes); of other networks nothing is
foretold. A pace is the seconds that this machine takes to encode and track one slice of one object at KNOWN_PX (model/speed.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Fingerprint
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import in_plane, stack_slices, tracked_slices, training_for

MIB = 2**20
KNOWN = "nano"
KNOWN_PX = 128  # the frame at which the constants were measured; what is kept of a slice grows with its area
RUNTIME_BYTES = 440 * MIB  # interpreter, libraries and nano's weights
VOXEL_BYTES, CHANNEL_BYTES = 11, 8  # of a volume and its mask, and of every channel of it, as read, normalised and brought into view
KEPT_BYTES = int(1.64 * MIB)  # features and memory of one slice
MOST_KEPT_BYTES = 2**31  # as inference/propagation.py
LEARNED_BYTES = 94 * MIB  # gradients, two moments and the moving average of nano's weights
ENCODED_BYTES, TRACKED_BYTES = 40 * MIB, 18 * MIB  # of a slice that is encoded, or tracked, for the way back through the network
MAPS, NUMBER_BYTES, BATCH = 25, 4, 16  # feature maps that the recogniser keeps at full size, for so many slices
TRACKS = 4  # at most, through each clip
MOST_SEEN_PX, LEAST_SEEN_PX, FEW_SEEN_PX = 128, 48, 64  # as training/label_unet.py
SEEN = 2.0  # the recogniser's square, in widths of everything that is annotated
START_S = 4.0  # libraries and weights
VOXEL_S = 1.5e-7  # to read, bring into view and back, and write; a second for some seven million voxels
STEP_PACES = 1.45  # to learn from one slice and track, forwards and backwards, in paces
TEACHER_BYTES = 80 * MIB  # the base, and what it makes of a clip
TEACHER_PACES = 0.4  # to ask the base about the same, which nothing is learned of
SEEN_PACES = 1.5e-6  # to learn from a channel and pixel that the recogniser sees
CHECKED = 2  # times a volume that was learned from is segmented, to calibrate confidence
FOLDS, SHARE, SHARE_OF_ONE = 2, 0.3, 0.2  # short runs, and their share of the steps, as training/cross_validation.py
JUDGED = 8  # times the volume that a fold left out is segmented: three looks with and without recogniser, before, and for a picture


@dataclass(frozen=True)
class Cost:
    """memory_bytes: peak of the process, or of the device where that is not the CPU; seconds: None where the pace is not known."""

    memory_bytes: int
    seconds: float | None = None


def cost_of_predicting(plan: Plan, cases: Sequence[CaseFingerprint], pace_s: float | None = None) -> Cost | None:
    """Of all these cases, one after the other; memory is that of the largest. None for a network that nothing is known of."""
    if plan.network.size != KNOWN or not cases:
        return None
    seconds = None if pace_s is None else START_S + sum(_predicting_s(plan, case, pace_s) for case in cases)
    return Cost(max(_predicting_bytes(plan, case) for case in cases), seconds)


def cost_of_tuning(plan: Plan, fingerprint: Fingerprint, count: int, pace_s: float | None = None) -> Cost | None:
    """Of fine-tuning on `count` of the cases, by the plan's settings but the rule's steps, and of preparing all of them.

    None for a network that nothing is known of.
    """
    cases = fingerprint.cases
    if plan.network.size != KNOWN or not cases:
        return None
    training, area = plan.training, (plan.geometry.frame_px / KNOWN_PX) ** 2
    tracks = min(TRACKS, 2 * len(plan.labels))
    encoded, tracked = training.clip_slices, (training.clip_slices - 1) * tracks
    px, width = recogniser_size(plan, cases)
    maps = BATCH * width * px**2 if training.recogniser else 0
    clips = training.clips_per_step * area
    learning = RUNTIME_BYTES + LEARNED_BYTES + clips * (encoded * ENCODED_BYTES + tracked * TRACKED_BYTES) + MAPS * NUMBER_BYTES * maps
    calibrating = LEARNED_BYTES + max(_predicting_bytes(plan, case) for case in cases)
    steps, presence = (rule := training_for(plan, count)).steps, rule.presence
    learning += TEACHER_BYTES if presence == "base" else 0
    seconds = None
    if pace_s is not None:
        paces = STEP_PACES + (TEACHER_PACES if presence == "base" else 0)
        step = pace_s * (clips * (encoded + tracked) * paces + maps * SEEN_PACES)
        apart = sum(_predicting_s(plan, case, pace_s) for case in cases) / len(cases)
        folds, share = (0, 0.0) if training.validation == "none" else (1, SHARE_OF_ONE) if count == 1 else (FOLDS, SHARE)
        looks = (CHECKED * count + JUDGED * folds) * apart
        seconds = START_S + sum(math.prod(case.shape) for case in cases) * VOXEL_S + steps * (1 + folds * share) * step + looks
        seconds = min(seconds, training.minutes * 60) if training.minutes is not None else seconds
    return Cost(int(max(learning, calibrating)), seconds)


def longest_clip(plan: Plan, fingerprint: Fingerprint, room_bytes: int) -> int | None:
    """training.clip_slices with which fine-tuning fits, at most the plan's; None where even two slices do not, or nothing is known."""
    for slices in range(plan.training.clip_slices, 1, -1):
        shorter = plan.model_copy(update={"training": plan.training.model_copy(update={"clip_slices": slices})})
        cost = cost_of_tuning(shorter, fingerprint, 1)
        if cost is not None and cost.memory_bytes <= room_bytes:
            return slices
    return None


def in_words(cost: Cost) -> tuple[str, str]:
    """Time and memory, as roughly as they are known."""
    if cost.seconds is None:
        span = "-"
    elif cost.seconds < 90:
        span = f"{max(1, float(f'{cost.seconds:.1g}')):.0f} s"
    else:
        span = f"{cost.seconds / 60:.0f} min" if cost.seconds < 5400 else f"{cost.seconds / 3600:.1f} h"
    return span, f"{cost.memory_bytes / 1e9:.1f} GB"


def _predicting_s(plan: Plan, case: CaseFingerprint, pace_s: float) -> float:
    axis, through_mm = plan.geometry.slice_axis, plan.geometry.through_plane_mm
    tracked = sum(tracked_slices(case, value, axis, plan.inference.patience, through_mm) for value in case.labels)
    area = (plan.geometry.frame_px / KNOWN_PX) ** 2
    return tracked * pace_s * area + math.prod(case.shape) * VOXEL_S


def _predicting_bytes(plan: Plan, case: CaseFingerprint) -> int:
    through = stack_slices(case, plan.geometry.slice_axis, plan.geometry.through_plane_mm)
    area = (plan.geometry.frame_px / KNOWN_PX) ** 2
    kept = min(through * KEPT_BYTES * area, MOST_KEPT_BYTES)
    return int(RUNTIME_BYTES + math.prod(case.shape) * (VOXEL_BYTES + CHANNEL_BYTES * len(plan.channels)) + kept)


def recogniser_size(plan: Plan, cases: Sequence[CaseFingerprint]) -> tuple[int, int]:
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
            edges.append(min(SEEN * max(spans), plan.geometry.stack_px))
    edge = 16 * math.ceil(median(edges) / 16) if edges else LEAST_SEEN_PX
    px = min(MOST_SEEN_PX, max(LEAST_SEEN_PX, edge))
    return px, 32 if px <= FEW_SEEN_PX else 16
