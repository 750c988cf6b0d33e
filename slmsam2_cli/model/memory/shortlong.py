"""SLM-SAM 2's memory: a long memory, and a short memory of the previous slices that a second attention stack reads.

The short memory follows the shape from slice to slice; the long memory holds what the object looks like. The published short length is
1 (Chen et al., "SLM-SAM 2", IEEE TMI 2025, arXiv:2505.01854). `ShortLong` has SAM 2's memory as its long memory, `ShortLongSelfSort`
MedSAM-2's bank; images without an order have no previous slice, so there the short memory is the most similar slice of the long one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import MemoryRead, ReadContext
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE, SelfSort
from slmsam2_cli.planning.plan import NetworkPlan


@dataclass(frozen=True)
class ShortLong:
    """short: number of slices in the short memory. The object score gate and the sharing are those of the long memory."""

    name: ClassVar[str] = "shortlong"
    has_short_stream: ClassVar[bool] = True
    has_bank: ClassVar[bool] = False

    long: Fifo = field(default_factory=Fifo)
    short: int = 1

    @classmethod
    def from_plan(cls, network: NetworkPlan, memories: int, pointers: int) -> ShortLong:
        """Build the policy with a plan's gate and sharing."""
        return cls(Fifo.from_plan(network, memories, pointers))

    @property
    def needs_scores(self) -> bool:
        """Whether the long memory needs them."""
        return self.long.needs_scores

    @property
    def shared_memory(self) -> bool:
        """Whether the long memory is shared."""
        return self.long.shared_memory

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose two reads: long, short."""
        return (self.long.long_read(context), short_read(context, self.short))

    def keep(self, context: ReadContext) -> list[int]:
        """List what the long memory keeps; it reaches farther than the short one."""
        return self.long.keep(context)


def short_read(context: ReadContext, count: int) -> MemoryRead:
    """Read the last `count` slices, tracked or annotated, in temporal rows k - 1, with unsigned pointer distances."""
    known = [(s, k) for s, k in context.previous_slices(count) if s in context.tracked or s in context.conditioning]
    return MemoryRead(tuple((s, k - 1) for s, k in known), tuple(reversed(known)))


@dataclass(frozen=True)
class ShortLongSelfSort:
    """short: number of slices in the short memory. All other settings are the bank's."""

    name: ClassVar[str] = "shortlong+selfsort"
    has_short_stream: ClassVar[bool] = True
    has_bank: ClassVar[bool] = True

    bank: SelfSort = field(default_factory=SelfSort)
    short: int = 1
    needs_scores: bool = True

    @classmethod
    def from_plan(cls, network: NetworkPlan, memories: int, pointers: int) -> ShortLongSelfSort:
        """Build the policy with a plan's bank."""
        return cls(SelfSort.from_plan(network, memories, pointers))

    @property
    def shared_memory(self) -> bool:
        """Whether the bank is shared."""
        return self.bank.shared_memory

    @property
    def min_similarity(self) -> float:
        """The bank's threshold of similarity."""
        return self.bank.min_similarity

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose two reads: long, short."""
        long = self.bank.long_read(context)
        if context.step:
            return (long, short_read(context, self.short))
        nearest = max((s for s, _ in long.spatial), key=lambda s: context.scores.query_similarity[s])
        return (long, MemoryRead(((nearest, 0),), ((nearest, POINTER_DISTANCE),)))

    def keep(self, context: ReadContext) -> list[int]:
        """List the bank, and as many of the last slices as the short memory holds."""
        last = {context.slice - context.step * distance for distance in range(self.short)}
        return [*{*self.bank.keep(context), *last.intersection(context.tracked)}]
