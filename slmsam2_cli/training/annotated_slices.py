"""Train label U-Nets on the annotated slices of a folder of volumes.

Every volume of the folder carries a few annotated slices, and nothing else of it is known. Two label U-Nets are trained, each without the
volumes of one half (cross-fitting), and each is used on that half: so its Dice on the annotated slices of a volume still tests it. Both
start from the model's label U-Net where there is one, and half of their slices then come from the labelled volumes that it was trained on.

In a second round they also learn from slices next to annotated ones, as far as propagation and the label U-Net agree; pixels on which
they differ are ignored. Slices on which either finds nothing are never learned from: where propagation ends too soon, a network would learn
to end there, too. Which slices are added to a volume was decided with a network that knows the other half. In this way, a little of a
volume's annotation reaches its own network in the second round.

Steps and rates were chosen on the cases named in docs/experiments/2026-11-29-annotated-slices.md.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.dataset.prompts import Prompts
from slmsam2_cli.dataset.slices import View, make_frames
from slmsam2_cli.device import torch_threads
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.inference.label_prior import MAX_LOGIT, compute_label_priors
from slmsam2_cli.inference.propagation import AnnotatedSlice, PropagationOptions, propagate_stack
from slmsam2_cli.inference.segment import PromptReader, annotated_slices_of
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import read_image
from slmsam2_cli.model.label_unet import REACH, LabelUNet, label_unet_from, label_unet_roi
from slmsam2_cli.model.roi import InputSlices, RoiCrop, pad_to_square
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import LABEL_UNET_BATCH
from slmsam2_cli.training.label_unet import (
    IGNORE_INDEX,
    MAX_REACH,
    SliceSampler,
    augment,
    crop_target,
    jitter,
    label_unet_input_size,
    label_unet_loss,
    new_label_unet,
)
from slmsam2_cli.training.side_by_side import Results, Watch, run_side_by_side

HALVES = 2
ROUNDS = 2  # annotated slices alone, then also slices on which propagation and the label U-Net agree
STEPS, STEPS_FROM_RANDOM = 150, 400  # of a round
MIN_AGREEMENT = 0.75  # Dice of the two
PEAK_RATE = 1e-3
LABELLED_SHARE = 0.5  # of the slices of a step, where there are labelled volumes
_CLIP_NORM = 1.0
_WARMUP_SHARE = 0.3
_KEY = "learned_from"
Masks = NDArray[Any]  # bool


@dataclass(frozen=True)
class TrainingSlice:
    """A slice of which some labels are known, as far as a crop of it may reach.

    slices (5, C, h, w) float16: the slice between its adjacent ones; target (h, w) int16: 0 none of the labels, 1 the first label, -1
    ignored; known (K,): whether it is known where a label is; corner: first row and column in the whole slice.
    """

    slices: NDArray[np.float16]
    target: NDArray[np.int16]
    known: tuple[bool, ...]
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class TrainingVolume:
    """The slices of a volume to learn from, and the crop in which the label U-Net sees them."""

    slices: tuple[TrainingSlice, ...]
    roi: RoiCrop


def read_annotated(
    case: Case, root: Path, prompt_reader: PromptReader, plan: Plan, witnesses: Witnesses | None = None
) -> TrainingVolume | None:
    """Read the annotated slices of a case; None where no label is drawn on them.

    witnesses: where given, slices next to annotated ones are added on which both agree.
    Raises: CaseError when the image or the prompts cannot be used.
    """
    image = read_image(case.images, case=case.id, root=root, channels=len(plan.channels))
    view, frames = make_frames(image, plan.geometry, plan.intensity)
    prompts, _ = prompt_reader.read(case, image, view, plan)
    return annotated_volume(frames, prompts, view, plan, witnesses)


@dataclass(frozen=True)
class Witnesses:
    """Two ways to segment a volume that learned from different slices: propagation without label prior, and a label U-Net."""

    model: SlmSam2
    label_unet: LabelUNet

    def masks(self, frames: NDArray[Any], objects: Mapping[int, list[AnnotatedSlice]], plan: Plan) -> dict[int, tuple[Masks, Masks]]:
        """Segment a stack (C, T, H, W): label -> the masks (T, H, W) bool of both."""
        (_, count, height, width), size = frames.shape, plan.geometry.storage_size
        found = propagate_stack(self.model, frames, objects, plan, PropagationOptions(use_label_prior=False))
        slices = InputSlices(torch.from_numpy(np.require(frames, requirements="W")), size, plan.geometry.adjacent_slices)
        annotated = {value: [(one.slice, one.mask) for one in each] for value, each in objects.items()}
        masks = {}
        for value, prior in compute_label_priors(self.label_unet, slices, annotated).items():
            propagated = [found[value].plane(t, size, height, width) > 0 for t in range(count)]
            predicted = [prior.roi.paste(one.float(), size, -MAX_LOGIT)[:height, :width] > 0 for one in prior.margins]
            masks[value] = torch.stack(propagated).numpy(), torch.stack(predicted).numpy()
        return masks


class _Targets:
    """What is known of the slices of a stack of T slices (H, W): by slice, the label of each pixel and the labels that are known."""

    def __init__(self, shape: tuple[int, int], labels: int) -> None:
        self.shape, self.labels = shape, labels
        self.target, self.known, self.unsure = dict[int, Masks](), dict[int, list[bool]](), dict[int, Masks]()

    def annotate(self, t: int, number: int, mask: Masks) -> None:
        """Enter the annotated mask (H, W) of a label, numbered from 1, on slice t; the last one of a label counts."""
        target = self._at(t, number)
        target[target == number] = 0
        target[mask] = number

    def agree(self, t: int, number: int, one: Masks, other: Masks) -> None:
        """Enter the masks (H, W) of two witnesses on slice t where nothing else is known; where they differ, the pixel is unsure."""
        target, both = self._at(t, number), one & other
        self.unsure[t] = self.unsure.get(t, np.False_) | (one ^ other)
        target[both & (target == 0)] = number

    def _at(self, t: int, number: int) -> NDArray[np.int16]:
        self.known.setdefault(t, [False] * self.labels)[number - 1] = True
        return self.target.setdefault(t, np.zeros(self.shape, np.int16))

    def slices(self, frames: NDArray[Any], ignored: Mapping[int, Masks], roi: RoiCrop) -> tuple[TrainingSlice, ...]:
        """Cut the slices of which something is known out of a stack (C, T, H, W), as far as crops around `roi` may reach.

        ignored: pixels without annotation, by slice.
        """
        found = []
        margin = math.ceil(MAX_REACH * roi.edge)
        top, left = max(0, roi.row - margin), max(0, roi.column - margin)
        window = (slice(top, roi.row + roi.edge + margin), slice(left, roi.column + roi.edge + margin))
        for t, target in sorted(self.target.items()):
            target[(target == 0) & self.unsure.get(t, np.False_)] = IGNORE_INDEX
            target[ignored.get(t, np.zeros(self.shape, bool))] = IGNORE_INDEX
            index = np.clip(np.arange(t - REACH, t + REACH + 1), 0, frames.shape[1] - 1)
            slices = np.ascontiguousarray(frames[(slice(None), index, *window)].swapaxes(0, 1).astype(np.float16))
            found.append(TrainingSlice(slices, target[window].copy(), tuple(self.known[t]), (top, left)))
        return tuple(found)


def annotated_volume(
    frames: NDArray[Any], prompts: Prompts, view: View, plan: Plan, witnesses: Witnesses | None = None
) -> TrainingVolume | None:
    """Take the annotated slices out of a stack (C, T, H, W), and those on which two witnesses agree; None where no label is drawn."""
    values, size = tuple(plan.labels), plan.geometry.storage_size
    targets, ignored, drawn = _Targets(frames.shape[2:], len(values)), dict[int, Masks](), list[Tensor]()
    for number, value in enumerate(values, start=1):
        projected = view.project_slices(prompts.labels, value, prompts.annotated.get(value, ())).values()
        for place, mask, _ in sorted(projected, key=lambda one: bool(one[1].any())):  # as in annotated_slices_of
            targets.annotate(place, number, mask)
            drawn += [pad_to_square(torch.from_numpy(mask), size)] if mask.any() else []
    if not drawn:
        return None
    if prompts.ignore is not None:
        for place, mask, _ in view.project_slices(prompts.labels, prompts.ignore, prompts.exact_slices).values():
            ignored[place] = ignored.get(place, np.False_) | mask
    if witnesses is not None:
        objects = annotated_slices_of(prompts, view, values, size)
        for value, (propagated, predicted) in witnesses.masks(frames, objects, plan).items():
            for t in agreed_slices(propagated, predicted, [one.slice for one in objects[value]]):
                if t not in ignored:  # annotated, but not for all labels
                    targets.agree(t, 1 + values.index(value), propagated[t], predicted[t])
    roi = label_unet_roi(drawn, size)
    return TrainingVolume(targets.slices(frames, ignored, roi), roi)


def agreed_slices(one: Masks, other: Masks, annotated: Sequence[int]) -> list[int]:
    """List the slices next to annotated ones, outwards up to the first on which the masks (T, H, W) of two witnesses differ."""
    found = list[int]()
    for start in annotated:
        for step in (1, -1):
            t = start + step
            while 0 <= t < len(one) and t not in annotated and t not in found and _agree(one[t], other[t]):
                found.append(t)
                t += step
    return sorted(found)


def _agree(one: Masks, other: Masks) -> bool:
    """Return whether two masks hold something and have a Dice of MIN_AGREEMENT."""
    pixels = int(one.sum()), int(other.sum())
    return min(pixels) > 0 and float(dice(int((one & other).sum()), *pixels)) >= MIN_AGREEMENT


class AnnotatedSampler:
    """Draws annotated slices, the volumes being equally likely."""

    def __init__(self, volumes: Sequence[TrainingVolume], values: Sequence[int], storage_size: int) -> None:
        self.volumes, self.values, self.storage_size = volumes, tuple(values), storage_size

    @property
    def input_size(self) -> int:
        """The edge in pixels at which a new label U-Net sees the ROI crops."""
        return label_unet_input_size([volume.roi.edge for volume in self.volumes])

    @property
    def one_piece(self) -> list[bool]:
        """Per label, False: a few slices do not show whether it is connected."""
        return [False] * len(self.values)

    def draw_one(self, rng: np.random.Generator, input_size: int) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
        """Draw a slice (C * SLICES, px, px), the label of each pixel (px, px), and which labels were annotated (K,)."""
        volume = self.volumes[int(rng.integers(len(self.volumes)))]
        one = volume.slices[int(rng.integers(len(volume.slices)))]
        roi, (top, left), (height, width) = jitter(volume.roi, rng, self.storage_size), one.corner, one.target.shape
        whole = torch.zeros(*one.slices.shape[:2], self.storage_size, self.storage_size)
        whole[..., top : top + height, left : left + width] = torch.from_numpy(one.slices).float()
        target = torch.zeros(self.storage_size, self.storage_size, dtype=torch.int16)
        target[top : top + height, left : left + width] = torch.from_numpy(one.target)
        return roi.crop(whole, input_size).flatten(0, 1), crop_target(target, roi, self.storage_size, input_size), one.known


@dataclass(frozen=True)
class TrainingJob:
    """What one label U-Net is trained on. start: the network to continue from; labelled: slices of labelled volumes; title: next to the
    progress bar; device: its type.
    """

    annotated: AnnotatedSampler
    start: LabelUNet | None
    labelled: SliceSampler | None
    channels: int
    seed: int
    title: str
    device: str = "cpu"


def train_label_unet(job: TrainingJob, watch: Watch) -> bytes | None:
    """Train a label U-Net; None when the user stops the run before its end. Returns tensors as a safetensors file has them.

    Raises: TrainingError when a loss is not finite.
    """
    rng, torch_rng = np.random.default_rng(job.seed), torch.Generator().manual_seed(job.seed)
    label_unet = copy.deepcopy(job.start) or new_label_unet(job.annotated, job.channels, job.seed)
    label_unet.to(job.device).train().requires_grad_(True)
    steps = STEPS if job.start is not None else STEPS_FROM_RANDOM
    optimiser = torch.optim.AdamW(label_unet.parameters(), lr=PEAK_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=steps, pct_start=_WARMUP_SHARE)
    with watch.progress(job.title, steps) as advance:
        for step in range(steps):
            if watch.stopped():
                return None
            slices, target, unknown = _draw(job, rng, torch_rng, label_unet.input_size)
            loss = label_unet_loss(label_unet(slices.to(job.device)), target.to(job.device), unknown.to(job.device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(label_unet.parameters(), _CLIP_NORM)
            if not torch.isfinite(norm):
                raise TrainingError(f"learning from annotated slices diverged at step {step}. Predict without --together")
            optimiser.step()
            rates.step()
            advance(1)
    return save({name: tensor.cpu().contiguous() for name, tensor in label_unet.state_dict().items()})


def _draw(job: TrainingJob, rng: np.random.Generator, torch_rng: torch.Generator, px: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the slices of a step (B, C * SLICES, px, px), the label of each pixel (B, px, px), and the labels not annotated (B, K)."""
    of_labelled = round(LABEL_UNET_BATCH * LABELLED_SHARE) if job.labelled is not None else 0
    annotated = [job.annotated.draw_one(rng, px) for _ in range(LABEL_UNET_BATCH - of_labelled)]
    drawn = [(slices, target) for slices, target, _ in annotated]
    known = [known for _, _, known in annotated]
    if job.labelled is not None:
        drawn += [job.labelled.draw_one(rng, px) for _ in range(of_labelled)]
        known += [(True,) * len(job.annotated.values)] * of_labelled
    return *augment(drawn, torch_rng), ~torch.tensor(known)


