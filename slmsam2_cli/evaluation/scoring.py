"""Score cases: read two masks, compare their grids, measure every label; many cases on several processes.

A case that cannot be scored never stops another, and the scores do not depend on the number of processes. On request, a prediction on
another grid is resampled to the reference's grid, each voxel taking the value of the nearest one.
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
from slmsam2_cli.io.volume import LabelVolume, place_on, read_labels, relative

if TYPE_CHECKING:
    from slmsam2_cli.evaluation.matching import Group

CaseStatus = Literal["ok", "pred_missing", "failed"]
MAX_KEPT_BYTES = 2**28  # of results of `post_scoring`; those beyond are dropped, to be made again from the files

Box = tuple[slice, ...]


class Sized(Protocol):
    """A result that knows its size in bytes."""

    @property
    def size(self) -> int:
        """Return the number of bytes."""


@dataclass(frozen=True, eq=False)
class ComparedMasks:
    """The masks of a scored case.

    volume: the reference as read; reference, prediction: (z, y, x) on its grid, without ignored voxels, prediction None when it is missing;
    box: half-open (z, y, x) around the foreground of both, None when they are empty; resampled: the prediction was on another grid.
    """

    volume: LabelVolume
    reference: np.ndarray
    prediction: np.ndarray | None
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    resampled: bool


PostScoring = Callable[["CaseScore", ComparedMasks], Sized | None]


@dataclass(frozen=True)
class Job:
    """One case to score.

    values: labels and regions to score, None for the labels that occur; ignore: the value of voxels that are not scored; slice_axis: array
    axis (z, y, x) along which slices are numbered, None for the coarsest; annotated: label -> annotated slices, None when unknown;
    resample: resample a prediction on another grid; post_scoring: called with the masks while they are in memory, in whichever process
    scores them.
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
    annotated: Mapping[int, tuple[int, ...]] | None = None
    tolerance_mm: float = NSD_TOLERANCE_MM
    resample: bool = False
    post_scoring: PostScoring | None = None

    def file_names(self) -> tuple[str, str | None]:
        """Return the names of the two files relative to their folders."""
        prediction = None if self.prediction is None else relative(self.prediction, self.prediction_root)
        return relative(self.reference, self.reference_root), prediction


