"""How slices are walked through: how far apart they are, how many are encoded at a time, and when a pass gives up.

What these rules rest on was measured (benchmarks/plan_passes.py; docs/reference/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from slmsam2_cli.data.geometry import AXES, SliceAxis
from slmsam2_cli.planning.decision import Decision
from slmsam2_cli.planning.fingerprint import CaseFingerprint, Extent
from slmsam2_cli.planning.plan import InferencePlan

LONG = 48  # slices; structures over more of them lose at each step, so that twice the step is better
PATIENCE_IN_GAPS = 2  # times the longest gap that was seen in a training label
LEAST_PATIENCE = 6
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


def choose_inference(cases: Sequence[CaseFingerprint], axis: SliceAxis, frame_px: int) -> Decision[InferencePlan]:
    """Slices encoded at a time, by their size; and after how many slices without its object a pass ends, by the gaps in the labels."""
    batch = max(1, min(BATCH, math.floor(BATCH * (BATCH_PX / frame_px) ** 2)))
    gaps = [extent.gap for case in cases if 1 not in case.shape for extent in _extents(case, axis)]
    if not gaps:
        return Decision(InferencePlan(batch_slices=batch), "no label was measured, so every slice is tracked")
    patience = max(LEAST_PATIENCE, PATIENCE_IN_GAPS * max(gaps))
    seen = f"labels have gaps of up to {max(gaps)} slices" if max(gaps) else "no label has a gap"
    return Decision(InferencePlan(batch_slices=batch, patience=patience), f"{seen}: a pass ends {patience} slices after its object has")


def stack_slices(case: CaseFingerprint, axis: SliceAxis, through_mm: float | None) -> int:
    """How many slices the network is given of a case."""
    slices = case.shape[AXES.index(case.axis(axis))]
    return slices if through_mm is None else max(1, round(slices * _through_mm(case, axis) / through_mm))


def tracked_slices(case: CaseFingerprint, value: int, axis: SliceAxis, patience: int | None, through_mm: float | None = None) -> int:
    """About how many of these are walked through for a label of a case."""
    slices, stored = stack_slices(case, axis, through_mm), case.shape[AXES.index(case.axis(axis))]
    extent = case.labels[value].extents.get(case.axis(axis))
    if extent is None or patience is None:
        return slices
    first, last = round(extent.first * slices / stored), round((extent.last + 1) * slices / stored)
    return min(slices, last + patience) - max(0, first - patience)


def _extents(case: CaseFingerprint, axis: SliceAxis) -> list[Extent]:
    cut = case.axis(axis)
    return [label.extents[cut] for label in case.labels.values() if cut in label.extents]


def _through_mm(case: CaseFingerprint, axis: SliceAxis) -> float:
    return case.spacing_mm[AXES.index(case.axis(axis))]
