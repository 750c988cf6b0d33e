"""Measure intensities: percentiles, mean, standard deviation and an evenly spaced sample.

Values come in chunks that can be read repeatedly, so that a large volume is never copied. numpy computes the percentiles of up to
MAX_HELD_VALUES values. More are ranked by radix selection (`values_at_ranks`), since numpy would need a copy of the whole volume: 207 MB
more for 200 x 512 x 512 voxels, in every process that measures a case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from slmsam2_cli.planning.fingerprint import Statistics

Array = np.ndarray[Any, Any]
Chunks = Callable[[], Iterable[Array]]  # returns (n,) arrays of one type, the same values at every call

MAX_HELD_VALUES = 1 << 22  # in memory at one time
CHUNK_VALUES = 1 << 17  # small enough for the processor's cache
SCANS = 16  # approximate number of passes over the values for a large sample
PERCENTILES = np.array([0.5, 50, 99.5])
WORDS = 1 << 16
_NEGATIVE = 1 << 15  # leading words from here on have the sign bit set


class IntensityValues:
    """Finite values of one type: number, minimum, maximum. Up to MAX_HELD_VALUES are held in memory, more are read again when needed."""

    def __init__(self, chunks: Chunks) -> None:
        held: list[Array] = []
        self.count, self.low, self.high = 0, np.inf, -np.inf
        for chunk in filter(len, chunks()):
            self.count += chunk.size
            self.low, self.high = min(self.low, chunk.min()), max(self.high, chunk.max())
            if self.count <= MAX_HELD_VALUES:
                held.append(chunk)
            else:
                held.clear()
        self.fit_in_memory = self.count <= MAX_HELD_VALUES
        self.chunks: Chunks = (lambda: held) if self.fit_in_memory else (lambda: filter(len, chunks()))

    def at_ranks(self, ranks: Array) -> Array:
        """Return the values at ranks (n,), counted from 0 in ascending order; 8-bit values may be returned as 16-bit."""
        if self.fit_in_memory:
            return np.asarray(np.sort(np.concatenate(list(self.chunks())))[ranks])

        def chunks() -> Iterable[Array]:
            return (chunk.astype(np.int16) if chunk.itemsize == 1 else chunk for chunk in self.chunks())

        return values_at_ranks(chunks, ranks, max(MAX_HELD_VALUES, self.count // SCANS))


def statistics(intensities: IntensityValues) -> Statistics | None:
    """Compute the statistics of the fingerprint; None without values. Percentiles are interpolated linearly, as in numpy."""
    count, chunks = intensities.count, intensities.chunks
    if not count:
        return None
    if intensities.fit_in_memory:
        low, median, high = np.percentile(np.concatenate(list(chunks())).astype(np.float64), PERCENTILES, overwrite_input=True)
    else:
        places = PERCENTILES / 100 * (count - 1)
        below = places.astype(int)
        ranks, where = np.unique([below, np.minimum(below + 1, count - 1)], return_inverse=True)
        lower, upper = intensities.at_ranks(ranks).astype(np.float64)[where.reshape(2, -1)]
        low, median, high = lower + (upper - lower) * (places - below)
    mean = sum(float(chunk.sum(dtype=np.float64)) for chunk in chunks()) / count
    squares = sum(float(np.square(np.subtract(chunk, mean, dtype=np.float64)).sum()) for chunk in chunks())
    found = {"mean": mean, "median": median, "std": np.sqrt(squares / count), "p00_5": low, "p99_5": high}
    found |= {"min": intensities.low, "max": intensities.high}
    return Statistics(voxels=count, **{key: round_significant(value) for key, value in found.items()})


def sample_evenly(intensities: IntensityValues, count: int) -> Array:
    """Draw at most `count` values, evenly spaced in ascending order: without randomness, and independent of the storage order."""
    if not intensities.count:
        return np.empty(0)
    size = min(count, intensities.count)
    return intensities.at_ranks(((np.arange(size) + 0.5) * intensities.count / size).astype(int))


def round_significant(value: float) -> float:
    """Round to seven significant digits, without negative zero; further digits depend on machine and storage order."""
    return float(f"{float(value):.7g}") + 0.0


def values_at_ranks(chunks: Chunks, ranks: Array, max_held: int = MAX_HELD_VALUES, prefix: tuple[int, ...] = ()) -> Array:
    """Find the values at ranks (n,), counted from 0 in ascending order, in bounded memory. Returns (n,) of the values' own type.

    Radix selection: values are counted by their leading 16-bit word. Those that share this word with a wanted value are gathered and
    sorted; while they are more than max_held, they are counted by their next word. Values have 2, 4 or 8 bytes in native byte order,
    are not NaN, and outnumber the highest rank. prefix: consider only the values that begin with these words.
    """
    counts = np.zeros(WORDS, np.int64)
    dtype = np.dtype(np.uint16)
    for chunk in chunks():
        dtype = chunk.dtype
        counts += np.bincount(_word(_with_prefix(chunk, prefix), len(prefix)), minlength=WORDS)
    order = _ascending_words(dtype, prefix)
    ends = np.cumsum(counts[order])
    places = np.searchsorted(ends, ranks, side="right")
    if 2 * (len(prefix) + 1) == dtype.itemsize:  # this is the last word, so the values are known
        words = np.empty((len(places), len(prefix) + 1), np.uint16)
        words[:, :-1], words[:, -1] = prefix, order[places]
        return np.ascontiguousarray(words[:, ::-1] if sys.byteorder == "little" else words).view(dtype)[:, 0]
    wanted, which = np.unique(places, return_inverse=True)
    sizes = counts[order[wanted]]
    within = ranks - (ends[wanted] - sizes)[which]  # rank among the values with the same word
    before = np.concatenate([[0], np.cumsum(sizes)])
    found = np.empty(len(ranks), dtype)
    start = 0
    while start < len(wanted):  # as many words at a time as max_held allows, at least one
        stop = max(start + 1, int(np.searchsorted(before, before[start] + max_held, side="right")) - 1)
        here = (which >= start) & (which < stop)
        if before[stop] - before[start] <= max_held:
            values = _gather(chunks, prefix, order[wanted[start:stop]])
            found[here] = values[within[here] + before[which[here]] - before[start]]
        else:
            found[here] = values_at_ranks(chunks, within[here], max_held, (*prefix, int(order[wanted[start]])))
        start = stop
    return found


def _gather(chunks: Chunks, prefix: tuple[int, ...], words: Array) -> Array:
    """Sort the values that begin with the prefix and one of `words`. (`take` and `compress` are faster than indexing by arrays.)"""
    wanted = np.zeros(WORDS, bool)
    wanted[words] = True
    candidates = (_with_prefix(chunk, prefix) for chunk in chunks())
    return np.sort(np.concatenate([chunk.compress(wanted.take(_word(chunk, len(prefix)))) for chunk in candidates]))


def _with_prefix(chunk: Array, prefix: tuple[int, ...]) -> Array:
    """Select the values that begin with these words."""
    for place, word in enumerate(prefix):
        chunk = chunk.compress(_word(chunk, place) == word)
    return chunk


def _word(chunk: Array, place: int) -> Array:
    """Return 16 bits of every value, place 0 being the most significant; a view."""
    words = np.ascontiguousarray(chunk).view(np.uint16).reshape(-1, chunk.dtype.itemsize // 2)
    return words[:, -1 - place if sys.byteorder == "little" else place]


def _ascending_words(dtype: np.dtype[Any], prefix: tuple[int, ...]) -> Array:
    """List the words that may follow the prefix in ascending order of the values. Floats consist of sign and magnitude."""
    words = np.arange(WORDS)
    if prefix:
        return words[::-1] if dtype.kind == "f" and prefix[0] >= _NEGATIVE else words
    if dtype.kind == "u":
        return words
    negative = words[_NEGATIVE:]
    return np.concatenate([negative[::-1] if dtype.kind == "f" else negative, words[:_NEGATIVE]])
