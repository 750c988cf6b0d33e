"""Measure the speed of this machine in seconds per slice, on a random network; planning/estimate.py estimates run times from it."""

from __future__ import annotations

import statistics
import time

import torch

from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

SLICES = 4
TRIALS, LONGEST_S = 5, 1.5  # trials are given up after so many seconds, on a machine that is busy


@torch.inference_mode()
def seconds_per_slice(network: NetworkPlan, input_size: int, device: torch.device) -> float:
    """Seconds to encode one slice and track one object through it; the median of a few trials, without the one that warms up.

    Time does not depend on the weights, so they are random; the generators are left as they were.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = SlmSam2(network, input_size).eval().to(device)
        frames = torch.rand(SLICES, 3, input_size, input_size, device=device)
    trials, started = [_trial(model, frames)], time.perf_counter()
    while len(trials) <= TRIALS and time.perf_counter() - started < LONGEST_S:
        trials.append(_trial(model, frames))
    return statistics.median(trials[1:])


def _trial(model: SlmSam2, frames: torch.Tensor) -> float:
    """Seconds a slice, through a clip whose first slice is annotated."""
    mask = torch.zeros(1, 1, model.input_size, model.input_size, device=frames.device)
    mask[..., model.input_size // 4 : model.input_size // 2, model.input_size // 4 : model.input_size // 2] = 1
    started = time.perf_counter()
    features = model.encode(frames)
    first = features.at(slice(0, 1))
    bank = MemoryBank({0: model.remember(first, model.condition_on_mask(first, mask), mask)})
    for t in range(1, len(frames)):
        here = features.at(slice(t, t + 1))
        output = model.track(here, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, len(frames)))
        bank.tracked[t] = model.remember(here, output)
    float(output.object_score.sum())  # waits for the device
    return (time.perf_counter() - started) / len(frames)
