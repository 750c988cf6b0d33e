"""One volume: from annotated slices to mask logits on every slice.

Every annotated slice that holds an object starts a pass in each direction. A pass stops at the next annotated slice,
where the next annotated slice begins. Between two that hold the object the passes from both sides, no surer than SURE, are blended by
distance; towards one that marks its end the mask tapers (tapering.py). The passes are independent (docs/explanation/propagation.md),
unless the memory policy is shared: then all passes share one store, as in SAM 2's predictor, first all forwards, then all backwards.

With `roi_scale` the network sees, of every slice, a square around what is annotated (model/roi.py). An object whose mask reaches the
edge of its square is tracked once more in a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.inference.end_taper import EndTaper
from slmsam2_cli.inference.label_prior import LabelPrior, recognised
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.roi import RoiCrop, around, box_of
from slmsam2_cli.model.slmsam2 import Memory, MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.planning.rules import MAX_CACHED_BYTES

ABSENT = -20.0  # logit of "nothing here" in results
SURE = 10.0  # the most one of two passes counts where they are blended; "nothing here" would outvote the other from afar
BATCH = 8  # slices encoded at a time
ATTEMPTS = 3  # squares tried, each larger than the one before
BORDER = 1  # mask pixels along the edge of a square that a mask has to leave free


@dataclass(frozen=True)
class AnnotatedSlice:
    """One annotated slice of one object. mask (px, px) bool; an empty mask is an end mark.

    end: whether an empty one marks the object's end, not only that it is not there, as a slice painted for the sake of others.
    """

    slice: int
    mask: Tensor
    end: bool = True


@dataclass(frozen=True)
class Propagation:
    """One object on every slice.

    logits (T, n, n) float32, below 0 where absent: of `square`, or of whole slices; confidence (T,): object score probability
    times predicted IoU, 1 on annotated slices, 0 where no pass came by; disagreement (T,): where passes from both sides came
    by, 1 - Dice of their two masks (0 when both are empty), NaN elsewhere; agreement: Dice of what the label U-Net finds with what was
    annotated, None where there is no label U-Net.
    """

    logits: Tensor
    confidence: Tensor
    disagreement: Tensor
    square: RoiCrop | None = None
    agreement: float | None = None

    def plane(self, t: int, storage_size: int, height: int, width: int) -> Tensor:
        """(H, W) logits of slice t on the stack's pixels; storage_size: edge of the frame that the stack's slices are padded to."""
        if self.square is None:
            return full_resolution(self.logits[t : t + 1], storage_size, height, width)[0]
        return self.square.paste(self.logits[t], storage_size, ABSENT)[:height, :width]


class FeatureCache:
    """Encodes slices in batches on demand and keeps them while there is room."""

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


@torch.inference_mode()
def propagate(
    model: SlmSam2,
    frames: Tensor,
    objects: Mapping[int, list[AnnotatedSlice]],
    advance: Callable[[int], None] = lambda slices: None,
    low_resolution_prompts: bool = False,
    batch: int = BATCH,
    roi_scale: float | None = None,
    recognise: bool = False,
    max_empty_slices: int | None = None,
) -> dict[int, Propagation]:
    """Masks of every object on every slice.

    frames (T, C, px, px) in [0, 1], of the network's size, or of any with `roi_scale`: the network then sees a square so many times
    as wide as what is annotated, each object in its own. objects: label -> its annotated slices. `advance` is told how many slices were
    tracked. low_resolution_prompts: write an annotated mask to memory as SAM 2's predictor does, through the 4x smaller
    mask; otherwise at full resolution. batch: slices encoded at a time. recognise: the objects are the labels that the model was
    tuned on, so its label U-Net, if any, is weighted by its agreement with the annotated slices. max_empty_slices: a pass with no annotated
    slice of the object ahead ends after so many slices without it; None: at the end of the volume.
    """
    model.eval()
    hints = _label_priors(model, frames, objects) if recognise else {}
    low = low_resolution_prompts
    if roi_scale is None:
        features = FeatureCache(model, frames, batch)
        each = partial(_propagate_object, model, features, advance=advance, low=low, max_empty_slices=max_empty_slices)
        return {label: each(anchors, hint=hints.get(label)) for label, anchors in objects.items()}
    return {
        label: _propagate_in_roi(model, frames, anchors, roi_scale, advance, low, batch, hints.get(label), max_empty_slices)
        for label, anchors in objects.items()
    }


def _label_priors(model: SlmSam2, frames: Tensor, objects: Mapping[int, list[AnnotatedSlice]]) -> dict[int, LabelPrior]:
    """What the model's label U-Net says of each object; nothing where it has none."""
    if model.label_unet is None:
        return {}
    return recognised(model.label_unet, frames, {label: [(a.slice, a.mask) for a in anchors] for label, anchors in objects.items()})


