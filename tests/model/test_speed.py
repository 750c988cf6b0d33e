"""How fast this machine is: a positive number, found without disturbing any other draw."""

from __future__ import annotations

import torch

from slmsam2_cli.model.speed import seconds_per_slice
from slmsam2_cli.planning.plan import NetworkPlan

CPU = torch.device("cpu")


def test_a_pace_is_a_time():
    assert 0 < seconds_per_slice(NetworkPlan(), 64, CPU) < 60


def test_trying_it_out_leaves_random_draws_as_they_were():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    seconds_per_slice(NetworkPlan(), 64, CPU)
    assert torch.equal(torch.rand(3), expected)
