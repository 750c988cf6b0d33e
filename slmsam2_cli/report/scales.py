"""Where a value lies on an axis, in per cent of its length; round ticks; numbers short enough to write ten thousand times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


def tidy(value: float, digits: int = 2) -> str:
    """A coordinate without needless characters: 12.50 -> "12.5", 3.00 -> "3", -0.0 -> "0"."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Scale:
    """A linear axis from low to high, low < high."""

    low: float
    high: float

    def percent(self, value: float) -> str:
        """Where a value lies, "0" to "100"; what lies outside sticks to the end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return tidy(100 * share)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """About `count` round values from low to high."""
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(round(i * step, 10) for i in range(first, last + 1))


def share_scale(values: Iterable[float]) -> Scale:
    """For values from 0 to 1: down to a round number below the least, so that good results still differ visibly."""
    least = min(values, default=0.0)
    return Scale(max(0.0, min(0.9, math.floor(least * 10 + 1e-9) / 10)), 1.0)


def length_scale(values: Iterable[float]) -> Scale:
    """For values from 0 up: to a round number at or above the greatest."""
    greatest = max((abs(value) for value in values), default=0.0) or 1.0
    step = _round_step(greatest / 4)
    return Scale(0.0, math.ceil(greatest / step - 1e-9) * step)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