@dataclass(frozen=True, eq=False)
class CaseScore:
    """The result of one case.

    labels: by label value or region, empty when the case failed; absent: the score of a label that does not occur in it; hints: mistakes
    that may explain a low score; resampled: the prediction was on another grid; made: the result of `post_scoring`.
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


def onto(grid: Grid, labels: np.ndarray, source: Grid) -> tuple[np.ndarray, int]:
    """Resample labels (Z, Y, X) from the grid `source` to `grid` by nearest neighbour, 0 where `source` does not reach.

    Returns the labels, and the number of labelled voxels of `source` that lie outside `grid`.
    """
    from scipy import ndimage  # slow to import, and rarely needed

    order = np.ix_([2, 1, 0, 3], [2, 1, 0, 3])  # matrices map an index (z, y, x, 1) on the first grid to the second
    there, back = (np.linalg.solve(end.affine(), start.affine())[order] for start, end in ((grid, source), (source, grid)))
    moved = ndimage.affine_transform(
        labels, there[:3, :3], offset=there[:3, 3], output_shape=grid.shape, output=labels.dtype, order=0, mode="grid-constant", cval=0
    )
    places = np.argwhere(labels) @ back[:3, :3].T + back[:3, 3]
    inside = np.all((places >= -0.5) & (places < np.array(grid.shape) - 0.5), axis=1)
    return np.asarray(moved), int(np.count_nonzero(~inside))


def score_case(job: Job) -> CaseScore:
    """Read and measure one case; a case that cannot be scored is returned as failed, with the reason."""
    try:
        return _score(job)
    except CaseError as error:
        return failed(job, str(error))
    except MemoryError:
        return failed(job, f"case {job.case}: not enough memory to compare the masks. Close other programs, or use a larger machine")


def failed(job: Job, problem: str) -> CaseScore:
    """Make the result of a case that could not be scored."""
    return CaseScore(job.case, job.group, "failed", *job.file_names(), problem=problem)


def fill_missing_labels(scores: Sequence[CaseScore], values: Sequence[Structure]) -> list[CaseScore]:
    """Give every scored case an entry for every label, in the order of `values`."""
    return [
        score if score.absent is None else replace(score, labels={v: score.labels.get(v, score.absent) for v in values}) for score in scores
    ]


def score_all(
    jobs: Sequence[Job],
    workers: int | None = None,
    advance: Callable[..., None] = lambda: None,
    max_kept_bytes: int = MAX_KEPT_BYTES,
) -> list[CaseScore]:
    """Score cases and return the results in the order of the jobs.

    workers: processes, None for one per core (at most 8); advance: called after each case; max_kept_bytes: of results of `post_scoring`.
    """
    scores: dict[int, CaseScore] = {}
    held = 0
    count = min(parallel.count(workers), len(jobs))
    for place, score in _score_in_pool(jobs, count) if count > 1 else enumerate(map(score_case, jobs)):
        held += score.made.size if score.made is not None else 0
        scores[place] = score if held <= max_kept_bytes else replace(score, made=None)
        advance()
    return [scores[place] for place in range(len(jobs))]


def _score_in_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, CaseScore]]:
    """Yield (index of the job, score) in the order of completion, so that results of finished cases do not wait for a slow one.

    A process that dies ends its pool. The cases that are left are then scored one by one, each in a process of its own and without
    `post_scoring`, which may be what took too much memory.
    """
    left = dict(enumerate(jobs))
    pool = parallel.pool(workers)
    if pool is None:
        yield from enumerate(map(score_case, jobs))
        return
    running: dict[Future[CaseScore], int] = {}
    with pool:
        try:
            with suppress(BrokenProcessPool, OSError, EOFError):  # no further process can be started
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
        yield place, _score_in_own_process(replace(job, post_scoring=None))


def _score_in_own_process(job: Job) -> CaseScore:
    """Score a case in a new process; failed when that process dies."""
    pool = parallel.pool(1)
    if pool is None:
        return score_case(job)
    with pool:
        try:
            return pool.submit(score_case, job).result()
        except BrokenProcessPool:
            problem = "the process that scored it was killed, probably because memory ran out. Use a larger machine"
            return failed(job, f"case {job.case}: {problem}")


@dataclass(frozen=True, eq=False)
class _Masks:
    """Both masks of a case on the reference's grid, without ignored voxels.

    reference, prediction: (z, y, x), prediction zero throughout when it is missing; boxes: label value -> the smallest box that holds it in
    both; slice_axis: along which slices are numbered; scored: pixels per slice that are not ignored, (S,).
    """

    reference: np.ndarray
    prediction: np.ndarray
    boxes: Mapping[int, Box]
    spacing_mm: tuple[float, ...]
    slice_axis: int
    scored: np.ndarray

    def pair(self, structure: Structure) -> Pair:
        """Crop the two masks of one label or region."""
        values = values_of(structure)
        held = [self.boxes[value] for value in values if value in self.boxes]
        box = _around(held) if held else (slice(0, 0),) * 3
        crops = (mask[box] for mask in (self.reference, self.prediction))
        reference, prediction = (np.asarray(crop == values[0] if len(values) == 1 else np.isin(crop, values)) for crop in crops)
        first = tuple(side.start for side in box)
        return Pair(reference, prediction, first, self.reference.shape, self.spacing_mm, self.slice_axis, self.scored)


def _score(job: Job) -> CaseScore:
    """Read and measure one case.

    Raises: CaseError when a mask cannot be read, the grids differ, or the reference holds undeclared labels.
    """
    volume = read_labels(job.reference, case=job.case, root=job.reference_root)
    found = None if job.prediction is None else read_labels(job.prediction, case=job.case, root=job.prediction_root, on=volume.grid)
    volume = volume if found is None else place_on(volume, found.grid)
    predicted, notes, resampled = _on_grid(job, found, volume)
    job = replace(job, slice_axis=None, annotated=None) if resampled else job  # these refer to the grid that the prediction was on
    masks = _make_masks(job, volume, predicted)
    structures: tuple[Structure, ...] = tuple(masks.boxes) if job.values is None else job.values
    values = {value for structure in structures for value in values_of(structure)}
    warnings = [*volume.warnings, *notes]
    if not any(value in masks.boxes and (masks.reference[masks.boxes[value]] == value).any() for value in values):
        warnings.append("the label is empty: no foreground")
    warnings += _check_undeclared(job, masks, [value for value in masks.boxes if value not in values])

    def score(structure: Structure) -> LabelScore:
        pair = masks.pair(structure)
        if job.prediction is None:
            return measure_missing(pair, job.annotated is not None, job.tolerance_mm)
        if job.annotated is None:
            return measure(pair, None, job.tolerance_mm)
        # a slice annotated for one label of a region counts for the region, so that none of it counts as predicted
        annotated = {k for value in values_of(structure) for k in job.annotated.get(value, ())}
        return measure(pair, sorted(annotated), job.tolerance_mm)

    labels = {structure: score(structure) for structure in structures}
    regions = any(len(values_of(structure)) > 1 for structure in structures)  # whose Dice says nothing about that of their labels
    doubtful = job.prediction is not None and (regions or may_have_hints(measured.all["Dice"] for measured in labels.values()))
    scores = CaseScore(
        job.case,
        job.group,
        "ok" if job.prediction is not None else "pred_missing",
        *job.file_names(),
        labels,
        absent=score(0),
        warnings=tuple(f"case {job.case}: {line}" for line in dict.fromkeys(warnings)),
        hints=tuple(hints(masks.reference, masks.prediction, [v for v in masks.boxes if v in values])) if doubtful else (),
        resampled=resampled,
    )
    if job.post_scoring is None:
        return scores
    prediction = None if job.prediction is None else masks.prediction
    box = None
    if masks.boxes:
        z, y, x = ((side.start, side.stop) for side in _around([*masks.boxes.values()]))
        box = (z, y, x)
    return replace(scores, made=job.post_scoring(scores, ComparedMasks(volume, masks.reference, prediction, box, resampled)))


def values_of(structure: Structure) -> tuple[int, ...]:
    """Return the label values that make up a label or a region."""
    return structure if isinstance(structure, tuple) else (structure,)


def _on_grid(job: Job, prediction: LabelVolume | None, reference: LabelVolume) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Bring the predicted labels to the reference's grid; zero throughout when the prediction is missing.

    Returns the labels (Z, Y, X), warnings, and whether they were resampled.

    Raises: CaseError when the mask lies on another grid and is not to be resampled.
    """
    if prediction is None:
        return np.broadcast_to(np.uint8(0), reference.voxels.shape), (), False
    difference, doubts = compare_geometry(reference, prediction)
    if difference is None:
        return prediction.voxels, (*prediction.warnings, *doubts), False
    if not job.resample:
        what = f"the prediction's grid differs from the label's: {difference} (label, then prediction)"
        remedy = "Predict on the grid of the label, or resample with --resample"
        raise CaseError(job.case, job.file_names()[1] or "", what, remedy)
    moved, outside = onto(reference.grid, prediction.voxels, prediction.grid)
    lost = f"; {outside} labelled voxels lie outside it and are not scored" if outside else ""
    unknown = "; the annotated slices are not known on that grid" if job.annotated is not None else ""
    note = f"the prediction was resampled to the label's grid (nearest neighbour): {difference}{lost}{unknown}"
    return moved, (*prediction.warnings, note), True


