"""Whether there is memory enough for a run, asked before it begins."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from slmsam2_cli.data.footprint import free_bytes
from slmsam2_cli.errors import PlanError
from slmsam2_cli.planning.cost import RUNTIME_BYTES, cost_of_tuning, longest_clip
from slmsam2_cli.planning.fingerprint import read_fingerprint
from slmsam2_cli.planning.plan import Plan


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
    if cost is None or cost.memory_bytes <= room:
        return None
    shorter = longest_clip(plan, measured, room)
    remedy = (
        f"Run slmsam2 plan --memory {math.floor(room / 1e8) / 10:g} for shorter clips"
        if shorter
        else "Close other programs, or use a machine with more"
    )
    return f"about {cost.memory_bytes / 1e9:.1f} GB of memory are needed and {room / 1e9:.1f} GB are free. {remedy}"


def room_bytes(device: torch.device) -> int | None:
    """Memory for a run, what is loaded already included; None where nobody can tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes() + RUNTIME_BYTES if device.type == "cpu" else None
