"""Propagate annotated slices through a volume: from masks on a few slices to mask logits on every slice.

Every annotated slice that holds an object starts a pass in each direction, which stops at the next annotated slice. Between two that
hold the object, the passes from both sides are blended by distance, their logits clamped to MAX_LOGIT; towards an end mark the mask
tapers (end_taper.py). Passes are independent (docs/explanation/propagation.md), unless the plan says `network.shared_memory`: then all
use one memory bank, as in SAM 2's predictor, first all forwards, then all backwards.

Independent passes that read alike form a batch, whatever their object and direction: slices are counted from the start of each pass.
Batches may be spread over processes; which passes form a batch does not depend on their number, so results do not either.

With `roi_scale` the network sees a crop of every slice around the annotation (model/roi.py). An object whose mask reaches the border of
its crop is propagated again in a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.inference.end_taper import EndTaper
from slmsam2_cli.inference.label_prior import MAX_LOGIT, LabelPrior, best_label_priors
from slmsam2_cli.model.batch import join, select
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.roi import InputSlices, RoiCrop, mask_box, roi_around
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.parallel import fork_map
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import MAX_CACHED_BYTES

ABSENT = -20.0  # logit of an absent object in results
BATCH = 8  # slices encoded at a time
PASSES_PER_SLICE = 2  # passes run at a time, per slice encoded at a time: they need less memory, and a larger batch saves more time
PASSES_TO_SHARE = 6  # that form two batches at least, for two processes; for fewer, one batch saves more than a second process does
SLICES_TO_SHARE = 40  # of all passes, below which one process is about as fast: copying it takes as long as ten slices
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
    that meet (0 when both are empty), NaN elsewhere; prompt_dice: Dice of the label U-Net on the annotated slices, None without one;
    prior_learned: whether this label U-Net learned from annotated slices of other volumes.
    """

    logits: Tensor
    confidence: Tensor
    disagreement: Tensor
    roi: RoiCrop | None = None
    prompt_dice: float | None = None
    prior_learned: bool = False

    def plane(self, t: int, storage_size: int, height: int, width: int) -> Tensor:
        """Compute the logits (H, W) of slice t on the stack's pixels; storage_size: edge of the square to which its slices are padded."""
        if self.roi is None:
            return full_resolution(self.logits[t : t + 1], storage_size, height, width)[0]
        return self.roi.paste(self.logits[t], storage_size, ABSENT)[:height, :width]


