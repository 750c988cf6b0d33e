"""Measure the speed of this machine in seconds per slice, on a random network; planning/estimate.py estimates run times from it."""

from __future__ import annotations

import math
import statistics
import time

import torch

from slmsam2_cli.device import needs_one_thread, torch_threads
from slmsam2_cli.model.cpu_ops import to_device
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

SLICES, PASSES = 4, 2  # one object has two passes, side by side
TRIALS, MAX_S = 5, 1.5  # no further trial starts after MAX_S seconds, as on a busy machine


@torch.inference_mode()
def seconds_per_slice(network: NetworkPlan, input_size: int, device: torch.device) -> float:
    """Measure the seconds to encode one slice and track one object on it, as predict does: the median of up to five trials.

    A trial for warm-up is not counted. Time does not depend on the weights, so they are random; random generators are left as they were.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = to_device(SlmSam2(network, input_size), device)
        frames = torch.rand(SLICES * PASSES, 3, input_size, input_size, device=device)
    mask = torch.zeros(PASSES, 1, input_size, input_size, device=device)
    mask[..., input_size // 4 : input_size // 2, input_size // 4 : input_size // 2] = 1

    seconds, deadline = list[float](), math.inf
    with torch_threads(1 if needs_one_thread(network.size, device) else None):
        while len(seconds) <= TRIALS and time.perf_counter() < deadline:
            started = time.perf_counter()
            features = model.encode(frames)
            first = features.at(slice(0, PASSES))
            bank = MemoryBank({0: model.remember(first, model.condition_on_mask(first, mask), mask)})
            for t in range(1, SLICES):
                current = features.at(slice(t * PASSES, (t + 1) * PASSES))
                output = model.track(current, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, SLICES))
                bank.tracked[t] = model.remember(current, output)
            float(output.object_score.sum())  # wait for the device
            seconds.append((time.perf_counter() - started) / (SLICES * PASSES))
            deadline = min(deadline, time.perf_counter() + MAX_S)  # counted from the end of the warm-up
    return statistics.median(seconds[1:])
