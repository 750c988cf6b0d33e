"""Use SLM-SAM 2 from Python: build or load a model, encode slices, propagate masks through arrays, files and sets of images.

No function writes a file. A wrong argument raises ValueError, one line that begins with its name; a wrong file raises the error that the
command line would show (errors.py). docs/how-to/python.md shows all functions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.dataset.discovery import stem
from slmsam2_cli.device import DeviceName, choose_device
from slmsam2_cli.inference import arrays, image_set, propagation
from slmsam2_cli.inference.arrays import Array, ArrayPrompts, Match, Track, Window
from slmsam2_cli.inference.load_model import build_model, warnings_of
from slmsam2_cli.inference.segment import SegmentedCase, Segmenter, segment_case
from slmsam2_cli.io.strict_json import explain
from slmsam2_cli.model import slmsam2, zoo
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import RANDOM_WARNING, load_weights, read_checkpoint, resolve_adapter
from slmsam2_cli.model.cpu_ops import to_device
from slmsam2_cli.model.export import model_in
from slmsam2_cli.model.slmsam2 import SliceFeatures
from slmsam2_cli.planning.plan import NetworkPlan, NetworkSize, Plan, read_plan

FilePath = str | PathLike[str]
ArrayLike = Array | Tensor
Label = TypeVar("Label", bound=Hashable)


@dataclass(frozen=True, eq=False, repr=False)
class SlmSam2:
    """A network ready to segment, made by `build` or `load`.

    network: the torch module, in evaluation mode, on its device; plan: the plan that it was fine-tuned with, or None; calibration: the
    table from its confidence to expected Dice, or None; warnings: for users of its masks, one line each.
    """

    network: slmsam2.SlmSam2
    plan: Plan | None = None
    calibration: Calibration | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        made_of, tuned = self.network.network, f", fine-tuned on {self.plan.dataset_name}" if self.plan else ""
        return f"SlmSam2({made_of.size}, {made_of.policy}, {self.input_size} px, {self.network.device}{tuned})"

    @property
    def input_size(self) -> int:
        """Edge of the square that the network sees, in pixels."""
        return self.network.input_size

    @property
    def adjacent_slices(self) -> bool:
        """Whether the network sees the slices before and after one-channel slices as further input channels."""
        return self.plan is not None and self.plan.geometry.adjacent_slices

    def encode(self, slices: ArrayLike, *, window: Window | None = None) -> SliceFeatures:
        """Encode slices (T, H, W) or (T, C, H, W), all at once; sizes and window as in `propagate`.

        Returns SliceFeatures on the network's device: top (T, C, px/16, px/16), fine (T, C/8, px/4, px/4) and (T, C/4, px/8, px/8).
        Raises: ValueError for the arguments.
        """
        _, frames = arrays.frame(slices, self.input_size, window, adjacent_slices=self.adjacent_slices)
        with torch.no_grad():
            return self.network.encode(frames.to(self.network.device))


def build(size: NetworkSize = "nano", *, input_size: int, seed: int = 0, device: DeviceName = "auto", **options: Any) -> SlmSam2:
    """Build a network with random weights, to be trained; its predictions are noise.

    size: nano, tiny, small, base_plus or large; input_size: edge of its input, a multiple of 32; options: further keys of
    `network` in plan.json, such as policy="fifo".
    Raises: ValueError for the arguments, DeviceError.
    """
    input_size, seed = _as_int(input_size, "input_size"), _as_int(seed, "seed")
    try:
        made_of = NetworkPlan(size=size, **options)
    except ValidationError as error:
        raise ValueError(explain(error, NetworkPlan)) from None
    chosen = choose_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = slmsam2.SlmSam2(made_of, input_size)
    return SlmSam2(network.to(chosen).eval(), warnings=(RANDOM_WARNING,))


def load(
    path: FilePath,
    *,
    base: FilePath | None = None,
    plan: FilePath | Plan | None = None,
    input_size: int | None = None,
    device: DeviceName = "auto",
) -> SlmSam2:
    """Load the model of a file: one of `slmsam2 finetune` (or its folder), an adapter, or weights of SAM 2.1 and related models.

    path may also be a name of `slmsam2 weights list`. base: the pretrained weights of an adapter, where they are not found
    automatically. plan: a plan, or the path of a plan.json, instead of the one inside. input_size: for weights without a plan: the edge
    of the input, a multiple of 32. Raises: ValueError for the arguments, WeightsError, PlanError, DeviceError.
    """
    file = zoo.locate(str(path))
    checkpoint = read_checkpoint(model_in(file) if file.is_dir() else file)
    if checkpoint.required_base is None and base is not None:
        raise ValueError(f"base: {checkpoint.name} is no adapter but a whole model; leave it out")
    checkpoint = resolve_adapter(checkpoint, None if base is None else str(base))
    decided = checkpoint.plan
    if plan is not None:
        decided = plan if isinstance(plan, Plan) else read_plan(Path(plan))
        if checkpoint.plan is None:  # weights without a plan keep their own network
            decided = decided.model_copy(update={"network": checkpoint.network})
    if decided is not None and input_size is not None:
        raise ValueError(f"input_size: {input_size}, but the plan says {decided.geometry.input_size}; leave it out")
    chosen = choose_device(device)
    if decided is not None:
        table = checkpoint.calibration_for(decided.modality)
        return SlmSam2(to_device(build_model(checkpoint, decided), chosen), decided, table, warnings_of(checkpoint, decided))
    if input_size is None or checkpoint.network is None:
        raise ValueError(f"input_size: {checkpoint.name} carries no plan; give the edge of its input in pixels, or a plan")
    network = slmsam2.SlmSam2(checkpoint.network, _as_int(input_size, "input_size"))
    load_weights(network, checkpoint)
    return SlmSam2(to_device(network, chosen), warnings=checkpoint.warnings)


def _as_int(value: SupportsIndex, name: str) -> int:
    """Convert a whole number of any type to int."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r}; give a whole number") from None


