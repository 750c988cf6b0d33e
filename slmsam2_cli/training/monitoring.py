"""Monitoring of a run: a log as CSV and JSON Lines, TensorBoard, a plot of its losses, and masks of held-out cases over their slices.

TensorBoard is optional (pip install '.[tensorboard]'); log.csv has the same numbers without it.
"""

from __future__ import annotations

import csv
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreparedCase, check_not_truncated
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import error_reason

LABEL_UNET_COLUMN = "label_unet"
COLUMNS = ("step", "seconds", "learning_rate", "pixels", "dice", "iou", "object_score", "total", LABEL_UNET_COLUMN)
Array = np.ndarray[Any, Any]


class Log:
    """Rows of numbers whose first column is the step; a resumed run keeps the rows up to the step `from_step`.

    rows: the cells as text, empty where there is no value.
    """

    def __init__(self, path: Path, from_step: int, columns: Sequence[str] = COLUMNS) -> None:
        self.path, self.columns = path, tuple(columns)
        text = path.read_text(encoding="utf-8") if from_step and path.exists() else ""
        saved = list(csv.reader(text.splitlines()[1:]))
        self.rows = [row for row in saved if row and row[0].isdecimal() and int(row[0]) <= from_step]
        self.losses: list[float] = []

    def add(self, values: Mapping[str, float]) -> None:
        """Add a row; a column without a value stays empty, a value without a column is dropped."""
        self.rows.append([f"{values[c]:.6g}" if c in values else "" for c in self.columns])
        self.losses = [*self.losses[-49:], values.get("total", float("nan"))]

    def recent_loss(self) -> float:
        """Average the finite losses of the last 50 steps; NaN when there is none."""
        return float(np.nanmean(self.losses)) if np.isfinite(self.losses).any() else float("nan")

    def write(self) -> None:
        """Write all rows to NAME.csv and NAME.jsonl, one JSON object per row.

        Raises: OutputError when a file cannot be written.
        """
        table = StringIO()
        csv.writer(table, lineterminator="\n").writerows([self.columns, *self.rows])
        atomic.write_text(self.path, table.getvalue())
        objects = ({name: _to_json(text) for name, text in zip(self.columns, row, strict=False) if text} for row in self.rows)
        atomic.write_text(self.path.with_suffix(".jsonl"), "".join(json.dumps(each) + "\n" for each in objects))


