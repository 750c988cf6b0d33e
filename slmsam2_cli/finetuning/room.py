"""Whether there is memory enough for a run, asked before it begins."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from slmsam2_cli.data.footprint import free_bytes
from slmsam2_cli.errors import PlanError
from slmsam2_cli.planning.cost import RUNTIME_BYTES, cost_of_tuning, longest_clip
from slmsam2_cli.planning.fingerprint import read_fingerprint
from slmsam2_cli.planning.plan import Plan, read_plan


def shortage(plan: Plan, fingerprint: Path, count: int, device: torch.device) -> str | None:
    """Where fine-tuning on `count` volumes will probably not fit, a line with the setting that does.

    None where it will, or where nobody can tell: there is no fingerprint, or it is damaged.
    """
    room = room_bytes(device)
    if room is None:
        return None
    try:
        measured = read_fingerprint(fingerprint)
    except PlanError:
        return None
    cost = cost_of_tuning(plan, measured, count)
    sharing = plan.training.processes if device.type == "cpu" else 1
    needed = cost.memory_bytes * sharing if cost is not None else 0
    if needed <= room:
        return None
    shorter = longest_clip(plan, measured, room // sharing)
    way_out = (
        f"Run slmsam2 plan --memory {math.floor(room / 1e8) / 10:g} for shorter clips"
        if shorter
        else "Close other programs, or use a machine with more"
    )
    return f"about {needed / 1e9:.1f} GB of memory are needed and {room / 1e9:.1f} GB are free. {way_out}"


def room_bytes(device: torch.device) -> int | None:
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
