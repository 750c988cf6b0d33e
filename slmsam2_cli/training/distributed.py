"""Processes that share every step, one on each GPU, or several on a CPU, joined by torch.distributed.

Each shows the network some of a step's windows; gradients are added up, so that the step is that of one process with all of them. The
first one leads: it alone decides when to stop, shows bars, keeps states and models, and trains the label U-Net. The others begin as copies
of it and take the same steps.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # lets tensors go through pipes
from torch import Tensor
from torch.nn import Parameter

from slmsam2_cli.errors import DeviceError, SlmSam2Error, TrainingError
from slmsam2_cli.training.learner import Learner

_TIMEOUT = timedelta(minutes=10)  # that one waits for another within a step
_IDLE_TIMEOUT = timedelta(days=7)  # between two steps, while the first judges and saves
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END_S = 10.0
_READY = ""
Work = Callable[[Any, "ProcessGroup"], None]  # what a process that follows does with its learner


class ProcessGroup:
    """One process, which shares with nobody."""

    rank, count = 0, 1

    def agree(self, going: bool, done: float) -> tuple[bool, float]:
        """Whether there is one more step, and how much of the run is done, as the first process sees it."""
        return going, done

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        return values

    def average_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Give every process the mean of all gradients; where one has none, it counts as zero."""

    def worker_error(self) -> TrainingError | None:
        """What to say when another process has failed or ended."""
        return None


ALONE = ProcessGroup()


class Group(ProcessGroup):
    """One of several processes; `device`: where its network runs; `lines`, `processes`: of the first, to the others.

    Gradients are shared where the network runs, all else over a group of CPUs, which notices at once when a process has ended.
    """

    def __init__(self, rank: int, count: int, device: torch.device, meeting: Path) -> None:
        self.rank, self.count, self.device = rank, count, device
        self.lines: list[Connection] = []
        self.processes: list[BaseProcess] = []
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=meeting.as_uri(), rank=rank, world_size=count, timeout=_TIMEOUT)
        self.talk = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)

    def agree(self, going: bool, done: float) -> tuple[bool, float]:
        if any(not process.is_alive() for process in self.processes):
            raise RuntimeError("a process that shares the steps has ended")
        said = torch.tensor([float(going), done], dtype=torch.float64)
        dist.broadcast(said, src=0, group=self.talk)
        return bool(said[0]), float(said[1])

    def mean(self, values: Tensor) -> Tensor:
        found = values.detach().to("cpu", torch.float32, copy=True)
        dist.all_reduce(found, group=self.talk)
        return (found / self.count).to(values.device)

    def average_gradients(self, parameters: Sequence[Parameter]) -> None:
        trained = [p for p in parameters if p.requires_grad]
        somewhere = self.mean(torch.tensor([float(p.grad is not None) for p in trained])) > 0
        moving = [p for p, anywhere in zip(trained, somewhere.tolist()) if anywhere]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in moving])
        dist.all_reduce(flat)
        for p, part in zip(moving, torch.split(flat / self.count, [p.numel() for p in moving])):
            p.grad = part.view_as(p)

    def worker_error(self) -> TrainingError | None:
        for process in self.processes:
            process.join(_END_S)
        said = [text for line, process in zip(self.lines, self.processes) if (text := _worker_message(line, process)) is not None]
        return _ended(said[0]) if said else None


def check_processes(count: int, device: torch.device) -> None:
    """DeviceError when there is not one device, or core, for each."""
    there = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    if count > 1 and (device.type == "mps" or count > there):
        kind = "core(s)" if device.type == "cpu" else "GPU(s)"
        raise DeviceError(f"{count} processes: there is room for {1 if device.type == 'mps' else there}, one for each of the {kind}")


@contextmanager
def shared(learner: Learner, count: int, work: Work) -> Iterator[ProcessGroup]:
    """`count` processes for the time of a block; `work(learner, ranks)` is what the others do: a plain function or a partial of one.

    TrainingError when one of them cannot begin.
    """
    if count == 1:
        yield ALONE
        return
    device, before = learner.model.device, torch.get_num_threads()
    threads = max(1, before // count) if device.type == "cpu" else before
    lines, processes, group = list[Connection](), list[BaseProcess](), None
    with tempfile.TemporaryDirectory() as folder:
        meeting, follower = Path(folder) / "meeting", copy.deepcopy(learner)
        follower.to(torch.device("cpu"))
        try:
            with _block_signals():
                for rank in range(1, count):
                    line, process = _started((rank, count, device.type, threads, meeting, follower, work))
                    lines, processes = [*lines, line], [*processes, process]
            for line, process in zip(lines, processes):
                if (why := _worker_message(line, process, wait_s=_TIMEOUT.total_seconds())) != _READY:
                    raise _ended(why or "it did not begin")
            torch.set_num_threads(threads)
            group = Group(0, count, device, meeting)
            group.lines, group.processes = lines, processes
            yield group
        finally:
            torch.set_num_threads(before)
            for process in processes:
                process.join(_END_S if group is not None else 0)
                process.kill()
            if group is not None:
                dist.destroy_process_group()


def _started(told: tuple[Any, ...]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # a copy of a process that has threads may hang
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_follow, args=(*told, theirs))
    process.start()
    theirs.close()
    return ours, process


@contextmanager
def _block_signals() -> Iterator[None]:
    """Ctrl-C waits until the block is over, and with it in every process that was started there."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(rank: int, count: int, kind: str, threads: int, meeting: Path, learner: Any, work: Work, line: Any) -> None:
    """The life of a process that follows."""
    for number in _STOP_SIGNALS:  # the first one finishes its step, and says when it is over
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    try:
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(threads)
        line.send(_READY)
        group = Group(rank, count, device, meeting)
        own = copy.deepcopy(learner)  # what came through the pipe, all that follow share
        own.to(device)
        work(own, group)
        dist.destroy_process_group()
    except SlmSam2Error as error:
        line.send(str(error))
    except Exception as error:  # noqa: BLE001 - said by the first process
        line.send(f"{type(error).__name__}: {error}".partition("\n")[0])


def _worker_message(line: Connection, process: BaseProcess, wait_s: float = 0.0) -> str | None:
    """What a process has said; None where it says nothing and goes on."""
    try:
        return str(line.recv()) if line.poll(wait_s) else None if process.exitcode is None else _end_of(process)
    except EOFError:
        return _end_of(process)


def _end_of(process: BaseProcess) -> str:
    process.join(_END_S)
    code = process.exitcode
    return "it was killed" if code is None or code < 0 else f"it ended with exit code {code}"


def _ended(why: str) -> TrainingError:
    return TrainingError(f"a process that shares the steps ended: {why}. Resume with slmsam2 finetune --continue")
