"""Grey values in numbers: percentiles, mean, spread and a sample, all exact, without a copy of a large volume.

Whole numbers of a narrow range, which most scans hold, are counted value by value, and everything follows from the counts.

Order statistics of any number of values, exact and in bounded memory.

Values come in pieces, as often as they are asked for. They are counted by their leading 16 bits; those that share the leading bits of
the value looked for are gathered and sorted, or, while they are too many, counted by their next 16 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np

from slmsam2_cli.planning.fingerprint import Statistics

Array = np.ndarray[Any, Any]
Pieces = Callable[[], Iterable[Array]]  # gives (n,) arrays of one type, the same values whenever it is called

HELD = 1 << 22  # values in memory at one time
BINS = 1 << 16
_NEGATIVE = 1 << 15  # from this leading digit on the sign bit is set


def at_ranks(pieces: Pieces, ranks: Array, held: int = HELD, leading: tuple[int, ...] = ()) -> Array:
    """The values at the ranks (n,), ascending from 0, in the order of size: (n,) of the values' own type.

    Values: 2, 4 or 8 bytes each, in native byte order, not NaN; more of them than the highest rank. held: the most to have in memory at
    one time; leading: look only at the values that begin with these 16-bit digits.
    """
    counts = np.zeros(BINS, np.int64)
    kind = np.dtype(np.uint8)
    for piece in pieces():
        kind = piece.dtype
        counts += np.bincount(_digit(_led_by(piece, leading), len(leading)), minlength=BINS)
    order = _ascending(kind, leading)
    ends = np.cumsum(counts[order])
    places = np.searchsorted(ends, ranks, side="right")
    if 2 * (len(leading) + 1) == kind.itemsize:
        return _assembled(kind, leading, order[places])
    looked_for, which = np.unique(places, return_inverse=True)
    sizes = counts[order[looked_for]]
    within = ranks - (ends[looked_for] - sizes)[which]  # rank among the values that share its digit
    before = np.concatenate([[0], np.cumsum(sizes)])
    found = np.empty(len(ranks), kind)
    start = 0
    while start < len(looked_for):  # as many digits at a time as `held` allows, one at least
        stop = max(start + 1, int(np.searchsorted(before, before[start] + held, side="right")) - 1)
        here = (which >= start) & (which < stop)
        digits = order[looked_for[start:stop]]
        if before[stop] - before[start] <= held:
            values = _gathered(pieces, leading, digits)
            values.sort()
            found[here] = values[within[here] + before[which[here]] - before[start]]
        else:
            found[here] = at_ranks(pieces, within[here], held, (*leading, int(digits[0])))
        start = stop
    return found


def _gathered(pieces: Pieces, leading: tuple[int, ...], digits: Array) -> Array:
    """The values with these leading digits, followed by one of `digits`. (`take` and `compress` are fast, indexing by arrays is not.)"""
    wanted = np.zeros(BINS, bool)
    wanted[digits] = True
    led = (_led_by(piece, leading) for piece in pieces())
    return np.concatenate([piece.compress(wanted.take(_digit(piece, len(leading)))) for piece in led])


def _led_by(piece: Array, leading: tuple[int, ...]) -> Array:
    for place, digit in enumerate(leading):
        piece = piece.compress(_digit(piece, place) == digit)
    return piece


def _digit(piece: Array, place: int) -> Array:
    """16 bits of every value, place 0 the most significant; a view."""
    digits = np.ascontiguousarray(piece).view(np.uint16).reshape(-1, piece.dtype.itemsize // 2)
    return digits[:, -1 - place if sys.byteorder == "little" else place]


def _ascending(kind: np.dtype[Any], leading: tuple[int, ...]) -> Array:
    """The digits that may follow the leading ones, in the order of the values' size. Floats have a sign and a magnitude."""
    digits = np.arange(BINS)
    if leading:
        return digits[::-1] if kind.kind == "f" and leading[0] >= _NEGATIVE else digits
    if kind.kind == "u":
        return digits
    below_zero = digits[_NEGATIVE:]
    return np.concatenate([below_zero[::-1] if kind.kind == "f" else below_zero, digits[:_NEGATIVE]])


def _assembled(kind: np.dtype[Any], leading: tuple[int, ...], last: Array) -> Array:
    """The values of all their digits."""
    digits = np.empty((len(last), len(leading) + 1), np.uint16)
    digits[:, :-1], digits[:, -1] = leading, last
    return np.ascontiguousarray(digits[:, ::-1] if sys.byteorder == "little" else digits).view(kind)[:, 0]


CHUNK_VALUES = 1 << 17  # values looked at together: few enough for the processor's cache
ROUNDS = 16  # how often, about, many values are gone through for a large sample of them
PERCENTILES = np.array([0.5, 50, 99.5])


class Greys:
    """Any number of finite grey values of one type."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = _cache_if_small(pieces)
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


def sample_evenly(greys: Greys, count: int) -> Array:
    """At most `count` of the values, evenly spaced in order of size: a sample without chance, the same for every storage order."""
    if greys.count <= count:
        return greys.at(np.arange(greys.count)) if greys.count else np.empty(0)
    return greys.at(((np.arange(count) + 0.5) * greys.count / count).astype(int))


def short(value: float) -> float:
    """Seven significant digits and no negative zero: more would differ between machines and storage orders."""
    return float(f"{float(value):.7g}") + 0.0


def _cache_if_small(pieces: Pieces) -> Pieces:
    """The same pieces without empty ones, made only once if they hold few values."""
    kept: list[Array] = []
    count = 0
    for piece in filter(len, pieces()):
        kept.append(piece)
        count += piece.size
        if count > HELD:
            return lambda: filter(len, pieces())
    return lambda: kept
