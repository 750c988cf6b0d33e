"""What a memory policy answers: which earlier slices a slice looks at, in which temporal row, and which pointers.

Index arithmetic and comparisons of plain numbers: no tensors, no parameters, so every rule is tested without weights.
SAM 2's memory: Ravi et al., "SAM 2" (arXiv:2408.00714); the two views as in Chen et al., arXiv:2505.01854.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

MIN_CERTAINTY = 0.01  # certainty above which a gated policy reads a slice, as SAM 3 ships it


@dataclass(frozen=True)
class Stream:
    """One view of the store of per-slice outputs.

    spatial: (slice, temporal row) of every spatial memory, in reading order.
    pointers: (slice, distance in slices) of every object pointer; the distance of an anchor is signed.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]

    def tokens(self, spatial_tokens: int, tokens_per_pointer: int) -> int:
        """Number of memory tokens that attention sees, with `spatial_tokens` per slice."""
        return len(self.spatial) * spatial_tokens + len(self.pointers) * tokens_per_pointer


@dataclass(frozen=True)
class MemoryScores:
    """What is known of one object on the stored slices.

    object_score: object-score logit; confidence: predicted IoU, or the Dice to expect (`calibrated`), 0 to 1; here: similarity to the
    slice to be segmented; alike: similarity of two stored slices, under either order of the two. Similarities are cosines, -1 to 1.
    """

    object_score: Mapping[int, float] = field(default_factory=dict)
    confidence: Mapping[int, float] = field(default_factory=dict)
    here: Mapping[int, float] = field(default_factory=dict)
    alike: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def certainty(self, slice_: int) -> float:
        """max(0, 2 sigmoid(object_score) - 1) * confidence: 0 where the object is rather absent, 1 where it surely is as drawn."""
        return max(0.0, math.tanh(self.object_score[slice_] / 2)) * self.confidence[slice_]

    def calibrated(self, slices: Iterable[int], table: Callable[[float], float]) -> MemoryScores:
        """The same, but for the confidence of these slices: what the table makes of object score probability times predicted IoU."""
        told = {s: table((1 + math.tanh(self.object_score[s] / 2)) / 2 * self.confidence[s]) for s in slices}
        return replace(self, confidence={**self.confidence, **told})


@dataclass(frozen=True)
class ReadContext:
    """Where a pass stands: the slice to be segmented (or just stored) and what has been stored so far.

    slice: index along the slice axis; step: +1 forward, -1 backward, 0 where slices have no order; anchors: slices a person
    annotated; tracked: slices segmented so far, in the order of writing; slices: number of slices of the volume;
    evidence: filled in for policies that weigh it.
    """

    slice: int
    step: int
    anchors: Collection[int]
    tracked: Collection[int]
    slices: int
    evidence: MemoryScores = MemoryScores()


class MemoryPolicy(Protocol):
    """The questions asked at every slice."""

    @property
    def name(self) -> str:
        """What a plan calls it."""
        ...

    @property
    def needs_scores(self) -> bool:
        """Whether its answers rest on evidence, besides the slices' places."""
        ...

    @property
    def shared_memory(self) -> bool:
        """Whether all passes of a run share one store."""
        ...

    def read(self, moment: ReadContext) -> tuple[Stream, ...]:
        """The streams to attend to, the long one first."""
        ...

    def keep(self, moment: ReadContext) -> Collection[int]:
        """The tracked slices that have to stay stored, once `moment.slice` has been."""
        ...


def recent(moment: ReadContext, reach: int) -> list[tuple[int, int]]:
    """(slice, distance) of the `reach` slices behind this one, the farthest first."""
    return [(moment.slice - moment.step * distance, distance) for distance in range(reach, 0, -1)]


def gated(moment: ReadContext) -> ReadContext:
    """The moment without tracked slices on which the object is hardly certain; the slice just passed always stays."""
    just_passed = moment.slice - moment.step
    sure = [s for s in moment.tracked if s == just_passed or moment.evidence.certainty(s) > MIN_CERTAINTY]
    return replace(moment, tracked=sure)


def within(moment: ReadContext, reach: int, starts: Iterable[int]) -> list[int]:
    """Tracked slices at most `reach` behind this one, ahead of it, or at most `reach` from one of `starts`."""
    near = set(starts)
    return [s for s in moment.tracked if (moment.slice - s) * moment.step <= reach or any(abs(s - start) <= reach for start in near)]
