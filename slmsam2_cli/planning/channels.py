"""How many channels the network is shown: up to three as colours, more through a learned projection to three."""

from __future__ import annotations

from itertools import pairwise

COLOURS = 3  # red, green, blue
MOST_CHANNELS = 16


def groups(channels: int) -> tuple[range, ...]:
    """Which of more than three channels each colour starts as the mean of: neighbours, the larger groups first (4: 2, 1, 1)."""
    least, larger = divmod(channels, COLOURS)
    starts = [colour * least + min(colour, larger) for colour in range(COLOURS + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))
