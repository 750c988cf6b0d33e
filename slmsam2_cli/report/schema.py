"""The contents of a report page as plain values, without files, HTML or colours.

Slices are counted from 0 along the slice axis, as the file stores them. Distances are in mm. Text is raw; the page escapes it.
One page serves an evaluation (with reference masks) and a prediction (without them, so that it shows no scores).
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

    prediction_px, reference_px: area in pixels, None without a reference; dice: None where both masks are empty or without a reference;
    prompted: whether the slice is annotated; distance: signed number of slices from the nearest annotated slice; confidence: 0 to 1;
    disagreement: 1 - Dice of the forward and the backward pass. Unknown values are None.
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
    def area_px(self) -> int:
        """Return the larger area of both masks."""
        return max(self.prediction_px, self.reference_px or 0)

    @property
    def false(self) -> bool:
        """Whether the structure is predicted on a slice where the reference has none."""
        return self.reference_px == 0 and self.prediction_px > 0

    @property
    def missed(self) -> bool:
        """Whether the structure is in the reference but not predicted on this slice."""
        return bool(self.reference_px) and self.prediction_px == 0


@dataclass(frozen=True)
class Structure:
    """One label or region of one case.

    key: as in summary.json; status and the names of measures: as in docs/reference/metrics.md; unprompted: the same measures without the
    annotated slices; slices: the slices with the structure, ascending; slice_count: slices of the volume, 0 when unknown.
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
    """One slice with outlines. uri: a data: URI; width, height: size on the page in CSS pixels, which are square in mm."""

    case: str
    slice: int
    uri: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class ViewerVolumes:
    """Image and masks of one case for the 3-D viewer.

    image, reference, prediction: gzipped NIfTI files in base64, None where missing; masks hold label values. axis: slice axis of the NIfTI
    (0, 1, 2 = x, y, z); first, step: slice k of the case is slice (k - first) / step of these volumes; note: how they were cropped or
    subsampled.
    """

    prediction: str
    image: str | None = None
    reference: str | None = None
    axis: int = 2
    first: int = 0
    step: int = 1
    note: str = ""

    @property
    def size(self) -> int:
        """Return the number of base64 characters."""
        return sum(len(part or "") for part in (self.prediction, self.image, self.reference))


@dataclass(frozen=True)
class CaseReport:
    """One case.

    group: held_out or training; status: ok, pred_missing or failed (with `problem`); flags: short statements of what is wrong;
    slice_mm: distance between slices; pictures: its slices with outlines, worst first; volumes: for the viewer, or volumes_file: the file
    with them next to the page, relative, with forward slashes; both None when the viewer cannot show the case.
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
    """Dice of one structure at one distance (in slices) from the annotated slice: percentiles over n slices of held-out cases."""

    distance: int
    n: int
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Table:
    """A small table of text. note: a line below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """A whole page.

    headline: (name, value, remark) of each card at the top; cases: worst first; structures: key -> name, in the order shown;
    columns: (key of Structure.measures, heading, digits, better) of the case table, with better "high", "low" or "";
    tables: label means and comparisons; worst: the worst slices of all cases; curve: by structure key; facts: (name, value) of the
    provenance; definitions: (term, meaning); warnings: shown at the top, below failed cases.
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
