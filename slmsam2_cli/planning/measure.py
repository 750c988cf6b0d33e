"""Measure a dataset: a few cases in memory at a time, all problems of all cases in one pass.

The measurements depend neither on the order in which voxels are stored nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
from pydantic import ValidationError

from slmsam2_cli.dataset.cache import read_pair
from slmsam2_cli.dataset.dataset import Case, Dataset
from slmsam2_cli.dataset.resources import bytes_on_disk, bytes_to_read, free_bytes
from slmsam2_cli.dataset.slices import orient, oriented_size
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.image import Grid
from slmsam2_cli.parallel import MemoryLimit, available_cpus, parallel_map
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from slmsam2_cli.planning.intensity_stats import CHUNK_VALUES, Array, IntensityValues, round_significant, sample_evenly, statistics
from slmsam2_cli.planning.label_stats import bounding_box_of_planes, measure_labels
from slmsam2_cli.version import VERSION

SAMPLES_PER_CASE = 10_000  # foreground voxels of a case in the statistics of the dataset
MIN_PARALLEL_BYTES = 1 << 26  # on disk: one process measures them in a second or more; starting others takes half a second
PROCESS_BYTES = 1 << 27  # memory of a process without the case it measures
MEMORY_FRACTION = 0.7  # of the free memory, for cases measured at one time
PRELOADED = ("slmsam2_cli.planning.measure", "nibabel")


def measure(
    dataset: Dataset, advance: Callable[..., None] = lambda steps=1, note="": None, workers: int | None = None
) -> tuple[Fingerprint, tuple[CaseError, ...]]:
    """Measure all training cases; returns the fingerprint of the valid ones and the problems of the others.

    advance: called as advance(1, case id) after each case; workers: processes, 0 for this one only, None to choose by the data's size.
    """
    answers = parallel_map(
        partial(measure_case, dataset=replace(dataset, training=(), test=(), problems=())),
        {case.id: case for case in dataset.training},
        worker_count(dataset.training) if workers is None else workers,
        limit=MemoryLimit(lambda case: PROCESS_BYTES + bytes_to_read(case), int(MEMORY_FRACTION * free_bytes())),
        advance=advance,
        preload=PRELOADED,
    )
    measured = [answer for answer in answers if not isinstance(answer, CaseError)]
    samples = zip(*(sampled for _, sampled in measured), strict=True) if measured else [()] * len(dataset.channels)
    as_float64 = methodcaller("astype", np.float64)  # the images of a channel may differ in type
    fingerprint = Fingerprint(
        tool_version=VERSION,
        dataset_name=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        ignore=dataset.ignore,
        cases=tuple(case for case, _ in measured),
        foreground=tuple(statistics(IntensityValues(partial(map, as_float64, pool))) for pool in samples),
    )
    return fingerprint, (*dataset.problems, *(answer for answer in answers if isinstance(answer, CaseError)))


def worker_count(cases: Sequence[Case]) -> int:
    """Choose the number of processes: one per core and at most one per case, but none for a dataset below MIN_PARALLEL_BYTES."""
    return min(available_cpus(), len(cases)) if sum(map(bytes_on_disk, cases)) >= MIN_PARALLEL_BYTES else 0


def measure_case(case: Case, dataset: Dataset) -> tuple[CaseFingerprint, list[Array]]:
    """Measure one training case; returns its measurements and, per channel, at most SAMPLES_PER_CASE foreground values.

    Raises: CaseError when the case is invalid or does not fit in memory.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _measure_case(case, dataset)
    except ValidationError:  # a mean or standard deviation that is not finite
        raise CaseError(case.id, "", "intensities are too large to be measured", "Export the image again in its usual unit") from None
    except MemoryError:
        raise CaseError(case.id, "", "not enough memory to measure it", "Close other programs, or use a machine with more memory") from None


def _measure_case(case: Case, dataset: Dataset) -> tuple[CaseFingerprint, list[Array]]:
    volume, mask, warnings = read_pair(case, dataset)
    if mask is None:
        raise CaseError(case.id, "", "has no label", "Add its mask to labelsTr, or remove the case from dataset.json")
    voxels, labels, orientation = volume.voxels, mask.voxels, orient(volume.grid.direction)
    shape, spacing = oriented_size(volume.grid)
    box = bounding_box_of_planes(labels.shape, lambda planes: (voxels[:, planes] != 0).any(axis=0)) or [(0, n) for n in labels.shape]
    content = [box[stored][1] - box[stored][0] for stored in orientation.order]
    foreground = [IntensityValues(partial(voxel_values, channel, labels, dataset.ignore)) for channel in voxels]
    fingerprint = CaseFingerprint(
        id=case.id,
        stored_shape=volume.grid.shape,
        orientation=orientation_code(volume.grid),
        shape=shape,
        spacing_mm=_rounded(spacing),
        content_mm=_rounded(length * mm for length, mm in zip(content, spacing, strict=True)),
        channels=tuple(
            ChannelFingerprint(whole=statistics(IntensityValues(partial(voxel_values, channel))), foreground=statistics(inside))
            for channel, inside in zip(voxels, foreground, strict=True)
        ),
        labels=measure_labels(labels, dataset.labels, orientation),
        warnings=warnings,
    )
    return fingerprint, [sample_evenly(inside, SAMPLES_PER_CASE) for inside in foreground]


def voxel_values(channel: Array, labels: Array | None = None, ignore: int | None = None) -> Iterator[Array]:
    """Yield the non-zero values of a channel (Z, Y, X) in chunks; with labels (Z, Y, X), its values under a label other than `ignore`."""
    values, marks = channel.reshape(-1), (channel if labels is None else labels).reshape(-1)
    for start in range(0, values.size, CHUNK_VALUES):
        mark = marks[start : start + CHUNK_VALUES]
        kept = mark != 0 if labels is None or ignore is None else (mark != 0) & (mark != ignore)
        yield values[start : start + CHUNK_VALUES].compress(kept)


def orientation_code(grid: Grid) -> str:
    """Return where the stored x, y and z axes point, e.g. "LPS" or "RAS"."""
    found = orient(grid.direction)
    ends = ("IS", "AP", "RL")
    letters = {axis: ends[a][0 if back else 1] for a, (axis, back) in enumerate(zip(found.order, found.flipped, strict=True))}
    return letters[2] + letters[1] + letters[0]


def _rounded(values: Any) -> tuple[float, float, float]:
    si, ap, lr = (round_significant(value) for value in values)
    return si, ap, lr
