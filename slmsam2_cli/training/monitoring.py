"""Rows of numbers about a run, one per step or check, as a CSV file, and as one JSON object a line for scripts.

What a run tells TensorBoard, where that is installed (pip install 'slmsam2[tensorboard]'); log.csv has the same numbers without it.

progress.png: how a run goes, for people who would rather look than read; drawn from the rows of its log.

Masks over the slices of a volume that was left out, beside what a person drew.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import error_reason

LABEL_UNET_COLUMN = "label_unet"
COLUMNS = ("step", "seconds", "learning_rate", "pixels", "dice", "iou", "object_score", "total", LABEL_UNET_COLUMN)


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
        atomic.write_text(self.path, "\n".join([",".join(self.columns), *self.rows]) + "\n")
        objects = ({name: _number(value) for name, value in zip(self.columns, row, strict=False) if value} for row in self.values())
        atomic.write_text(self.path.with_suffix(".jsonl"), "".join(json.dumps(each) + "\n" for each in objects))


def _number(text: str) -> float | str | None:
    """As JSON has it: whole numbers whole, null for what is not finite, text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not np.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


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
    with _hide_thread_traceback():
        told = _Told(folder, from_step)
        try:
            yield told.record
        finally:
            told.close()


class _Told:
    def __init__(self, folder: Path, from_step: int) -> None:
        self.writer: Any = None
        with self._disable_on_error():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def record(self, row: Mapping[str, float]) -> None:
        with self._disable_on_error():
            for name, value in row.items():
                if self.writer is not None and name not in AXES:
                    self.writer.add_scalar(f"train/{name}", value, int(row["step"]))

    def close(self) -> None:
        with self._disable_on_error():
            if self.writer is not None:
                self.writer.close()

    @contextmanager
    def _disable_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - nothing about TensorBoard may make a run fail
            self.writer = None
            why = error_reason(error) if isinstance(error, OSError) else str(error).partition("\n")[0] or type(error).__name__
            console.warn(f"TensorBoard is told no more: {why}. log.csv has the same numbers")
            console.trace(error)


@contextmanager
def _hide_thread_traceback() -> Iterator[None]:
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


SMOOTHED = 25  # steps in a running mean
TERMS = ("pixels", "dice", "iou", "object_score", "label_unet")
_INCHES, _DPI = (9.0, 9.0), 100


def draw_progress(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Write the picture of a log, rows of text by column, empty where there is no value. OutputError."""
    atomic.write_bytes(path, picture({name: _numbers(rows, place) for place, name in enumerate(columns)}, title))


def picture(values: Mapping[str, NDArray[np.float64]], title: str) -> bytes:
    """A PNG of three panels over the steps: the loss, its terms, learning rate and seconds a step. The same values give the same bytes."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # of letters that the font has not
        matplotlib.rcdefaults()  # not what a user's own settings say
        return _drawn(values, title)


def _drawn(values: Mapping[str, NDArray[np.float64]], title: str) -> bytes:
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    loss, terms, pace = figure.subplots(3, 1, sharex=True)
    step = values["step"]
    loss.plot(step, values["total"], color="0.8", linewidth=0.8)
    loss.plot(step, smoothed(values["total"]), color="C0", label=f"loss, mean of {SMOOTHED} steps")
    for name in (name for name in TERMS if np.isfinite(values.get(name, np.empty(0))).any()):
        terms.plot(step, smoothed(values[name]), label=name)
    seconds = np.diff(values["seconds"], prepend=0.0)
    pace.plot(step, smoothed(seconds), color="C0", label="seconds a step")
    rate = pace.twinx()
    rate.plot(step, values["learning_rate"], color="C1", label="learning rate (right)")
    loss.set_title(title, parse_math=False)
    pace.set_xlabel("step")
    for axes in (loss, terms):
        _finished(axes, axes)
    _finished(pace, pace, rate)
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each value and those before it, SMOOTHED in all, as far as they are finite; NaN where none is."""
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[SMOOTHED:], counts[SMOOTHED:] = sums[SMOOTHED:] - sums[:-SMOOTHED], counts[SMOOTHED:] - counts[:-SMOOTHED]
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def _finished(axes: Axes, *labelled: Axes) -> None:
    """Grid, and one legend for all curves that share the panel."""
    axes.grid(visible=True, alpha=0.3)
    curves = [curve for each in labelled for curve in each.get_lines() if not str(curve.get_label()).startswith("_")]
    axes.legend(curves, [str(curve.get_label()) for curve in curves], loc="upper right", fontsize="small")


def _numbers(rows: Sequence[Sequence[str]], place: int) -> NDArray[np.float64]:
    return np.array([float(row[place]) if row[place] else np.nan for row in rows], dtype=np.float64)


SHOWN = 8  # slices
BEYOND = 2  # slices shown past either end
MARGIN = 8  # pixels around all masks
Array = np.ndarray[Any, Any]


def draw_overlays(path: Path, case: PreparedCase, found: Array, title: str) -> None:
    """Write a PNG of SHOWN slices; what a person drew is outlined solid, what was found, labels (T, H, W), dashed.

    OutputError, ArrayError.
    """
    check_not_truncated(case)
    assert case.labels is not None
    labels = np.asarray(case.labels)
    values = [int(value) for value in np.unique(found) if value]
    anywhere = np.isin(labels, values) | (found != 0)
    if not anywhere.any():
        return
    slices = np.flatnonzero(anywhere.any(axis=(1, 2)))
    first, last = max(0, slices[0] - BEYOND), min(len(labels) - 1, slices[-1] + BEYOND)
    rows, columns = (np.flatnonzero(anywhere.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = tuple(slice(max(0, int(found[0]) - MARGIN), int(found[-1]) + 1 + MARGIN) for found in (rows, columns))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(10, 5.4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title + "; solid: drawn by hand, dashed: found", fontsize=10, parse_math=False)
        for axes, t in zip(figure.subplots(2, SHOWN // 2).flat, np.linspace(first, last, SHOWN).round().astype(int), strict=True):
            axes.imshow(np.asarray(case.frames[0, t], np.float32)[box], cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"slice {t}", fontsize=8)
            axes.set_axis_off()
            for place, value in enumerate(values):
                for mask, style in ((labels[t] == value, "solid"), (found[t] == value, "dashed")):
                    if mask[box].any() and not mask[box].all():
                        axes.contour(mask[box], levels=[0.5], colors=f"C{place % 10}", linestyles=style, linewidths=1.2)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    atomic.write_bytes(path, file.getvalue())
