"""Cases in, scores out: reads two masks, compares their grids, measures every label; many cases on a few processes.

One bad case never stops another, and the scores do not depend on the number of processes.

A mask brought onto another grid, when a person asks for it: each voxel takes the value of the nearest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from slmsam2_cli import parallel
from slmsam2_cli.dataset.checks import compare_geometry
from slmsam2_cli.dataset.dataset_json import Structure
from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.diagnostics import hints, may_have_hints
from slmsam2_cli.evaluation.metrics import NSD_TOLERANCE_MM, LabelScore, Pair, box_of, coarsest_axis, measure, measure_missing
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import LabelVolume, read_labels, relative

if TYPE_CHECKING:
    from slmsam2_cli.evaluation.matching import Group


def onto(grid: Grid, labels: np.ndarray, source: Grid) -> tuple[np.ndarray, int]:
    """(labels (Z, Y, X) on `grid`, number of labelled voxels of `source` that lie outside it). 0 where `source` does not reach."""
    there = _index_map(grid, source)
    from scipy import ndimage  # slow to import, and rarely needed

    moved = ndimage.affine_transform(
        labels, there[:3, :3], offset=there[:3, 3], output_shape=grid.shape, output=labels.dtype, order=0, mode="grid-constant", cval=0
    )
    return np.asarray(moved), _outside(grid, labels, source)


def _outside(grid: Grid, labels: np.ndarray, source: Grid) -> int:
    back = _index_map(source, grid)
    voxels = np.argwhere(labels)
    places = voxels @ back[:3, :3].T + back[:3, 3]
    inside = np.all((places >= -0.5) & (places < np.array(grid.shape) - 0.5), axis=1)
    return int(np.count_nonzero(~inside))


def _index_map(start: Grid, end: Grid) -> np.ndarray:
    """(4, 4): index (z, y, x, 1) on `start` -> the same place's index on `end`."""
    matrix = np.linalg.solve(end.affine(), start.affine())
    order = [2, 1, 0, 3]
    return np.asarray(matrix[np.ix_(order, order)])


CaseStatus = Literal["ok", "pred_missing", "failed"]
MAX_KEPT_BYTES = 2**28  # of what `afterwards` made; what is beyond is dropped, to be made again from the files

Boxes = Mapping[int, tuple[slice, ...]]


@dataclass(frozen=True, eq=False)
class ComparedMasks:
    """The masks of a case once it is scored. reference: as read; truth, prediction: (z, y, x) on its grid, without ignored voxels;
    prediction: None when it is missing; box: half-open (z, y, x), around everything in both, None when they are empty; resampled: the
    prediction was on another grid."""

    reference: LabelVolume
    truth: np.ndarray
    prediction: np.ndarray | None
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    resampled: bool


class Sized(Protocol):
    """What can say how many bytes it holds."""

    @property
    def size(self) -> int: ...


PostScoring = Callable[["CaseScore", ComparedMasks], Sized | None]


@dataclass(frozen=True)
class Job:
    """One case to score.

    values: labels and regions to score, None for the labels that occur; slice_axis: array axis (z, y, x) of the slice numbers, None for the
    coarsest; prompted: label -> given slices, None when nobody knows; resample: bring a prediction on another grid onto the label's;
    afterwards: what else to make of the masks while they are in memory (it may be called in another process).
    """

    case: str
    group: Group
    reference: Path
    prediction: Path | None
    reference_root: Path
    prediction_root: Path
    values: tuple[Structure, ...] | None
    ignore: int | None = None
    slice_axis: int | None = None
    prompted: Mapping[int, tuple[int, ...]] | None = None
    tolerance_mm: float = NSD_TOLERANCE_MM
    resample: bool = False
    post_scoring: PostScoring | None = None


@dataclass(frozen=True, eq=False)
class CaseScore:
    """What came of one case.

    labels: by label value or region, empty when the case failed; absent: the score of a label that does not occur in it; hints: mistakes
    that a low score may come from; resampled: the prediction was on another grid; made: by the job's `afterwards`.
    """

    case: str
    group: Group
    status: CaseStatus
    reference_file: str
    prediction_file: str | None
    labels: Mapping[Structure, LabelScore] = field(default_factory=dict)
    absent: LabelScore | None = None
    problem: str | None = None
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    resampled: bool = False
    made: Sized | None = None


def score_case(job: Job) -> CaseScore:
    """Read and measure; a case that cannot be used comes back as failed, with the reason."""
    try:
        return _score(job)
    except CaseError as error:
        return failed(job, str(error))
    except MemoryError:
        return failed(
            job, f"case {job.case}: not enough memory to compare the masks. Close other programs, or score it on a larger machine"
        )


def failed(job: Job, problem: str) -> CaseScore:
    """A case about which nothing can be said."""
    return CaseScore(job.case, job.group, "failed", *_names(job), problem=problem)


def fill_missing_labels(scores: Sequence[CaseScore], values: Sequence[Structure]) -> list[CaseScore]:
    """Every scored case with an entry for every label, in the order of `values`."""
    return [
        score if score.absent is None else replace(score, labels={v: score.labels.get(v, score.absent) for v in values}) for score in scores
    ]


