"""What a second thread does beside the one that trains, and that nothing depends on there being one."""

import threading

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.finetuning.beside import beside
from slmsam2_cli.finetuning.clips import ClipSampler
from slmsam2_cli.finetuning.feeding import Material
from slmsam2_cli.finetuning.loop import new_learner, train
from slmsam2_cli.finetuning.recognising import SliceSampler, new_recogniser
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.network import NetworkPlan
from slmsam2_cli.planning.plan import TrainingPlan

PX = 32
CPU = torch.device("cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_work_is_done_in_its_order_by_another_thread_with_half_of_the_cores(threads):
    threads(4)
    done = []

    def work(number):
        done.append(number)
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    with beside(CPU) as other:
        assert other.works and torch.get_num_threads() == 2
        later = [other.begin(lambda n=n: work(n)) for n in range(5)]
        assert [one.result() for one in later] == [(False, 2)] * 5
    assert done == [0, 1, 2, 3, 4] and torch.get_num_threads() == 4


@pytest.mark.parametrize(("device", "cores"), [(CPU, 1), (torch.device("cuda"), 4)])
def test_on_one_core_and_beside_a_gpu_work_is_done_once_and_when_it_is_asked_for(threads, device, cores):
    threads(cores)
    done = []
    with beside(device) as other:
        assert not other.works and torch.get_num_threads() == cores
        later = other.begin(lambda: done.append(threading.current_thread()))
        assert not done
        later.result()
        later.result()
    assert done == [threading.main_thread()]


def test_what_goes_wrong_there_is_raised_where_it_is_asked_for_and_the_threads_come_back(threads):
    threads(2)
    with pytest.raises(ValueError, match="wrong"), beside(CPU) as other:
        other.begin(lambda: int("wrong")).result()
    assert torch.get_num_threads() == 2


def weights_after(steps, presence, scratch=False):
    """Of everything that learns, recogniser included."""
    plan = TrainingPlan(
        steps=9, clip_slices=4, clips_per_step=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.01, presence=presence, recogniser=True
    )
    cases = [case(name=name, size=(PX, PX)) for name in ("left", "right")]
    material = Material(ClipSampler(cases, [1], whole(PX)), SliceSampler(cases, [1], PX))
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    model.recogniser = new_recogniser(material.slices, 1, 0)
    one = new_learner(model, plan, scratch)
    for _, _progress in zip(range(steps), train(one, material, plan, lambda: False), strict=False):
        pass
    return one.model.state_dict()


@pytest.mark.parametrize(("presence", "scratch"), [("base", False), ("truth", False), ("truth", True)])
def test_two_threads_learn_what_one_does_bit_by_bit(threads, presence, scratch):
    threads(1)
    alone = weights_after(4, presence, scratch)
    threads(2)
    helped = weights_after(4, presence, scratch)
    assert all(torch.equal(value, helped[name]) for name, value in alone.items())
    assert any(name.startswith("recogniser.") for name in alone)
