"""SLM-SAM 2's memory: the long view of SAM 2, and a short view of the slices just passed.

Chen et al., "SLM-SAM 2", IEEE TMI 2025 (arXiv:2505.01854); the published short length is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import Moment, Stream, recent


@dataclass(frozen=True)
class ShortLong:
    """short: how many slices the short stream sees; gate and sides are the long view's."""

    long: Fifo = field(default_factory=Fifo)
    short: int = 1
    name: str = "shortlong"

    @property
    def weighs(self) -> bool:
        """Whether the long view does."""
        return self.long.weighs

    @property
    def two_sided(self) -> bool:
        """Whether the long view is."""
        return self.long.two_sided

    def read(self, moment: Moment) -> tuple[Stream, ...]:
        """Two streams: long, short."""
        return (self.long.long(moment), near(moment, self.short))

    def keep(self, moment: Moment) -> list[int]:
        """What the long view keeps; it reaches farther."""
        return self.long.keep(moment)


def near(moment: Moment, short: int) -> Stream:
    """The last `short` slices, tracked or annotated, at temporal rows k - 1, with unsigned pointer distances."""
    known = [(s, k) for s, k in recent(moment, short) if s in moment.tracked or s in moment.anchors]
    return Stream(tuple((s, k - 1) for s, k in known), tuple(reversed(known)))
