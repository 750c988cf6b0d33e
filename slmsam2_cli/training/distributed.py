"""Share every training step among processes: one on each GPU, or several on a CPU, joined by torch.distributed.

Each process trains on some of a step's windows; gradients are averaged, so the step is that of one process with all windows. Process 0
decides when to stop, shows progress, saves states and models, and trains the label U-Net. The others start as copies of it and take
the same steps.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing  # lets tensors go through pipes
from torch import Tensor
from torch.nn import Parameter

from slmsam2_cli.errors import DeviceError, SlmSam2Error, TrainingError
from slmsam2_cli.parallel import available_cpus

_TIMEOUT = timedelta(minutes=10)  # for messages within a step
_IDLE_TIMEOUT = timedelta(days=7)  # between two steps, while process 0 validates and saves
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_JOIN_S = 10.0
_READY = ""
Work = Callable[[Any, "ProcessGroup"], None]  # what a worker process does with its copy of the learner


class _Worker(NamedTuple):
    """A process that process 0 started, and the connection on which it reports."""

    connection: Connection
    process: BaseProcess


@dataclass
class ProcessGroup:
    """The processes that share every step, as one of them sees it; by default this process alone.

    cpu_group: torch's group for everything but gradients, which are shared where the network runs. Its CPU backend notices at once when
    a process has ended. workers: of process 0, all the others. cores: how many CPU cores this process has for itself.
    """

    rank: int = 0
    count: int = 1
    cpu_group: Any = None
    workers: Sequence[_Worker] = ()
    cores: int = field(default_factory=available_cpus)

    @classmethod
    def join(cls, rank: int, count: int, device: torch.device, rendezvous: Path) -> ProcessGroup:
        """Join the group whose processes meet at the file `rendezvous`; waits for all of them."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=rendezvous.as_uri(), rank=rank, world_size=count, timeout=_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        return cls(rank, count, group, cores=max(1, available_cpus() // count))

    def broadcast_progress(self, going: bool, done: float) -> tuple[bool, float]:
        """Return whether there is one more step, and the fraction of the run that is done, as process 0 sees it."""
        if self.count == 1:
            return going, done
        if any(not worker.process.is_alive() for worker in self.workers):
            raise RuntimeError("a training process has ended")
        values = torch.tensor([float(going), done], dtype=torch.float64)
        dist.broadcast(values, src=0, group=self.cpu_group)
        return bool(values[0]), float(values[1])

    def mean(self, values: Tensor) -> Tensor:
        """Average values over all processes."""
        if self.count == 1:
            return values
        total = values.detach().to("cpu", torch.float32, copy=True)
        dist.all_reduce(total, group=self.cpu_group)
        return (total / self.count).to(values.device)

    def average_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace every gradient by its mean over all processes; a parameter without a gradient in one of them counts as zero there."""
        if self.count == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        used = self.mean(torch.tensor([float(p.grad is not None) for p in trained])) > 0
        moving = [p for p, anywhere in zip(trained, used.tolist()) if anywhere]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in moving])
        dist.all_reduce(flat)
        for p, part in zip(moving, torch.split(flat / self.count, [p.numel() for p in moving])):
            p.grad = part.view_as(p)

    def worker_error(self) -> TrainingError | None:
        """Return the error of the first worker that has failed or ended; None when all are running."""
        for worker in self.workers:
            worker.process.join(_JOIN_S)
        reports = [report for worker in self.workers if (report := _read_report(worker)) is not None]
        return TrainingError(_ENDED.format(reports[0])) if reports else None


SINGLE_PROCESS = ProcessGroup()
_ENDED = "a training process ended: {}. Resume with slmsam2 finetune --continue"


def check_workers(count: int, device: torch.device) -> None:
    """Check that there is a GPU, or a CPU core, for each process.

    Raises: DeviceError when there are too few.
    """
    available = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1 if device.type == "cpu" else 1
    if count > max(1, available):
        unit = "CPU core" if device.type == "cpu" else "GPU"
        raise DeviceError(f"--workers {count} needs {count} {unit}s, one per process, but {available} {unit}(s) are available")


@dataclass(frozen=True)
class _WorkerStart:
    """What a worker process needs to start: its place in the group, its device and cores, its copy of the learner and its work."""

    rank: int
    count: int
    device_type: str
    threads: int
    rendezvous: Path
    learner: Any
    work: Work


@contextmanager
def start_processes(learner: Any, count: int, work: Work, cores: int | None = None) -> Iterator[ProcessGroup]:
    """Run `count` processes during a block; `work(learner, process_group)`, a picklable function, is what the others do.

    learner: what is trained; it has `model.device` and `to(device)` and can be pickled. cores: CPU cores that a single process has for
    itself, None for all.

    Raises: TrainingError when a process cannot start.
    """
    if count == 1:
        yield SINGLE_PROCESS if cores is None else ProcessGroup(cores=cores)
        return
    device, before = learner.model.device, torch.get_num_threads()
    threads = max(1, before // count) if device.type == "cpu" else before
    workers, group = list[_Worker](), None
    with tempfile.TemporaryDirectory() as folder:
        rendezvous, copied = Path(folder) / "rendezvous", copy.deepcopy(learner)
        copied.to(torch.device("cpu"))
        try:
            with _block_signals():
                for rank in range(1, count):
                    workers.append(_start_worker(_WorkerStart(rank, count, device.type, threads, rendezvous, copied, work)))
            for worker in workers:
                if (report := _read_report(worker, wait_s=_TIMEOUT.total_seconds())) != _READY:
                    raise TrainingError(_ENDED.format(report or "it did not start"))
            torch.set_num_threads(threads)
            group = ProcessGroup.join(0, count, device, rendezvous)
            group.workers = workers
            yield group
        finally:
            torch.set_num_threads(before)
            for worker in workers:
                worker.process.join(_JOIN_S if group is not None else 0)
                worker.process.kill()
            if group is not None:
                dist.destroy_process_group()


def _start_worker(start: _WorkerStart) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a forked copy of a process that has threads may hang
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker_main, args=(start, theirs))
    process.start()
    theirs.close()
    return _Worker(ours, process)


@contextmanager
def _block_signals() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block is over, also in the processes that are started in it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_main(start: _WorkerStart, connection: Any) -> None:
    """Run a worker process: join the group, do the work, report an error to process 0."""
    for number in _STOP_SIGNALS:  # process 0 finishes its step and tells the others when to stop
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    try:
        device = torch.device(start.device_type, start.rank) if start.device_type == "cuda" else torch.device(start.device_type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(start.threads)
        connection.send(_READY)
        group = ProcessGroup.join(start.rank, start.count, device, start.rendezvous)
        learner = copy.deepcopy(start.learner)  # tensors that come through the pipe are shared among all workers
        learner.to(device)
        start.work(learner, group)
        dist.destroy_process_group()
    except SlmSam2Error as error:
        connection.send(str(error))
    except Exception as error:  # noqa: BLE001 - reported by process 0
        connection.send(f"{type(error).__name__}: {error}".partition("\n")[0])


def _read_report(worker: _Worker, wait_s: float = 0.0) -> str | None:
    """Read what a worker has reported, or how it ended; None while it runs and reports nothing."""
    with suppress(EOFError):
        if worker.connection.poll(wait_s):
            return str(worker.connection.recv())
        if worker.process.exitcode is None:
            return None
    worker.process.join(_JOIN_S)
    code = worker.process.exitcode
    return "it was killed" if code is None or code < 0 else f"it ended with exit code {code}"
