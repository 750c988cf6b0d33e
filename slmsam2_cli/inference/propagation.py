"""Propagate annotated slices through a volume: from masks on a few slices to mask logits on every slice.

Every annotated slice that holds an object starts a pass in each direction, which stops at the next annotated slice. Between two that
hold the object, the passes from both sides are blended by distance, their logits clamped to MAX_LOGIT; towards an end mark the mask
tapers (end_taper.py). Passes are independent (docs/explanation/propagation.md), unless the plan says `network.shared_memory`: then all
use one memory bank, as in SAM 2's predictor, first all forwards, then all backwards.

With `roi_scale` the network sees a crop of every slice around the annotation (model/roi.py). An object whose mask reaches the border of
its crop is propagated again in a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.inference.end_taper import EndTaper
from slmsam2_cli.inference.label_prior import MAX_LOGIT, LabelPrior, compute_label_priors
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.roi import RoiCrop, mask_box, pad_to_square, roi_around, to_input
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import MAX_CACHED_BYTES

ABSENT = -20.0  # logit of an absent object in results
BATCH = 8  # slices encoded at a time
ATTEMPTS = 3  # crops tried, each larger than the one before
BORDER = 1  # mask pixels along the border of a crop that a mask must leave free


@dataclass(frozen=True)
class AnnotatedSlice:
    """One annotated slice of one object. mask (px, px) bool; an empty mask is an end mark.

    end: whether an empty mask is an end mark; otherwise the slice was annotated for another object and only stops the passes.
    """

    slice: int
    mask: Tensor
    end: bool = True


@dataclass(frozen=True)
class Propagation:
    """The result of one object on every slice.

    logits (T, n, n) float32, below 0 where absent: of the crop `roi`, or of whole slices; confidence (T,): object score probability
    times predicted IoU, 1 on annotated slices, 0 on slices that no pass reached; disagreement (T,): 1 - Dice of the masks of two passes
    that meet (0 when both are empty), NaN elsewhere; prompt_dice: Dice of the label U-Net on the annotated slices, None without one.
    """

    logits: Tensor
    confidence: Tensor
    disagreement: Tensor
    roi: RoiCrop | None = None
    prompt_dice: float | None = None

    def plane(self, t: int, storage_size: int, height: int, width: int) -> Tensor:
        """Compute the logits (H, W) of slice t on the stack's pixels; storage_size: edge of the square to which its slices are padded."""
        if self.roi is None:
            return full_resolution(self.logits[t : t + 1], storage_size, height, width)[0]
        return self.roi.paste(self.logits[t], storage_size, ABSENT)[:height, :width]


class FeatureCache:
    """Encodes slices in batches on demand and keeps them up to `keep_bytes`."""

    def __init__(self, model: SlmSam2, frames: Tensor, batch: int = BATCH, keep_bytes: int = MAX_CACHED_BYTES) -> None:
        self.model, self.frames, self.batch = model, frames, batch
        self.kept: dict[int, SliceFeatures] = {}
        self.keep_bytes, self.kept_bytes = keep_bytes, 0

    def __getitem__(self, slice_: int) -> SliceFeatures:
        if slice_ not in self.kept:
            self._encode(slice_ - slice_ % self.batch)
        return self.kept[slice_]

    def _encode(self, start: int) -> None:
        stop = min(start + self.batch, len(self.frames))
        features = self.model.encode(self.frames[start:stop].to(self.model.device))
        size = sum(t.element_size() * t.nelement() for t in (features.top, features.top_position, *features.fine))
        if self.kept_bytes + size > self.keep_bytes:
            self.kept.clear()
            self.kept_bytes = 0
        self.kept_bytes += size
        for i in range(stop - start):
            self.kept[start + i] = features.at(slice(i, i + 1))


@dataclass(frozen=True)
class PropagationOptions:
    """How objects are propagated.

    batch: slices encoded at a time. roi_scale: the network sees a crop so many times as wide as the annotation, one per object; None:
    whole slices. use_label_prior: the objects are the labels that the model was fine-tuned on, so the prediction of its label U-Net
    is weighted by its agreement with the annotated slices. max_empty_slices: a pass without an annotated slice ahead stops after so many
    slices without its object; None: at the end of the volume. low_resolution_prompts: write an annotated mask to memory as SAM 2's
    predictor does, through the 4x smaller mask; otherwise at full resolution.
    """

    batch: int = BATCH
    roi_scale: float | None = None
    use_label_prior: bool = False
    max_empty_slices: int | None = None
    low_resolution_prompts: bool = False


