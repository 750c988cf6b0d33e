"""Whether an image and a mask belong together: geometry, declared values, content. Nothing is resampled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.dataset.dataset_json import Case, Dataset
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.volume import LabelVolume, Volume, relative


def compare_geometry(one: Volume | LabelVolume, other: Volume | LabelVolume) -> tuple[str | None, list[str]]:
    """Compare two geometries; return (what differs or None, warnings). Uncertain parts of the geometry are not compared:

    without form codes the orientation is not compared, with an implausible spacing neither spacing nor origin,
    and where sform and qform contradict each other either may match. Each such leniency is a warning.
    """
    uncertain = one.source.uncertain | other.source.uncertain
    if not uncertain:
        return _either_form(one, other)
    if one.grid.shape != other.grid.shape:
        return one.grid.difference(other.grid), []
    differences = [] if "spacing" in uncertain else [one.grid.spacing_difference(other.grid)]
    differences += [] if "orientation" in uncertain else [one.grid.direction_difference(other.grid)]
    warning = f"only partly comparable: the {' and the '.join(sorted(uncertain))} of one of the files is doubtful"
    return next(filter(None, differences), None), [] if one.grid.difference(other.grid) is None else [warning]


def _either_form(one: Volume | LabelVolume, other: Volume | LabelVolume) -> tuple[str | None, list[str]]:
    difference = one.grid.difference(other.grid)
    if difference is None:
        return None, []
    mine = [grid for grid in (one.grid, one.source.qform_grid) if grid is not None]
    theirs = [grid for grid in (other.grid, other.source.qform_grid) if grid is not None]
    if any(left.difference(right) is None for left in mine for right in theirs):
        return None, ["sform and qform of one file disagree; its partner matches only one of them"]
    return difference, []


def count_values(labels: NDArray[Any]) -> dict[int, int]:
    """Value -> voxels, for labels (Z, Y, X) uint8 or uint16, ascending."""
    counts = np.zeros(256 if labels.dtype == np.uint8 else 65536, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def check_pair(image: Volume, label: LabelVolume, dataset: Dataset, case: Case) -> list[str]:
    """Warnings about a pair that can be used. CaseError when the grids differ or the mask holds undeclared values."""
    file = relative(case.label, dataset.root) if case.label else ""
    return check_mask(image, label, dataset.labels, dataset.ignore, case=case.id, file=file)


def check_mask(image: Volume, label: LabelVolume, values: Collection[int], ignore: int | None, *, case: str, file: str) -> list[str]:
    """The same for any mask that may hold `values` and `ignore`; errors speak of the case and the file."""
    difference, warnings = compare_geometry(image, label)
    if difference:
        what = f"the label is not on the image's grid: image and label differ in {difference}"
        raise CaseError(case, file, what, "Export the label again on the image's grid, or drop the case")
    counts = count_values(label.voxels)
    declared = {0, *values, *([] if ignore is None else [ignore])}
    undeclared = {value: count for value, count in counts.items() if value not in declared}
    if undeclared:
        listed = ", ".join(f"{value} ({count} voxels)" for value, count in list(undeclared.items())[:10])
        what = f"label values {listed}{', ...' if len(undeclared) > 10 else ''} are not declared in dataset.json"
        raise CaseError(case, file, what, "Declare them under 'labels', or correct the mask")
    if not set(counts) & set(values):
        warnings.append("the label is empty: no foreground")
    return warnings