def _to_json(text: str) -> float | str | None:
    """Convert a cell: integers to int, other numbers to float, not finite ones to None; other text stays."""
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
def tensorboard_log(folder: Path, from_step: int) -> Iterator[Record]:
    """Yield a function that records the numbers of a step under `train/` in TensorBoard files in a folder.

    Records of steps after `from_step`, of this run or an earlier one, become invalid. Without TensorBoard nothing is written. After an
    error, one warning is printed and nothing more is recorded; the run continues.
    """
    if find_spec("tensorboard") is None:
        yield lambda row: None
        return
    previous_hook = threading.excepthook

    def hide_writer_errors(error: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's own thread: its error is raised again, and reported, by the next record."""
        if not type(error.thread).__module__.startswith("tensorboard"):
            previous_hook(error)

    threading.excepthook = hide_writer_errors
    log = _TensorBoardLog()
    try:
        with log.disable_on_error():
            from torch.utils.tensorboard import SummaryWriter

            log.writer = SummaryWriter(str(folder), purge_step=from_step + 1)
        yield log.record
    finally:
        with log.disable_on_error():
            if log.writer is not None:
                log.writer.close()
        threading.excepthook = previous_hook


class _TensorBoardLog:
    """A TensorBoard writer, None once there was an error."""

    writer: Any = None

    def record(self, row: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        with self.disable_on_error():
            for name, value in row.items():
                if self.writer is not None and name not in AXES:
                    self.writer.add_scalar(f"train/{name}", value, int(row["step"]))

    @contextmanager
    def disable_on_error(self) -> Iterator[None]:
        """Turn an error into a warning, after which nothing is recorded."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - nothing about TensorBoard may make a run fail
            self.writer = None
            reason = error_reason(error) if isinstance(error, OSError) else str(error).partition("\n")[0] or type(error).__name__
            console.warn(f"TensorBoard logging disabled: {reason}. Metrics are still written to log.csv")
            console.trace(error)


WINDOW = 25  # steps in a running mean
TERMS = ("pixels", "dice", "iou", "object_score", LABEL_UNET_COLUMN)
_INCHES, _DPI = (9.0, 9.0), 100


def draw_progress(path: Path, log: Log, title: str) -> None:
    """Plot a log as a PNG of three panels over the steps: the loss, its terms, learning rate and seconds per step.

    The same values give the same bytes.

    Raises: OutputError when the file cannot be written.
    """
    columns = zip(log.columns, zip(*log.rows, strict=False), strict=False)
    values = {name: np.array([float(text) if text else np.nan for text in cells]) for name, cells in columns}
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # of letters that the font has not
        matplotlib.rcdefaults()  # not the user's own settings
        figure = _plot(values, title)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    atomic.write_bytes(path, file.getvalue())


def _plot(values: Mapping[str, NDArray[np.float64]], title: str) -> Figure:
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    loss, terms, speed = figure.subplots(3, 1, sharex=True)
    step = values["step"]
    loss.plot(step, values["total"], color="0.8", linewidth=0.8)
    loss.plot(step, running_mean(values["total"]), color="C0", label=f"loss, mean of {WINDOW} steps")
    for name in (name for name in TERMS if np.isfinite(values.get(name, np.empty(0))).any()):
        terms.plot(step, running_mean(values[name]), label=name)
    seconds = np.diff(values["seconds"], prepend=0.0)
    speed.plot(step, running_mean(seconds), color="C0", label="seconds per step")
    rate = speed.twinx()
    rate.plot(step, values["learning_rate"], color="C1", label="learning rate (right)")
    loss.set_title(title, parse_math=False)
    speed.set_xlabel("step")
    for axes, curves in ((loss, loss.lines), (terms, terms.lines), (speed, [*speed.lines, *rate.lines])):
        axes.grid(visible=True, alpha=0.3)
        labelled = [curve for curve in curves if not str(curve.get_label()).startswith("_")]
        axes.legend(labelled, [str(curve.get_label()) for curve in labelled], loc="upper right", fontsize="small")
    return figure


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average each value with those before it, WINDOW in all, as far as they are finite; NaN where none is."""
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    sums[WINDOW:], counts[WINDOW:] = sums[WINDOW:] - sums[:-WINDOW], counts[WINDOW:] - counts[:-WINDOW]
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


SLICES = 8  # in an overlay
BEYOND = 2  # slices shown past either end
MARGIN = 8  # pixels around all masks


def draw_overlays(path: Path, case: PreparedCase, prediction: Array, title: str) -> None:
    """Draw the outlines of masks over SLICES slices of a case as a PNG: solid the ground truth, dashed the prediction (T, H, W).

    Only labels that the prediction holds are drawn.

    Raises: ArrayError when a file of the case was cut short; OutputError when the picture cannot be written.
    """
    check_not_truncated(case)
    assert case.labels is not None
    labels = np.asarray(case.labels)
    values = [int(value) for value in np.unique(prediction) if value]
    box = bounding_box(np.isin(labels, values) | (prediction != 0))
    if box is None:
        return
    (start, stop), *plane = box
    slices = np.linspace(max(0, start - BEYOND), min(len(labels) - 1, stop - 1 + BEYOND), SLICES).round().astype(int)
    part = tuple(slice(max(0, low - MARGIN), high + MARGIN) for low, high in plane)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(10, 5.4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title + "; solid: ground truth, dashed: prediction", fontsize=10, parse_math=False)
        for axes, t in zip(figure.subplots(2, SLICES // 2).flat, slices, strict=True):
            axes.imshow(np.asarray(case.frames[0, t], np.float32)[part], cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"slice {t}", fontsize=8)
            axes.set_axis_off()
            for place, value in enumerate(values):
                for mask, style in ((labels[t] == value, "solid"), (prediction[t] == value, "dashed")):
                    if mask[part].any() and not mask[part].all():
                        axes.contour(mask[part], levels=[0.5], colors=f"C{place % 10}", linestyles=style, linewidths=1.2)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    atomic.write_bytes(path, file.getvalue())
