"""Add pictures and volumes for the viewer to the cases of a report, the worst cases first, within a limit of bytes.

A case that has not been drawn yet is loaded, drawn and dropped; the next two are read meanwhile, so that at most three are in memory. The
page holds as many volumes as fit; further ones are written to files next to it at once. An evaluation draws a case right after scoring
it, in the process that has the masks in memory, because reading them again would take longer than drawing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from slmsam2_cli.evaluation.metrics import LabelScore
from slmsam2_cli.evaluation.scoring import CaseScore, ComparedMasks
from slmsam2_cli.report import viewer
from slmsam2_cli.report.case_files import CaseFiles, LoadedCase, add_image, load_case
from slmsam2_cli.report.contact_sheet import DrawnSlice, draw_slices, make_pictures, worst_of_all, worst_slices
from slmsam2_cli.report.schema import CaseReport, Picture, SliceMark, Structure, ViewerVolumes

FOLDER = "report_files"
MAX_CASES = 200  # cases that get pictures; the others have numbers only
MAX_VOXELS = 2**26  # of a case drawn while scoring, where its image comes on top of the masks in every process at once
_READ_AHEAD = 2
WriteVolumes = Callable[[str, str, ViewerVolumes], None]  # (relative file name, case, volumes): write the file


@dataclass(frozen=True)
class CaseDrawing:
    """What a page shows of the files of a case. slice_mm, slice_count, ends, image_missing: as in LoadedCase; pictures: by slice."""

    slice_mm: float
    slice_count: int
    ends: tuple[str, str]
    image_missing: bool
    pictures: Mapping[int, DrawnSlice]
    volumes: ViewerVolumes | None

    @property
    def size(self) -> int:
        """Return the bytes of pictures and volumes."""
        return sum(len(picture.uri) for picture in self.pictures.values()) + (self.volumes.size if self.volumes is not None else 0)


Finish = Callable[[CaseReport, CaseDrawing | None], CaseReport]


def draw(loaded: LoadedCase, slices: Sequence[int], with_volumes: bool = True) -> CaseDrawing:
    """Draw these slices of a case, and make its volumes for the viewer."""
    volumes = viewer.make_volumes(loaded) if with_volumes else None
    pictures = draw_slices(loaded, slices)
    return CaseDrawing(loaded.slice_mm, loaded.slice_count, loaded.ends(), loaded.image_missing, pictures, volumes)


@dataclass(frozen=True)
class DrawAfterScoring:
    """Draws a scored case from the masks in memory. files: for its image, and how to show it."""

    files: CaseFiles

    def __call__(self, score: CaseScore, compared: ComparedMasks) -> CaseDrawing | None:
        """Draw the slices that the page chooses from the same score; None when memory is short, so that it is drawn later."""
        if math.prod(compared.volume.grid.shape) > MAX_VOXELS:
            return None
        try:
            files = replace(self.files, axis=None) if compared.resampled else self.files  # the axis belongs to another grid
            loaded = add_image(score.case, files, compared.volume, compared.reference, compared.prediction, compared.box)
            structures = [Structure(str(value), "", score.status, {}, slices=slice_marks(label)) for value, label in score.labels.items()]
            return draw(loaded, [choice.slice for choice in worst_slices(structures)])
        except MemoryError:
            return None


def slice_marks(
    label: LabelScore, confidence: Mapping[int, float] | None = None, disagreement: Mapping[int, float] | None = None
) -> tuple[SliceMark, ...]:
    """Return the slices of a scored structure for the page. confidence, disagreement: by slice, where known."""
    marks = []
    for row in label.slices:
        k, distance = int(row["slice"] or 0), row["prompt_distance_slices"]
        mark = SliceMark(
            slice=k,
            prediction_px=int(row["prediction_px"] or 0),
            reference_px=int(row["reference_px"] or 0),
            dice=row["Dice"],
            prompted=distance == 0,
            distance=None if distance is None else int(distance),
            confidence=(confidence or {}).get(k),
            disagreement=(disagreement or {}).get(k),
        )
        marks.append(mark)
    return tuple(marks)


@dataclass(frozen=True)
class PageOutput:
    """Where the parts of a page go while it is made.

    write_volumes: writes volumes next to the page, None when it is a single file; advance: called as the work proceeds; embedded_bytes,
    separate_bytes: limits of the base64 text of volumes in the page and in the files next to it.
    """

    write_volumes: WriteVolumes | None = None
    advance: Callable[..., None] = lambda: None
    embedded_bytes: int = viewer.EMBEDDED_BYTES
    separate_bytes: int = viewer.SEPARATE_BYTES


@dataclass(frozen=True)
class Thumbnails:
    """cases: with pictures and volumes, in their order; worst: the worst slices of all cases; drawn: number of cases with a drawing."""

    cases: tuple[CaseReport, ...]
    worst: tuple[Picture, ...]
    drawn: int


def add_thumbnails(
    cases: Sequence[CaseReport],
    files: Mapping[str, CaseFiles],
    finish: Finish,
    output: PageOutput,
    flagged: Mapping[str, Mapping[int, str]] | None = None,
    ready: Mapping[str, CaseDrawing] | None = None,
) -> Thumbnails:
    """Add pictures and volumes to the cases (worst first), in the order of viewer.viewing_order while there is room.

    files: by case; a case that is not in it gets no pictures. finish: completes a case from its drawing, None where there is none.
    flagged: case -> slices to show first, with captions. ready: drawings made already, by case. output.advance is called after each case.
    """
    by_id = {case.id: case for case in cases}
    visible = [case.id for case in cases if case.status != "failed" and case.id in files][:MAX_CASES]
    predicted = [case for case in visible if files[case].prediction is not None]
    order = list(dict.fromkeys((*viewer.viewing_order(predicted), *by_id)))
    shown, ready = frozenset(visible), ready or {}
    wanted = [(case, ready.get(case) or files[case] if case in shown else None) for case in order]
    pictures: dict[str, list[tuple[float, Picture]]] = {}
    embedded, separate = output.embedded_bytes, output.separate_bytes if output.write_volumes is not None else 0
    for case, found in zip(order, _load_ahead(wanted), strict=True):
        choices = worst_slices(by_id[case].structures, flagged=(flagged or {}).get(case))
        drawn = draw(found, [choice.slice for choice in choices], max(embedded, separate) > 0) if isinstance(found, LoadedCase) else found
        report = finish(by_id[case], drawn)
        if drawn is not None:
            severity = {choice.slice: choice.severity for choice in choices}
            report = replace(report, pictures=make_pictures(case, choices, drawn.pictures))
            pictures[case] = [(severity[picture.slice], picture) for picture in report.pictures]
            if drawn.volumes is not None and drawn.volumes.size <= embedded:
                embedded -= drawn.volumes.size
                report = replace(report, volumes=drawn.volumes)
            elif drawn.volumes is not None and output.write_volumes is not None and drawn.volumes.size <= separate:
                separate -= drawn.volumes.size
                report = replace(report, volumes_file=file_name(case))
                output.write_volumes(file_name(case), case, drawn.volumes)
        by_id[case] = report
        output.advance()
    return Thumbnails(tuple(by_id[case.id] for case in cases), worst_of_all(pictures), len(pictures))


def _load_ahead(wanted: Sequence[tuple[str, CaseFiles | CaseDrawing | None]]) -> Iterator[LoadedCase | CaseDrawing | None]:
    """Load each case that is given by its files and pass on the others, reading _READ_AHEAD cases in advance."""

    def load(case: str, files: CaseFiles | CaseDrawing | None) -> LoadedCase | CaseDrawing | None:
        return load_case(case, files) if isinstance(files, CaseFiles) else files

    with ThreadPoolExecutor(_READ_AHEAD) as reader:
        coming = deque[Future[LoadedCase | CaseDrawing | None]]()
        for case, files in wanted:
            coming.append(reader.submit(load, case, files))
            if len(coming) > _READ_AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def file_name(case: str) -> str:
    """Return the name of the file of a case's volumes next to the page, safe on any file system and different for every case."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", case).strip("-")[:60]
    return f"{FOLDER}/{slug or 'case'}-{hashlib.sha256(case.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}.js"
