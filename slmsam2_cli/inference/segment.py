"""Segment one case: read the image and its prompts, propagate, and restore the labels to the image's grid.

Masks are written to files by io/volume.py.

image --> stack of slices --+
                            +--> propagation --> labels on the stack --> labels on the image's grid --> annotated slices restored
prompts --> annotated slices +
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
from numpy.typing import NDArray

from slmsam2_cli.dataset.checks import check_mask
from slmsam2_cli.dataset.dataset_json import Case, PromptFiles
from slmsam2_cli.dataset.discovery import stem
from slmsam2_cli.dataset.prompts import Prompts, PromptSlice, find_listing, find_prompts, read_prompts, restore_annotated, simulate_prompts
from slmsam2_cli.dataset.slices import View, make_frames
from slmsam2_cli.errors import CaseError
from slmsam2_cli.inference.label_prior import FULL_WEIGHT_DICE
from slmsam2_cli.inference.postprocess import keep_connected
from slmsam2_cli.inference.propagation import AnnotatedSlice, Propagation, PropagationOptions, propagate_stack
from slmsam2_cli.io.volume import SEG_NRRD, Volume, read_image, read_labels, write_mask
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.roi import pad_to_square
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan

_DIGITS = 4


class PromptReader(Protocol):
    """Reads the annotated slices of a case, from files or from arrays."""

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """Read the prompts of a case. Returns them and warnings."""
        ...


@dataclass(frozen=True)
class PromptSource:
    """A folder of prompt masks, or of full masks from which one slice per label is taken.

    simulated: which slice of a full mask is taken; None: the masks hold annotated slices only. dataset_labels: the full masks are the
    labels that the data set names for its cases, wherever they lie below `folder`. mark_ends: also take the first empty slice beyond
    each end of a label. file: the one mask that is the prompt of the only case, whatever its name.
    """

    folder: Path
    simulated: PromptSlice | None = None
    dataset_labels: bool = False
    mark_ends: bool = False
    file: Path | None = None

    def assign(self, case: Case) -> Case:
        """Return the case with the files from which its prompts are read.

        Raises: CaseError when several masks have the case's name.
        """
        if self.file is not None:
            return replace(case, prompts=PromptFiles(self.file, find_listing(self.folder, stem(self.file), case.id)))
        return replace(case, prompts=PromptFiles(case.label) if self.dataset_labels else find_prompts(self.folder, case.id, case.images))

    def describe(self) -> str:
        """Describe the prompts for the manifest."""
        return f"simulated: {self.simulated}{', ends marked' if self.mark_ends else ''}" if self.simulated else "given"

    def read(self, case: Case, image: Volume, view: View, plan: Plan) -> tuple[Prompts, tuple[str, ...]]:
        """Read the prompts of a case. Returns them and warnings; a full mask that is empty gives an empty result.

        Raises: CaseError when there are no prompts, or they do not fit the image.
        """
        path = case.prompts.mask
        if self.simulated is not None and path is not None:
            labels = read_labels(path, case=case.id, root=self.folder, on=image.grid)
            warnings = check_mask(image, labels, plan.labels, plan.ignore, case=case.id, file=path.name)
            return simulate_prompts(labels.voxels, view, tuple(plan.labels), self.simulated, self.mark_ends), (*labels.warnings, *warnings)
        prompts = read_prompts(case.prompts, case.id, view, tuple(plan.labels), plan.ignore, image) if self.simulated is None else None
        if prompts is None or not any(prompts.annotated.values()):
            raise CaseError(case.id, "", "no annotated slice", f"Add a prompt mask named {case.id} with at least one annotated slice")
        return prompts, tuple(f"the prompt: {line}" for line in prompts.warnings if line not in image.warnings)


@dataclass(frozen=True)
class SegmentedCase:
    """A segmented case: labels (Z, Y, X) on the image's grid, the image, warnings, and metadata for the manifest."""

    labels: NDArray[Any]
    image: Volume
    warnings: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def confidence(self) -> dict[int, dict[int, float]]:
        """Label -> slice, numbered as the file stores it -> confidence from 0 to 1; 1 on annotated slices."""
        labels = self.metadata["confidence"].items()
        return {int(value): {int(t): confidence for t, confidence in entry["slices"].items()} for value, entry in labels}

    def write(self, path: str | Path) -> None:
        """Save the labels with the image's header, in the format of the path's ending.

        Raises: OutputError when the file cannot be written.
        """
        write_mask(Path(path), self.labels, self.image)


@dataclass(frozen=True)
class Segmenter:
    """A model with its plan and calibration, ready to segment cases.

    calibration: maps the confidence of slices that were not annotated to expected Dice. processes: that share the passes of a case, on a
    CPU. learned: a label U-Net that learned from annotated slices of other volumes.
    """

    model: SlmSam2
    plan: Plan
    calibration: Calibration | None = None
    processes: int = 1
    learned: LabelUNet | None = None


