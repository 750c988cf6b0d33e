"""Order statistics of any number of values, exact and in bounded memory.

Values come in pieces, as often as they are asked for. They are counted by their leading 16 bits; those that share the leading bits of
the value looked for are gathered and sorted, or, while they are too many, counted by their next 16 bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

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
