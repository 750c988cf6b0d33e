"""Rows of numbers about a run, one per step or check, as a CSV file, and as one JSON object a line for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slmsam2_cli.data import store

RECOGNISED = "recogniser"
COLUMNS = ("step", "seconds", "learning_rate", "pixels", "dice", "iou", "presence", "total", RECOGNISED)


class Log:
    """Rows whose first column is the step; a resumed run keeps the rows up to where it stood."""

    def __init__(self, path: Path, from_step: int, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.columns = path, tuple(columns)
        before = path.read_text(encoding="utf-8").splitlines()[1:] if from_step and path.exists() else []
        self.rows = [row for row in before if row.partition(",")[0].isdecimal() and int(row.partition(",")[0]) <= from_step]
        self.losses: list[float] = []

    def add(self, values: Mapping[str, float]) -> None:
        """One more row; a column without a value stays empty, a value without a column is left out."""
        self.rows.append(",".join(f"{values[c]:.6g}" if c in values else "" for c in self.columns))
        self.losses = [*self.losses[-49:], values.get("total", float("nan"))]

    def recent(self) -> float:
        """The mean loss of the last steps; NaN when none was finite."""
        return float(np.nanmean(self.losses)) if np.isfinite(self.losses).any() else float("nan")

    def values(self) -> list[list[str]]:
        """Every row, as text by column; empty where there is no value."""
        return [row.split(",") for row in self.rows]

    def write(self) -> None:
        """Write all rows, NAME.csv and NAME.jsonl. OutputError."""
        store.write_text(self.path, "\n".join([",".join(self.columns), *self.rows]) + "\n")
        objects = ({name: _number(value) for name, value in zip(self.columns, row, strict=False) if value} for row in self.values())
        store.write_text(self.path.with_suffix(".jsonl"), "".join(json.dumps(each) + "\n" for each in objects))


def _number(text: str) -> float | str | None:
    """As JSON has it: whole numbers whole, null for what is not finite, text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not np.isfinite(value):
        return None
    return int(value) if value.is_integer() else value
