"""Masks over the slices of a volume that was left out, beside what a person drew."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slmsam2_cli.data import store
from slmsam2_cli.data.prepared import PreparedCase, check_whole

SHOWN = 8  # slices
BEYOND = 2  # slices shown past either end
MARGIN = 8  # pixels around all masks
Array = np.ndarray[Any, Any]


def draw_overlays(path: Path, case: PreparedCase, found: Array, title: str) -> None:
    """Write a PNG of SHOWN slices; what a person drew is outlined solid, what was found, labels (T, H, W), dashed.

    OutputError, ArrayError.
    """
    check_whole(case)
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
    store.write_bytes(path, file.getvalue())
