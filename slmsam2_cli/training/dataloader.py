"""Batches for the training steps, drawn ahead by worker processes where the device is faster than drawing.

The batch of step k depends on the seed and k alone, so a resumed run continues as if it had never stopped, and the batch is the same
whichever process draws it. On a CPU the training process draws the batches itself, as workers would use the same cores.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from slmsam2_cli.dataset.cache import check_not_truncated
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.io.atomic import ArrayError
from slmsam2_cli.parallel import exit_with_parent
from slmsam2_cli.planning.plan import TrainingPlan
from slmsam2_cli.planning.rules import TRACKS_PER_CLIP
from slmsam2_cli.training.augment import augment
from slmsam2_cli.training.clips import Clips, ClipSampler, WindowChoice, concatenate_clips
from slmsam2_cli.training.label_unet import SliceSampler

BATCH_TIMEOUT_S = 300  # after which the process that draws a batch counts as dead
_MAX_WORKERS, _PREFETCHED = 4, 2  # at 1024 px a batch is 0.2 GB of shared memory
_IDLE = -1
_LOADER = "DataLoader"  # the first word of torch's messages about worker processes
_CHOOSE, _READ, _SLICES = 0, 1, 2  # generators of their own: the draws of one do not change another


@dataclass(frozen=True)
class TrainingData:
    """Samplers of clips and, where there is a label U-Net, of its slices."""

    clips: ClipSampler
    slices: SliceSampler | None = None


@dataclass(frozen=True)
class Batch:
    """The data of one step. clips: of all windows; slices: for the label U-Net, with the label of each pixel."""

    clips: Clips
    slices: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class FailedBatch:
    """A batch that could not be read, and why."""

    why: str


@dataclass(eq=False)
class BatchDataset(Dataset[Any]):
    """Maps (step, slices in a clip) to a Batch: the share of process `rank` of the `count` that share a step.

    label_unet_size: the input size of the label U-Net; None without one.
    """

    training_data: TrainingData
    plan: TrainingPlan
    label_unet_size: int | None = None
    rank: int = 0
    count: int = 1

    def windows(self, step: int, length: int) -> WindowChoice:
        """Choose the windows of a step, for all processes together; each has equally many."""
        wanted = self.plan.clips_per_step * max(1, min(4, self.plan.clip_slices // (2 * length)))
        rng = np.random.default_rng([self.plan.seed, step, _CHOOSE])
        return self.training_data.clips.choose_windows(rng, math.ceil(wanted / self.count) * self.count, length)

    def __getitem__(self, at: tuple[int, int]) -> Batch | FailedBatch:
        step, length = at
        windows, clips, slices = self.windows(step, length), [], None
        sampler = self.training_data.clips
        try:
            for case in sampler.cases:
                check_not_truncated(case)
            for number in range(self.rank, len(windows.starts), self.count):
                rng = np.random.default_rng([self.plan.seed, step, _READ, number])
                clips.append(augment(sampler.read_window(windows, number, rng, TRACKS_PER_CLIP), rng))
            if self.training_data.slices is not None and self.label_unet_size is not None:
                rng = np.random.default_rng([self.plan.seed, step, _SLICES])
                torch_rng = torch.Generator().manual_seed(int(rng.integers(2**63)))
                slices = self.training_data.slices.draw(rng, torch_rng, self.label_unet_size)
            return Batch(concatenate_clips(clips), slices)
        except ArrayError as error:
            return FailedBatch(f"step {step}: {error}")
        except (OSError, ValueError) as error:  # of reading damaged files
            return FailedBatch(f"step {step}, {', '.join(sampler.cases_of(windows))}: {error or type(error).__name__}")


def dataloader_workers(device: torch.device, from_scratch: bool, count: int = 1) -> int:
    """Choose the number of processes that draw batches ahead for each of the `count` training processes.

    None from random weights, for there the length of a clip depends on the progress of the run.
    """
    if device.type == "cpu" or from_scratch:
        return 0
    return max(1, min(_MAX_WORKERS, (os.cpu_count() or 2) // count - 1))


class BatchFeed:
    """The batches of step `first` and all later ones. length: slices in a clip of the batches that are drawn next.

    in_progress: the process id and the step of every worker process, -1 while it is idle.
    """

    def __init__(self, batches: BatchDataset, first: int, length: int, workers: int = 0, timeout_s: float = BATCH_TIMEOUT_S) -> None:
        self.batches, self.step, self.length = batches, first, length
        self.in_progress: Tensor = torch.full((workers, 2), _IDLE, dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
        loader: DataLoader[Any] = DataLoader(
            _RecordingDataset(batches, self.in_progress),
            batch_size=None,
            sampler=((step, self.length) for step in itertools.count(first)),
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            timeout=timeout_s if workers else 0,
            worker_init_fn=_init_worker if workers else None,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # the default before Python 3.14
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
            collate_fn=_identity,
        )
        self._batches: Iterator[Any] = iter(loader)

    def next(self) -> Batch:
        """Return the next batch.

        Raises: TrainingError, with step and cases, when the batch cannot be read; RuntimeError when a worker process has ended.
        """
        try:
            batch = next(self._batches)
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # it ended before all of its last batch was fetched
            raise RuntimeError(f"{_LOADER} worker ended: {error or type(error).__name__}") from error
        if isinstance(batch, FailedBatch):
            raise TrainingError(f"{batch.why}. Run: slmsam2 finetune --continue, which prepares damaged files in prepared/ again")
        self.step += 1
        assert isinstance(batch, Batch)
        return batch

    def worker_error(self, error: RuntimeError) -> TrainingError | None:
        """Describe an error that says that a worker process has ended or hangs; None for any other error.

        Such an error may come at any time, not only in `next`.
        """
        reason = str(error).partition("\n")[0]
        if not reason.startswith(_LOADER):
            return None
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self._batches = iter(())  # with these, frees the loader, which would raise this again when any of its processes ends
        busy = [(pid, step) for pid, step in self.in_progress.tolist() if step != _IDLE]
        steps = [step for pid, step in busy if f"{pid}" in re.findall(r"\d+", reason)] or [step for _, step in busy] or [self.step]
        step = min(steps)
        cases = ", ".join(self.batches.training_data.clips.cases_of(self.batches.windows(step, self.length)))
        return TrainingError(
            f"step {step}, {cases}: a process that reads training data ended or hung ({reason}). Resume with slmsam2 finetune --continue"
        )


@dataclass(eq=False)
class _RecordingDataset(Dataset[Any]):
    """Batches, with a record of which one each worker process is drawing."""

    batches: BatchDataset
    in_progress: Tensor

    def __getitem__(self, at: tuple[int, int]) -> Batch | FailedBatch:
        worker = get_worker_info()
        if worker is None:
            return self.batches[at]
        self.in_progress[worker.id] = torch.tensor((os.getpid(), at[0]))
        batch = self.batches[at]
        self.in_progress[worker.id, 1] = _IDLE
        return batch


def _init_worker(number: int) -> None:
    """Protect a worker from Ctrl-C and signals to the group: the training process needs it to finish its step. It ends with its parent."""
    os.setpgrp()
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a warning written from the background must not stop it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    exit_with_parent()


def _identity(batch: Any) -> Any:
    return batch