def score_all(
    jobs: Sequence[Job],
    workers: int | None = None,
    advance: Callable[..., None] = lambda: None,
    max_kept_bytes: int = MAX_KEPT_BYTES,
) -> list[CaseScore]:
    """Scores in the order of the jobs. workers: processes, None for one per core (at most 8); max_kept_bytes: of what `afterwards` made."""
    scores: dict[int, CaseScore] = {}
    held = 0
    count = min(parallel.count(workers), len(jobs))
    for place, score in _score_in_pool(jobs, count) if count > 1 else enumerate(map(score_case, jobs)):
        held += score.made.size if score.made is not None else 0
        scores[place] = score if held <= max_kept_bytes else replace(score, made=None)
        advance()
    return [scores[place] for place in range(len(jobs))]


def _score_in_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, CaseScore]]:
    """(place of the job, score) as they come, so that none waits for a slow one with all that was made of it.

    A process that dies takes its pool with it: what it left undone is tried again, each case in a process of its own.
    """
    left = dict(enumerate(jobs))
    pool = parallel.pool(workers)
    if pool is None:
        yield from enumerate(map(score_case, jobs))
        return
    running: dict[Future[CaseScore], int] = {}
    with pool:
        try:
            with suppress(BrokenProcessPool, OSError, EOFError):  # the next process cannot be had
                for place, job in left.items():
                    running[pool.submit(score_case, job)] = place
            for future in as_completed(running):
                place = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    continue
                del left[place]
                yield place, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for place, job in left.items():
        yield place, _score_in_own_process(job)


def _score_in_own_process(job: Job) -> CaseScore:
    """Without anything made of the masks: that may be what took too much memory."""
    job = replace(job, post_scoring=None)
    pool = parallel.pool(1)
    if pool is None:
        return score_case(job)
    with pool:
        try:
            return pool.submit(score_case, job).result()
        except BrokenProcessPool:
            return failed(
                job, f"case {job.case}: the process scoring it was ended, probably for want of memory. Score it on a larger machine"
            )


def _score(job: Job) -> CaseScore:
    reference = read_labels(job.reference, case=job.case, root=job.reference_root)
    predicted, notes, resampled = _prediction(job, reference)
    job = replace(job, slice_axis=None, prompted=None) if resampled else job  # both are of the grid that the prediction was on
    axis = coarsest_axis(reference.grid.spacing_mm) if job.slice_axis is None else job.slice_axis
    _check_prompted_slices(job, reference.voxels.shape[axis])
    truth, predicted, scored = _without_ignored(reference.voxels, predicted, job.ignore, axis)
    boxes = _boxes(truth, predicted)

    def score(structure: Structure) -> LabelScore:
        pair = _cut(truth, predicted, structure, boxes, reference.grid.spacing_mm, axis, scored)
        if job.prediction is None:
            return measure_missing(pair, job.prompted is not None, job.tolerance_mm)
        return measure(pair, _given(job.prompted, structure), job.tolerance_mm)

    structures: tuple[Structure, ...] = tuple(boxes) if job.values is None else job.values
    values = {value for structure in structures for value in values_of(structure)}
    _check_declared(job, truth, [v for v in boxes if v not in values])
    undeclared = _undeclared(predicted, [v for v in boxes if v not in values])
    status: CaseStatus = "ok" if job.prediction is not None else "pred_missing"
    labels = {structure: score(structure) for structure in structures}
    empty = (
        [] if any(value in boxes and (truth[boxes[value]] == value).any() for value in values) else ["the label is empty: no foreground"]
    )
    said = [f"case {job.case}: {line}" for line in dict.fromkeys((*reference.warnings, *notes, *empty, *undeclared))]
    regions = any(len(values_of(structure)) > 1 for structure in structures)  # whose Dice does not tell that of their labels
    doubtful = status == "ok" and (regions or may_have_hints(measured.all["Dice"] for measured in labels.values()))
    found = tuple(hints(truth, predicted, [v for v in boxes if v in values])) if doubtful else ()
    scores = CaseScore(job.case, job.group, status, *_names(job), labels, score(0), warnings=tuple(said), hints=found, resampled=resampled)
    if job.post_scoring is None:
        return scores
    compared = ComparedMasks(reference, truth, None if job.prediction is None else predicted, _around(boxes), resampled)
    return replace(scores, made=job.post_scoring(scores, compared))


def values_of(structure: Structure) -> tuple[int, ...]:
    """The label values that make up a label or a region."""
    return structure if isinstance(structure, tuple) else (structure,)


def _given(prompted: Mapping[int, tuple[int, ...]] | None, structure: Structure) -> tuple[int, ...] | None:
    """Slices given for a structure; of a region, those given for any of its labels, so that none is counted as found."""
    if prompted is None:
        return None
    return tuple(sorted({k for value in values_of(structure) for k in prompted.get(value, ())}))


