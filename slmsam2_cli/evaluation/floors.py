"""Limits that a result must reach, for use in continuous integration: `Dice=0.8`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmsam2_cli.errors import UsageError
from slmsam2_cli.evaluation.surface import nsd_key

KNOWN = {"dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall", "nsd": "nsd"}


@dataclass(frozen=True)
class Floor:
    """The least that the foreground mean of a measure may be. metric: as in summary.json; "nsd" at whatever tolerance was used."""

    metric: str
    least: float


def floors_of(asked: Iterable[str]) -> list[Floor]:
    """Limits from "Dice=0.8" (upper or lower case), or "0.8" for Dice. UsageError."""
    return [_floor(text) for text in asked]


def shortfalls(summary: Mapping[str, Any], floors: Sequence[Floor]) -> list[str]:
    """One line for each limit that the foreground mean of unseen cases does not reach; an undefined mean reaches none."""
    lines = []
    for floor in floors:
        key = nsd_key(summary["definitions"]["nsd_tolerance_mm"]) if floor.metric == "nsd" else floor.metric
        value = summary["foreground_mean"][key]
        if value is None or value < floor.least:
            lines.append(f"{key} {'is undefined' if value is None else f'{value:.4f}'}, the limit is {floor.least:g}")
    return lines


def _floor(text: str) -> Floor:
    metric, _, number = text.rpartition("=")
    try:
        least = float(number)
    except ValueError:
        least = -1.0
    name = KNOWN.get(metric.strip().lower() or "dice")
    if name is None or not 0 <= least <= 1:
        raise UsageError(f"{text!r} is no limit. Write Dice=0.8; known are {', '.join(KNOWN.values())}, from 0 to 1")
    return Floor(name, least)
