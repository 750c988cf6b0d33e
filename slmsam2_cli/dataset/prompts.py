"""Read, simulate and restore prompts: the annotated slices of a volume.

A prompt is a sparse mask of the image's name and grid, as 3D Slicer and ITK-SNAP save it. A slice counts as annotated when anything is
painted on it, or when `CASE.prompts.json` beside the mask lists it, so that an empty slice can say "the structure has ended here":

    {"axis": "SI", "annotated_slices": [12, 40]}

axis: the anatomical slice axis (SI, AP or LR), which must be the one the volume is propagated along. annotated_slices: voxel indices,
counted from 0, along that axis of the array as the mask file stores it (the k in i, j, k for an axial NIfTI), in any order. Where an
ignore label occurs in the mask, everything that is not ignored is annotated instead. Slices painted along another axis are refused
rather than taken for a sliver of annotation on every slice; the list says that they are meant as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slmsam2_cli.dataset.dataset import compare_geometry, find_label
from slmsam2_cli.dataset.masks import bounding_box
from slmsam2_cli.dataset.slices import SliceAxis, View
from slmsam2_cli.errors import CaseError, SlmSam2Error
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import Volume, read_labels

Array = np.ndarray[Any, Any]
PromptSlice = Literal["middle", "largest", "quarter"]
MAX_ANNOTATED_SLICES = 3  # more slices than this along an axis are not taken for single annotated slices


@dataclass(frozen=True, eq=False)
class Prompts:
    """The annotated slices of one volume.

    labels: (Z, Y, X) sparse mask on the native grid. annotated: label value -> ascending native slice indices on which that label's mask
    is complete (empty allowed: the label is not there). exact_slices: slices that come back bit-exact as a whole.
    ignore: the value in `labels` that means "not looked at", or None.
    """

    labels: Array
    annotated: dict[int, tuple[int, ...]]
    exact_slices: tuple[int, ...]
    ignore: int | None = None


def read_prompts(
    folder: Path, case_id: str, view: View, values: Sequence[int], ignore: int | None = None, image: Volume | None = None
) -> Prompts | None:
    """Annotated prompts for one case; None when the folder holds none, or nothing is annotated. CaseError when they cannot be used.

    image: where given, what its file does not know about its own geometry is not held against the prompt (see check.compare_geometry).
    """
    path = find_label(folder, case_id)
    listing = folder / f"{case_id}.prompts.json"
    if path is None:
        if listing.exists():
            raise CaseError(case_id, listing.name, "there is no mask of the same name beside it", "Save the annotated mask next to it")
        return None
    mask = read_annotated_mask(path, view, image, case=case_id, root=folder)
    listed = _listed(listing, case_id, view) if listing.exists() else None
    return mask_to_prompts(mask, view, values, ignore, listed, case=case_id, file=path.name, list_in=listing.name)


def read_annotated_mask(path: Path, view: View, image: Volume | None = None, *, case: str, root: Path) -> Array:
    """A mask (Z, Y, X) that somebody painted on the grid of the view; image as in read_prompts. CaseError."""
    volume = read_labels(path, case=case, root=root)
    difference = view.grid.difference(volume.grid) if image is None else compare_geometry(image, volume)[0]
    if difference:
        raise CaseError(
            case, path.name, f"the prompt's grid differs from the image's: {difference}", "Paint on the image's own grid and save again"
        )
    return volume.voxels


def mask_to_prompts(
    mask: Array,
    view: View,
    values: Sequence[int],
    ignore: int | None = None,
    listed: tuple[int, ...] | None = None,
    *,
    case: str,
    file: str,
    list_in: str,
) -> Prompts | None:
    """What a sparse mask (Z, Y, X) says, whole numbers; None when nothing is annotated. CaseError when it cannot be used.

    listed: native slices that are annotated whatever is painted there; None: nobody said, so paint that seems to lie on slices along
    another axis is refused. case, file and list_in (where such slices can be listed) are for messages.
    """
    ignored = ignore if ignore is not None and (mask == ignore).any() else None
    _refuse_unknown(mask, values, ignore, case, file)
    painted = _annotated_slices(mask, view, ignored)
    if listed is None and (other := _annotated_along(mask if ignored is None else mask != ignored, view)):
        raise CaseError(
            case,
            file,
            f"prompt mask appears to be annotated along {other}, but the slice axis is {view.axis} "
            f"(mask covers {len(painted)} {view.axis} slices)",
            f"Paint slices along {view.axis}, or edit slice_axis in plan.json; if it is meant as it is, list the annotated slices "
            f"in {list_in}",
        )
    slices = tuple(sorted({*painted, *(listed or ())}))
    return Prompts(mask, dict.fromkeys(values, slices), slices, ignored) if slices else None


def _refuse_unknown(mask: Array, values: Sequence[int], ignore: int | None, case_id: str, name: str) -> None:
    found, counts = np.unique(mask, return_counts=True)
    known = {0, *values} | ({ignore} if ignore is not None else set())
    unknown = [f"{value} ({count} voxels)" for value, count in zip(found.tolist(), counts.tolist(), strict=True) if value not in known]
    if unknown:
        wanted = ", ".join(map(str, values))
        raise CaseError(
            case_id,
            name,
            f"undeclared label values {', '.join(unknown)}; the plan knows {wanted}",
            "Relabel them, or declare them in dataset.json",
        )


def _annotated_slices(mask: Array, view: View, ignore: int | None) -> list[int]:
    """Native slices with paint on them; with an ignore label, those with anything that is not ignored."""
    return view.slices_with(mask != 0 if ignore is None else mask != ignore)


def _annotated_along(paint: Array, view: View) -> SliceAxis | None:
    """The other axis along which somebody annotated slices, if it looks so: few slices along it hold all paint, many along the view's do.

    A structure that is thin in both directions (a vessel) is no annotated slice unless it is exactly one voxel thick in one of them, and an
    axis with few slices says nothing.
    """
    along = view.count_slices(paint)
    here = along.pop(view.axis)[0]
    (few, axis), (more, _) = sorted((count, axis) for axis, (count, _) in along.items())
    deep = along[axis][1] > MAX_ANNOTATED_SLICES
    flat = few <= MAX_ANNOTATED_SLICES and (more > MAX_ANNOTATED_SLICES or few == 1 < more)
    return axis if deep and flat and here > max(MAX_ANNOTATED_SLICES, 2 * few) else None


def _listed(path: Path, case_id: str, view: View) -> tuple[int, ...]:
    """Native slice indices from CASE.prompts.json."""

    def error(what: str, remedy: str = 'Write {"axis": "SI", "annotated_slices": [0, 7]}') -> CaseError:
        return CaseError(case_id, path.name, what, remedy)

    try:
        value = atomic.read_json(path, "list of annotated slices")
    except SlmSam2Error as problem:
        raise error(str(problem)) from None
    if not isinstance(value, dict) or set(value) != {"axis", "annotated_slices"}:
        raise error("expected the keys axis and annotated_slices, and no others")
    if value["axis"] != view.axis:
        raise error(
            f"axis is {value['axis']!r}, but this volume is propagated along {view.axis}",
            f"Annotate slices along {view.axis}, or edit slice_axis in plan.json",
        )
    listed = value["annotated_slices"]
    if not isinstance(listed, list) or not all(type(index) is int for index in listed):
        raise error("annotated_slices must be a list of whole numbers")
    beyond = [index for index in listed if not 0 <= index < view.native_slices()]
    if beyond:
        raise error(
            f"slice {beyond[0]} does not exist; the volume has slices 0 to {view.native_slices() - 1} along {view.axis}", "Correct the list"
        )
    return tuple(view.file_index(index) for index in listed)


def simulate_prompts(labels: Array, view: View, values: Sequence[int], where: PromptSlice, mark_ends: bool = False) -> Prompts:
    """One slice for each label, cut out of a full mask (Z, Y, X). A label that does not occur is annotated nowhere.

    mark_ends: the slices just before its first and just behind its last one, where there are such, say that it is not there.
    """
    stack = view.oriented(labels)
    sparse = np.zeros_like(labels)
    kept = view.oriented(sparse)
    annotated: dict[int, tuple[int, ...]] = {}
    for value in values:
        area = (stack == value).sum(axis=(1, 2))
        given = (choose_slice(area, where),) if area.any() else ()
        for t in given:
            kept[t][stack[t] == value] = value
        annotated[value] = tuple(sorted({*given, *(_end_slices(area) if mark_ends else ())}))
    return Prompts(sparse, annotated, ())


def _end_slices(area: Array) -> list[int]:
    """The slices just beyond either end of a label, given its area (T,) on each slice."""
    extent = bounding_box(area != 0)
    return [] if extent is None else [t for t in (extent[0][0] - 1, extent[0][1]) if 0 <= t < len(area)]


def choose_slice(area: Array, where: PromptSlice) -> int:
    """The slice to annotate, given the label's area (T,) on each slice.

    middle / quarter: the slice holding the label nearest to half / a quarter of the way from its first to its last slice; largest: the
    one with the largest area. Ties go to the lower index.
    """
    holding = np.flatnonzero(area)
    if where == "largest":
        return int(area.argmax())
    first, last = int(holding[0]), int(holding[-1])
    target = first + (last - first) * (0.5 if where == "middle" else 0.25)
    return int(holding[np.abs(holding - target).argmin()])


def restore_annotated(result: Array, prompts: Prompts, view: View) -> Array:
    """A copy of the result (Z, Y, X) with every annotated slice exactly as annotated."""
    imposed = result.copy()
    stack, given = view.oriented(imposed), view.oriented(prompts.labels)
    for t in prompts.exact_slices:
        known = np.ones(given[t].shape, bool) if prompts.ignore is None else given[t] != prompts.ignore
        stack[t][known] = given[t][known]
    for value, slices in prompts.annotated.items():
        for t in set(slices) - set(prompts.exact_slices):
            stack[t][stack[t] == value] = 0
    for value, slices in prompts.annotated.items():
        for t in set(slices) - set(prompts.exact_slices):
            stack[t][given[t] == value] = value
    return imposed
