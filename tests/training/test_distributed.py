"""Processes that share the steps do what one does with all of their clips; one that ends is an error."""

import os
from functools import partial

import pytest
import torch
from sharers import die_on, fail_on, help_on, learner, plan, steps

from slmsam2_cli.errors import DeviceError, TrainingError
from slmsam2_cli.training.distributed import check_workers, start_processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread_each():
    """Several processes with several threads each would wait for each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_three_processes_take_the_same_steps_as_one_with_as_many_clips():
    """If workers shared the memory of their weights, the steps of one would change another."""
    settings = plan(clips_per_step=3)
    alone, leader = learner(settings), learner(settings)
    expected = steps(alone, settings)
    with start_processes(leader, 3, partial(help_on, settings)) as group:
        assert group.count == 3
        found = steps(leader, settings, group)
    assert len(found) == len(expected) == 3
    for one, other in zip(expected, found):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
    for (name, p), q in zip(alone.model.named_parameters(), leader.model.parameters()):
        assert torch.allclose(p, q, atol=2e-4), name  # Adam amplifies gradients that are almost 0


def test_with_one_clip_per_step_each_process_takes_one_until_process_0_stops():
    settings, whole_ = plan(clips_per_step=1, steps=50, object_score_target="teacher"), plan(steps=50, object_score_target="teacher")
    alone, leader = learner(whole_), learner(settings)
    (expected,) = steps(alone, whole_, until=1)
    with start_processes(leader, 2, partial(help_on, settings)) as group:
        (found,) = steps(leader, settings, group, until=1)
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for (name, p), q in zip(alone.model.named_parameters(), leader.model.parameters()):
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


def test_a_process_that_is_killed_is_an_error():
    settings = plan(steps=50)
    leader = learner(settings)
    with (
        pytest.raises(TrainingError, match="a training process ended: it was killed.*--continue"),
        start_processes(leader, 2, partial(die_on, settings)) as group,
    ):
        steps(leader, settings, group)


def test_the_error_of_a_worker_is_raised_by_process_0():
    settings = plan()
    leader = learner(settings)
    with (
        pytest.raises(TrainingError, match="step 1, a: the volume is damaged"),
        start_processes(leader, 2, partial(fail_on, settings)) as group,
    ):
        steps(leader, settings, group)


def test_more_processes_than_cores_are_an_error(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    check_workers(4, CPU)
    with pytest.raises(DeviceError, match=r"--workers 5 needs 5 CPU cores, one per process, but 4 CPU core"):
        check_workers(5, CPU)
    with pytest.raises(DeviceError, match="1 GPU"):
        check_workers(2, torch.device("mps"))
