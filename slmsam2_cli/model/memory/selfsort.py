"""MedSAM-2's self-sorting bank, made deterministic: a slice reads the stored slices that are most similar to it, not the last ones.

A tracked slice enters the bank if it contains the object, with enough confidence, and is similar enough to a conditioning slice. When
the bank is full, its most redundant slice leaves. A slice reads every conditioning slice and the most similar slices of the bank (Zhu
et al., "Medical SAM 2", arXiv:2408.00874). Unlike there, conditioning slices never leave and nothing is drawn at random.

The order of slices plays no role, and the temporal table has no row for that. The row that SAM 2 gives to conditioning slices comes
closest, as it was trained to mean "prompted, at any distance", so everything is read in that row. Pointers, which are encoded by
distance, all get that of an adjacent slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slmsam2_cli.model.memory.interface import MIN_CERTAINTY, MemoryRead, MemoryScores, ReadContext
from slmsam2_cli.planning.plan import NetworkPlan

POINTER_DISTANCE = 1  # pointer distance of every slice that is read, in slices


@dataclass(frozen=True)
class SelfSort:
    """capacity: the most tracked slices in the bank. nearest: how many of them are read. Both thresholds are inclusive.

    temporal_row: row of the temporal table for everything that is read. object_score_gate: a slice enters only if its certainty passes
    the gate. shared_memory: one bank for the passes in both directions.
    """

    name: ClassVar[str] = "selfsort"
    has_short_stream: ClassVar[bool] = False
    has_bank: ClassVar[bool] = True

    capacity: int = 16
    nearest: int = 6
    min_confidence: float = 0.5
    min_similarity: float = 0.5
    temporal_row: int = 6
    object_score_gate: bool = False
    shared_memory: bool = False
    needs_scores: bool = True

    @classmethod
    def from_plan(cls, network: NetworkPlan, memories: int, pointers: int) -> SelfSort:
        """Build the bank with a plan's settings, whichever policy the plan names. pointers: not used."""
        bank = (network.bank_slices, network.bank_read, network.bank_confidence, network.bank_similarity)
        return cls(*bank, memories - 1, network.object_score_gate, network.shared_memory)

    def read(self, context: ReadContext) -> tuple[MemoryRead, ...]:
        """Choose one read: conditioning slices and the most similar slices of the bank.

        Of equally similar slices the one of higher confidence is read first, then the one of the lower index.
        """
        similarity, confidence = context.scores.query_similarity, context.scores.confidence
        ranked = sorted(self.members(context), key=lambda s: (-similarity[s], -confidence[s], s))
        read = [*context.conditioning, *ranked[: self.nearest]]
        return (MemoryRead(tuple((s, self.temporal_row) for s in read), tuple((s, POINTER_DISTANCE) for s in read)),)

    def keep(self, context: ReadContext) -> list[int]:
        """List the bank, and the slice just stored, whose mask the decoder may need for the next slice."""
        return [*{*self.members(context), *(s for s in context.tracked if s == context.slice)}]

    def members(self, context: ReadContext) -> list[int]:
        """List the tracked slices in the bank, in the order of writing.

        Admission is repeated at every call. A slice that left the bank would leave again, so deleting it does not change the bank.
        """
        bank: list[int] = []
        for slice_ in (s for s in context.tracked if self.admits(s, context)):
            bank.append(slice_)
            if len(bank) > self.capacity:
                bank.remove(most_redundant(bank, context.scores))
        return bank

    def admits(self, slice_: int, context: ReadContext) -> bool:
        """Check object score, confidence, gate and similarity to the nearest conditioning slice against the thresholds."""
        scores = context.scores
        present = scores.object_score[slice_] > 0 and scores.confidence[slice_] >= self.min_confidence
        certain = not self.object_score_gate or scores.certainty(slice_) > MIN_CERTAINTY
        nearest = max((scores.pairwise_similarity[slice_, other] for other in context.conditioning), default=-1.0)
        return present and certain and nearest >= self.min_similarity


def most_redundant(bank: Sequence[int], scores: MemoryScores) -> int:
    """Find the slice with the least summed 1 - similarity to the others; ties: the lower confidence, then the higher index."""
    distance = {one: sum(1 - scores.pairwise_similarity[one, other] for other in bank if other != one) for one in bank}
    return min(bank, key=lambda s: (distance[s], scores.confidence[s], -s))
