"""One case from file to mask: read, bring into view, propagate, bring back, impose what a person drew.

From the user's prompts on the volume's own grid to anchors on the stack that the network sees.

The way back: from mask logits on the network's frame to labels on the volume's own grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from slmsam2_cli.dataset.cache import make_frames
from slmsam2_cli.dataset.checks import check_mask
from slmsam2_cli.dataset.dataset import Case, find_label
from slmsam2_cli.dataset.prompts import Prompts, PromptSlice, read_prompts, restore_annotated, simulate_prompts
from slmsam2_cli.dataset.slices import View, interpolation_matrix, resample_plane
from slmsam2_cli.errors import CaseError
from slmsam2_cli.inference.label_prior import GOOD
from slmsam2_cli.inference.postprocess import keep_connected
from slmsam2_cli.inference.propagation import AnnotatedSlice, Propagation, options_of, propagate
from slmsam2_cli.io.volume import Volume, read_image, read_labels, write_mask
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.roi import pad_to_square, to_input
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan


def annotated_slices_of(prompts: Prompts, view: View, values: Sequence[int], input_size: int) -> dict[int, list[AnnotatedSlice]]:
    """Label value -> its annotated slices, ascending; labels that nobody annotated with anything are left out.

    Slices outside the crop hold nothing the network could see, so they anchor nothing (they still come back exact). A slice
    without the label is an end mark only where all of it was looked at, and marks an end only where nothing at all is painted on it.
    Where several native slices meet in one stack slice, a painted one counts.
    """
    found: dict[int, list[AnnotatedSlice]] = {}
    for value in values:
        masks = {s: _mask(prompts, view, value, s) for s in prompts.annotated.get(value, ()) if _inside(view, s)}
        empty_first = sorted((s for s in masks if masks[s].any() or _seen_whole(prompts, view, s)), key=lambda s: bool(masks[s].any()))
        by_slice = {view.to_stack(s): masks[s] for s in empty_first}
        if any(mask.any() for mask in by_slice.values()):
            bare = {view.to_stack(s): not _painted(prompts, view, s) for s in empty_first}
            found[value] = [
                AnnotatedSlice(s, pad_to_square(torch.from_numpy(mask), input_size), bare[s]) for s, mask in sorted(by_slice.items())
            ]
    return found


def _painted(prompts: Prompts, view: View, native_slice: int) -> bool:
    """Whether anything, of whichever label, is painted on the slice: then it may have been annotated for the sake of that."""
    plane = view.oriented(prompts.labels)[native_slice]
    return bool(((plane != 0) & (plane != (prompts.ignore or 0))).any())


def _inside(view: View, native_slice: int) -> bool:
    start, end = view.box[0]
    return start <= native_slice < end


def _seen_whole(prompts: Prompts, view: View, native_slice: int) -> bool:
    """Whether nothing on the slice is ignored."""
    return prompts.ignore is None or not bool((view.oriented(prompts.labels)[native_slice] == prompts.ignore).any())


def _mask(prompts: Prompts, view: View, value: int, native_slice: int) -> np.ndarray:
    """One label on one slice at the stack's size, (H, W) bool; a structure too thin for the stack keeps its best pixels."""
    _, height, width = view.stack_shape
    drawn = view.cropped(prompts.labels)[native_slice - view.box[0][0]] == value
    rows, columns = interpolation_matrix(drawn.shape[0], height), interpolation_matrix(drawn.shape[1], width)
    cover = resample_plane(drawn.astype(np.float32), rows, columns)
    return np.asarray(cover >= min(0.5, float(cover.max()))) & (cover > 0)


def restore_labels(found: Mapping[int, Propagation], view: View, storage_size: int) -> np.ndarray:
    """What was found of one label at least, on every slice of the stack -> labels (Z, Y, X), uint8 or uint16.

    A voxel gets the label with the largest logit above 0, and 0 where there is none.
    """
    _, height, width = view.stack_shape

    def planes(t: int) -> np.ndarray:
        return torch.stack([one.plane(t, storage_size, height, width) for one in found.values()]).numpy()

    return view.restore(planes, tuple(found))


_DIGITS = 4


class PromptReader(Protocol):
    """Whatever knows what a person annotated on an image."""

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """The prompts of one case, and warnings."""
        ...


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: a folder of sparse masks, or full masks from which one slice per label is cut.

    dataset_labels: the full masks are those that the data set names for its cases, wherever they lie below `folder`; mark_ends: from
    full masks also the empty slices just beyond either end of a label.
    """

    folder: Path
    simulated: PromptSlice | None = None
    dataset_labels: bool = False
    mark_ends: bool = False

    def file(self, case: Case) -> Path | None:
        """The mask that holds this case's prompts, if there is one."""
        return case.label if self.dataset_labels else find_label(self.folder, case.id)

    def files(self, case: Case) -> list[Path]:
        """Every file this case's prompts are read from."""
        mask, listing = self.file(case), self.folder / f"{case.id}.prompts.json"
        return [*([mask] if mask else []), *([listing] if listing.exists() else [])]

    def words(self) -> str:
        """What the manifest says of them."""
        return f"simulated: {self.simulated}{', ends marked' if self.mark_ends else ''}" if self.simulated else "given"

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """The prompts of one case, and warnings. CaseError when there are none, or they do not fit the image.

        A whole mask that is empty is no error: the structure is not there, and so the result is empty too.
        """
        path = self.file(case)
        if self.simulated is not None and path is not None:
            labels = read_labels(path, case=case.id, root=self.folder)
            warnings = check_mask(image, labels, plan.labels, plan.ignore, case=case.id, file=path.name)
            return simulate_prompts(labels.voxels, view, tuple(plan.labels), self.simulated, self.mark_ends), (*labels.warnings, *warnings)
        prompts = read_prompts(self.folder, case.id, view, tuple(plan.labels), plan.ignore, image) if self.simulated is None else None
        if prompts is None or not any(prompts.annotated.values()):
            raise CaseError(
                case.id, "", "has no annotated slice", f"Save a mask named {case.id} with at least one annotated slice among the prompts"
            )
        return prompts, ()


