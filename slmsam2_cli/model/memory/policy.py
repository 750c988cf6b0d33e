"""What a memory policy answers: which earlier slices a slice looks at, in which temporal row, and which pointers.

Index arithmetic only: no tensors, no parameters, so every rule is tested without weights.
Kirillov-style SAM 2 memory: Ravi et al., "SAM 2" (arXiv:2408.00714); views as in Chen et al., arXiv:2505.01854.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Stream:
    """One view of the store of per-slice outputs.

    spatial: (slice, temporal row) of every spatial memory, in reading order.
    pointers: (slice, distance in slices) of every object pointer; the distance of an anchor is signed.
    """

    spatial: tuple[tuple[int, int], ...]
    pointers: tuple[tuple[int, int], ...]

    def tokens(self, spatial_tokens: int, tokens_per_pointer: int) -> int:
        """Number of memory tokens that attention sees, with `spatial_tokens` per slice."""
        return len(self.spatial) * spatial_tokens + len(self.pointers) * tokens_per_pointer


@dataclass(frozen=True)
class Moment:
    """Where a pass stands: the slice to be segmented and what has been stored so far.

    slice: index along the slice axis; step: +1 forward, -1 backward; anchors: slices a person annotated;
    tracked: slices this pass has segmented; slices: number of slices of the volume.
    """

    slice: int
    step: int
    anchors: Collection[int]
    tracked: Collection[int]
    slices: int


class MemoryPolicy(Protocol):
    """The question asked at every slice."""

    @property
    def name(self) -> str:
        """What a plan calls it."""
        ...

    def read(self, moment: Moment) -> tuple[Stream, ...]:
        """The streams to attend to, the long one first."""
        ...


def recent(moment: Moment, reach: int) -> list[tuple[int, int]]:
    """(slice, distance) of the `reach` slices behind this one, the farthest first."""
    return [(moment.slice - moment.step * distance, distance) for distance in range(reach, 0, -1)]
