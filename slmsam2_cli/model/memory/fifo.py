"""SAM 2's memory: every conditioning slice, and the last tracked slices first in, first out.

Conditioning slices take the last temporal row; a tracked slice at distance k takes row k - 1. Pointers of conditioning slices are
read only where they lie before the slice in the direction of the pass, with a signed distance (Ravi et al., "SAM 2",
arXiv:2408.00714).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slmsam2_cli.model.memory.interface import MemoryRead, ReadContext
from slmsam2_cli.planning.plan import NetworkPlan


@dataclass(frozen=True)
class Fifo:
    """memories: temporal rows, the last of them for conditioning slices. pointers: the most pointers that are read.

    object_score_gate: leave out tracked slices of low certainty, as SAM 3 does by default; the other slices keep their rows.
    """

    name: ClassVar[str] = "fifo"
    has_short_stream: ClassVar[bool] = False
    has_bank: ClassVar[bool] = False

    memories: int = 7
    pointers: int = 16
    object_score_gate: bool = False
    shared_memory: bool = False

    @classmethod
    def from_plan(cls, network: NetworkPlan, memories: int, pointers: int) -> Fifo:
        """Build the policy with a plan's gate and sharing; see `PlannedPolicy`."""
        return cls(memories, pointers, network.object_score_gate, network.shared_memory)

    @property
    def needs_scores(self) -> bool:
        """Return whether the gate is on; nothing else depends on scores."""
        return self.object_score_gate

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose one read: conditioning slices and the last `memories` - 1 tracked slices; missing slices are left out, not padded."""
        context = context.drop_uncertain() if self.object_score_gate else context
        conditioning = [(s, self.memories - 1) for s in context.conditioning]
        tracked = [(s, distance - 1) for s, distance in context.previous_slices(self.memories - 1) if s in context.tracked]
        before = [(s, (context.slice - s) * context.step) for s in context.conditioning]
        previous = context.previous_slices(min(context.slices, self.pointers) - 1)
        pointers = [(s, distance) for s, distance in reversed(previous) if s in context.tracked]
        return (MemoryRead(tuple(conditioning + tracked), tuple([(s, d) for s, d in before if d >= 0] + pointers)),)

    def keep(self, context: ReadContext) -> list[int]:
        """List the tracked slices within reach; with shared memory also those near a conditioning slice, for the opposite pass."""
        reach, starts = max(self.memories, self.pointers), context.conditioning if self.shared_memory else ()
        return [
            s for s in context.tracked if (context.slice - s) * context.step <= reach or any(abs(s - start) <= reach for start in starts)
        ]
