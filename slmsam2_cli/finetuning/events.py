"""What a run tells TensorBoard, where that is installed (pip install 'slmsam2[tensorboard]'); log.csv has the same numbers without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmsam2_cli import console
from slmsam2_cli.data.files import cause

AXES = ("step", "seconds")
Record = Callable[[Mapping[str, float]], None]


@contextmanager
def events(folder: Path, from_step: int) -> Iterator[Record]:
    """A function that records the numbers of a step under `train/`, into files in the folder.

    What there is of later steps than `from_step`, of this run or an earlier one, no longer counts. Without TensorBoard nothing is written.
    Where it cannot be told, one warning says so and nothing more is recorded: a run does not end for it.
    """
    if find_spec("tensorboard") is None:
        yield lambda row: None
        return
    with _one_line_at_most():
        told = _Told(folder, from_step)
        try:
            yield told.record
        finally:
            told.close()


class _Told:
    def __init__(self, folder: Path, from_step: int) -> None:
        self.writer: Any = None
        with self._giving_up():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def record(self, row: Mapping[str, float]) -> None:
        with self._giving_up():
            for name, value in row.items():
                if self.writer is not None and name not in AXES:
                    self.writer.add_scalar(f"train/{name}", value, int(row["step"]))

    def close(self) -> None:
        with self._giving_up():
            if self.writer is not None:
                self.writer.close()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - nothing about TensorBoard may make a run fail
            self.writer = None
            why = cause(error) if isinstance(error, OSError) else str(error).partition("\n")[0] or type(error).__name__
            console.warn(f"TensorBoard is told no more: {why}. log.csv has the same numbers")
            console.trace(error)


@contextmanager
def _one_line_at_most() -> Iterator[None]:
    """TensorBoard writes in a thread of its own, whose error comes up again where it is told more: no traceback besides."""
    before = threading.excepthook

    def silent(said: threading.ExceptHookArgs) -> None:
        if not type(said.thread).__module__.startswith("tensorboard"):
            before(said)

    threading.excepthook = silent
    try:
        yield
    finally:
        threading.excepthook = before
