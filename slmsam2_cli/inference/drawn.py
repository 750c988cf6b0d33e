"""Prompts for a volume that are given in Python, as arrays or single files, in place of a folder of masks.

What they mean is what it means in `data/prompts.py`: a slice with anything painted on it is annotated, for every label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from slmsam2_cli.data.cases import Case
from slmsam2_cli.data.geometry import View
from slmsam2_cli.data.prompts import Prompts, painted_prompts, read_painted
from slmsam2_cli.data.volume import Volume
from slmsam2_cli.inference.arrays import Array, mask_of, number, numbers
from slmsam2_cli.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Drawn:
    """masks: one mask that holds label values, or one mask a label, by the label's value or name; each an array (Z, Y, X) on the
    image's grid or the path of a file. annotated_slices: further slices on which nothing is painted because nothing is there,
    numbered as the file stores them; None when nobody listed any.
    """

    masks: object
    annotated_slices: Sequence[int] | None = None

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """The prompts, and no warnings. ValueError for what was given in Python, CaseError for what is wrong with a file."""
        if isinstance(self.masks, Mapping):
            mask = self._joined(self.masks, case, image, view, plan)
        else:
            mask = _declared(_voxels(self.masks, "prompts", case, image, view), plan)
        found = painted_prompts(
            mask,
            view,
            tuple(plan.labels),
            plan.ignore,
            self._listed(view),
            case=case.id,
            file=Path(self.masks).name if isinstance(self.masks, str | PathLike) else "prompts",
            list_in="annotated_slices",
        )
        if found is None:
            raise ValueError("prompts: nothing is painted; give a mask with at least one painted slice")
        return found, ()

    def _joined(self, masks: Mapping[object, object], case: Case, image: Volume, view: View, plan: Plan) -> Array:
        """One mask (Z, Y, X) of all labels."""
        joined = np.zeros(view.grid.shape, _dtype(plan))
        for key, mask in masks.items():
            name = f"prompts[{key!r}]"
            value = _value_of(key, plan)
            painted = mask_of(_voxels(mask, name, case, image, view), view.grid.shape, name)
            if (other := joined[painted]).any():
                raise ValueError(f"{name}: {np.count_nonzero(other)} of its voxels are painted as label {other[other != 0][0]} too")
            joined[painted] = value
        return joined

    def _listed(self, view: View) -> tuple[int, ...] | None:
        if self.annotated_slices is None:
            return None
        if not isinstance(self.annotated_slices, Sequence | np.ndarray):
            raise ValueError(f"annotated_slices: {self.annotated_slices!r}; give a list of slice numbers")
        count = view.native_slices()
        return tuple(view.file_index(number(index, count, "annotated_slices", "slice")) for index in self.annotated_slices)


def _voxels(mask: object, name: str, case: Case, image: Volume, view: View) -> Array:
    """A mask (Z, Y, X) of the image's shape, from wherever it is."""
    if isinstance(mask, str | PathLike):
        path = Path(mask)
        return read_painted(path, view, image, case=case.id, root=path.parent)
    voxels = numbers(mask, name)
    if voxels.shape != view.grid.shape:
        raise ValueError(f"{name}: shape {voxels.shape}, but the image's is {view.grid.shape} (z, y, x)")
    return voxels


def _declared(mask: Array, plan: Plan) -> Array:
    """A mask of label values in a type that holds them. ValueError for others than the plan's."""
    known = {0, *plan.labels, *([] if plan.ignore is None else [plan.ignore])}
    if unknown := [value for value in np.unique(mask).tolist() if value not in known]:
        raise ValueError(f"prompts: holds {', '.join(f'{value:g}' for value in unknown[:3])}; the plan knows {_labels(plan)}")
    return mask.astype(_dtype(plan), copy=False)


def _value_of(key: object, plan: Plan) -> int:
    """The label that a value or a name means. ValueError."""
    for value, name in plan.labels.items():
        if key in (value, name):
            return value
    raise ValueError(f"prompts: no label {key!r}; the plan knows {_labels(plan)}")


def _labels(plan: Plan) -> str:
    return ", ".join(f"{value} ({name})" for value, name in plan.labels.items())


def _dtype(plan: Plan) -> type[np.uint8 | np.uint16]:
    return np.uint8 if max(*plan.labels, plan.ignore or 0) < 256 else np.uint16
