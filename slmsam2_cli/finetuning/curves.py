"""progress.png: how a run goes, for people who would rather look than read; drawn from the rows of its log."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from slmsam2_cli.data import store

SMOOTHED = 25  # steps in a running mean
TERMS = ("pixels", "dice", "iou", "presence", "recogniser")
_INCHES, _DPI = (9.0, 9.0), 100


def draw_progress(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Write the picture of a log, rows of text by column, empty where there is no value. OutputError."""
    store.write_bytes(path, picture({name: _numbers(rows, place) for place, name in enumerate(columns)}, title))


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
