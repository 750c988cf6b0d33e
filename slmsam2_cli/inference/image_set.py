"""Many images in no order, one of them annotated: masks for all the others, without training (MedSAM-2, arXiv:2408.00874).

The annotated images are conditioning slices: always read, never evicted. The others are segmented from the most similar to the least;
images on which the object is present, confident and similar enough enter the self-sorting bank. Then all are segmented again with the
final bank, each without its own memory, so that no image profits from having come late.

Images are numbered by their content, not by their place in the list, so that their order does not change one bit. The same image given
twice is one image. Intensities and crop should be alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slmsam2_cli.inference.propagation import ABSENT, FeatureCache, confidences_of, to_bfloat16
from slmsam2_cli.model.memory.features import similarity
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLongSelfSort
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceOutput, SlmSam2

UNORDERED = 0  # the step of a pass through images: none lies behind another
_NO_IMAGE = -1  # no image's number


@dataclass(frozen=True)
class ImageResult:
    """The result of one object on one image.

    logits (n, n) float32, below 0 where absent; confidence: object score probability times predicted IoU, 1 on annotated images;
    nearest: the annotated image whose object it is most similar to; similarity: to that one, -1 to 1; warning: "" if all is well.
    """

    logits: Tensor
    confidence: float
    nearest: int
    similarity: float
    warning: str = ""


def bank_policy(model: SlmSam2) -> SelfSort:
    """Build the self-sorting bank for a network, whatever its own policy is, with the thresholds of its plan."""
    policy = ShortLongSelfSort if model.network.has_short_stream else SelfSort
    return policy.from_plan(model.network, model.num_maskmem, model.max_obj_ptrs_in_encoder)


@torch.inference_mode()
def segment_images(
    model: SlmSam2,
    images: Tensor,
    prompts: Mapping[int, Tensor],
    policy: SelfSort | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> list[ImageResult]:
    """Segment one object on every image. Returns the results in the order given.

    images (N, C, px, px) in [0, 1]; prompts: index of an annotated image -> its mask (px, px) bool; an empty mask says that the
    object is not there. policy: `bank_policy(model)` if none. `advance` is called after every segmentation, twice per image.
    Raises: ValueError when no annotated image holds the object.
    """
    if not any(bool(mask.any()) for mask in prompts.values()):
        raise ValueError("no annotated image holds the object; annotate one that does")
    model.eval()
    names = [_name(image, prompts.get(i)) for i, image in enumerate(images)]
    places = [names.index(name) for name in sorted(set(names))]  # of each image once, by content
    number = {names[place]: n for n, place in enumerate(places)}
    given = {number[names[i]]: mask for i, mask in prompts.items()}
    found = _ImageSet(model, images[places], policy or bank_policy(model), advance).segment(given)
    shown = [found[number[name]] for name in names]
    return [replace(one, nearest=i if i in prompts else places[one.nearest]) for i, one in enumerate(shown)]


def _name(image: Tensor, mask: Tensor | None) -> str:
    """Compute the SHA-256 of an image, and of its mask if it is annotated."""
    parts = [image.cpu().contiguous(), *([mask.cpu().contiguous()] if mask is not None else [])]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


class _ImageSet:
    """One object on N different images that are numbered by content."""

    def __init__(self, model: SlmSam2, images: Tensor, policy: SelfSort, advance: Callable[[int], None]) -> None:
        self.model, self.policy, self.advance = model, policy, advance
        self.features = FeatureCache(model, images, batch=1)  # an image's features must not depend on others in its batch
        self.bank = MemoryBank()

    def segment(self, given: Mapping[int, Tensor]) -> dict[int, ImageResult]:
        """Segment all images in two rounds. given: number of an annotated image -> its mask (px, px)."""
        found = {i: self._store_prompt(i, given[i]) for i in sorted(given)}
        nearest = {i: self._nearest(i) for i in range(len(self.features.frames)) if i not in given}
        order = sorted(nearest, key=lambda i: (-nearest[i][1], i))
        for i in order:
            self.bank.write(i, to_bfloat16(self.model.remember(self.features[i], self._track(i, self.bank))))
            self.model.prune(self.bank, self._context(i, self.bank), self.policy)
            self.advance(1)
        self.model.prune(self.bank, self._context(_NO_IMAGE, self.bank), self.policy)  # now the bank's members alone are left
        for i in order:
            others = {s: memory for s, memory in self.bank.tracked.items() if s != i}
            output, (alike_to, alike) = self._track(i, MemoryBank(self.bank.conditioning, others)), nearest[i]
            logits = output.logits[0, 0].float().clamp(min=ABSENT).cpu()
            wanted = self.policy.min_similarity
            warning = f"resembles no annotated image (similarity {alike:.2f}, wanted {wanted:.2f}). Check it, or annotate one like it"
            found[i] = ImageResult(logits, confidences_of(output)[0], alike_to, alike, warning if alike < wanted else "")
            self.advance(1)
        return found

    def _store_prompt(self, i: int, mask: Tensor) -> ImageResult:
        """Return the result of an annotated image, and write it to memory if it holds the object."""
        drawn = mask.float()[None, None].to(self.model.device)
        output = self.model.condition_on_mask(self.features[i], drawn)
        if bool(mask.any()):
            self.bank.conditioning[i] = to_bfloat16(self.model.remember(self.features[i], output, drawn))
        return ImageResult(output.logits[0, 0].float().cpu(), 1.0, i, 1.0)

    def _nearest(self, i: int) -> tuple[int, float]:
        """Find the annotated image whose object this image resembles most. Returns it and the similarity."""
        stats = [memory.stats for memory in self.bank.conditioning.values()]
        vectors, areas = torch.cat([t.vector for t in stats]), torch.cat([t.area for t in stats])
        alike = dict(zip(self.bank.conditioning, similarity(vectors, areas, self.features[i].top[0]).tolist()))
        nearest = max(alike, key=lambda anchor: (alike[anchor], -anchor))
        return nearest, alike[nearest]

    def _context(self, i: int, bank: MemoryBank) -> ReadContext:
        return ReadContext(i, UNORDERED, bank.conditioning, bank.tracked, self.model.max_obj_ptrs_in_encoder)

    def _track(self, i: int, bank: MemoryBank) -> SliceOutput:
        return self.model.track(self.features[i], bank, self._context(i, bank), self.policy)
