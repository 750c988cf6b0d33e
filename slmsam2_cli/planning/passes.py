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
MOST_PATIENCE_GAPS = 2  # times the longest gap that was seen in a training label
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
    return Decision(wanted, f"{long}: every {times} slices are joined")


def choose_inference(cases: Sequence[CaseFingerprint], axis: SliceAxis, frame_px: int) -> Decision[InferencePlan]:
    """Slices encoded at a time, by their size; and after how many slices without its object a pass ends, by the gaps in the labels."""
    batch = max(1, min(BATCH, math.floor(BATCH * (BATCH_PX / frame_px) ** 2)))
    gaps = [extent.last - extent.first + 1 - extent.slices for case in cases if 1 not in case.shape for extent in _extents(case, axis)]
    if not gaps:
        return Decision(InferencePlan(batch_slices=batch), "no label was measured, so every slice is tracked")
    patience = max(LEAST_PATIENCE, MOST_PATIENCE_GAPS * max(gaps))
    seen = f"gaps of {max(gaps)} slices were seen" if max(gaps) else "no training label has a gap"
    return Decision(InferencePlan(batch_slices=batch, patience=patience), f"{seen}: a pass ends {patience} slices after its object has")


def tracked_slices(case: CaseFingerprint, value: int, axis: SliceAxis, patience: int | None) -> int:
    """About how many slices are walked through for a label of a case."""
    cut = case.axis(axis)
    slices = case.shape[AXES.index(cut)]
    extent = case.labels[value].extents.get(cut)
    if extent is None or patience is None:
        return slices
    return min(slices, extent.last + 1 + patience) - max(0, extent.first - patience)


def _extents(case: CaseFingerprint, axis: SliceAxis) -> list[Extent]:
    cut = case.axis(axis)
    return [label.extents[cut] for label in case.labels.values() if cut in label.extents]


def _through_mm(case: CaseFingerprint, axis: SliceAxis) -> float:
    return case.spacing_mm[AXES.index(case.axis(axis))]
