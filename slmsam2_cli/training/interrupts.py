"""Interruptions of a run: stop after the current step and save, say how to resume, and warn before memory runs out."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from slmsam2_cli import console
from slmsam2_cli.dataset.resources import free_bytes
from slmsam2_cli.errors import OutputError, PlanError
from slmsam2_cli.io.atomic import ArrayError
from slmsam2_cli.planning.estimate import RUNTIME_BYTES, estimate_finetuning, longest_clip
from slmsam2_cli.planning.fingerprint import read_fingerprint
from slmsam2_cli.planning.plan import Plan, read_plan


class ResumableError(OutputError):
    """A file could not be written, or was cut short while it was read, but the run can be resumed."""


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Add to errors of writing and reading files how to resume the run.

    Raises: ResumableError in place of OutputError and ArrayError.
    """
    try:
        yield
    except OutputError as error:
        raise ResumableError(f"{error}. Fix this, then run: {command} --continue") from error
    except ArrayError as error:
        raise ResumableError(f"{error}. Run: {command} --continue, which prepares the file again") from error


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Delay the first SIGINT or SIGTERM until the end of the block; the function that is yielded tells whether there was one.

    A second signal acts at once. A signal that was ignored before (nohup, a job in the background) stays ignored.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            signal.signal(number, before[signal.Signals(number)])
        caught.append(number)
        console.say("stopping after this step …")

    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(signal.Signals(caught[0]))


def finetuning_bytes(plan: Plan, fingerprint: Path, count: int) -> int | None:
    """Estimate the memory of fine-tuning on `count` cases in one process; None where it is unknown."""
    try:
        estimate = estimate_finetuning(plan, read_fingerprint(fingerprint), count)
    except PlanError:
        return None
    return estimate.memory_bytes if estimate is not None else None


def memory_warning(plan: Plan, fingerprint: Path, count: int, device: torch.device) -> str | None:
    """Compare the memory that fine-tuning on `count` cases needs with what is free. Returns a warning with the setting that fits.

    None where memory suffices, or where that is unknown: there is no fingerprint, it is damaged, or the device does not tell.
    """
    if device.type == "cuda":
        available = int(torch.cuda.mem_get_info(device)[0])
    elif device.type == "cpu":
        available = free_bytes() + RUNTIME_BYTES  # the runtime is loaded already
    else:
        return None
    processes = plan.training.workers if device.type == "cpu" else 1
    needed = (finetuning_bytes(plan, fingerprint, count) or 0) * processes
    if needed <= available:
        return None
    advice = "Close other programs, or use a machine with more memory"
    if longest_clip(plan, read_fingerprint(fingerprint), available // processes):
        advice = f"Run: slmsam2 plan --max-memory {math.floor(available / 1e8) / 10:g}"
    return f"fine-tuning needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB available. {advice}"


def memory_advice(plan_file: Path, device: torch.device) -> str:
    """Name the setting that needs about half as much memory, and what else helps."""
    others = "close other programs" if device.type == "cpu" else "use --device cpu"
    try:
        training = read_plan(plan_file).training
    except PlanError:
        return others.capitalize()
    name = "clips_per_step" if training.clips_per_step > 1 else "clip_slices"
    now, least = getattr(training, name), 1 if name == "clips_per_step" else 2
    if now // 2 < least:
        return others.capitalize()
    return f"Set training.{name} to {now // 2} in plan.json (now {now}), or {others}"