def halves_of(cases: Sequence[str]) -> dict[str, int]:
    """Divide cases into halves by a fixed draw: case id -> 0 or 1."""
    order = np.random.default_rng(len(cases)).permutation(len(cases))
    return {case: int(place) % HALVES for case, place in zip(sorted(cases), order.tolist(), strict=True)}


def cross_fitting(
    volumes: Mapping[str, TrainingVolume],
    halves: Mapping[str, int],
    plan: Plan,
    starts: Sequence[LabelUNet | None],
    labelled: SliceSampler | None,
    device: torch.device,
) -> list[TrainingJob]:
    """Prepare one label U-Net per half of the volumes, to be trained on those of the other half.

    halves: case id -> 0 or 1; starts: the network of each half to continue from; labelled: slices of labelled volumes.
    Raises: TrainingError when a half has no volumes to learn from.
    """
    if len({halves[case] for case in volumes}) < HALVES:
        raise TrainingError("too few volumes with annotated slices can be read to learn from. Predict without --together to see why")
    jobs = []
    for half in range(HALVES):
        others = [volumes[case] for case in sorted(volumes) if halves[case] != half]
        sampler = AnnotatedSampler(others, tuple(plan.labels), plan.geometry.storage_size)
        title = f"label U-Net {half + 1} of {HALVES}"
        jobs.append(TrainingJob(sampler, starts[half], labelled, len(plan.channels), half, title, device.type))
    return jobs


