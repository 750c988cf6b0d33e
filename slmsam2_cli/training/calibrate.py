"""Compare the confidence of a fine-tuned model with its Dice: on its training cases, from one annotated slice per structure.

On these cases confidence is optimistic, which the table's note says. Slices on which both the mask and the ground truth are empty are
not counted, nor is the annotated slice itself. Structures do not depend on each other, so worker processes share them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.errors import CaseError, TrainingError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.calibration import Calibration, calibrate
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.parallel import parallel_map
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.training.cross_validation import label_areas, propagate_labels

MAX_SLICES = 256  # propagated in all
MIN_SLICES = 16  # propagated per structure


@dataclass(frozen=True)
class _Structure:
    """One label of one case, its annotated slice, and the slices start ... stop around it."""

    case: PreparedCase
    value: int
    annotated: int
    start: int
    stop: int


def calibrate_model(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False, processes: int = 1
) -> Calibration | None:
    """Fit the calibration of a fine-tuned model; None when there are too few slices, or `stop` became true before all were propagated."""
    pairs = confidence_and_dice(model, cases, plan, stop, processes)
    return calibrate([confidence for confidence, _ in pairs], [score for _, score in pairs]) if not stop() else None


def confidence_and_dice(
    model: SlmSam2, cases: Sequence[PreparedCase], plan: Plan, stop: Callable[[], bool] = lambda: False, processes: int = 1
) -> list[tuple[float, float]]:
    """Return (raw confidence, Dice) of slices of these cases, each structure propagated from its middle slice, until `stop` is true.

    processes: worker processes that share the structures; 1: this process alone.

    Raises: ArrayError when a file of a case was cut short; TrainingError when a worker process was killed.
    """
    structures = _choose_structures(cases, plan)
    if processes == 1 or len(structures) < 2 or stop():
        return [pair for structure in structures if not stop() for pair in _pairs(model, structure, plan)]
    jobs = {f"{one.case.id}, {plan.labels[one.value]}": one for one in structures}
    content = pickle.dumps((model, plan))  # by the usual pickle: torch's own would move the weights to shared memory

    def advance(steps: int = 1, note: str = "") -> None:
        if stop():
            raise _Stopped

    try:
        found = parallel_map(partial(_pairs_in_process, content), jobs, min(processes, len(jobs)), advance=advance, preload=[__name__])
    except _Stopped:
        return []
    if any(isinstance(one, CaseError) for one in found):
        raise TrainingError(
            "calibration: a process was killed, probably because memory ran out. Close other programs, then run: "
            "slmsam2 finetune --continue"
        )
    if errors := [one for one in found if isinstance(one, Exception)]:
        raise errors[0]
    return [pair for one in found if not isinstance(one, Exception) for pair in one]


class _Stopped(Exception):
    """The user stops the run."""


@lru_cache(maxsize=1)
def _unpickled(content: bytes) -> tuple[SlmSam2, Plan]:
    """Read the model and the plan, once in each process."""
    torch.set_num_threads(1)
    model, plan = pickle.loads(content)
    return model, plan


def _pairs_in_process(content: bytes, structure: _Structure) -> list[tuple[float, float]] | atomic.ArrayError:
    """Return the pairs of a structure, in a worker process; an error of reading is returned, not raised, as it names what to do."""
    try:
        model, plan = _unpickled(content)
        return list(_pairs(model, structure, plan))
    except atomic.ArrayError as error:
        return error


def _choose_structures(cases: Sequence[PreparedCase], plan: Plan) -> list[_Structure]:
    """Choose as many structures as MAX_SLICES allows, spread over the cases."""
    areas = [(case, value, area) for case in cases for value in plan.labels if (area := label_areas(case, value, plan.ignore)).any()]
    slices = max(MIN_SLICES, MAX_SLICES // max(len(areas), 1))
    step = max(1, -(-len(areas) * slices // MAX_SLICES))
    structures = []
    for case, value, area in areas[::step]:
        annotated = choose_slice(area, "middle")
        start = max(0, min(annotated - slices // 2, len(area) - slices))
        structures.append(_Structure(case, value, annotated, start, min(len(area), start + slices)))
    return structures


def _pairs(model: SlmSam2, structure: _Structure, plan: Plan) -> Iterator[tuple[float, float]]:
    """Yield (raw confidence, Dice) of every slice that holds the structure or its mask."""
    case, value = structure.case, structure.value
    check_not_truncated(case)
    assert case.labels is not None
    labels = np.asarray(case.labels[structure.start : structure.stop])
    truth, counted = torch.from_numpy(labels == value), torch.from_numpy(labels != plan.ignore)
    size, annotated = plan.geometry.storage_size, structure.annotated - structure.start
    frames = np.asarray(case.frames[:, structure.start : structure.stop])
    found = propagate_labels(model, frames, labels, {value: annotated}, plan)[value]
    for t in range(len(truth)):
        mask = (found.plane(t, size, *truth.shape[1:]) > 0) & counted[t]
        pixels = int(mask.sum()), int(truth[t].sum())
        if t != annotated and any(pixels):
            yield float(found.confidence[t]), float(dice(int((mask & truth[t]).sum()), *pixels))
