"""What every step learns from, drawn and changed ahead of it where the device is faster than that: `Batches`, and a `Feed` of them.

What step k shows is a matter of the seed and k alone, so that a resumed run goes on as if it had never stopped, and it is the same
whichever process draws it. On a CPU the process that trains draws as well, as both would use the same cores.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.io.atomic import ArrayError
from slmsam2_cli.parallel import exit_with_parent
from slmsam2_cli.planning.plan import TrainingPlan
from slmsam2_cli.planning.rules import TRACKS_PER_CLIP
from slmsam2_cli.training.augment import augment
from slmsam2_cli.training.clips import Clips, ClipSampler, WindowChoice, together
from slmsam2_cli.training.label_unet import SliceSampler

BATCH_TIMEOUT_S = 300  # that a batch may take before the process that draws it counts as dead
_MOST_WORKERS, _AHEAD = 4, 2  # at 1024 px a batch is 0.2 GB of shared memory
_IDLE = -1
_LOADER = "DataLoader"  # what torch's words about processes that draw begin with
_CHOOSE, _SHOW, _SLICES = 0, 1, 2  # apart: what one draws does not change another


@dataclass(frozen=True)
class TrainingData:
    """What is learned from: clips, and slices for the label U-Net where there is one, which sees `px` pixels."""

    clips: ClipSampler
    slices: SliceSampler | None = None


@dataclass(frozen=True)
class Batch:
    """clips: of all windows; seen: slices for the label U-Net and what their pixels are."""

    clips: Clips
    seen: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class FailedBatch:
    """A batch that could not be made, and why."""

    why: str


class BatchDataset(Dataset[Any]):
    """(step, slices in a clip) -> Batch; of `count` processes that share a step, what number `rank` shows."""

    def __init__(
        self, training_data: TrainingData, plan: TrainingPlan, label_unet_size: int | None = None, rank: int = 0, count: int = 1
    ) -> None:
        self.training_data, self.plan, self.label_unet_size = training_data, plan, label_unet_size
        self.rank, self.count = rank, count

    def windows(self, step: int, length: int) -> WindowChoice:
        """What is shown at a step, by all processes; as many by each."""
        wanted = self.plan.clips_per_step * max(1, min(4, self.plan.clip_slices // (2 * length)))
        return self.training_data.clips.choose(self._rng(step, _CHOOSE), math.ceil(wanted / self.count) * self.count, length)

    def __getitem__(self, at: tuple[int, int]) -> Batch | FailedBatch:
        step, length = at
        windows = self.windows(step, length)
        try:
            self.training_data.clips.check_not_truncated()
            clips = together([self._window(windows, step, number) for number in range(self.rank, len(windows.starts), self.count)])
            return Batch(clips, self._slices(step))
        except ArrayError as error:
            return FailedBatch(f"step {step}: {error}")
        except (OSError, ValueError) as error:  # what reading says of damaged files
            return FailedBatch(f"step {step}, {', '.join(self.training_data.clips.cases_of(windows))}: {error or type(error).__name__}")

    def _window(self, windows: WindowChoice, step: int, number: int) -> Clips:
        rng = self._rng(step, _SHOW, number)
        return augment(self.training_data.clips.show(windows, number, rng, TRACKS_PER_CLIP), rng)

    def _slices(self, step: int) -> tuple[Tensor, Tensor] | None:
        if self.training_data.slices is None or self.label_unet_size is None:
            return None
        rng = self._rng(step, _SLICES)
        return self.training_data.slices.draw(rng, torch.Generator().manual_seed(int(rng.integers(2**63))), self.label_unet_size)

    def _rng(self, *of: int) -> np.random.Generator:
        return np.random.default_rng([self.plan.seed, *of])


class _StepSampler(Sampler[tuple[int, int]]):
    """Step after step, as long as somebody asks."""

    def __init__(self, first: int, length: Callable[[], int]) -> None:
        self.first, self.length = first, length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.first
        while True:
            yield step, self.length()
            step += 1


def dataloader_workers(device: torch.device, from_scratch: bool, count: int = 1) -> int:
    """Processes that draw ahead for each of the `count` that train.

    From random weights none: there the length of a clip depends on how far the run is.
    """
    if device.type == "cpu" or from_scratch:
        return 0
    return max(1, min(_MOST_WORKERS, (os.cpu_count() or 2) // count - 1))


class BatchFeed:
    """The batches of step `first` and all after it; `in_progress`: the process id and the step of every process that draws ahead."""

    def __init__(
        self, batches: BatchDataset, first: int, length: Callable[[], int], workers: int = 0, timeout_s: float = BATCH_TIMEOUT_S
    ) -> None:
        self.batches, self.step, self.length = batches, first, length
        self.in_progress: Tensor = torch.full((workers, 2), _IDLE, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
        loader: DataLoader[Any] = DataLoader(
            _RecordingDataset(batches, self.in_progress),
            batch_size=None,
            sampler=_StepSampler(first, length),
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            timeout=timeout_s if workers else 0,
            worker_init_fn=_init_worker if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # as it was before Python 3.14
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
            collate_fn=_identity,
        )
        self._found: Iterator[Any] = iter(loader)

    def next(self) -> Batch:
        """TrainingError, naming step and volumes, where the batch cannot be made; RuntimeError where a process that draws has ended."""
        try:
            batch = next(self._found)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # it ended before all of its last batch was fetched
            raise RuntimeError(f"{_LOADER} worker ended: {error or type(error).__name__}") from error
        if isinstance(batch, FailedBatch):
            raise TrainingError(f"{batch.why}. Resume with slmsam2 finetune --continue, which makes again what is damaged in prepared/")
        self.step += 1
        found: Batch = batch
        return found

    def worker_error(self, error: RuntimeError) -> TrainingError | None:
        """What to say when a process that draws has ended, or hangs; None where the error is another one's.

        The news of an ended process may come at any time, not only in `next`.
        """
        said = str(error).partition("\n")[0]
        if not said.startswith(_LOADER):
            return None
        error.__traceback__, self._found = None, iter(())  # lets go of the loader, or it would say so again whenever a process ends
        busy = [(pid, step) for pid, step in self.in_progress.tolist() if step != _IDLE]
        theirs = [step for pid, step in busy if f"{pid}" in re.findall(r"\d+", said)] or [step for _, step in busy] or [self.step]
        step = min(theirs)
        ids = ", ".join(self.batches.training_data.clips.cases_of(self.batches.windows(step, self.length())))
        return TrainingError(
            f"step {step}, {ids}: a process that draws clips ended or hung ({said}). Resume with slmsam2 finetune --continue"
        )


class _RecordingDataset(Dataset[Any]):
    """Batches, and a note of which is being drawn."""

    def __init__(self, batches: BatchDataset, in_progress: Tensor) -> None:
        self.batches, self.in_progress = batches, in_progress

    def __getitem__(self, at: tuple[int, int]) -> Batch | FailedBatch:
        worker = get_worker_info()
        if worker is None:
            return self.batches[at]
        self.in_progress[worker.id] = torch.tensor((os.getpid(), at[0]))
        found = self.batches[at]
        self.in_progress[worker.id, 1] = _IDLE
        return found


def _init_worker(number: int) -> None:
    """Who trains finishes its step on Ctrl-C, or when its whole group is told to end, and needs the others for it; they end with it."""
    os.setpgrp()
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a warning from the background shall not stop it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent()


def _identity(batch: Any) -> Any:
    return batch
