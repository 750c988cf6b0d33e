"""SAM 2's own memory: every anchor, and the last slices first in, first out.

Anchors take the last temporal row; a tracked slice at distance k takes row k - 1. Pointers of anchors count only
from the past of the direction, with a signed distance (Ravi et al., "SAM 2", arXiv:2408.00714).
"""

from __future__ import annotations

from dataclasses import dataclass

from slmsam2_cli.model.memory.policy import ReadContext, Stream, gated, recent, within


@dataclass(frozen=True)
class Fifo:
    """memories: temporal rows, one of them for anchors; pointers: how many pointers are read at most.

    object_score_gate: a tracked slice on which the object is hardly certain is not read (SAM 3's default), the slice just passed
    always; the others keep their rows.
    """

    memories: int = 7
    pointers: int = 16
    object_score_gate: bool = False
    shared_memory: bool = False
    name: str = "fifo"

    @property
    def needs_scores(self) -> bool:
        """Only behind the gate."""
        return self.object_score_gate

    def read(self, moment: ReadContext) -> tuple[Stream, ...]:
        """One stream: the long view."""
        return (self.long(moment),)

    def keep(self, moment: ReadContext) -> list[int]:
        """What is within reach; with shared reading also what a pass from an anchor the other way will read first."""
        return within(moment, max(self.memories, self.pointers), moment.anchors if self.shared_memory else ())

    def long(self, moment: ReadContext) -> Stream:
        """Anchors and the last `memories` - 1 tracked slices; missing slices are dropped, not padded."""
        moment = gated(moment) if self.object_score_gate else moment
        anchors = [(anchor, self.memories - 1) for anchor in moment.anchors]
        tracked = [(slice_, distance - 1) for slice_, distance in recent(moment, self.memories - 1) if slice_ in moment.tracked]
        return Stream(tuple(anchors + tracked), tuple(self._pointers(moment)))

    def _pointers(self, moment: ReadContext) -> list[tuple[int, int]]:
        past = [(anchor, (moment.slice - anchor) * moment.step) for anchor in moment.anchors]
        reach = min(moment.slices, self.pointers) - 1
        tracked = [(slice_, distance) for slice_, distance in reversed(recent(moment, reach)) if slice_ in moment.tracked]
        return [pointer for pointer in past if pointer[1] >= 0] + tracked