def _make_masks(job: Job, volume: LabelVolume, predicted: np.ndarray) -> _Masks:
    """Remove ignored voxels from both masks and find the box of every label.

    Raises: CaseError when an annotated slice lies outside the volume.
    """
    reference, spacing_mm = volume.voxels, volume.grid.spacing_mm
    axis = coarsest_axis(spacing_mm) if job.slice_axis is None else job.slice_axis
    slices = reference.shape[axis]
    beyond = sorted({k for annotated in (job.annotated or {}).values() for k in annotated if k >= slices})
    if beyond:
        what = f"manifest.json lists the annotated slice {beyond[0]}, but the volume has slices 0 to {slices - 1}"
        raise CaseError(job.case, job.file_names()[1] or "", what, "The manifest is of other masks; run slmsam2 predict again")
    scored = np.full(slices, reference.size // slices, dtype=np.int64)
    if job.ignore is not None:
        keep = reference != job.ignore
        reference, predicted = reference * keep, predicted * keep
        scored = np.count_nonzero(keep, axis=tuple(i for i in range(3) if i != axis)).astype(np.int64)
    return _Masks(reference, predicted, find_boxes(reference, predicted), tuple(spacing_mm), axis, scored)


def find_boxes(*masks: np.ndarray) -> dict[int, Box]:
    """Find the smallest box (z, y, x) that holds each label value in all label masks (Z, Y, X), by ascending value."""
    whole = box_of(*masks)
    if not whole[0].stop:
        return {}
    crops = [mask[whole] for mask in masks]
    highest = max(int(crop.max()) for crop in crops)
    if all(np.count_nonzero(crop) == np.count_nonzero(crop == highest) for crop in crops):
        return {highest: whole}  # a single label, found much faster than by labelling objects
    from scipy import ndimage  # slow to import, and often not needed

    found: dict[int, list[Box]] = {}
    for crop in crops:
        for value, inside in enumerate(ndimage.find_objects(crop), start=1):
            if inside is not None:
                box = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(whole, inside, strict=True))
                found.setdefault(value, []).append(box)
    return {value: _around(found[value]) for value in sorted(found)}


def _around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that holds at least one box."""
    return tuple(slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True))


def _check_undeclared(job: Job, masks: _Masks, values: Sequence[int]) -> list[str]:
    """Return a warning for each undeclared value of the prediction. values: those that occur in either mask but are not declared.

    Raises: CaseError when the reference holds one, because its labels then differ from those that are scored.
    """
    counts = {value: int(np.count_nonzero(masks.reference == value)) for value in values}
    listed = ", ".join(f"{value} ({count} voxels)" for value, count in counts.items() if count)
    if listed:
        what = f"label values {listed} are not declared"
        raise CaseError(job.case, job.file_names()[0], what, "Declare them under 'labels' in dataset.json, or correct the mask")
    return [
        f"label {value} is not declared and not scored ({np.count_nonzero(masks.prediction == value)} voxels in the prediction)"
        for value in values
    ]
