"""Cases get their pictures and their volumes for the viewer, those to look at first, within a budget of bytes.

What was not drawn already is opened, one case after the other. The page holds as many volumes as it can carry; further ones go to files
beside it, through the function that writes them, at once, so that the voxels of never more than three cases are in memory: the one being
drawn, and the next two being read.

All that a page shows of a case's files, drawn, so that the voxels can go.

An evaluation draws where it scores, in the process that holds the masks: reading them a second time would take longer than drawing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from slmsam2_cli.evaluation.scoring import CaseScore, ComparedMasks
from slmsam2_cli.report import viewer
from slmsam2_cli.report.case_files import LoadedCase, Sources, load_case, with_image
from slmsam2_cli.report.charts import marks
from slmsam2_cli.report.contact_sheet import Shown, captioned, cohort_sheet, draw_slices, worst_slices
from slmsam2_cli.report.schema import CaseReport, Picture, Structure, ViewerVolumes

LARGEST = 2**26  # voxels of a case drawn where it is scored: its image comes on top of the masks, in every process at once


@dataclass(frozen=True)
class Drawn:
    """slice_mm, slice_count, ends: as Opened tells them; image_missing: there ought to be one; pictures: by slice."""

    slice_mm: float
    slice_count: int
    ends: tuple[str, str]
    image_missing: bool
    pictures: Mapping[int, Shown]
    volumes: ViewerVolumes | None

    @property
    def size(self) -> int:
        """Bytes, of pictures and volumes."""
        return sum(len(shown.uri) for shown in self.pictures.values()) + (self.volumes.size if self.volumes is not None else 0)


def draw(opened: LoadedCase, slices: Sequence[int], with_volumes: bool = True) -> Drawn:
    """Pictures of these slices, and the volumes for the viewer."""
    volumes = viewer.volumes(opened) if with_volumes else None
    return Drawn(opened.slice_mm, opened.slice_count, opened.ends(), opened.image_missing, draw_slices(opened, slices), volumes)


@dataclass(frozen=True)
class Drawing:
    """To be called with a scored case and its masks; sources: for its image, and how it is shown."""

    sources: Sources

    def __call__(self, score: CaseScore, compared: ComparedMasks) -> Drawn | None:
        """The slices chosen are those that the page will choose from the same score. None: draw it from its files later."""
        if math.prod(compared.reference.grid.shape) > LARGEST:
            return None
        try:
            sources = replace(self.sources, axis=None) if compared.resampled else self.sources  # that was an axis of another grid
            opened = with_image(score.case, sources, compared.reference, compared.truth, compared.prediction, compared.box)
            structures = [Structure(str(value), "", score.status, {}, slices=marks(label)) for value, label in score.labels.items()]
            return draw(opened, [choice.slice for choice in worst_slices(structures)])
        except MemoryError:
            return None


FOLDER = "report_files"
_AHEAD = 2
MOST_CASES = 200  # cases that are opened for pictures; the others are told in numbers
Beside = Callable[[str, str, ViewerVolumes], None]  # (relative file name, case, volumes) -> written
Finish = Callable[[CaseReport, Drawn | None], CaseReport]


@dataclass
class Budget:
    """Bytes of base64 left: in the page, and in files beside it."""

    embedded: int = viewer.EMBEDDED_BYTES
    beside: int = viewer.BESIDE_BYTES


@dataclass(frozen=True)
class Looks:
    """cases: as they came, with pictures and volumes; worst: the cohort's contact sheet; opened: how many could be shown."""

    cases: tuple[CaseReport, ...]
    worst: tuple[Picture, ...]
    opened: int


def add_thumbnails(
    cases: Sequence[CaseReport],
    sources: Mapping[str, Sources],
    finish: Finish,
    beside: Beside | None = None,
    advance: Callable[..., None] = lambda: None,
    budget: Budget | None = None,
    most: int = MOST_CASES,
    odd: Mapping[str, Mapping[int, str]] | None = None,
    ready: Mapping[str, Drawn] | None = None,
) -> Looks:
    """cases: worst first. finish: adds what is known only once the case is open; it also sees the cases that are not (None).

    odd: case -> slices that are to be shown first, and why. ready: cases that need not be opened; the page is the same.
    """
    left = budget or Budget()
    by_id = {case.id: case for case in cases}
    shown: dict[str, list[tuple[float, Picture]]] = {}
    visible = [case.id for case in cases if case.status != "failed" and case.id in sources][:most]
    predicted = [case for case in visible if sources[case].prediction is not None]
    seen = frozenset(visible)
    order = list(dict.fromkeys((*viewer.viewing_order(predicted), *by_id)))
    wanted = [(case, (ready or {}).get(case) or sources[case] if case in seen else None) for case in order]
    for case, found in zip(order, _ahead(wanted), strict=True):
        choices = worst_slices(by_id[case].structures, odd=(odd or {}).get(case))
        room = max(left.embedded, left.beside if beside is not None else 0) > 0
        drawn = draw(found, [choice.slice for choice in choices], room) if isinstance(found, LoadedCase) else found
        by_id[case] = finish(by_id[case], drawn)
        if drawn is not None:
            severity = {choice.slice: choice.severity for choice in choices}
            there = captioned(case, choices, drawn.pictures)
            shown[case] = [(severity[picture.slice], picture) for picture in there]
            by_id[case] = _with_volumes(replace(by_id[case], pictures=there), drawn.volumes, left, beside)
        advance()
    return Looks(tuple(by_id[case.id] for case in cases), cohort_sheet(shown), len(shown))


def _ahead(wanted: Sequence[tuple[str, Sources | Drawn | None]]) -> Iterator[LoadedCase | Drawn | None]:
    """Each case opened, unless it is drawn, or None; the next two are being read while one is drawn, so that three are in memory."""
    with ThreadPoolExecutor(_AHEAD) as reader:
        coming = deque[Future[LoadedCase | Drawn | None]]()
        for case, files in wanted:
            coming.append(reader.submit(_open, case, files))
            if len(coming) > _AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _open(case: str, files: Sources | Drawn | None) -> LoadedCase | Drawn | None:
    return load_case(case, files) if isinstance(files, Sources) else files


def file_name(case: str) -> str:
    """A name beside the page that no case can make unsafe or share with another, on any file system."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", case).strip("-")[:60]
    return f"{FOLDER}/{slug or 'case'}-{hashlib.sha256(case.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}.js"


def _with_volumes(case: CaseReport, volumes: ViewerVolumes | None, left: Budget, beside: Beside | None) -> CaseReport:
    """In the page while there is room, else beside it while there is, else not at all."""
    if volumes is None:
        return case
    if volumes.size <= left.embedded:
        left.embedded -= volumes.size
        return replace(case, volumes=volumes)
    if beside is not None and volumes.size <= left.beside:
        left.beside -= volumes.size
        name = file_name(case.id)
        beside(name, case.id, volumes)
        return replace(case, volumes_file=name)
    return case
