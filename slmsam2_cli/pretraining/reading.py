"""How a training step reads memory: by one of the policies, with parts of it missing.

The self-sorting bank chooses for each object by what it has learned, which makes a batch slow. What its reading asks of the
weights are its codes (every slice in the row of anchors, every pointer a neighbour's) and slices in any order from
anywhere; so in training it is a random choice of the bank, the same for all objects of a step.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from slmsam2_cli.model.memory.choice import policy_of
from slmsam2_cli.model.memory.policy import MemoryPolicy, Moment, Stream
from slmsam2_cli.model.memory.selfsort import NEIGHBOUR
from slmsam2_cli.model.memory.shortlong import near
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceFeatures, SliceOutput, SlmSam2
from slmsam2_cli.pretraining.prompting import without_memory
from slmsam2_cli.pretraining.recipe import Recipe


@dataclass(frozen=True)
class Anywhere:
    """A self-sorting bank that holds what it is told. row: of the temporal table; nearest: slices read; short: for a short stack."""

    row: int
    nearest: int
    short: bool
    name: str = "anywhere"
    weighs: bool = False
    two_sided: bool = False

    def read(self, moment: Moment) -> tuple[Stream, ...]:
        """Anchors, and the last of what was tracked in the order told."""
        read = [*moment.anchors, *list(moment.tracked)[-self.nearest :]]
        long = Stream(tuple((s, self.row) for s in read), tuple((s, NEIGHBOUR) for s in read))
        return (long, near(moment, 1)) if self.short else (long,)

    def keep(self, moment: Moment) -> Collection[int]:
        """Everything."""
        return moment.tracked


class Reader:
    """Tracks one clip after another slice by slice, reading by a policy drawn once."""

    def __init__(self, model: SlmSam2, recipe: Recipe, slices: int, chance: random.Random) -> None:
        self.model, self.reading, self.slices, self.chance = model, recipe.reading, slices, chance
        names, weights = list(recipe.reading.policies), list(recipe.reading.policies.values())
        (self.name,) = chance.choices(names, weights)
        self.policy = self._policy(recipe)

    def _policy(self, recipe: Recipe) -> MemoryPolicy:
        if self.name in ("fifo", "shortlong"):
            named = recipe.network.model_copy(update={"policy": self.name})
            return policy_of(named, self.model.num_maskmem, self.model.max_obj_ptrs_in_encoder)
        return Anywhere(self.model.num_maskmem - 1, recipe.network.bank_read, self.name.startswith("shortlong"))

    def track(self, here: SliceFeatures, bank: MemoryBank, t: int) -> SliceOutput:
        """Segment all objects on slice `t` from what of the memory can be read."""
        only_carried = self.chance.random() < self.reading.drop_all
        carries = only_carried or self.chance.random() >= self.reading.drop_carried
        passed = bank[t - 1] if carries and self.model.carry_gain is not None else None
        if only_carried and passed is not None:
            return self.model.decode(without_memory(self.model, here), here.fine, passed.chosen)
        moment = Moment(t, 1, bank.anchors, self._readable(list(bank.tracked), t), self.slices)
        return self.model.decode_after(self.model.condition(here, bank, moment, self.policy), here, bank, passed)

    def _readable(self, tracked: Sequence[int], t: int) -> list[int]:
        """The tracked slices without those that are missing; a short stack always has the one just passed."""
        needed = self.name.startswith("shortlong")
        kept = [s for s in tracked if (needed and s == t - 1) or self.chance.random() >= self.reading.drop_tracked]
        return self.chance.sample(kept, len(kept)) if isinstance(self.policy, Anywhere) else kept
