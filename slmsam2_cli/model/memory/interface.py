"""What a memory policy provides and what it is given; which slices it reads is in shortlong.py (the default), fifo.py and selfsort.py.

Index arithmetic and comparisons of plain numbers: no tensors and no parameters, so every rule can be tested without weights.
SAM 2's memory: Ravi et al., "SAM 2", arXiv:2408.00714. Long and short memory: Chen et al., "SLM-SAM 2", arXiv:2505.01854.

registry.py lists the policies and says how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, SupportsFloat

from slmsam2_cli.planning.plan import NetworkPlan

MIN_CERTAINTY = 0.01  # certainty above which the object score gate lets a slice be read, as in SAM 3


@dataclass(frozen=True)
class MemoryRead:
    """What one memory-attention stack reads.

    spatial: (slice, temporal row) of every spatial memory, in reading order.
    pointers: (slice, distance in slices) of every object pointer; the distance of a conditioning slice is signed.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MemoryScores:
    """Scores of one object on the stored slices, from which a policy chooses.

    object_score: object score logit. confidence: predicted IoU, 0 to 1, or the expected Dice after `calibrated`.
    query_similarity: similarity to the slice to be segmented. pairwise_similarity: similarity of two stored slices, under both orders
    of the two. Similarities are cosines, -1 to 1.
    """

    object_score: Mapping[int, float] = field(default_factory=dict)
    confidence: Mapping[int, float] = field(default_factory=dict)
    query_similarity: Mapping[int, float] = field(default_factory=dict)
    pairwise_similarity: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def certainty(self, slice_: int) -> float:
        """Compute max(0, 2 sigmoid(object_score) - 1) * confidence: 0 where the object is probably absent, at most 1."""
        return max(0.0, math.tanh(self.object_score[slice_] / 2)) * self.confidence[slice_]

    def calibrated(self, slices: Iterable[int], table: Callable[[float], SupportsFloat]) -> MemoryScores:
        """Return the scores with the confidence of these slices looked up in a table by sigmoid(object_score) * predicted IoU."""
        expected = {s: float(table((1 + math.tanh(self.object_score[s] / 2)) / 2 * self.confidence[s])) for s in slices}
        return replace(self, confidence={**self.confidence, **expected})


@dataclass(frozen=True)
class ReadContext:
    """The state of a pass: the slice to be segmented (or just stored), and what is stored.

    slice: index along the slice axis. step: +1 forward, -1 backward, 0 for images without an order. conditioning: the annotated
    slices. tracked: slices segmented so far, in the order of writing. slices: number of slices of the volume. scores: only filled in
    for policies with `needs_scores`.
    """

    slice: int
    step: int
    conditioning: Collection[int]
    tracked: Collection[int]
    slices: int
    scores: MemoryScores = MemoryScores()

    def previous_slices(self, count: int) -> list[tuple[int, int]]:
        """List (slice, distance) of the `count` slices before this one in the direction of the pass, the farthest first."""
        return [(self.slice - self.step * distance, distance) for distance in range(count, 0, -1)]

    def drop_uncertain(self) -> ReadContext:
        """Return the context without tracked slices of low certainty (the object score gate); the previous slice always stays."""
        previous = self.slice - self.step
        certain = [s for s in self.tracked if s == previous or self.scores.certainty(s) > MIN_CERTAINTY]
        return replace(self, tracked=certain)


class MemoryPolicy(Protocol):
    """What the network asks at every slice."""

    @property
    def needs_scores(self) -> bool:
        """Return whether the choice depends on `ReadContext.scores`; computing them takes time."""
        ...

    @property
    def shared_memory(self) -> bool:
        """Return whether all passes through a volume share one memory bank."""
        ...

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose what the long stack reads and, for a policy with `has_short_stream`, what the short stack reads."""
        ...

    def keep(self, context: ReadContext) -> Collection[int]:
        """List the tracked slices that may still be read once `context.slice` is stored; all others are deleted."""
        ...


class PlannedPolicy(MemoryPolicy, Protocol):
    """A policy that a plan can name."""

    name: ClassVar[str]  # value of network.policy in plan.json
    has_short_stream: ClassVar[bool]  # whether the network gets a second memory-attention stack, and a fuser
    has_bank: ClassVar[bool]  # whether the plan's bank_* keys apply

    @classmethod
    def from_plan(cls, network: NetworkPlan, memories: int, pointers: int) -> PlannedPolicy:
        """Build the policy with a plan's settings.

        memories: rows of the network's temporal table. pointers: the most object pointers that the network reads.
        """
        ...