def _propagate_in_roi(
    model: SlmSam2,
    frames: Tensor,
    anchors: list[AnnotatedSlice],
    roi_scale: float,
    advance: Callable[[int], None],
    low: bool,
    batch: int,
    hint: LabelPrior | None,
    max_empty_slices: int | None,
) -> Propagation:
    """One object in a square around what is annotated; in a larger one where that turns out too small."""
    storage_size, px = frames.shape[-1], model.input_size
    square = around(box_of([a.mask for a in anchors if bool(a.mask.any())]), roi_scale, storage_size)
    for attempt in range(1, ATTEMPTS + 1):
        features = FeatureCache(model, square.cut(frames, px), batch)
        seen = [replace(a, mask=square.crop_masks(a.mask, px)) for a in anchors]
        told = advance if attempt == 1 else _no_progress
        found = replace(_propagate_object(model, features, seen, told, low, hint, square, max_empty_slices), square=square)
        larger = _larger_roi(found, roi_scale, storage_size)
        if larger is None:
            break
        square = larger
    return found


def _no_progress(slices: int) -> None:
    """Slices tracked once more are no progress."""


def _larger_roi(found: Propagation, roi_scale: float, storage_size: int) -> RoiCrop | None:
    """A square that leaves the mask room; None where it has room enough, or there is no larger one."""
    assert found.square is not None
    square, held = found.square, (found.logits > 0).any(dim=0)
    if square.edge >= storage_size or not held.any():
        return None
    top, left, bottom, right = box_of([held])
    count = held.shape[-1]
    ends = (top, square.row > 0), (left, square.column > 0)
    tails = (bottom, square.row + square.edge < storage_size), (right, square.column + square.edge < storage_size)
    if not (any(place < BORDER and open_ for place, open_ in ends) or any(place > count - BORDER and open_ for place, open_ in tails)):
        return None
    scale = square.edge / count
    low = [offset + int(place * scale) for offset, place in ((square.row, top), (square.column, left))]
    high = [offset + math.ceil(place * scale) for offset, place in ((square.row, bottom), (square.column, right))]
    wanted = around((low[0], low[1], high[0], high[1]), roi_scale, storage_size)
    return wanted if wanted != square else None


def _propagate_object(
    model: SlmSam2,
    features: FeatureCache,
    anchors: list[AnnotatedSlice],
    advance: Callable[[int], None],
    low: bool,
    hint: LabelPrior | None,
    square: RoiCrop | None = None,
    max_empty_slices: int | None = None,
) -> Propagation:
    count, edge = len(features.frames), model.mask_size
    logits = torch.full((count, edge, edge), ABSENT, dtype=torch.float32)
    confidence = torch.zeros(count)
    said = {anchor.slice: anchor for anchor in anchors}
    memories = {a.slice: _store_prompt(model, features, a, logits, confidence, low) for a in anchors if bool(a.mask.any())}
    for anchor in (a for a in anchors if not bool(a.mask.any())):
        confidence[anchor.slice] = 1.0
    weight, disagreement = torch.zeros(count), torch.full((count,), torch.nan)
    shared = MemoryBank(memories)
    for start, step in _passes(memories, model.policy.shared_memory):
        bank = shared if model.policy.shared_memory else MemoryBank(memories)
        _run(model, features, bank, start, step, said, logits, confidence, weight, disagreement, advance, hint, square, max_empty_slices)
    return Propagation(logits, confidence, disagreement, agreement=hint.agreement if hint is not None else None)


