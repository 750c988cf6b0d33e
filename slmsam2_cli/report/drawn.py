"""All that a page shows of a case's files, drawn, so that the voxels can go.

An evaluation draws where it scores, in the process that holds the masks: reading them a second time would take longer than drawing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slmsam2_cli.evaluation.scoring import CaseScore, Compared
from slmsam2_cli.report import viewer
from slmsam2_cli.report.contents import Structure, ViewerVolumes
from slmsam2_cli.report.marks import marks
from slmsam2_cli.report.opened import Opened, Sources, with_image
from slmsam2_cli.report.pictures import Shown, draw_slices, worst_slices

LARGEST = 2**26  # voxels of a case drawn where it is scored: its image comes on top of the masks, in every process at once


@dataclass(frozen=True)
class Drawn:
    """slice_mm, slice_count, ends: as Opened tells them; lacks_image: there ought to be one; pictures: by slice."""

    slice_mm: float
    slice_count: int
    ends: tuple[str, str]
    lacks_image: bool
    pictures: Mapping[int, Shown]
    volumes: ViewerVolumes | None

    @property
    def size(self) -> int:
        """Bytes, of pictures and volumes."""
        return sum(len(shown.uri) for shown in self.pictures.values()) + (self.volumes.size if self.volumes is not None else 0)


def draw(opened: Opened, slices: Sequence[int], with_volumes: bool = True) -> Drawn:
    """Pictures of these slices, and the volumes for the viewer."""
    volumes = viewer.volumes(opened) if with_volumes else None
    return Drawn(opened.slice_mm, opened.slice_count, opened.ends(), opened.lacks_image, draw_slices(opened, slices), volumes)


@dataclass(frozen=True)
class Drawing:
    """To be called with a scored case and its masks; sources: for its image, and how it is shown."""

    sources: Sources

    def __call__(self, score: CaseScore, compared: Compared) -> Drawn | None:
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
