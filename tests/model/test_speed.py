"""Seconds per slice on this machine: a positive number, and random generators are left as they were."""

from __future__ import annotations

import torch

from slmsam2_cli.model.speed import seconds_per_slice
from slmsam2_cli.planning.plan import NetworkPlan

CPU = torch.device("cpu")


def test_seconds_per_slice_is_between_0_and_60():
    assert 0 < seconds_per_slice(NetworkPlan(), 64, CPU) < 60


def test_measuring_the_speed_does_not_change_random_draws():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    seconds_per_slice(NetworkPlan(), 64, CPU)
    assert torch.equal(torch.rand(3), expected)
