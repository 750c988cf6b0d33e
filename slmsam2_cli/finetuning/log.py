"""log.csv: one row per step of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slmsam2_cli.data import store
from slmsam2_cli.finetuning.loop import Learner, Progress

COLUMNS = ("step", "seconds", "learning_rate", "focal", "dice", "iou", "presence", "total")


class Log:
    """One row per step, written whenever the state is saved; a resumed run keeps the rows up to where it stood."""

    def __init__(self, path: Path, from_step: int) -> None:
        self.path = path
        before = path.read_text(encoding="utf-8").splitlines()[1:] if from_step and path.exists() else []
        self.rows = [row for row in before if row.partition(",")[0].isdecimal() and int(row.partition(",")[0]) <= from_step]
        self.losses: list[float] = []

    def add(self, learner: Learner, progress: Progress) -> None:
        """One more row."""
        values = {"step": progress.step, "seconds": round(learner.seconds, 2), "learning_rate": progress.learning_rate} | progress.losses
        self.rows.append(",".join(f"{values[c]:.6g}" if c in values else "" for c in COLUMNS))
        self.losses = [*self.losses[-49:], progress.losses.get("total", float("nan"))]

    def recent(self) -> float:
        """The mean loss of the last steps; NaN when none was finite."""
        return float(np.nanmean(self.losses)) if np.isfinite(self.losses).any() else float("nan")

    def write(self) -> None:
        """Write all rows. OutputError."""
        store.write_text(self.path, "\n".join([",".join(COLUMNS), *self.rows]) + "\n")