def propagate(
    model: SlmSam2, slices: ArrayLike, prompts: Mapping[Label, Mapping[int, ArrayLike]], *, window: Window | None = None
) -> dict[Label, Track]:
    """Segment every object on every slice, from a few annotated slices of each. Returns a Track for each label.

    slices: (T, H, W) or (T, C, H, W), any size: the longer edge of a slice fills the input, pixels are taken for squares.
    prompts: label (any name or number) -> slice index -> mask (H, W), 0 where the object is not; an empty mask says that the
    object has ended there. window: the grey values that become 0 and 1, or "percentile" for the 0.5th and 99.5th of the
    non-zero ones; None: the values are from 0 to 1 already. Labels are segmented independently, so their masks may overlap;
    annotated slices are returned unchanged. Raises: ValueError for the arguments.
    """
    view, frames = arrays.frame(slices, model.input_size, window, adjacent_slices=model.adjacent_slices)
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError("prompts: give {label: {slice index: mask}}, one label at least")
    drawn = [arrays.masks_to_prompts(masks, view, f"prompts[{label!r}]") for label, masks in prompts.items()]
    objects = {n: arrays.annotated_slices_on(one, view, model.input_size) for n, one in enumerate(drawn)}
    found = propagation.propagate(model.network, frames, objects)
    return {label: arrays.track_of(found[n], drawn[n], view, model.input_size) for n, label in enumerate(prompts)}


def segment(
    model: SlmSam2,
    image: FilePath | Sequence[FilePath],
    prompts: FilePath | ArrayLike | Mapping[int | str, FilePath | ArrayLike],
    *,
    annotated_slices: Sequence[int] | None = None,
) -> SegmentedCase:
    """Segment a volume as `slmsam2 predict` does, with the plan of the model; the same prompts give the same mask.

    image: a volume's file, a folder with one DICOM series, or one file per channel. prompts: a mask with the plan's label values,
    or label (value or name) -> mask; each a file or an array (Z, Y, X) on the image's grid. A slice with anything drawn on it
    is annotated, for all labels. annotated_slices: further slices, which are empty because nothing is there, as in
    CASE.prompts.json. Raises: ValueError for the arguments, CaseError for files that cannot be used.

    SegmentedCase: labels (Z, Y, X) on the image's grid, confidence (label -> slice -> 0 to 1, the Dice to expect where the model has
    a calibration), warnings, and write(path).
    """
    if model.plan is None:
        raise ValueError("model: carries no plan, so spacing and grey values are unknown; load it with plan=")
    given = (image,) if isinstance(image, str | PathLike) else image
    if not isinstance(given, Sequence) or not given or not all(isinstance(path, str | PathLike) for path in given):
        raise ValueError("image: give the path of a file, or a list of paths, one a channel")
    if len(given) > 1 and len(given) != len(model.plan.channels):
        raise ValueError(
            f"image: {len(given)} files, but the plan has the channels {', '.join(model.plan.channels)}; give one file of each"
        )
    paths = tuple(map(Path, given))
    case = Case(stem(paths[0]).removesuffix("_0000"), paths, None)
    segmenter = Segmenter(model.network, model.plan, model.calibration)
    return segment_case(case, paths[0].parent, ArrayPrompts(prompts, annotated_slices), segmenter)


def segment_images(
    model: SlmSam2, images: ArrayLike | Sequence[ArrayLike], prompts: Mapping[int, ArrayLike], *, window: Window | None = None
) -> list[Match]:
    """Segment one object on every image of an unordered set, from one or a few annotated images (MedSAM-2). Returns a Match per image.

    images: (N, H, W), (N, C, H, W), or a list of arrays (H, W) or (C, H, W) that may differ in size; each fills the frame by
    itself. prompts: image index -> mask (H, W); an empty one says that the object is not on that image. window: as in
    `propagate`, for each image. The order of the images does not change the masks. Raises: ValueError for the arguments.
    """
    views, frames = arrays.images_of(images, model.input_size, window)
    drawn = arrays.read_image_prompts(prompts, views)
    given = {i: arrays.mask_at_input_size(mask, views[i], model.input_size) for i, mask in drawn.items()}
    found = image_set.segment_images(model.network, frames, given)
    return [arrays.match_of(one, drawn.get(i), view, model.input_size) for i, (one, view) in enumerate(zip(found, views, strict=True))]