def _prediction(job: Job, reference: LabelVolume) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """The predicted labels on the reference's grid, warnings, and whether they were brought there; nothing at all when it is missing."""
    if job.prediction is None:
        return np.broadcast_to(np.uint8(0), reference.voxels.shape), (), False
    prediction = read_labels(job.prediction, case=job.case, root=job.prediction_root)
    difference, doubts = compare_geometry(reference, prediction)
    if difference is None:
        return prediction.voxels, (*prediction.warnings, *doubts), False
    if not job.resample:
        what = f"the prediction's grid is not the label's: {difference} (label, then prediction)"
        remedy = "Predict on the grid of the label, or score it with --resample; nothing is resampled silently"
        raise CaseError(job.case, _names(job)[1] or "", what, remedy)
    moved, outside = onto(reference.grid, prediction.voxels, prediction.grid)
    lost = f"; {outside} labelled voxels lie outside it and are not scored" if outside else ""
    given = "; which slices were given is not known on that grid" if job.prompted is not None else ""
    note = f"the prediction was resampled onto the label's grid (nearest voxel): {difference}{lost}{given}"
    return moved, (*prediction.warnings, note), True


def _check_prompted_slices(job: Job, slices: int) -> None:
    beyond = sorted({k for given in (job.prompted or {}).values() for k in given if k >= slices})
    if beyond:
        what = f"the manifest lists prompted slice {beyond[0]}, the volume has slices 0 to {slices - 1}"
        raise CaseError(job.case, _names(job)[1] or "", what, "Predict again; the masks and the manifest do not belong together")


def _without_ignored(truth: np.ndarray, predicted: np.ndarray, ignore: int | None, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both masks without the voxels the reference asks to ignore, and the pixels left per slice."""
    across = tuple(i for i in range(3) if i != axis)
    pixels = np.full(truth.shape[axis], truth.size // truth.shape[axis], dtype=np.int64)
    if ignore is None:
        return truth, predicted, pixels
    keep = truth != ignore
    return truth * keep, predicted * keep, np.count_nonzero(keep, axis=across).astype(np.int64)


def _boxes(*masks: np.ndarray) -> Boxes:
    """Label value -> the smallest box that holds it in every mask, ascending."""
    around = box_of(*masks)
    found: dict[int, tuple[slice, ...]] = {}
    if around[0].stop and (only := _only_value([mask[around] for mask in masks])) is not None:
        return {only: around}
    from scipy import ndimage  # slow to import, and often not needed

    for mask in masks if around[0].stop else ():
        for value, inside in enumerate(ndimage.find_objects(mask[around]), start=1):
            if inside is not None:
                box = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(around, inside, strict=True))
                found[value] = box if value not in found else tuple(map(_hull, found[value], box))
    return dict(sorted(found.items()))


def _around(boxes: Boxes) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """The box around all boxes."""
    if not boxes:
        return None
    z, y, x = ((min(b.start for b in side), max(b.stop for b in side)) for side in zip(*boxes.values(), strict=True))
    return z, y, x


def _only_value(masks: Sequence[np.ndarray]) -> int | None:
    """The one value above 0 that masks hold together; None when there are several. Much faster than looking for all of them."""
    value = max(int(mask.max()) for mask in masks)
    return value if all(np.count_nonzero(mask) == np.count_nonzero(mask == value) for mask in masks) else None


def _hull(a: slice, b: slice) -> slice:
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _cut(
    truth: np.ndarray, predicted: np.ndarray, structure: Structure, boxes: Boxes, spacing_mm: Sequence[float], axis: int, scored: np.ndarray
) -> Pair:
    """The two masks of one label or region, cropped."""
    values = values_of(structure)
    held = [boxes[value] for value in values if value in boxes]
    box = held[0] if held else (slice(0, 0),) * 3
    for other in held[1:]:
        box = tuple(map(_hull, box, other))
    reference, prediction = (_holding(mask[box], values) for mask in (truth, predicted))
    return Pair(reference, prediction, tuple(b.start for b in box), truth.shape, tuple(spacing_mm), axis, scored)


def _holding(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    return np.asarray(labels == values[0] if len(values) == 1 else np.isin(labels, values))


def _check_declared(job: Job, truth: np.ndarray, values: Sequence[int]) -> None:
    """A label that holds what nobody declared is not what the names say; CaseError."""
    counts = {value: int(np.count_nonzero(truth == value)) for value in values}
    listed = ", ".join(f"{value} ({count} voxels)" for value, count in counts.items() if count)
    if listed:
        what = f"label values {listed} are not declared"
        raise CaseError(job.case, _names(job)[0], what, "Declare them under 'labels', or correct the mask")


def _undeclared(predicted: np.ndarray, values: Sequence[int]) -> list[str]:
    """One line for each value of the prediction that nobody declared, with its count."""
    return [
        f"label {value} is not declared and not scored ({np.count_nonzero(predicted == value)} voxels in the prediction)"
        for value in values
    ]


def _names(job: Job) -> tuple[str, str | None]:
    prediction = None if job.prediction is None else relative(job.prediction, job.prediction_root)
    return relative(job.reference, job.reference_root), prediction
