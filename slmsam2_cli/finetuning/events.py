"""What a run tells TensorBoard, where that is installed (pip install 'slmsam2[tensorboard]'); log.csv has the same numbers without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

AXES = ("step", "seconds")
Record = Callable[[Mapping[str, float]], None]


@contextmanager
def events(folder: Path, from_step: int) -> Iterator[Record]:
    """A function that records the numbers of a step under `train/`, into files in the folder.

    What there is of later steps than `from_step`, of this run or an earlier one, no longer counts. Without TensorBoard nothing is written.
    """
    if find_spec("tensorboard") is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=from_step + 1) as writer:

        def record(row: Mapping[str, float]) -> None:
            for name, value in row.items():
                if name not in AXES:
                    writer.add_scalar(f"train/{name}", value, int(row["step"]))

        yield record