@dataclass
class PropagationState:
    """What the passes of one object have written so far; changed in place.

    logits (T, n, n) float32; confidence (T,); disagreement (T,): NaN where no two passes met; weight (T,): sum of the passes' shares.
    """

    logits: Tensor
    confidence: Tensor
    disagreement: Tensor
    weight: Tensor

    @classmethod
    def empty(cls, slices: int, edge: int) -> PropagationState:
        """Return the state before the first pass: no object on any slice."""
        logits = torch.full((slices, edge, edge), ABSENT, dtype=torch.float32)
        return cls(logits, torch.zeros(slices), torch.full((slices,), torch.nan), torch.zeros(slices))

    def blend(self, t: int, logits: Tensor, confidence: float, share: float) -> None:
        """Mix a pass's logits (n, n) and confidence on slice t with those of an earlier pass, by their shares."""
        if self.weight[t] > 0:  # the pass from the other side was here, so `self.logits` holds its logits alone
            one, other = self.logits[t] > 0, logits > 0
            pixels = int(one.sum()), int(other.sum())
            self.disagreement[t] = 1 - float(dice(int((one & other).sum()), *pixels)) if any(pixels) else 0.0
        mix = share / (share + float(self.weight[t]))
        self.logits[t] = torch.lerp(self.logits[t], logits, mix)
        self.confidence[t] = self.confidence[t] + mix * (confidence - self.confidence[t])
        self.weight[t] += share


@dataclass(frozen=True)
class _Object:
    """What the passes of one object read: the network, its encoded slices, annotated slices by number, and how to go about it."""

    model: SlmSam2
    features: FeatureCache
    annotated: Mapping[int, AnnotatedSlice]
    options: PropagationOptions
    advance: Callable[[int], None]
    prior: LabelPrior | None
    roi: RoiCrop | None = None


@torch.inference_mode()
def propagate(
    model: SlmSam2,
    frames: Tensor,
    objects: Mapping[int, list[AnnotatedSlice]],
    options: PropagationOptions = PropagationOptions(),
    advance: Callable[[int], None] = lambda slices: None,
) -> dict[int, Propagation]:
    """Segment every object on every slice.

    frames (T, C, px, px) in [0, 1], of the network's input size, or of any size with `options.roi_scale`. objects: label -> its annotated
    slices. advance: called with the number of slices that were propagated.
    """
    model.eval()
    priors = {}
    if options.use_label_prior and model.label_unet is not None:
        masks = {label: [(a.slice, a.mask) for a in annotated] for label, annotated in objects.items()}
        priors = compute_label_priors(model.label_unet, frames, masks)
    features = FeatureCache(model, frames, options.batch)
    ones = {
        label: _Object(model, features, {a.slice: a for a in annotated}, options, advance, priors.get(label))
        for label, annotated in objects.items()
    }
    return {label: _propagate_object(one) if options.roi_scale is None else _propagate_in_roi(one) for label, one in ones.items()}


def propagate_stack(
    model: SlmSam2,
    frames: NDArray[Any],
    objects: Mapping[int, list[AnnotatedSlice]],
    plan: Plan,
    use_label_prior: bool = True,
    batch: int | None = None,
) -> dict[int, Propagation]:
    """Segment every object on a stack of slices (C, T, H, W) in [0, 1] as a plan says; prediction and training go through here.

    objects: label -> annotated slices, their masks (S, S) padded to the plan's `storage_size`. batch: slices encoded at a time, where it
    is not the plan's number.
    """
    geometry, inference = plan.geometry, plan.inference
    stack = to_input(torch.from_numpy(frames.astype(np.float32, copy=False)), geometry.adjacent_slices)
    options = PropagationOptions(batch or inference.batch_slices, geometry.roi_scale, use_label_prior, inference.max_empty_slices)
    return propagate(model, pad_to_square(stack, geometry.storage_size), objects, options)


def _propagate_in_roi(one: _Object) -> Propagation:
    """Propagate one object in a crop around its annotation; again in a larger one where the mask reaches its border."""
    frames, px, roi_scale = one.features.frames, one.model.input_size, one.options.roi_scale
    assert roi_scale is not None
    storage_size = frames.shape[-1]
    roi = roi_around(mask_box([a.mask for a in one.annotated.values() if bool(a.mask.any())]), roi_scale, storage_size)
    for attempt in range(1, ATTEMPTS + 1):
        cropped = replace(
            one,
            features=FeatureCache(one.model, roi.crop(frames, px), one.options.batch),
            annotated={t: replace(a, mask=roi.crop_masks(a.mask, px)) for t, a in one.annotated.items()},
            advance=one.advance if attempt == 1 else lambda slices: None,  # slices propagated again are no progress
            roi=roi,
        )
        found = replace(_propagate_object(cropped), roi=roi)
        larger = _larger_roi(found, roi_scale, storage_size)
        if larger is None:
            break
        roi = larger
    return found


