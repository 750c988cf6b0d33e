"""Read, simulate and restore prompts: the annotated slices of a volume.

A prompt is a sparse mask with the image's name and grid, as 3D Slicer and ITK-SNAP save it. A slice counts as annotated when it holds
foreground, or when `CASE.prompts.json` next to the mask lists it, so that an empty slice can mark where the structure ends:

    {"axis": "SI", "annotated_slices": [12, 40]}

axis: the anatomical slice axis (SI, AP or LR), which must be the one the volume is propagated along. annotated_slices: voxel indices,
counted from 0, along that axis of the array as the mask file stores it (the k in i, j, k for an axial NIfTI), in any order. Where an
ignore label occurs in the mask, everything that is not ignored is annotated instead. Slices annotated along another axis are rejected,
because they would count as a thin annotation on every slice; listing the annotated slices overrides this check.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slmsam2_cli.dataset.dataset import compare_geometry, find_label
from slmsam2_cli.dataset.dataset_json import PromptFiles
from slmsam2_cli.dataset.discovery import stem
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.dataset.slices import AXES, SliceAxis, View
from slmsam2_cli.errors import CaseError, SlmSam2Error
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.volume import LabelVolume, Source, Volume, read_labels

Array = np.ndarray[Any, Any]
PromptSlice = Literal["middle", "largest", "quarter"]
DESCRIPTION_ENDINGS, DESCRIPTION_TITLE = (".txt", ".label"), "ITK-SnAP Label Description File"
DESCRIPTION_LINE = re.compile(r'^\s*(\d{1,5})\s+\d+\s+\d+\s+\d+\s+[\d.]+\s+\d\s+\d\s+"([^"\n]{1,80})"', re.MULTILINE)
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_ANNOTATED_SLICES = 3  # more slices than this along an axis are not taken for single annotated slices


@dataclass(frozen=True, eq=False)
class Prompts:
    """The annotated slices of one volume.

    labels: (Z, Y, X) sparse mask on the native grid. annotated: label value -> ascending native slice indices on which that label's mask
    is complete (empty allowed: the label is not there). exact_slices: slices that come back bit-exact as a whole.
    ignore: the value in `labels` that means "not annotated", or None. source, warnings: of the mask file.
    """

    labels: Array
    annotated: dict[int, tuple[int, ...]]
    exact_slices: tuple[int, ...]
    ignore: int | None = None
    source: Source | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptFile:
    """What error messages call a prompt: case id, file name, and the file or argument in which annotated slices can be listed."""

    case: str
    name: str
    listing: str


def find_prompts(folder: Path, case_id: str, images: Collection[Path] = ()) -> PromptFiles:
    """Find the files with the annotated slices of a case in a folder: a mask of its name, and CASE.prompts.json.

    images: as in find_label.

    Raises: CaseError when several masks have the case's name.
    """
    mask = find_label(folder, case_id, images)
    return PromptFiles(mask, find_listing(folder, case_id, *([stem(mask)] if mask is not None else [])))


def find_listing(folder: Path, *names: str) -> Path | None:
    """Return the first NAME.prompts.json that is in a folder."""
    return next((path for name in names if (path := folder / f"{name}.prompts.json").exists()), None)


def read_prompts(
    files: PromptFiles, case_id: str, view: View, values: Sequence[int], ignore: int | None = None, image: Volume | None = None
) -> Prompts | None:
    """Read the prompts of one case; None when there is no mask, or nothing is annotated.

    image: where given, parts of the geometry that its file does not state reliably are not compared (see checks.compare_geometry).

    Raises: CaseError when the prompt cannot be read, is on another grid, or holds unknown labels.
    """
    path, listing = files.mask, files.listing
    if path is None:
        if listing is not None:
            raise CaseError(case_id, listing.name, "no mask of the same name in this folder", "Save the annotated mask next to it")
        return None
    mask = read_annotated_mask(path, view, image, case=case_id, root=path.parent)
    listed = _listed(listing, case_id, view) if listing is not None else None
    prompts = mask_to_prompts(mask.voxels, view, values, PromptFile(case_id, path.name, f"{case_id}.prompts.json"), ignore, listed)
    return None if prompts is None else replace(prompts, source=mask.source, warnings=mask.warnings)


def read_annotated_mask(path: Path, view: View, image: Volume | None = None, *, case: str, root: Path) -> LabelVolume:
    """Read an annotated mask and compare its grid with the view's; image as in read_prompts.

    Raises: CaseError when it cannot be read or is on another grid.
    """
    volume = read_labels(path, case=case, root=root, on=view.grid)
    difference = view.grid.difference(volume.grid) if image is None else compare_geometry(image, volume)[0]
    if difference:
        raise CaseError(
            case, path.name, f"the prompt's grid differs from the image's: {difference}", "Annotate on the image's grid and save again"
        )
    return volume


def mask_to_prompts(
    mask: Array,
    view: View,
    values: Sequence[int],
    file: PromptFile,
    ignore: int | None = None,
    listed: tuple[int, ...] | None = None,
) -> Prompts | None:
    """Find the annotated slices of a sparse mask (Z, Y, X) of whole numbers; None when nothing is annotated.

    listed: native slices that are annotated even where they are empty; None: no list, so a mask that appears to be annotated along
    another axis is rejected.

    Raises: CaseError when the mask holds unknown labels or is annotated along another axis.
    """
    found, counts = np.unique(mask, return_counts=True)
    known = {0, *values, *([] if ignore is None else [ignore])}
    unknown = [f"{value} ({count} voxels)" for value, count in zip(found.tolist(), counts.tolist(), strict=True) if value not in known]
    if unknown:
        what = f"undeclared label values {', '.join(unknown)}; the plan has {', '.join(map(str, values))}"
        raise CaseError(file.case, file.name, what, "Relabel them, or declare them in dataset.json")
    ignored = ignore if ignore in found.tolist() else None
    held = mask != (0 if ignored is None else ignored)
    along = {axis: view.slices_with(held, axis) for axis in AXES}
    painted = np.flatnonzero(along[view.axis]).tolist()
    if listed is None and (other := _annotated_along(along, view.axis)):
        raise CaseError(
            file.case,
            file.name,
            f"prompt mask appears to be annotated along {other}, but the slice axis is {view.axis} "
            f"(mask covers {len(painted)} {view.axis} slices)",
            f"Annotate slices along {view.axis}, or edit slice_axis in plan.json; if the mask is correct, list the annotated slices "
            f"in {file.listing}",
        )
    slices = tuple(sorted({*painted, *(listed or ())}))
    return Prompts(mask, dict.fromkeys(values, slices), slices, ignored) if slices else None


def _annotated_along(along: Mapping[SliceAxis, Array], planned: SliceAxis) -> SliceAxis | None:
    """Return another axis than the planned one along which a mask appears to be annotated; None when there is none.

    along: axis -> which of its slices hold the mask (T,) bool. A mask appears to be annotated along an axis when few of that axis's slices
    hold it, but many planned ones. A structure that is thin in both other directions (a vessel) does not, unless it is exactly one voxel
    thick in one of them. An axis with few slices is not considered.
    """
    here = int(along[planned].sum())
    (few, axis), (more, _) = sorted((int(held.sum()), axis) for axis, held in along.items() if axis != planned)
    deep = len(along[axis]) > MAX_ANNOTATED_SLICES
    flat = few <= MAX_ANNOTATED_SLICES and (more > MAX_ANNOTATED_SLICES or few == 1 < more)
    return axis if deep and flat and here > max(MAX_ANNOTATED_SLICES, 2 * few) else None


def _listed(path: Path, case_id: str, view: View) -> tuple[int, ...]:
    """Read native slice indices from CASE.prompts.json.

    Raises: CaseError when the file is invalid or lists slices that do not exist.
    """

    def error(what: str, remedy: str = 'Write {"axis": "SI", "annotated_slices": [0, 7]}') -> CaseError:
        return CaseError(case_id, path.name, what, remedy)

    try:
        value = atomic.read_json(path, "list of annotated slices")
    except SlmSam2Error as problem:
        raise error(str(problem)) from None
    if not isinstance(value, dict) or set(value) != {"axis", "annotated_slices"}:
        raise error("must have the keys axis and annotated_slices, and no others")
    if value["axis"] != view.axis:
        raise error(
            f"axis is {value['axis']!r}, but the slice axis is {view.axis}",
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
    """Take one slice of each label from a full mask (Z, Y, X); a label that does not occur has no annotated slice.

    where: see choose_slice. mark_ends: also annotate the empty slices just before a label's first and just after its last slice.
    """
    stack = view.oriented(labels)
    sparse = np.zeros_like(labels)
    kept = view.oriented(sparse)
    annotated: dict[int, tuple[int, ...]] = {}
    for value in values:
        area = (stack == value).sum(axis=(1, 2))
        extent = bounding_box(area != 0)
        if extent is None:
            annotated[value] = ()
            continue
        t, ends = choose_slice(area, where), (extent[0][0] - 1, extent[0][1])
        kept[t][stack[t] == value] = value
        annotated[value] = tuple(sorted({t, *(end for end in ends if mark_ends and 0 <= end < len(area))}))
    return Prompts(sparse, annotated, ())


def choose_slice(area: Array, where: PromptSlice) -> int:
    """Choose the slice to annotate from the label's area (T,) on each slice.

    middle, quarter: the slice with the label nearest to half or a quarter of the way from its first to its last slice; largest: the
    slice with the largest area. Ties go to the lower index.

    Raises: ValueError when the label is on no slice.
    """
    extent = bounding_box(area != 0)
    if extent is None:
        raise ValueError("the label is on no slice")
    if where == "largest":
        return int(area.argmax())
    first, last = extent[0][0], extent[0][1] - 1
    target = first + (last - first) * (0.5 if where == "middle" else 0.25)
    return min((t for t in range(first, last + 1) if area[t]), key=lambda t: abs(t - target))


def restore_annotated(result: Array, prompts: Prompts, view: View) -> Array:
    """Copy the annotated slices into a copy of the result (Z, Y, X), so that they are returned exactly as annotated."""
    restored = result.copy()
    stack, given = view.oriented(restored), view.oriented(prompts.labels)
    for t in prompts.exact_slices:
        known = np.ones(given[t].shape, bool) if prompts.ignore is None else given[t] != prompts.ignore
        stack[t][known] = given[t][known]
    for value, slices in prompts.annotated.items():
        for t in set(slices) - set(prompts.exact_slices):
            stack[t][stack[t] == value] = 0
    for value, slices in prompts.annotated.items():
        for t in set(slices) - set(prompts.exact_slices):
            stack[t][given[t] == value] = value
    return restored


def read_label_descriptions(folder: Path) -> dict[int, str]:
    """Read the names of labels from the label descriptions that ITK-SNAP saves beside masks: label value -> name; empty without any.

    A line is: value, red, green, blue, opacity, two flags, and the name in quotation marks.
    """
    names: dict[int, str] = {}
    for path in sorted(path for ending in DESCRIPTION_ENDINGS for path in folder.glob(f"*{ending}")):
        with suppress(InputError, OSError), open_regular(path) as file:
            text = file.read(MAX_DESCRIPTION_BYTES).decode("utf-8", "replace")
            if DESCRIPTION_TITLE in text:
                names |= {int(value): " ".join(name.split()) for value, name in DESCRIPTION_LINE.findall(text) if int(value)}
    return {value: name for value, name in names.items() if name}
