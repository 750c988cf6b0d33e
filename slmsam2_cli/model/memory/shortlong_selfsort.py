"""Both ideas at once: SLM-SAM 2's short view of the slice just passed, beside MedSAM-2's bank as the long view.

The short stream follows the shape from slice to slice; the long one says what the object looks like. Where slices have no
order, the short stream sees the most similar slice of the long one instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slmsam2_cli.model.memory.policy import Moment, Stream
from slmsam2_cli.model.memory.selfsort import NEIGHBOUR, SelfSort
from slmsam2_cli.model.memory.shortlong import near


@dataclass(frozen=True)
class ShortLongSelfSort:
    """short: how many slices the short stream sees; everything else is the bank's."""

    bank: SelfSort = field(default_factory=SelfSort)
    short: int = 1
    name: str = "shortlong+selfsort"
    weighs: bool = True

    @property
    def two_sided(self) -> bool:
        """Whether the bank is."""
        return self.bank.two_sided

    @property
    def min_similarity(self) -> float:
        """What the bank asks for."""
        return self.bank.min_similarity

    def read(self, moment: Moment) -> tuple[Stream, ...]:
        """Two streams: long, short."""
        long = self.bank.long(moment)
        return (long, near(moment, self.short) if moment.step else most_similar(long, moment))

    def keep(self, moment: Moment) -> list[int]:
        """The bank, and as many of the last slices as the short stream sees."""
        last = {moment.slice - moment.step * distance for distance in range(self.short)}
        return [*{*self.bank.keep(moment), *last.intersection(moment.tracked)}]


def most_similar(long: Stream, moment: Moment) -> Stream:
    """Of what the long stream reads, the slice most similar to this one, in row 0."""
    best = max((s for s, _ in long.spatial), key=lambda s: moment.evidence.here[s])
    return Stream(((best, 0),), ((best, NEIGHBOUR),))
