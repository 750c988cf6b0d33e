"""What a second thread does beside the one that trains, and that nothing depends on there being one."""

import threading
from types import SimpleNamespace

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, TrainingPlan
from slmsam2_cli.training.background import beside
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import BatchDataset, FailedBatch, TrainingData
from slmsam2_cli.training.distributed import ALONE
from slmsam2_cli.training.label_unet import SliceSampler, new_label_unet
from slmsam2_cli.training.trainer import _thread_is_useful, new_learner, train

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
        assert other.present and torch.get_num_threads() == 2
        later = [other.begin(lambda n=n: work(n)) for n in range(5)]
        assert [one.result() for one in later] == [(False, 2)] * 5
    assert done == [0, 1, 2, 3, 4] and torch.get_num_threads() == 4


@pytest.mark.parametrize(("device", "cores", "wanted"), [(CPU, 1, True), (torch.device("cuda"), 4, True), (CPU, 4, False)])
def test_on_one_core_beside_a_gpu_and_where_it_does_not_pay_work_is_done_once_and_when_it_is_asked_for(threads, device, cores, wanted):
    threads(cores)
    done = []
    with beside(device, wanted) as other:
        assert not other.present and torch.get_num_threads() == cores
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


def made(object_score, scratch=False):
    """A learner with a label U-Net, and what it learns from."""
    cases = [case(name=name, size=(PX, PX)) for name in ("left", "right")]
    training_data = TrainingData(ClipSampler(cases, [1], whole(PX)), SliceSampler(cases, [1], PX))
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    model.label_unet = new_label_unet(training_data.slices, 1, 0)
    return new_learner(model, plan(object_score_target=object_score), scratch), training_data


def plan(**changes):
    usual = {"steps": 3, "clip_slices": 4, "clips_per_step": 1, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**usual, "label_unet": True, **changes})


def learned(object_score, scratch=False):
    """All weights after three steps, the label U-Net's included."""
    one, training_data = made(object_score, scratch)
    for _ in train(one, training_data, plan(object_score_target=object_score), lambda: False):
        pass
    return one.model.state_dict()


@pytest.mark.parametrize(("object_score", "scratch"), [("teacher", False), ("ground_truth", False), ("ground_truth", True)])
def test_two_threads_learn_what_one_does_bit_by_bit(threads, object_score, scratch):
    threads(1)
    alone = learned(object_score, scratch)
    threads(2)
    helped, before = learned(object_score, scratch), made(object_score, scratch)[0].model.state_dict()
    assert all(torch.equal(value, helped[name]) for name, value in alone.items())
    assert not torch.equal(helped["label U-Net.logits.weight"], before["label U-Net.logits.weight"])


def test_with_two_threads_each_batch_is_drawn_once_and_none_beyond_the_last_step(threads, monkeypatch):
    threads(2)
    drawn, one = [], made("teacher")
    monkeypatch.setattr(
        BatchDataset, "__getitem__", lambda self, at, usual=BatchDataset.__getitem__: drawn.append(at[0]) or usual(self, at)
    )
    for _ in train(*one, plan(object_score_target="teacher"), lambda: False):
        pass
    assert drawn == [0, 1, 2]


def test_a_batch_that_cannot_be_shown_ends_the_run_at_its_own_step(threads, monkeypatch):
    threads(2)

    def failed(self, at, usual=BatchDataset.__getitem__):
        return FailedBatch("step 2: damaged") if at[0] == 2 else usual(self, at)

    monkeypatch.setattr(BatchDataset, "__getitem__", failed)
    one, training_data = made("teacher")
    with pytest.raises(TrainingError, match="step 2: damaged"):
        list(train(one, training_data, plan(object_score_target="teacher"), lambda: False))
    assert one.step == 2


def test_cores_are_halved_only_for_nano_with_work_to_do_beside(threads):
    one, _ = made("teacher")
    assert _thread_is_useful(one, ALONE)
    one.teacher = None
    assert _thread_is_useful(one, ALONE) and not _thread_is_useful(one, SimpleNamespace(rank=1))
    one.model.label_unet = None
    assert not _thread_is_useful(one, ALONE)
    one.teacher, one.model.network = one.model, NetworkPlan(size="tiny")
    assert not _thread_is_useful(one, ALONE)


def test_the_cores_come_back_when_a_run_is_given_up_between_two_steps(threads):
    threads(2)
    steps = train(*made("teacher"), plan(object_score_target="teacher"), lambda: False)
    next(steps)
    assert torch.get_num_threads() == 1
    steps.close()
    assert torch.get_num_threads() == 2
