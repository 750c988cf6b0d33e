"""SLM-SAM 2's memory: the long view of SAM 2, and a short view of the slices just passed.

Chen et al., "SLM-SAM 2", IEEE TMI 2025 (arXiv:2505.01854); the published short length is 1.

Both ideas at once: SLM-SAM 2's short view of the slice just passed, beside MedSAM-2's bank as the long view.

The short stream follows the shape from slice to slice; the long one says what the object looks like. Where slices have no
order, the short stream sees the most similar slice of the long one instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import ReadContext, Stream, recent
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE, SelfSort


@dataclass(frozen=True)
class ShortLong:
    """short: how many slices the short stream sees; gate and sides are the long view's."""

    long: Fifo = field(default_factory=Fifo)
    short: int = 1
    name: str = "shortlong"

    @property
    def needs_scores(self) -> bool:
        """Whether the long view does."""
        return self.long.needs_scores

    @property
    def shared_memory(self) -> bool:
        """Whether the long view is."""
        return self.long.shared_memory

    def read(self, moment: ReadContext) -> tuple[Stream, ...]:
        """Two streams: long, short."""
        return (self.long.long(moment), near(moment, self.short))

    def keep(self, moment: ReadContext) -> list[int]:
        """What the long view keeps; it reaches farther."""
        return self.long.keep(moment)


def near(moment: ReadContext, short: int) -> Stream:
    """The last `short` slices, tracked or annotated, at temporal rows k - 1, with unsigned pointer distances."""
    known = [(s, k) for s, k in recent(moment, short) if s in moment.tracked or s in moment.anchors]
    return Stream(tuple((s, k - 1) for s, k in known), tuple(reversed(known)))


@dataclass(frozen=True)
class ShortLongSelfSort:
    """short: how many slices the short stream sees; everything else is the bank's."""

    bank: SelfSort = field(default_factory=SelfSort)
    short: int = 1
    name: str = "shortlong+selfsort"
    needs_scores: bool = True

    @property
    def shared_memory(self) -> bool:
        """Whether the bank is."""
        return self.bank.shared_memory

    @property
    def min_similarity(self) -> float:
        """What the bank asks for."""
        return self.bank.min_similarity

    def read(self, moment: ReadContext) -> tuple[Stream, ...]:
        """Two streams: long, short."""
        long = self.bank.long(moment)
        return (long, near(moment, self.short) if moment.step else most_similar(long, moment))

    def keep(self, moment: ReadContext) -> list[int]:
        """The bank, and as many of the last slices as the short stream sees."""
        last = {moment.slice - moment.step * distance for distance in range(self.short)}
        return [*{*self.bank.keep(moment), *last.intersection(moment.tracked)}]


def most_similar(long: Stream, moment: ReadContext) -> Stream:
    """Of what the long stream reads, the slice most similar to this one, in row 0."""
    best = max((s for s, _ in long.spatial), key=lambda s: moment.evidence.here[s])
    return Stream(((best, 0),), ((best, POINTER_DISTANCE),))