def _passes(starts: Iterable[int], shared_memory: bool) -> list[tuple[int, int]]:
    """(anchor, step) of every pass, in order; shared: all forwards, ascending, then all backwards, descending."""
    if shared_memory:
        return [(start, 1) for start in sorted(starts)] + [(start, -1) for start in sorted(starts, reverse=True)]
    return [(start, step) for start in starts for step in (1, -1)]


def _store_prompt(model: SlmSam2, features: FeatureCache, anchor: AnnotatedSlice, logits: Tensor, confidence: Tensor, low: bool) -> Memory:
    mask = anchor.mask.float()[None, None].to(model.device)
    output = model.anchor(features[anchor.slice], mask)
    logits[anchor.slice], confidence[anchor.slice] = output.logits[0, 0].float().cpu(), 1.0
    return stored(model.remember(features[anchor.slice], output, None if low else mask))


def stored(memory: Memory) -> Memory:
    """Spatial memories are kept in bfloat16, as SAM 2's predictor does: half the bytes."""
    return replace(memory, spatial=memory.spatial.to(torch.bfloat16))


def confidence_of(output: SliceOutput) -> float:
    """Object score probability times predicted IoU of the one object on a slice."""
    return float(output.object_score.float().sigmoid() * output.iou.float().amax(dim=1, keepdim=True).clamp(0, 1))


def _run(
    model: SlmSam2,
    features: FeatureCache,
    bank: MemoryBank,
    start: int,
    step: int,
    said: Mapping[int, AnnotatedSlice],
    logits: Tensor,
    confidence: Tensor,
    weight: Tensor,
    disagreement: Tensor,
    advance: Callable[[int], None],
    hint: LabelPrior | None,
    square: RoiCrop | None,
    max_empty_slices: int | None,
) -> None:
    """One pass from an anchor up to the next annotated slice, the end of the volume, or after `max_empty_slices` empty slices."""
    count = len(features.frames)
    stop = next((s for s in range(start + step, count if step > 0 else -1, step) if s in said), count if step > 0 else -1)
    between, ends = stop in bank.anchors, stop in said and said[stop].end and not bool(said[stop].mask.any())
    taper = EndTaper(said[start].mask, start, stop, model.mask_size) if ends else None
    without = 0
    for t in range(start + step, stop, step):
        moment = ReadContext(t, step, bank.anchors, bank.tracked, count)
        output = model.track(features[t], bank, moment)
        output = hint.weighted(output, t, square) if hint is not None else output
        output = taper.followed(output, t) if taper is not None else output
        bank.write(t, stored(model.remember(features[t], output)))
        model.forget(bank, moment)
        share = abs(stop - t) / abs(stop - start) if between else 1.0
        seen = output.logits[0, 0].float().cpu()
        seen = seen.clamp(-SURE, SURE) if between else seen.clamp(min=ABSENT)
        sure = confidence_of(output)
        if weight[t] > 0:  # the other side was here, so its logits are all that is in `logits`
            disagreement[t] = _disagreement(logits[t] > 0, seen > 0)
        mix = share / (share + float(weight[t]))
        logits[t], confidence[t] = torch.lerp(logits[t], seen, mix), confidence[t] + mix * (sure - confidence[t])
        weight[t] += share
        advance(1)
        without = 0 if bool((seen > 0).any()) else without + 1
        if not between and without == max_empty_slices:
            advance(abs(stop - t) - 1)
            break


def _disagreement(one: Tensor, other: Tensor) -> float:
    """1 - Dice of two masks (h, w) bool; 0 when both are empty."""
    pixels = int(one.sum()) + int(other.sum())
    return 1 - 2 * int((one & other).sum()) / pixels if pixels else 0.0


def full_resolution(logits: Tensor, input_size: int, height: int, width: int) -> Tensor:
    """(K, 4h, 4w) logits of one slice -> (K, H, W) on the stack's pixels: upsample to the frame, drop the padding."""
    frame = F.interpolate(logits.float()[None], size=(input_size, input_size), mode="bilinear", align_corners=False)[0]
    return frame[:, :height, :width]
