"""Grey values in numbers: percentiles, mean, spread and a sample, all exact, without a copy of a large volume.

Whole numbers of a narrow range, which most scans hold, are counted value by value, and everything follows from the counts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from slmsam2_cli.planning.fingerprint import Statistics
from slmsam2_cli.planning.ranks import BINS, HELD, Array, Pieces, at_ranks

PIECE = 1 << 17  # values looked at together: few enough for the processor's cache
ROUNDS = 16  # how often, about, many values are gone through for a large sample of them
PERCENTILES = np.array([0.5, 50, 99.5])


class Greys:
    """Any number of finite grey values of one type."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = _at_hand(pieces)
        self.kind: np.dtype[Any] = np.dtype(np.float64)
        self.count, self.low, self.high, self.whole = 0, np.inf, -np.inf, True
        for piece in self.pieces():
            self.kind = piece.dtype
            self.count += piece.size
            self.low, self.high = min(self.low, piece.min()), max(self.high, piece.max())
            self.whole = self.whole and (piece.dtype.kind != "f" or bool((np.rint(piece) == piece).all()))

    @cached_property
    def counts(self) -> Array | None:
        """How often each whole number from the lowest to the highest occurs; None where there are fewer values than such numbers."""
        if not self.whole or int(self.high) - int(self.low) >= min(BINS, self.count):
            return None
        counts = np.zeros(int(self.high) - int(self.low) + 1, np.int64)
        for piece in self.pieces():
            above = piece - self.low
            if above.dtype.kind == "i":
                above = above.view(f"u{above.dtype.itemsize}")  # where the difference was too large for the type
            counts += np.bincount(above.astype(np.intp), minlength=counts.size)
        return counts

    @cached_property
    def ordered(self) -> Array:
        """All values, in the order of size."""
        values = np.concatenate(list(self.pieces()))
        values.sort()
        return values

    def at(self, ranks: Array) -> Array:
        """The values at the ranks (n,), ascending from 0, in the order of size; of the values' own type."""
        if self.counts is not None:
            return (np.searchsorted(np.cumsum(self.counts), ranks, side="right") + float(self.low)).astype(self.kind)
        return self.ordered[ranks] if self.count <= HELD else at_ranks(self.pieces, ranks, held=max(HELD, self.count // ROUNDS))

    def mean_and_std(self) -> tuple[float, float]:
        """Of at least one value; the standard deviation of the values themselves, not an estimate of a population's."""
        if self.counts is not None:
            steps = np.arange(self.counts.size)
            mean = float((self.counts * steps).sum()) / self.count
            return float(self.low) + mean, float(np.sqrt((self.counts * (steps - mean) ** 2).sum() / self.count))
        mean = sum(float(piece.sum(dtype=np.float64)) for piece in self.pieces()) / self.count
        squares = sum(float(np.square(np.subtract(piece, mean, dtype=np.float64)).sum()) for piece in self.pieces())
        return mean, float(np.sqrt(squares / self.count))


def statistics(greys: Greys) -> Statistics | None:
    """None when there are no values. Percentiles are interpolated linearly, as numpy does."""
    if not greys.count:
        return None
    places = PERCENTILES / 100 * (greys.count - 1)
    below = places.astype(int)
    ranks, where = np.unique([below, np.minimum(below + 1, greys.count - 1)], return_inverse=True)
    lower, upper = greys.at(ranks).astype(np.float64)[where.reshape(2, -1)]
    low, median, high = lower + (upper - lower) * (places - below)
    mean, std = greys.mean_and_std()
    found = {"mean": mean, "median": median, "std": std, "min": greys.low, "max": greys.high, "p00_5": low, "p99_5": high}
    return Statistics(voxels=greys.count, **{key: short(value) for key, value in found.items()})


def evenly(greys: Greys, count: int) -> Array:
    """At most `count` of the values, evenly spaced in order of size: a sample without chance, the same for every storage order."""
    if greys.count <= count:
        return greys.at(np.arange(greys.count)) if greys.count else np.empty(0)
    return greys.at(((np.arange(count) + 0.5) * greys.count / count).astype(int))


def short(value: float) -> float:
    """Seven significant digits and no negative zero: more would differ between machines and storage orders."""
    return float(f"{float(value):.7g}") + 0.0


def _at_hand(pieces: Pieces) -> Pieces:
    """The same pieces without empty ones, made only once if they hold few values."""
    kept: list[Array] = []
    count = 0
    for piece in filter(len, pieces()):
        kept.append(piece)
        count += piece.size
        if count > HELD:
            return lambda: filter(len, pieces())
    return lambda: kept
