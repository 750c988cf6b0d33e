"""A run that is asked to stop finishes its step and saves what it has.

Whether there is memory enough for a run, asked before it begins.
"""

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
    """A file could not be written, or was cut short while it was read, but the run can go on."""


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Say of what cannot be written or read inside how to go on."""
    try:
        yield
    except OutputError as error:
        raise ResumableError(f"{error}. Fix that, and resume with {command} --continue") from error
    except ArrayError as error:
        raise ResumableError(f"{error}. Resume with {command} --continue, which makes it again") from error


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that answers True; raise it when the block is done.

    A signal that was ignored before (nohup, a job in the background) stays ignored.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            signal.signal(number, before[signal.Signals(number)])
        caught.append(number)
        console.say("stopping after this step …")

    weighted = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in weighted}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(signal.Signals(caught[0]))


def memory_warning(plan: Plan, fingerprint: Path, count: int, device: torch.device) -> str | None:
    """Where fine-tuning on `count` volumes will probably not fit, a line with the setting that does.

    None where it will, or where nobody can tell: there is no fingerprint, or it is damaged.
    """
    room = available_bytes(device)
    if room is None:
        return None
    try:
        measured = read_fingerprint(fingerprint)
    except PlanError:
        return None
    cost = estimate_finetuning(plan, measured, count)
    sharing = plan.training.workers if device.type == "cpu" else 1
    needed = cost.memory_bytes * sharing if cost is not None else 0
    if needed <= room:
        return None
    shorter = longest_clip(plan, measured, room // sharing)
    way_out = (
        f"Run slmsam2 plan --max-memory {math.floor(room / 1e8) / 10:g} for shorter clips"
        if shorter
        else "Close other programs, or use a machine with more"
    )
    return f"about {needed / 1e9:.1f} GB of memory are needed and {room / 1e9:.1f} GB are free. {way_out}"


def available_bytes(device: torch.device) -> int | None:
    """Memory for a run, what is loaded already included; None where nobody can tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes() + RUNTIME_BYTES if device.type == "cpu" else None


def remedy(plan_file: Path, device: torch.device) -> str:
    """The setting that needs about half as much, and what else helps."""
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
