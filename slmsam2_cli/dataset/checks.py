"""Check that an image and a mask belong together: geometry, declared labels, content. Nothing is resampled."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.dataset.dataset_json import Case, Dataset
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.volume import LabelVolume, Volume, relative


def compare_geometry(one: Volume | LabelVolume, other: Volume | LabelVolume) -> tuple[str | None, list[str]]:
    """Compare two geometries and return (the first difference or None, warnings).

    Uncertain parts of the geometry are not compared, with a warning: without form codes the orientation, with an implausible spacing
    the spacing and the origin. Where sform and qform contradict each other, either may match.
    """
    uncertain = one.source.uncertain | other.source.uncertain
    if not uncertain:
        difference = one.grid.difference(other.grid)
        mine = [grid for grid in (one.grid, one.source.qform_grid) if grid is not None]
        theirs = [grid for grid in (other.grid, other.source.qform_grid) if grid is not None]
        if difference and any(left.difference(right) is None for left in mine for right in theirs):
            return None, ["sform and qform of one file differ; only one of them matches the other file"]
        return difference, []
    if one.grid.shape != other.grid.shape:
        return one.grid.difference(other.grid), []
    differences = [] if "spacing" in uncertain else [one.grid.spacing_difference(other.grid)]
    differences += [] if "orientation" in uncertain else [one.grid.direction_difference(other.grid)]
    warning = f"only partly comparable: the {' and the '.join(sorted(uncertain))} of one of the files is uncertain"
    return next(filter(None, differences), None), [] if one.grid.difference(other.grid) is None else [warning]


def count_values(labels: NDArray[Any]) -> dict[int, int]:
    """Count the voxels of each label value in a mask (Z, Y, X) uint8 or uint16, by ascending value."""
    counts = np.zeros(256 if labels.dtype == np.uint8 else 65536, np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def check_pair(image: Volume, label: LabelVolume, dataset: Dataset, case: Case) -> list[str]:
    """Check the image and label of a dataset's case and return warnings.

    Raises: CaseError when the grids differ or the mask holds undeclared label values.
    """
    file = relative(case.label, dataset.root) if case.label else ""
    return check_mask(image, label, dataset.labels, dataset.ignore, case=case.id, file=file)


def check_mask(image: Volume, label: LabelVolume, values: Collection[int], ignore: int | None, *, case: str, file: str) -> list[str]:
    """Check a mask that may hold the label `values` and `ignore` against its image and return warnings; case and file are for messages.

    Raises: CaseError when the grids differ or the mask holds other values.
    """
    difference, warnings = compare_geometry(image, label)
    if difference:
        what = f"the label is not on the image's grid: image and label differ in {difference}"
        raise CaseError(case, file, what, "Export the label again on the image's grid, or remove the case")
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