@dataclass(frozen=True)
class SegmentedCase:
    """A finished case: labels (Z, Y, X) on the image's grid, its image, warnings, and the account of it for the manifest."""

    labels: np.ndarray
    image: Volume
    warnings: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def confidence(self) -> dict[int, dict[int, float]]:
        """Label -> slice, numbered as the file stores it -> confidence from 0 to 1; 1 on annotated slices."""
        told = self.metadata["confidence"]
        return {int(value): {int(s): share for s, share in one["slices"].items()} for value, one in told.items()}

    def write(self, path: str | Path) -> None:
        """Save the labels with the image's header; the ending of the path is the format. OutputError."""
        write_mask(Path(path), self.labels, self.image)


def segment_case(
    case: Case,
    root: Path,
    prompt_reader: PromptReader,
    model: SlmSam2,
    plan: Plan,
    calibration: Calibration | None = None,
    batch: int | None = None,
) -> SegmentedCase:
    """Propagate one case. CaseError names what is wrong with it; nothing is written.

    batch: slices encoded at a time, where not as many as planned. calibration: turns the confidence of slices that nobody annotated
    into the Dice to expect.
    """
    started = time.monotonic()
    image = read_image(case.images, case=case.id, root=root, channels=len(plan.channels))
    view, frames = make_frames(image, plan.geometry, plan.intensity)
    prompts, warnings = prompt_reader.read(case, image, view, plan)
    objects = annotated_slices_of(prompts, view, tuple(plan.labels), plan.geometry.stack_size)
    stack = pad_to_square(to_input(torch.from_numpy(frames), plan.geometry.adjacent_slices), plan.geometry.stack_size)
    found = propagate(
        model,
        stack,
        objects,
        options_of(plan, batch=batch),
    )
    known = model.label_unet.pieces if model.label_unet is not None else []
    one_piece = [value for value, one in found.items() if value in known and (one.agreement or 0) >= GOOD]
    labels = restore_annotated(_labels(found, view, plan), prompts, view)
    labels = keep_connected(labels, prompts.labels, one_piece, view.orientation.order[0])
    told = {value: _apply_calibration(one, objects[value], calibration) for value, one in found.items()}
    metadata = _case_metadata(prompts, view, told, time.monotonic() - started) | {"calibrated": calibration is not None}
    return SegmentedCase(labels, image, (*image.warnings, *warnings), metadata)


def _apply_calibration(found: Propagation, anchors: list[AnnotatedSlice], calibration: Calibration | None) -> Propagation:
    """The same masks with calibrated confidence; annotated slices, and slices that no pass came to, keep theirs."""
    if calibration is None:
        return found
    table = torch.from_numpy(calibration(found.confidence.numpy())).to(found.confidence)
    given = torch.zeros_like(found.confidence, dtype=torch.bool)
    given[[anchor.slice for anchor in anchors]] = True
    return replace(found, confidence=torch.where(given | (found.confidence == 0), found.confidence, table))


def _labels(found: dict[int, Propagation], view: View, plan: Plan) -> np.ndarray:
    """(Z, Y, X) labels on the native grid."""
    if not found:
        return np.zeros(view.grid.shape, dtype=np.uint8 if max(plan.labels) < 256 else np.uint16)
    labels = restore_labels(found, view, plan.geometry.stack_size)
    return labels if max(plan.labels) < 256 else labels.astype(np.uint16)


def _case_metadata(prompts: Prompts, view: View, found: dict[int, Propagation], seconds: float) -> dict[str, Any]:
    """What the manifest says of a case; slices are numbered as the file stores them, along `array_axis` of (z, y, x)."""
    start, end = view.box[0]
    natives = range(start, end)
    shown = {
        str(value): {
            "mean": round(float(one.confidence.mean()), _DIGITS),
            "slices": _by_slice(one.confidence, view, natives),
        }
        for value, one in found.items()
    }
    disagreement = {str(value): _by_slice(one.disagreement, view, natives) for value, one in found.items()}
    return {
        "slice_axis": view.axis,
        "array_axis": view.orientation.order[0],
        "prompted_slices": {str(v): sorted(view.file_index(s) for s in slices) for v, slices in prompts.annotated.items() if slices},
        "confidence": shown,
        "disagreement": {value: slices for value, slices in disagreement.items() if slices},
        "recognised": {str(v): round(one.agreement, _DIGITS) for v, one in found.items() if one.agreement is not None},
        "seconds": round(seconds, 3),
    }


def _by_slice(shares: torch.Tensor, view: View, natives: range) -> dict[str, float]:
    """(T,) shares of the stack's slices, by the number that the file gives a slice; where there is none (NaN), no entry."""
    told = {view.file_index(s): float(shares[view.to_stack(s)]) for s in natives}
    return {str(k): round(share, _DIGITS) for k, share in told.items() if not math.isnan(share)}
