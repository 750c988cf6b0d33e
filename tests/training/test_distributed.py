"""Two processes that share the steps do what one does with all of their clips; one that dies is an error, not a hang."""

import os
from functools import partial

import pytest
import torch
from sharers import die_on, fail_on, help_on, learner, plan, steps

from slmsam2_cli.errors import DeviceError, TrainingError
from slmsam2_cli.training.distributed import check_processes, shared

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread_each():
    """Several processes of several threads wait for each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_take_the_same_steps_as_one_with_as_many_clips():
    settings = plan()
    alone, leader = learner(settings), learner(settings)
    expected = steps(alone, settings)
    with shared(leader, 2, partial(help_on, settings)) as ranks:
        assert ranks.count == 2
        found = steps(leader, settings, ranks)
    assert len(found) == len(expected) == 3
    for one, other in zip(expected, found):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
    for (name, p), q in zip(alone.model.named_parameters(), leader.model.parameters()):
        assert torch.allclose(p, q, atol=2e-4), name  # Adam makes much of gradients that are almost 0


def test_three_processes_stay_in_step():
    """Each of them has weights of its own: were they shared, all steps of one would be in those of another."""
    settings = plan(clips_per_step=3)
    alone, leader = learner(settings), learner(settings)
    expected = steps(alone, settings)
    with shared(leader, 3, partial(help_on, settings)) as ranks:
        found = steps(leader, settings, ranks)
    assert [one.losses["total"] for one in found] == pytest.approx([one.losses["total"] for one in expected], rel=1e-4)


def test_of_one_clip_a_step_each_takes_one_the_gradient_is_the_same_and_the_first_one_says_when_it_is_over():
    settings, whole_ = plan(clips_per_step=1, steps=50, object_score_target="teacher"), plan(steps=50, object_score_target="teacher")
    alone, leader = learner(whole_), learner(settings)
    (expected,) = steps(alone, whole_, until=1)
    with shared(leader, 2, partial(help_on, settings)) as ranks:
        (found,) = steps(leader, settings, ranks, until=1)
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for (name, p), q in zip(alone.model.named_parameters(), leader.model.parameters()):
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name


def test_a_process_that_is_killed_is_an_error():
    settings = plan(steps=50)
    leader = learner(settings)
    with (
        pytest.raises(TrainingError, match="shares the steps ended: it was killed.*--continue"),
        shared(leader, 2, partial(die_on, settings)) as ranks,
    ):
        steps(leader, settings, ranks)


def test_what_stops_a_process_is_said_by_the_first_one():
    settings = plan()
    leader = learner(settings)
    with pytest.raises(TrainingError, match="step 1, a: the volume is damaged"), shared(leader, 2, partial(fail_on, settings)) as ranks:
        steps(leader, settings, ranks)


def test_there_is_a_core_for_each_process(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    check_processes(4, CPU)
    with pytest.raises(DeviceError, match=r"5 processes: there is room for 4, one for each of the core"):
        check_processes(5, CPU)
    with pytest.raises(DeviceError, match="room for 1"):
        check_processes(2, torch.device("mps"))
