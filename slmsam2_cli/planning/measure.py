"""Measuring a data set: one case in memory at a time, every problem of every case found in one pass.

All measurements are made on the oriented volume and do not depend on the order in which its voxels were stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slmsam2_cli.data.dataset import Case, Dataset
from slmsam2_cli.data.geometry import AXES, SliceAxis, nonzero_box, orient, oriented_size
from slmsam2_cli.data.grid import Grid
from slmsam2_cli.data.prepared import read_pair
from slmsam2_cli.data.prompts import choose_slice
from slmsam2_cli.errors import CaseError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Extent, Fingerprint, LabelFingerprint, Statistics
from slmsam2_cli.version import VERSION

SAMPLE = 10_000  # foreground voxels a case gives to the data set's statistics
Array = np.ndarray[Any, Any]


def measure(dataset: Dataset, advance: Callable[..., None] = lambda steps=1, note="": None) -> tuple[Fingerprint, tuple[CaseError, ...]]:
    """The fingerprint of all usable training cases, and the problems of the others. advance() is called after each case."""
    cases: list[CaseFingerprint] = []
    samples: list[list[Array]] = [[] for _ in dataset.channels]
    problems = list(dataset.problems)
    for case in dataset.training:
        try:
            measured, sampled = measure_case(case, dataset)
            cases.append(measured)
            for pool, sample in zip(samples, sampled, strict=True):
                pool.append(sample)
        except CaseError as problem:
            problems.append(problem)
        advance(1, case.id)
    fingerprint = Fingerprint(
        tool_version=VERSION,
        dataset_name=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        ignore=dataset.ignore,
        cases=tuple(cases),
        foreground=tuple(statistics(np.concatenate([*pool, np.empty(0)])) for pool in samples),
    )
    return fingerprint, tuple(problems)


def measure_case(case: Case, dataset: Dataset) -> tuple[CaseFingerprint, list[Array]]:
    """One training case, and per channel at most SAMPLE of its foreground's grey values. CaseError when it is unusable."""
    volume, mask, warnings = read_pair(case, dataset)
    if mask is None:
        raise CaseError(case.id, "", "has no label", "Add its mask to labelsTr, or drop the case from dataset.json")
    orientation = orient(volume.grid.direction)
    voxels, labels = orientation.apply(volume.voxels), orientation.apply(mask.voxels)
    shape, spacing = oriented_size(volume.grid)
    foreground = (labels != 0) & (labels != (dataset.ignore or 0))
    picked = [channel[foreground] for channel in voxels]
    box = nonzero_box(voxels)
    fingerprint = CaseFingerprint(
        id=case.id,
        stored_shape=volume.grid.shape,
        orientation=orientation_code(volume.grid),
        shape=shape,
        spacing_mm=_rounded(spacing),
        content_mm=_rounded((end - start) * mm for (start, end), mm in zip(box, spacing, strict=True)),
        channels=tuple(
            ChannelFingerprint(whole=statistics(channel[channel != 0]), foreground=statistics(values))
            for channel, values in zip(voxels, picked, strict=True)
        ),
        labels={value: measured for value in dataset.labels if (measured := measure_label(labels == value))},
        warnings=warnings,
    )
    return fingerprint, [evenly(values, SAMPLE) for values in picked]


def measure_label(mask: Array) -> LabelFingerprint | None:
    """One label's mask (S, P, L), bool; None when it is empty."""
    box = nonzero_box(mask[None])
    cut = mask[tuple(slice(start, end) for start, end in box)]
    if not cut.any():
        return None
    extents: dict[SliceAxis, Extent] = {}
    overlap: dict[SliceAxis, float] = {}
    copied: dict[SliceAxis, float] = {}
    for index, axis in enumerate(AXES):
        stack = np.moveaxis(cut, index, 0)
        start, end = box[index]
        extents[axis] = Extent(first=start, last=end - 1, slices=int(stack.any(axis=(1, 2)).sum()))
        if mask.shape[index] > 1:
            overlap[axis] = round(neighbour_overlap(stack, ends=(start > 0) + (end < mask.shape[index])), 6)
            copied[axis] = round(copy_overlap(stack, mask.shape[index]), 6)
    return LabelFingerprint(voxels=int(cut.sum()), extents=extents, overlap=overlap, copied=copied)


def neighbour_overlap(stack: Array, ends: int) -> float:
    """Mean Dice of neighbouring slices (T, R, C) of which at least one is not empty.

    ends: how many of the stack's two ends border on an empty slice of the volume; such a pair overlaps by 0, so a label that often
    vanishes scores low.
    """
    area = stack.sum(axis=(1, 2), dtype=np.int64)
    common = (stack[1:] & stack[:-1]).sum(axis=(1, 2), dtype=np.int64)
    both = area[1:] + area[:-1]
    pairs = int((both > 0).sum()) + ends
    return float((2 * common[both > 0] / both[both > 0]).sum() / pairs) if pairs else 0.0


def copy_overlap(stack: Array, slices: int) -> float:
    """Dice of a label (T, R, C) with its middle slice copied to all `slices` slices of the volume."""
    area = stack.sum(axis=(1, 2), dtype=np.int64)
    middle = stack[choose_slice(area, "middle")]
    common = int((stack & middle).sum())
    return 2 * common / (int(area.sum()) + slices * int(middle.sum()))


def statistics(values: Array) -> Statistics | None:
    """Of any number of grey values; None when there are none."""
    if values.size == 0:
        return None
    low, median, high = np.percentile(values, [0.5, 50, 99.5])
    found = {"mean": values.mean(dtype=np.float64), "median": median, "std": values.std(dtype=np.float64), "p00_5": low, "p99_5": high}
    numbers = {key: _short(value) for key, value in {**found, "min": values.min(), "max": values.max()}.items()}
    return Statistics(voxels=int(values.size), **numbers)


def evenly(values: Array, count: int) -> Array:
    """At most `count` of the values, evenly spaced in order of size: a sample without chance, the same for every storage order."""
    ordered: Array = np.sort(values, axis=None)
    if ordered.size <= count:
        return ordered
    return np.asarray(ordered[((np.arange(count) + 0.5) * ordered.size / count).astype(int)])


def orientation_code(grid: Grid) -> str:
    """Where the stored x, y and z axes point, e.g. "LPS" or "RAS"."""
    found = orient(grid.direction)
    ends = ("IS", "AP", "RL")
    letters = {axis: ends[a][0 if back else 1] for a, (axis, back) in enumerate(zip(found.order, found.flipped, strict=True))}
    return letters[2] + letters[1] + letters[0]


def _short(value: float) -> float:
    """Seven significant digits: more would differ between machines and storage orders."""
    return float(f"{float(value):.7g}")


def _rounded(values: Any) -> tuple[float, float, float]:
    si, ap, lr = (_short(value) for value in values)
    return si, ap, lr