def train_label_unets(jobs: Sequence[TrainingJob], title: str, stopped: Callable[[], bool]) -> tuple[LabelUNet, ...] | None:
    """Train label U-Nets, on a CPU side by side; None when the user stops the run. title: of the progress bar.

    Raises: TrainingError when a loss is not finite, or a process was killed.
    """
    named, contents = {job.title: job for job in jobs}, dict[str, bytes | None]()
    results = Results(lambda name, value: None, contents.__setitem__)
    on_cpu = all(job.device == "cpu" for job in jobs)
    if not on_cpu or not run_side_by_side(train_in_process, named, title, stopped, results, again="the same command again"):
        with torch_threads(1 if on_cpu else None), torch.random.fork_rng():
            for name, job in named.items():
                contents[name] = train_label_unet(job, Watch(stopped, lambda value: None))
    trained = [content for name in named if (content := contents.get(name)) is not None]
    return tuple(label_unet_from(load(content)) for content in trained) if len(trained) == len(jobs) else None


def train_in_process(job: TrainingJob, watch: Watch) -> bytes | None:
    """Train a label U-Net in a process of its own, on one core."""
    torch.set_num_threads(1)
    return train_label_unet(job, watch)


def save_label_unets(path: Path, label_unets: Sequence[LabelUNet], key: str) -> None:
    """Write label U-Nets to a file. key: digest of what they were trained on.

    Raises: OutputError when the file cannot be written.
    """
    tensors = {f"{half}.{name}": tensor for half, one in enumerate(label_unets) for name, tensor in one.state_dict().items()}
    atomic.write_bytes(path, save(tensors, {_KEY: key}))


def load_label_unets(path: Path, key: str) -> tuple[LabelUNet, ...] | None:
    """Read the label U-Nets that were trained on what `key` says; None where the file is absent, damaged, or of another key."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(_KEY) != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        parts = [{n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{half}.")} for half in range(HALVES)]
        return tuple(label_unet_from(part) for part in parts)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def digest_of_learning(inputs: Mapping[str, str], labelled: Sequence[str]) -> str:
    """Compute the SHA-256 of what label U-Nets learn from.

    inputs: case id -> digest of its files and of all settings; labelled: digests of the preprocessed labelled volumes.
    """
    settings = [ROUNDS, MIN_AGREEMENT, STEPS, STEPS_FROM_RANDOM, PEAK_RATE, LABELLED_SHARE, LABEL_UNET_BATCH]
    return hashlib.sha256(repr((settings, sorted(inputs.items()), sorted(labelled))).encode()).hexdigest()