def segment_case(case: Case, root: Path, prompt_reader: PromptReader, segmenter: Segmenter) -> SegmentedCase:
    """Segment one case from its annotated slices. Nothing is written. root: messages name files relative to it.

    Raises: CaseError when the image or the prompts cannot be used.
    """
    started = time.monotonic()
    model, plan, size = segmenter.model, segmenter.plan, segmenter.plan.geometry.storage_size
    image = read_image(case.images, case=case.id, root=root, channels=len(plan.channels))
    view, frames = make_frames(image, plan.geometry, plan.intensity)
    prompts, warnings = prompt_reader.read(case, image, view, plan)
    objects = annotated_slices_of(prompts, view, tuple(plan.labels), size)
    options = PropagationOptions(processes=segmenter.processes, use_label_prior=True, learned=segmenter.learned)
    found = propagate_stack(model, frames, objects, plan, options)
    labels = restore_labels(found, view, size) if found else np.zeros(view.grid.shape, np.uint8)
    labels = restore_annotated(labels.astype(np.uint8 if max(plan.labels) < 256 else np.uint16, copy=False), prompts, view)
    labels = remove_loose_parts(labels, prompts.labels, found, model, view.orientation.order[0])
    calibrated = {value: _apply_calibration(one, objects[value], segmenter.calibration) for value, one in found.items()}
    metadata = _case_metadata(prompts, view, calibrated) | {
        "seconds": round(time.monotonic() - started, 3),
        "calibrated": segmenter.calibration is not None,
    }
    return SegmentedCase(labels, _like_prompt(image, prompts), (*image.warnings, *warnings), metadata)


def _like_prompt(image: Volume, prompts: Prompts) -> Volume:
    """Return the image with the labels that the prompt file describes, and its masks in 3D Slicer's format where the prompt is."""
    if prompts.source is None:
        return image
    ending = SEG_NRRD if prompts.source.ending == SEG_NRRD else image.source.mask_ending
    return replace(image, source=replace(image.source, segments=prompts.source.segments, mask_ending=ending))


def annotated_slices_of(prompts: Prompts, view: View, values: Sequence[int], storage_size: int) -> dict[int, list[AnnotatedSlice]]:
    """Bring the annotated slices of every label to the stack: label value -> slices, ascending; labels annotated nowhere are left out.

    Slices outside the crop are left out, for the network does not see them. A slice without the label counts only where none of it is
    ignored, and is an end mark only where no other label is annotated on it. Where several native slices meet in one stack slice, one
    that holds the label counts. Masks are padded to (storage_size, storage_size).
    """
    found: dict[int, list[AnnotatedSlice]] = {}
    for value in values:
        projected = view.project_slices(prompts.labels, value, prompts.annotated.get(value, ())).values()
        usable = [one for one in projected if one[1].any() or prompts.ignore is None or not (one[2] == prompts.ignore).any()]
        by_slice: dict[int, AnnotatedSlice] = {}
        for place, mask, plane in sorted(usable, key=lambda one: bool(one[1].any())):  # slices with the label last, so that they count
            alone = not bool(((plane != 0) & (plane != (prompts.ignore or 0))).any())
            by_slice[place] = AnnotatedSlice(place, pad_to_square(torch.from_numpy(mask), storage_size), alone)
        if any(bool(annotated.mask.any()) for annotated in by_slice.values()):
            found[value] = [annotated for _, annotated in sorted(by_slice.items())]
    return found


def restore_labels(found: Mapping[int, Propagation], view: View, storage_size: int) -> NDArray[Any]:
    """Turn the logits of at least one label into labels (Z, Y, X), uint8 or uint16, on the volume's grid.

    A voxel gets the label with the largest logit above 0, and 0 where there is none.
    """
    _, height, width = view.stack_shape
    return view.restore(
        lambda t: torch.stack([one.plane(t, storage_size, height, width) for one in found.values()]).numpy(),
        tuple(found),
    )


def remove_loose_parts(
    labels: NDArray[Any], annotated: NDArray[Any], found: Mapping[int, Propagation], model: SlmSam2, axis: int = 0
) -> NDArray[Any]:
    """Remove components that touch no annotation, of labels that were connected in all training cases and that the label U-Net knows.

    labels, annotated: (Z, Y, X) or (T, H, W); axis: the slice axis. The label U-Net that counts for a label must reach FULL_WEIGHT_DICE on
    its annotated slices.
    """
    connected = model.label_unet.one_piece_labels if model.label_unet is not None else []
    values = [value for value, one in found.items() if value in connected and (one.prompt_dice or 0) >= FULL_WEIGHT_DICE]
    return keep_connected(labels, annotated, values, axis) if values else labels


def _apply_calibration(found: Propagation, annotated: list[AnnotatedSlice], calibration: Calibration | None) -> Propagation:
    """Calibrate the confidence of one object; annotated slices, and slices that no pass reached, keep theirs."""
    if calibration is None:
        return found
    expected = torch.from_numpy(calibration(found.confidence.numpy())).to(found.confidence)
    kept = found.confidence == 0
    kept[[one.slice for one in annotated]] = True
    return replace(found, confidence=torch.where(kept, found.confidence, expected))


def _case_metadata(prompts: Prompts, view: View, found: Mapping[int, Propagation]) -> dict[str, Any]:
    """Collect what the manifest records about a case; slices are numbered as the file stores them, along `array_axis` of (z, y, x)."""

    def by_slice(values: torch.Tensor) -> dict[str, float]:
        return {str(t): round(value, _DIGITS) for t, value in view.by_file_slice(values.numpy()).items() if not math.isnan(value)}

    disagreement = {str(value): by_slice(one.disagreement) for value, one in found.items()}
    return {
        "slice_axis": view.axis,
        "array_axis": view.orientation.order[0],
        "annotated_slices": {str(v): sorted(view.file_index(t) for t in slices) for v, slices in prompts.annotated.items() if slices},
        "confidence": {
            str(value): {"mean": round(float(one.confidence.mean()), _DIGITS), "slices": by_slice(one.confidence)}
            for value, one in found.items()
        },
        "disagreement": {value: slices for value, slices in disagreement.items() if slices},
        "labels_learned_together": [value for value, one in found.items() if one.prior_learned],
        "label_prior_dice": {str(value): round(one.prompt_dice, _DIGITS) for value, one in found.items() if one.prompt_dice is not None},
    }