def _larger_roi(found: Propagation, roi_scale: float, storage_size: int) -> RoiCrop | None:
    """Return a crop that leaves the mask room; None when it has room enough, or there is no larger crop."""
    assert found.roi is not None
    roi, held = found.roi, (found.logits > 0).any(dim=0)
    if roi.edge >= storage_size or not held.any():
        return None
    top, left, bottom, right = mask_box([held])
    count = held.shape[-1]
    ends = (top, roi.row > 0), (left, roi.column > 0)
    tails = (bottom, roi.row + roi.edge < storage_size), (right, roi.column + roi.edge < storage_size)
    if not (any(place < BORDER and open_ for place, open_ in ends) or any(place > count - BORDER and open_ for place, open_ in tails)):
        return None
    scale = roi.edge / count
    low = [offset + int(place * scale) for offset, place in ((roi.row, top), (roi.column, left))]
    high = [offset + math.ceil(place * scale) for offset, place in ((roi.row, bottom), (roi.column, right))]
    wanted = roi_around((low[0], low[1], high[0], high[1]), roi_scale, storage_size)
    return wanted if wanted != roi else None


def _propagate_object(one: _Object) -> Propagation:
    """Propagate one object from each of its annotated slices in both directions, and blend where two passes meet."""
    state = PropagationState.empty(len(one.features.frames), one.model.mask_size)
    memories = {t: _store_prompt(one, state, a) for t, a in one.annotated.items() if bool(a.mask.any())}
    for t, annotated in one.annotated.items():
        if not bool(annotated.mask.any()):
            state.confidence[t] = 1.0
    if one.model.policy.shared_memory:  # as in SAM 2's predictor
        bank = MemoryBank(memories)
        for start, step in [*((t, 1) for t in sorted(memories)), *((t, -1) for t in sorted(memories, reverse=True))]:
            _run_pass(one, state, bank, start, step)
    else:
        for start, step in ((t, step) for t in memories for step in (1, -1)):
            _run_pass(one, state, MemoryBank(memories), start, step)
    prompt_dice = one.prior.prompt_dice if one.prior is not None else None
    return Propagation(state.logits, state.confidence, state.disagreement, prompt_dice=prompt_dice)


def _store_prompt(one: _Object, state: PropagationState, annotated: AnnotatedSlice) -> Memory:
    """Encode an annotated slice as a memory, and write its mask and confidence 1 into the state."""
    t, mask = annotated.slice, annotated.mask.float()[None, None].to(one.model.device)
    output = one.model.condition_on_mask(one.features[t], mask)
    state.logits[t], state.confidence[t] = output.logits[0, 0].float().cpu(), 1.0
    return to_bfloat16(one.model.remember(one.features[t], output, None if one.options.low_resolution_prompts else mask))


def to_bfloat16(memory: Memory) -> Memory:
    """Return the memory with its spatial part in bfloat16, as SAM 2's predictor keeps it: half the bytes."""
    return replace(memory, spatial=memory.spatial.to(torch.bfloat16))


def confidence_of(output: SliceOutput) -> float:
    """Compute object score probability times predicted IoU of the one object on a slice."""
    return float(output.object_score.float().sigmoid() * output.iou.float().amax(dim=1, keepdim=True).clamp(0, 1))


def _run_pass(one: _Object, state: PropagationState, bank: MemoryBank, start: int, step: int) -> None:
    """Propagate from an annotated slice to the next one, to the end of the volume, or until `max_empty_slices` slices were empty."""
    model, annotated, count = one.model, one.annotated, len(one.features.frames)
    end = count if step > 0 else -1
    stop = next((t for t in range(start + step, end, step) if t in annotated), end)
    between, ends = stop in bank.conditioning, stop in annotated and annotated[stop].end and not bool(annotated[stop].mask.any())
    taper = EndTaper(annotated[start].mask, start, stop, model.mask_size) if ends else None
    empty = 0
    for t in range(start + step, stop, step):
        context = ReadContext(t, step, bank.conditioning, bank.tracked, count)
        output = model.track(one.features[t], bank, context)
        output = one.prior.weighted(output, t, one.roi) if one.prior is not None else output
        output = taper.weighted(output, t) if taper is not None else output
        bank.write(t, to_bfloat16(model.remember(one.features[t], output)))
        model.prune(bank, context)
        logits = output.logits[0, 0].float().cpu()
        logits = logits.clamp(-MAX_LOGIT, MAX_LOGIT) if between else logits.clamp(min=ABSENT)
        state.blend(t, logits, confidence_of(output), abs(stop - t) / abs(stop - start) if between else 1.0)
        one.advance(1)
        empty = 0 if bool((logits > 0).any()) else empty + 1
        if not between and empty == one.options.max_empty_slices:
            one.advance(abs(stop - t) - 1)
            break


def full_resolution(logits: Tensor, input_size: int, height: int, width: int) -> Tensor:
    """Upsample logits (K, h, w) of one slice to (K, H, W) on the stack's pixels, without the padding."""
    frame = F.interpolate(logits.float()[None], size=(input_size, input_size), mode="bilinear", align_corners=False)[0]
    return frame[:, :height, :width]
