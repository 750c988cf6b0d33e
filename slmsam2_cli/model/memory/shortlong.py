"""SLM-SAM 2's memory: the long view of SAM 2, and a short view of the slices just passed.

Chen et al., "SLM-SAM 2", IEEE TMI 2025 (arXiv:2505.01854); the published short length is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import Moment, Stream, recent


@dataclass(frozen=True)
class ShortLong:
    """short: how many slices the short stream sees."""

    long: Fifo = field(default_factory=Fifo)
    short: int = 1
    name: str = "shortlong"

    def read(self, moment: Moment) -> tuple[Stream, ...]:
        """Two streams: long, short."""
        return (self.long.long(moment), self.near(moment))

    def near(self, moment: Moment) -> Stream:
        """The last `short` slices, tracked or annotated, at temporal rows k - 1, with unsigned pointer distances."""
        known = [(s, k) for s, k in recent(moment, self.short) if s in moment.tracked or s in moment.anchors]
        return Stream(tuple((s, k - 1) for s, k in known), tuple(reversed(known)))