class FeatureCache:
    """Encodes slices in blocks on demand and keeps the blocks used last, up to `keep_bytes`, but two at least, one per direction.

    frames (T, C, px, px), or of any size with a crop `roi`; batch: slices per block.
    """

    def __init__(
        self,
        model: SlmSam2,
        frames: Tensor | InputSlices,
        batch: int = BATCH,
        keep_bytes: int = MAX_CACHED_BYTES,
        roi: RoiCrop | None = None,
    ) -> None:
        self.model, self.frames, self.batch, self.keep_bytes, self.roi = model, frames, batch, keep_bytes, roi
        self.kept: dict[int, SliceFeatures] = {}  # first slice of a block -> its features, the block used last at the end

    def __getitem__(self, slice_: int) -> SliceFeatures:
        start = slice_ - slice_ % self.batch
        block = self.kept.pop(start) if start in self.kept else self._encode(start)
        self.kept[start] = block
        return block.at(slice(slice_ - start, slice_ - start + 1))

    def cropped(self, roi: RoiCrop, count: int) -> FeatureCache:
        """Return an empty cache for one of `count` crops of the same slices, which share the bytes of this one."""
        return FeatureCache(self.model, self.frames, self.batch, self.keep_bytes // count, roi)

    def read(self, start: int, end: int) -> Tensor:
        """Return the network's input of slices (end - start, C, px, px), on its device."""
        part = self.frames[start:end]
        return (part if self.roi is None else self.roi.crop(part, self.model.input_size)).to(self.model.device)

    def _encode(self, start: int) -> SliceFeatures:
        features = self.model.encode(self.read(start, min(start + self.batch, len(self.frames))))
        refining = vars(features.refiner_features).values() if features.refiner_features is not None else ()
        tensors = (features.top, features.top_position, *features.fine, *refining)
        room = self.keep_bytes // max(1, sum(t.element_size() * t.nelement() for t in tensors))
        while len(self.kept) >= max(2, room):
            del self.kept[next(iter(self.kept))]
        return features


@dataclass(frozen=True)
class PropagationOptions:
    """How objects are propagated.

    batch: slices encoded at a time. processes: that share the passes of one volume, on a CPU. roi_scale: the network
    sees a crop so many times as wide as the annotation, one per object; None: whole slices. use_label_prior: the objects are the labels
    that the model was fine-tuned on, so the prediction of its label U-Net is weighted by its agreement with the annotated slices.
    learned: another label U-Net, which learned from annotated slices of other volumes (training/annotated_slices.py).
    max_empty_slices: a pass without an annotated slice ahead stops after so many slices without its object; None: at the end of the
    volume. low_resolution_prompts: write an annotated mask to memory as SAM 2's predictor does, through the 4x smaller mask; otherwise at
    full resolution.
    """

    batch: int = BATCH
    processes: int = 1
    roi_scale: float | None = None
    use_label_prior: bool = False
    max_empty_slices: int | None = None
    low_resolution_prompts: bool = False
    learned: LabelUNet | None = None


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
    prior: LabelPrior | None


@dataclass
class _Pass:
    """One pass of one object, from an annotated slice to the next one, to the end of the volume, or until `max_empty_slices` are empty.

    memories: of all annotated slices that hold the object. step: 1 forwards, -1 backwards. stop: the slice that ends the pass. between:
    whether that slice holds the object, too. logits (n, n) and confidence: of the slices segmented so far, in the order of the pass.
    empty: how many of the last of them are empty.
    """

    obj: _Object
    memories: dict[int, Memory]
    start: int
    step: int
    stop: int = 0
    between: bool = False
    taper: EndTaper | None = None
    logits: list[Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    empty: int = 0

    def __post_init__(self) -> None:
        annotated, end = self.obj.annotated, len(self.obj.features.frames) if self.step > 0 else -1
        self.stop = next((t for t in range(self.start + self.step, end, self.step) if t in annotated), end)
        self.between = self.stop in self.memories
        if self.stop in annotated and annotated[self.stop].end and not bool(annotated[self.stop].mask.any()):
            self.taper = EndTaper(annotated[self.start].mask, self.start, self.stop, self.obj.model.mask_size)

    @property
    def length(self) -> int:
        """Count the slices up to the one that ends the pass."""
        return abs(self.stop - self.start) - 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """List the annotated slices as seen from the start, in the direction of the pass: passes with the same offsets read alike."""
        return tuple(sorted((t - self.start) * self.step for t in self.memories))

    def weighted(self, output: SliceOutput, t: int) -> SliceOutput:
        """Mix the label prior and the taper towards an end mark into the output on slice t."""
        output = self.obj.prior.weighted(output, t, self.obj.features.roi) if self.obj.prior is not None else output
        return self.taper.weighted(output, t) if self.taper is not None else output

    @property
    def going(self) -> bool:
        """Return whether further slices follow."""
        lost = not self.between and self.empty > 0 and self.empty == self.obj.options.max_empty_slices
        return len(self.logits) < self.length and not lost

    def store(self, logits: Tensor, confidence: float) -> int:
        """Store logits (n, n) and confidence of the next slice. Returns the slices that are done with it: all when the pass ends early."""
        logits = logits.clamp(-MAX_LOGIT, MAX_LOGIT) if self.between else logits.clamp(min=ABSENT)
        self.logits.append(logits)
        self.confidence.append(confidence)
        self.empty = 0 if bool((logits > 0).any()) else self.empty + 1
        return 1 if self.going else 1 + self.length - len(self.logits)

    def blend_into(self, state: PropagationState) -> None:
        """Mix the results of the pass into those of the object, by distance where it meets another pass."""
        for place, (logits, confidence) in enumerate(zip(self.logits, self.confidence), start=1):
            share = 1 - place / abs(self.stop - self.start) if self.between else 1.0
            state.blend(self.start + self.step * place, logits, confidence, share)


@torch.inference_mode()
def propagate(
    model: SlmSam2,
    frames: Tensor | InputSlices,
    objects: Mapping[int, list[AnnotatedSlice]],
    options: PropagationOptions = PropagationOptions(),
    advance: Callable[[int], None] = lambda slices: None,
) -> dict[int, Propagation]:
    """Segment every object on every slice.

    frames (T, C, px, px) in [0, 1], of the network's input size, or of any size with `options.roi_scale`. objects: label -> its annotated
    slices. advance: called with the number of slices that were propagated.
    """
    if not objects:
        return {}
    model.eval()
    priors = {}
    if options.use_label_prior and (model.label_unet is not None or options.learned is not None):
        masks = {label: [(a.slice, a.mask) for a in annotated] for label, annotated in objects.items()}
        priors = best_label_priors(model.label_unet, options.learned, frames, masks)
    whole = FeatureCache(model, frames, options.batch, MAX_CACHED_BYTES // options.processes)
    ones = {
        label: _Object(model, whole, {a.slice: a for a in annotated}, options, priors.get(label)) for label, annotated in objects.items()
    }
    return _propagate_objects(ones, advance) if options.roi_scale is None else _propagate_in_rois(ones, advance)


def propagate_stack(
    model: SlmSam2,
    frames: NDArray[Any],
    objects: Mapping[int, list[AnnotatedSlice]],
    plan: Plan,
    options: PropagationOptions = PropagationOptions(use_label_prior=True),
) -> dict[int, Propagation]:
    """Segment every object on a stack of slices (C, T, H, W) in [0, 1] as a plan says; prediction and training go through here.

    objects: label -> annotated slices, their masks (S, S) padded to the plan's `storage_size`. options: what the plan does not say.
    """
    geometry, inference = plan.geometry, plan.inference
    slices = InputSlices(torch.from_numpy(np.require(frames, requirements="W")), geometry.storage_size, geometry.adjacent_slices)
    empty = inference.max_empty_slices
    planned = replace(options, batch=inference.batch_slices, roi_scale=geometry.roi_scale, max_empty_slices=empty)
    return propagate(model, slices, objects, planned)


def _propagate_in_rois(ones: Mapping[int, _Object], advance: Callable[[int], None]) -> dict[int, Propagation]:
    """Propagate every object in a crop around its annotation; again in a larger one where the mask reaches its border."""
    found: dict[int, Propagation] = {}
    rois = {label: _first_roi(one) for label, one in ones.items()}
    for attempt in range(ATTEMPTS):
        found |= _propagate_objects(_crop(ones, rois), advance if attempt == 0 else lambda slices: None)  # what is repeated is no progress
        larger = {label: _larger_roi(found[label], ones[label]) for label in rois}
        rois = {label: roi for label, roi in larger.items() if roi is not None}
        if not rois:
            break
    return {label: found[label] for label in ones}


def _first_roi(one: _Object) -> RoiCrop:
    """Place the first crop of an object around its annotation."""
    scale, edge = one.options.roi_scale, one.features.frames.shape[-1]
    assert scale is not None
    return roi_around(mask_box([a.mask for a in one.annotated.values() if bool(a.mask.any())]), scale, edge)


def _crop(ones: Mapping[int, _Object], rois: Mapping[int, RoiCrop]) -> dict[int, _Object]:
    """Return the objects as the network sees them in these crops. Objects with the same crop share its features."""
    caches = {roi: ones[label].features.cropped(roi, len(set(rois.values()))) for label, roi in rois.items()}
    cropped = {}
    for label, roi in rois.items():
        one, px = ones[label], ones[label].model.input_size
        annotated = {t: replace(a, mask=roi.crop_masks(a.mask, px)) for t, a in one.annotated.items()}
        cropped[label] = replace(one, features=caches[roi], annotated=annotated)
    return cropped


def _larger_roi(found: Propagation, one: _Object) -> RoiCrop | None:
    """Return a crop that leaves the mask room; None when it has room enough, or there is no larger crop."""
    roi_scale, storage_size = one.options.roi_scale, one.features.frames.shape[-1]
    assert found.roi is not None and roi_scale is not None
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


def _propagate_objects(ones: Mapping[int, _Object], advance: Callable[[int], None]) -> dict[int, Propagation]:
    """Propagate objects from each of their annotated slices in both directions, and blend where two passes meet."""
    states = {label: PropagationState.empty(len(one.features.frames), one.model.mask_size) for label, one in ones.items()}
    stored, passes = _store_prompts(ones, states), dict[int, list[_Pass]]()
    for label, one in ones.items():
        memories = stored[label]
        ways = [(t, step) for t in memories for step in (1, -1)]
        if one.model.policy.shared_memory:  # as in SAM 2's predictor
            ways = [*((t, 1) for t in sorted(memories)), *((t, -1) for t in sorted(memories, reverse=True))]
        passes[label] = [_Pass(one, memories, *way) for way in ways]
    batches = _batches(list(passes.values()))
    for batch, results in zip(batches, _run_batches(batches, advance), strict=True):
        for one_pass, (logits, confidence) in zip(batch, results, strict=True):
            one_pass.logits, one_pass.confidence = list(torch.from_numpy(logits)), confidence
    for label, state in states.items():
        for one_pass in passes[label]:
            one_pass.blend_into(state)
    return {
        label: Propagation(
            state.logits,
            state.confidence,
            state.disagreement,
            ones[label].features.roi,
            prior.prompt_dice if (prior := ones[label].prior) is not None else None,
            prior is not None and prior.learned,
        )
        for label, state in states.items()
    }


def _batches(passes: Sequence[list[_Pass]]) -> list[list[_Pass]]:
    """Divide the passes of all objects into batches that are run side by side, the longest passes first.

    Where passes share memory, those of an object are one batch and run one after another. Where a policy needs scores, or slices are
    encoded one at a time, each runs alone. Several batches are an even number of about the same size, so that two processes share
    them well.
    """
    first = next((one for of_object in passes for one in of_object), None)
    if first is None or first.obj.model.policy.shared_memory:
        return [of_object for of_object in passes if of_object]
    alone = first.obj.model.policy.needs_scores or first.obj.options.batch == 1
    limit = 1 if alone else first.obj.options.batch * PASSES_PER_SLICE
    alike: dict[tuple[int, ...], list[_Pass]] = {}
    for one in sorted((one for of_object in passes for one in of_object if one.going), key=lambda one: -one.length):
        alike.setdefault(one.offsets, []).append(one)
    return [batch for group in alike.values() for batch in _divide(group, limit)]


def _divide(group: list[_Pass], limit: int) -> list[list[_Pass]]:
    """Divide passes into as few batches of at most `limit` as an even number can be; into one where there are few."""
    batches = math.ceil(len(group) / limit)
    if batches > 1 or len(group) >= PASSES_TO_SHARE:
        batches = min(len(group), batches + batches % 2)
    bounds = [len(group) * number // batches for number in range(batches + 1)]
    return [group[start:end] for start, end in pairwise(bounds)]


_Result = tuple[NDArray[np.float32], list[float]]  # logits (k, n, n) and confidence of the k slices of a pass


def _run_batches(batches: Sequence[list[_Pass]], advance: Callable[[int], None]) -> list[list[_Result]]:
    """Run every batch, in several processes where the options say so and they have enough to do. Returns the result of each pass."""
    processes = min(batches[0][0].obj.options.processes, len(batches)) if batches else 1
    if processes > 1 and sum(one.length for batch in batches for one in batch) >= SLICES_TO_SHARE:
        return fork_map(_run_batch, batches, processes, advance)
    return [_run_batch(batch, advance) for batch in batches]


def _run_batch(batch: list[_Pass], advance: Callable[[int], None]) -> list[_Result]:
    """Run the passes of a batch: side by side, or one after another where they share memory."""
    first = batch[0]
    if first.obj.model.policy.shared_memory or len(batch) == 1:
        bank = MemoryBank(first.memories)
        for one in batch:
            _run_passes([one], bank, advance)
    else:
        stored = {offset: [one.memories[one.start + one.step * offset] for one in batch] for offset in first.offsets}
        _run_passes(batch, MemoryBank({offset: join(memories) for offset, memories in stored.items()}), advance)
    nothing = np.empty((0, 0, 0), np.float32)
    results = []
    for one in batch:
        results.append((torch.stack(one.logits).numpy() if one.logits else nothing, one.confidence))
        one.logits.clear()  # which would be in memory twice
    return results


def _run_passes(running: list[_Pass], bank: MemoryBank, advance: Callable[[int], None]) -> None:
    """Run passes side by side until each has ended.

    bank: their memories. Slices of several passes are counted from the start of each, of a single one as in the volume.
    """
    model, count = running[0].obj.model, len(running[0].obj.features.frames)
    origin, step = (running[0].start, running[0].step) if len(running) == 1 else (0, 1)
    place = 0
    while running := [one for one in running if one.going]:
        place += 1
        slices = [one.start + one.step * place for one in running]
        features = join([one.obj.features[t] for one, t in zip(running, slices)])
        context = ReadContext(origin + step * place, step, bank.conditioning, bank.tracked, count)
        output = model.track(features, bank, context)
        if any(one.obj.prior is not None or one.taper is not None for one in running):
            output = join([one.weighted(select(output, slice(i, i + 1)), slices[i]) for i, one in enumerate(running)])
        bank.write(context.slice, to_bfloat16(model.remember(features, output)))
        model.prune(bank, context)
        results = zip(running, output.logits[:, 0].float().cpu(), confidences_of(output))
        advance(sum(one.store(logits, confidence) for one, logits, confidence in results))
        going = torch.tensor([one.going for one in running])
        if not going.all():
            bank = bank.at(going.nonzero()[:, 0].to(model.device))


def _store_prompts(ones: Mapping[int, _Object], states: Mapping[int, PropagationState]) -> dict[int, dict[int, Memory]]:
    """Encode the annotated slices of all objects as memories, and write masks and confidence 1 into the states.

    Returns label -> annotated slice that holds the object -> memory. Slices of several crops are encoded in batches.
    """
    memories: dict[int, dict[int, Memory]] = {label: {} for label in ones}
    drawn = [(label, a) for label, one in ones.items() for a in one.annotated.values() if bool(a.mask.any())]
    for label, one in ones.items():
        states[label].confidence[list(one.annotated)] = 1.0
    first = next(iter(ones.values()))
    model, options, caches = first.model, first.options, {id(one.features) for one in ones.values()}
    for start in range(0, len(drawn), options.batch):
        part = drawn[start : start + options.batch]
        if len(caches) == 1:  # whose other slices are needed next
            features = join([first.features[a.slice] for _, a in part])
        else:
            features = model.encode(torch.cat([ones[label].features.read(a.slice, a.slice + 1) for label, a in part]))
        masks = torch.stack([a.mask for _, a in part]).float()[:, None].to(model.device)
        output = model.condition_on_mask(features, masks)
        memory = to_bfloat16(model.remember(features, output, None if options.low_resolution_prompts else masks))
        for i, (label, a) in enumerate(part):
            states[label].logits[a.slice] = output.logits[i, 0].float().cpu()
            memories[label][a.slice] = select(memory, slice(i, i + 1))
    return memories


def to_bfloat16(memory: Memory) -> Memory:
    """Return the memory with its spatial part in bfloat16, as SAM 2's predictor keeps it: half the bytes."""
    return replace(memory, spatial=memory.spatial.to(torch.bfloat16))


def confidences_of(output: SliceOutput) -> list[float]:
    """Compute object score probability times predicted IoU of each object on a slice."""
    iou = output.iou.float().amax(dim=1, keepdim=True).clamp(0, 1)
    return [float(one) for one in (output.object_score.float().sigmoid() * iou).flatten()]


def full_resolution(logits: Tensor, input_size: int, height: int, width: int) -> Tensor:
    """Upsample logits (K, h, w) of one slice to (K, H, W) on the stack's pixels, without the padding."""
    frame = F.interpolate(logits.float()[None], size=(input_size, input_size), mode="bilinear", align_corners=False)[0]
    return frame[:, :height, :width]
