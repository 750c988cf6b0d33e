"""SLM-SAM 2's memory: a long memory, and a short memory of the previous slices that a second attention stack reads.

The short memory follows the shape from slice to slice; the long memory holds what the object looks like. The published short length is
1 (Chen et al., "SLM-SAM 2", IEEE TMI 2025, arXiv:2505.01854). The long memory of `ShortLong` is SAM 2's (fifo.py: all annotated slices
and the six slices before), that of `ShortLongSelfSort` MedSAM-2's bank (selfsort.py). Images without an order have no previous slice, so
there the short memory is the most similar slice of the long one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.interface import MemoryRead, ReadContext
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE, SelfSort


def short_read(context: ReadContext, count: int) -> MemoryRead:
    """Read the last `count` slices, tracked or annotated, in temporal rows k - 1, with unsigned pointer distances."""
    known = [(s, k) for s, k in context.previous_slices(count) if s in context.tracked or s in context.conditioning]
    return MemoryRead(tuple((s, k - 1) for s, k in known), tuple(reversed(known)))


@dataclass(frozen=True)
class ShortLong(Fifo):
    """SAM 2's memory and a short one. short: number of slices in the short memory; the long memory reaches farther than that."""

    name: ClassVar[str] = "shortlong"
    has_short_stream: ClassVar[bool] = True

    short: int = 1

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose two reads: long, short."""
        return (*super().read(context), short_read(context, self.short))


@dataclass(frozen=True)
class ShortLongSelfSort(SelfSort):
    """MedSAM-2's bank and a short memory. short: number of slices in the short memory."""

    name: ClassVar[str] = "shortlong+selfsort"
    has_short_stream: ClassVar[bool] = True

    short: int = 1

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose two reads: long, short."""
        (long,) = super().read(context)
        if context.step:
            return (long, short_read(context, self.short))
        nearest = max((s for s, _ in long.spatial), key=lambda s: context.scores.query_similarity[s])
        return (long, MemoryRead(((nearest, 0),), ((nearest, POINTER_DISTANCE),)))

    def keep(self, context: ReadContext) -> list[int]:
        """List the bank, and as many of the last slices as the short memory holds."""
        last = {context.slice - context.step * distance for distance in range(self.short)}
        return [*{*super().keep(context), *last.intersection(context.tracked)}]
