"""The second thread of training: what it does, and that the weights are the same without it."""

import threading
from types import SimpleNamespace

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.device import needs_one_thread, torch_threads
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, TrainingPlan
from slmsam2_cli.training.background import background_thread, submit
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import BatchDataset, FailedBatch, TrainingData
from slmsam2_cli.training.distributed import SINGLE_PROCESS, ProcessGroup
from slmsam2_cli.training.label_unet import SliceSampler, new_label_unet
from slmsam2_cli.training.trainer import _thread_is_useful, new_learner, train

PX = 32
CPU = torch.device("cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_work_runs_in_order_in_another_thread_and_both_compute_with_one_thread(threads):
    threads(4)
    done = []

    def work(number):
        done.append(number)
        return threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    with background_thread(CPU, 2) as thread:
        assert thread is not None and torch.get_num_threads() == 1
        futures = [submit(thread, lambda n=n: work(n)) for n in range(5)]
        assert [one.result() for one in futures] == [(False, 1)] * 5
    assert done == [0, 1, 2, 3, 4] and torch.get_num_threads() == 4


@pytest.mark.parametrize(("device", "cores", "useful"), [(CPU, 1, True), (torch.device("cuda"), 4, True), (CPU, 4, False)])
def test_without_a_thread_work_runs_once_and_when_its_result_is_asked_for(threads, device, cores, useful):
    threads(3)
    done = []
    with background_thread(device, cores, useful) as thread:
        assert thread is None and torch.get_num_threads() == 3
        future = submit(thread, lambda: done.append(threading.current_thread()))
        assert not done
        future.result()
        future.result()
    assert done == [threading.main_thread()]


def test_only_nano_on_a_cpu_needs_one_thread(threads):
    assert needs_one_thread("nano", CPU) and not needs_one_thread("tiny", CPU) and not needs_one_thread("nano", torch.device("cuda"))
    threads(2)
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    with torch_threads(None):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_an_error_of_the_work_is_raised_by_its_result_and_all_cores_are_used_again(threads):
    threads(2)
    with pytest.raises(ValueError, match="wrong"), background_thread(CPU, 2) as thread:
        submit(thread, lambda: int("wrong")).result()
    assert torch.get_num_threads() == 2


def made(object_score, scratch=False):
    """A learner with a label U-Net, and its training data."""
    cases = [case(name=name, size=(PX, PX)) for name in ("left", "right")]
    training_data = TrainingData(ClipSampler(cases, [1], whole(PX)), SliceSampler(cases, [1], PX))
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    model.label_unet = new_label_unet(training_data.slices, 1, 0)
    return new_learner(model, plan(object_score_target=object_score), scratch), training_data


def plan(**changes):
    usual = {"steps": 3, "clip_slices": 4, "clips_per_step": 1, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**usual, "label_unet": True, **changes})


def learned(cores, object_score, scratch=False):
    """All weights after three steps on so many cores, the label U-Net's included; from scratch, clips grow from two slices to four."""
    one, training_data = made(object_score, scratch)
    planned = plan(object_score_target=object_score, clip_slices=4 if scratch else 2)
    for _ in train(one, training_data, planned, lambda: False, ProcessGroup(cores=cores)):
        pass
    return one.model.state_dict()


@pytest.mark.parametrize(("object_score", "scratch"), [("teacher", False), ("ground_truth", False), ("ground_truth", True)])
def test_training_on_two_threads_gives_the_same_weights_as_on_one(threads, object_score, scratch):
    threads(1)
    single = learned(1, object_score, scratch)
    threads(3)
    double, before = learned(8, object_score, scratch), made(object_score, scratch)[0].model.state_dict()
    assert all(torch.equal(value, double[name]) for name, value in single.items())
    assert not torch.equal(double["label_unet.logits.weight"], before["label_unet.logits.weight"])


def test_with_two_threads_each_batch_is_drawn_once_and_none_after_the_last_step(monkeypatch):
    drawn, one = [], made("teacher")
    monkeypatch.setattr(
        BatchDataset, "__getitem__", lambda self, at, usual=BatchDataset.__getitem__: drawn.append(at[0]) or usual(self, at)
    )
    for _ in train(*one, plan(object_score_target="teacher"), lambda: False, ProcessGroup(cores=2)):
        pass
    assert drawn == [0, 1, 2]


def test_a_batch_that_cannot_be_read_ends_the_run_at_its_own_step(monkeypatch):
    def failed(self, at, usual=BatchDataset.__getitem__):
        return FailedBatch("step 2: damaged") if at[0] == 2 else usual(self, at)

    monkeypatch.setattr(BatchDataset, "__getitem__", failed)
    one, training_data = made("teacher")
    with pytest.raises(TrainingError, match="step 2: damaged"):
        list(train(one, training_data, plan(object_score_target="teacher"), lambda: False, ProcessGroup(cores=2)))
    assert one.step == 2


def test_a_second_thread_is_used_only_for_nano_with_a_teacher_or_label_unet(threads):
    one, _ = made("teacher")
    assert _thread_is_useful(one, SINGLE_PROCESS)
    one.teacher = None
    assert _thread_is_useful(one, SINGLE_PROCESS) and not _thread_is_useful(one, SimpleNamespace(rank=1))
    one.model.label_unet = None
    assert not _thread_is_useful(one, SINGLE_PROCESS)
    one.teacher, one.model.network = one.model, NetworkPlan(size="tiny")
    assert not _thread_is_useful(one, SINGLE_PROCESS)


def test_all_cores_are_used_again_when_a_run_is_closed_between_two_steps(threads):
    threads(2)
    steps = train(*made("teacher"), plan(object_score_target="teacher"), lambda: False, ProcessGroup(cores=2))
    next(steps)
    assert torch.get_num_threads() == 1
    steps.close()
    assert torch.get_num_threads() == 2
