"""What a report page shows, as plain values: no files, no HTML, no colours.

Slices are counted from 0 along the propagation axis, as the file stores them; distances are mm; text is raw and is escaped by the page.
The same page serves an evaluation (there is a truth) and a prediction (there is none, so nothing that needs one is shown).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["evaluation", "prediction"]
Number = float | int | None


@dataclass(frozen=True)
class SliceMark:
    """One slice of one structure.

    dice: None where neither mask holds the structure, or there is no truth; reference_px: None without a truth;
    distance: signed number of slices to the nearest prompt, None when no prompt is known; confidence, 0 to 1, and
    disagreement (1 - Dice of the forward and the backward pass): None where not known.
    """

    slice: int
    prediction_px: int
    reference_px: int | None = None
    dice: float | None = None
    prompted: bool = False
    distance: int | None = None
    confidence: float | None = None
    disagreement: float | None = None

    @property
    def false(self) -> bool:
        """Predicted where the truth has nothing."""
        return self.reference_px == 0 and self.prediction_px > 0

    @property
    def missed(self) -> bool:
        """Not predicted where the truth has something."""
        return bool(self.reference_px) and self.prediction_px == 0


@dataclass(frozen=True)
class Structure:
    """One label or region of one case. key: as in summary.json; status: as in docs/reference/metrics.md; measures: by the names there.

    slices: marks in ascending order, only slices worth showing; slice_count: slices in the volume, 0 when unknown.
    """

    key: str
    name: str
    status: str
    measures: Mapping[str, Number]
    unprompted: Mapping[str, Number] = field(default_factory=dict)
    slices: tuple[SliceMark, ...] = ()
    slice_count: int = 0


@dataclass(frozen=True)
class Picture:
    """One slice with outlines drawn in. uri: a data: URI; width, height: shown size in CSS pixels (pixels are square in mm)."""

    case: str
    slice: int
    uri: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class ViewerVolumes:
    """Image and masks of one case for the 3-D viewer: gzipped NIfTI files in base64, cut or thinned where large (`note` says how).

    image, truth, prediction: base64 text, None where there is none. Masks hold label values.
    first, step: slice k of the case is slice (k - first) / step along `axis` (0, 1, 2 = x, y, z of the NIfTI) of these volumes.
    """

    prediction: str
    image: str | None = None
    truth: str | None = None
    axis: int = 2
    first: int = 0
    step: int = 1
    note: str = ""

    @property
    def size(self) -> int:
        """Characters of base64."""
        return sum(len(part or "") for part in (self.prediction, self.image, self.truth))


@dataclass(frozen=True)
class CaseReport:
    """One case. group: held-out or training; status: ok, pred_missing, failed (problem says why); flags: why to look at it, in words.

    slice_mm: distance of slices; pictures: its contact sheet, worst first; volumes: None when the viewer has nothing of it;
    volumes_file: the file beside the page that holds them instead, relative, forward slashes.
    """

    id: str
    group: str
    status: str
    structures: tuple[Structure, ...] = ()
    problem: str | None = None
    flags: tuple[str, ...] = ()
    slice_mm: float | None = None
    pictures: tuple[Picture, ...] = ()
    volumes: ViewerVolumes | None = None
    volumes_file: str | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Dice at one distance from the prompt over all held-out cases of a structure."""

    distance: int
    n: int
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Table:
    """A small table of text. note: a line below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A whole page.

    headline: (what, value, remark), the few numbers at the top; tables: label means, comparisons; cases: all, worst first;
    structures: key -> name, in order; columns: the measures of the cohort table, in order, as (key of Structure.measures, heading,
    digits, better) with better "high", "low" or "" ; worst: the cohort's contact sheet; curve: by structure key; facts: (what, value)
    of provenance; definitions: (term, meaning); warnings: said at the top, after failed cases.
    """

    kind: Kind
    title: str
    headline: tuple[tuple[str, str, str], ...]
    cases: tuple[CaseReport, ...]
    structures: Mapping[str, str]
    columns: tuple[tuple[str, str, int, str], ...]
    tables: tuple[Table, ...] = ()
    worst: tuple[Picture, ...] = ()
    curve: Mapping[str, tuple[CurvePoint, ...]] = field(default_factory=dict)
    facts: tuple[tuple[str, str], ...] = ()
    definitions: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
