"""Measuring a data set: a few cases in memory at a time, every problem of every case found in one pass.

What is measured depends neither on the order in which voxels are stored nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from slmsam2_cli.dataset.cache import read_pair
from slmsam2_cli.dataset.dataset import Case, Dataset
from slmsam2_cli.dataset.resources import bytes_on_disk, bytes_to_read, free_bytes
from slmsam2_cli.dataset.slices import orient, oriented_size
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.image import Grid
from slmsam2_cli.parallel import available_cpus, parallel_map
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from slmsam2_cli.planning.intensity_stats import CHUNK_VALUES, Array, Greys, sample_evenly, short, statistics
from slmsam2_cli.planning.label_stats import box_of, measure_labels
from slmsam2_cli.version import VERSION

SAMPLE = 10_000  # foreground voxels a case gives to the data set's statistics
MIN_PARALLEL_BYTES = 1 << 26  # on disk: one process takes a second and more to measure them, and half a second to start others
PROCESS_BYTES = 1 << 27  # what a process takes beside the case it measures
SHARE = 0.7  # of the free memory, for cases measured at one time
LOADED = ("slmsam2_cli.planning.measure", "nibabel")


def measure(
    dataset: Dataset, advance: Callable[..., None] = lambda steps=1, note="": None, workers: int | None = None
) -> tuple[Fingerprint, tuple[CaseError, ...]]:
    """The fingerprint of all usable training cases, and the problems of the others. advance(1, case id) is called after each case.

    workers: processes, 0 for none but this one, None for as many as are worth their start.
    """
    answers = parallel_map(
        partial(measure_case, dataset=replace(dataset, training=(), test=(), problems=())),
        {case.id: case for case in dataset.training},
        worker_count(dataset.training) if workers is None else workers,
        bytes_of=lambda case: PROCESS_BYTES + bytes_to_read(case),
        max_bytes=int(SHARE * free_bytes()),
        advance=advance,
        preload=LOADED,
    )
    measured = [answer for answer in answers if not isinstance(answer, CaseError)]
    samples = zip(*(sampled for _, sampled in measured), strict=True) if measured else [()] * len(dataset.channels)
    fingerprint = Fingerprint(
        tool_version=VERSION,
        dataset_name=dataset.name,
        channels=dataset.channels,
        labels=dataset.labels,
        ignore=dataset.ignore,
        cases=tuple(case for case, _ in measured),
        foreground=tuple(statistics(Greys(partial(_as_doubles, pool))) for pool in samples),
    )
    return fingerprint, (*dataset.problems, *(answer for answer in answers if isinstance(answer, CaseError)))


def worker_count(cases: Sequence[Case]) -> int:
    """How many processes measure these cases soonest: one a core, but none for what is measured before they would have started."""
    return min(available_cpus(), len(cases)) if sum(map(bytes_on_disk, cases)) >= MIN_PARALLEL_BYTES else 0


def measure_case(case: Case, dataset: Dataset) -> tuple[CaseFingerprint, list[Array]]:
    """One training case, and per channel at most SAMPLE of its foreground's grey values. CaseError when it is unusable."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _measure_case(case, dataset)
    except ValidationError:  # a spread that is no number any more
        raise CaseError(case.id, "", "its grey values are too large to be measured", "Export the image again in its usual unit") from None
    except MemoryError:
        raise CaseError(case.id, "", "not enough memory to measure it", "Close other programs, or use a machine with more memory") from None


def _measure_case(case: Case, dataset: Dataset) -> tuple[CaseFingerprint, list[Array]]:
    volume, mask, warnings = read_pair(case, dataset)
    if mask is None:
        raise CaseError(case.id, "", "has no label", "Add its mask to labelsTr, or drop the case from dataset.json")
    voxels, labels, orientation = volume.voxels, mask.voxels, orient(volume.grid.direction)
    shape, spacing = oriented_size(volume.grid)
    box = box_of(labels.shape, lambda planes: (voxels[:, planes] != 0).any(axis=0)) or [(0, length) for length in labels.shape]
    content = [box[stored][1] - box[stored][0] for stored in orientation.order]
    foreground = [Greys(partial(labelled, channel, labels, dataset.ignore)) for channel in voxels]
    fingerprint = CaseFingerprint(
        id=case.id,
        stored_shape=volume.grid.shape,
        orientation=orientation_code(volume.grid),
        shape=shape,
        spacing_mm=_rounded(spacing),
        content_mm=_rounded(length * mm for length, mm in zip(content, spacing, strict=True)),
        channels=tuple(
            ChannelFingerprint(whole=statistics(Greys(partial(nonzero, channel))), foreground=statistics(inside))
            for channel, inside in zip(voxels, foreground, strict=True)
        ),
        labels=measure_labels(labels, dataset.labels, orientation),
        warnings=warnings,
    )
    return fingerprint, [sample_evenly(inside, SAMPLE) for inside in foreground]


def nonzero(channel: Array) -> Iterator[Array]:
    """The values of a channel (Z, Y, X) that are not 0, in pieces."""
    flat = channel.reshape(-1)
    for start in range(0, flat.size, CHUNK_VALUES):
        piece = flat[start : start + CHUNK_VALUES]
        yield piece.compress(piece != 0)


def labelled(channel: Array, labels: Array, ignore: int | None) -> Iterator[Array]:
    """The values of a channel (Z, Y, X) under a label other than `ignore`, in pieces."""
    flat, marks = channel.reshape(-1), labels.reshape(-1)
    for start in range(0, flat.size, CHUNK_VALUES):
        piece, mark = flat[start : start + CHUNK_VALUES], marks[start : start + CHUNK_VALUES]
        yield piece.compress((mark != 0) & (mark != (ignore or 0)))


def orientation_code(grid: Grid) -> str:
    """Where the stored x, y and z axes point, e.g. "LPS" or "RAS"."""
    found = orient(grid.direction)
    ends = ("IS", "AP", "RL")
    letters = {axis: ends[a][0 if back else 1] for a, (axis, back) in enumerate(zip(found.order, found.flipped, strict=True))}
    return letters[2] + letters[1] + letters[0]


def _as_doubles(samples: Iterable[Array]) -> Iterator[Array]:
    """What has been sampled of images that need not be of one type."""
    return (sample.astype(np.float64) for sample in samples)


def _rounded(values: Any) -> tuple[float, float, float]:
    si, ap, lr = (short(value) for value in values)
    return si, ap, lr
