"""MedSAM-2's self-sorting bank, made deterministic: what is read is what looks alike, not what was seen last.

A tracked slice enters the bank when the object is present, the prediction confident and the object similar to an anchor.
Of more than the bank holds, the least different one leaves. A slice reads every anchor and the most similar ones of the
bank (Zhu et al., "Medical SAM 2", arXiv:2408.00874). Unlike there, anchors are never evicted and nothing is drawn at random.

Order in time plays no role, and the temporal table has no row for that. The row that SAM 2 gives to anchors comes closest:
it was trained to mean "prompted, at any distance", so all that is read here has it. Pointers, whose code is a distance,
all have that of a neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slmsam2_cli.model.memory.policy import MIN_CERTAINTY, MemoryScores, ReadContext, Stream

POINTER_DISTANCE = 1  # pointer distance of every slice that is read, in slices


@dataclass(frozen=True)
class SelfSort:
    """capacity: tracked slices in the bank; nearest: how many of them are read; both thresholds are inclusive.

    row: of the temporal table, for everything; object_score_gate: a slice enters only when the object's certainty passes the gate;
    shared_memory: one bank for the passes in both directions.
    """

    capacity: int = 16
    nearest: int = 6
    min_confidence: float = 0.5
    min_similarity: float = 0.5
    row: int = 6
    object_score_gate: bool = False
    shared_memory: bool = False
    name: str = "selfsort"
    needs_scores: bool = True

    def read(self, moment: ReadContext) -> tuple[Stream, ...]:
        """One stream: the long view."""
        return (self.long(moment),)

    def keep(self, moment: ReadContext) -> list[int]:
        """The bank, and the slice just stored: its mask may be carried to the next one."""
        return [*{*self.members(moment), *(s for s in moment.tracked if s == moment.slice)}]

    def long(self, moment: ReadContext) -> Stream:
        """Anchors, and the bank's slices most similar to this one; ties: the more confident first, then the lower index."""
        told = moment.evidence
        ranked = sorted(self.members(moment), key=lambda s: (-told.here[s], -told.confidence[s], s))
        read = [*moment.anchors, *ranked[: self.nearest]]
        return Stream(tuple((s, self.row) for s in read), tuple((s, POINTER_DISTANCE) for s in read))

    def members(self, moment: ReadContext) -> list[int]:
        """The tracked slices in the bank, in the order of writing.

        Admission is gone through again each time. What had left would leave again, so forgetting it changes nothing.
        """
        bank: list[int] = []
        for slice_ in (s for s in moment.tracked if self.admits(s, moment)):
            bank.append(slice_)
            if len(bank) > self.capacity:
                bank.remove(most_redundant(bank, moment.evidence))
        return bank

    def admits(self, slice_: int, moment: ReadContext) -> bool:
        """Whether the object is there, as surely and as similar to an anchor as the thresholds ask."""
        told = moment.evidence
        there = told.object_score[slice_] > 0 and told.confidence[slice_] >= self.min_confidence
        certain = not self.object_score_gate or told.certainty(slice_) > MIN_CERTAINTY
        return there and certain and max((told.alike[slice_, a] for a in moment.anchors), default=-1.0) >= self.min_similarity


def most_redundant(bank: Sequence[int], told: MemoryScores) -> int:
    """The slice whose summed 1 - similarity to the others is least; ties: the less confident, then the higher index."""
    return min(bank, key=lambda s: (sum(1 - told.alike[s, other] for other in bank if other != s), told.confidence[s], -s))
