"""Batches depend on seed and step alone, whichever process draws them; the error of a worker names step and cases."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.io import atomic
from slmsam2_cli.planning.plan import TrainingPlan
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import BatchDataset, BatchFeed, TrainingData, dataloader_workers
from slmsam2_cli.training.label_unet import SliceSampler

PX, LENGTH = 32, 4


def plan(**changes):
    base = {"steps": 9, "clip_slices": 4, "clips_per_step": 2, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**base, **changes})


def training_data():
    cases = [case(name=name, size=(PX, PX)) for name in ("left", "right")]
    return TrainingData(ClipSampler(cases, [1], whole(PX)), SliceSampler(cases, [1], PX))


def feed(first=0, workers=0, batches=None, **changes):
    return BatchFeed(batches or BatchDataset(training_data(), plan(), 48), first, LENGTH, workers, **changes)


def same(one, other):
    tensors = [(batch.clips.frames, batch.clips.masks, batch.clips.window, *batch.slices) for batch in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*tensors))


def test_two_worker_processes_draw_the_same_batches_as_none():
    alone, helped = feed(), feed(workers=2)
    assert all(same(alone.next(), helped.next()) for _ in range(6))


def test_a_feed_that_starts_at_step_three_draws_the_same_batches_from_there():
    whole_, late = feed(), feed(first=3)
    for _ in range(3):
        whole_.next()
    assert all(same(whole_.next(), late.next()) for _ in range(3))


def test_steps_differ_and_so_do_seeds():
    one = feed()
    assert not same(one.next(), one.next())
    assert not same(feed().next(), feed(batches=BatchDataset(training_data(), plan(seed=1), 48)).next())


def test_a_batch_holds_the_planned_windows_and_each_has_a_track():
    for _, batch in zip(range(10), iter(feed().next, None)):
        assert batch.clips.frames.shape[:2] == (LENGTH, 2) and set(batch.clips.window.tolist()) == {0, 1}


def test_the_global_generator_is_unchanged():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    feed().next()
    assert torch.equal(torch.rand(1), expected)


class Dying(BatchDataset):
    """Step 2 cannot be drawn."""

    def __init__(self, how):
        super().__init__(training_data(), plan(), 48)
        self.how = how

    def __getitem__(self, at):
        if at[0] == 2:
            self.how()
        return super().__getitem__(at)


def until_it_fails(one):
    try:
        for _ in range(5):
            one.next()
            time.sleep(0.05)
    except RuntimeError as error:
        raise one.worker_error(error) or error from None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_is_an_error_with_step_and_cases(workers):
    with pytest.raises(
        TrainingError, match=r"step 2, (left|right|left, right|right, left): a process that reads training data ended.*--continue"
    ):
        until_it_fails(feed(workers=workers, batches=Dying(lambda: os.kill(os.getpid(), signal.SIGKILL))))


def test_a_worker_that_hangs_is_an_error_after_the_timeout():
    with pytest.raises(TrainingError, match=r"step 2, .*hung"):
        until_it_fails(feed(workers=1, batches=Dying(lambda: time.sleep(60)), timeout_s=2))


FINISHING = """
import os, signal
from test_dataloader import feed
signal.signal(signal.SIGTERM, lambda *_: None)  # the training process finishes its step
one = feed(workers=1)
one.next()
os.killpg(0, signal.SIGTERM)
for _ in range(5):  # more than were drawn ahead
    one.next()
"""


def test_a_signal_to_the_process_group_does_not_end_the_worker():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    subprocess.run([sys.executable, "-c", FINISHING], env=os.environ | {"PYTHONPATH": path}, start_new_session=True, check=True, timeout=60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_cannot_be_read_is_named(workers, monkeypatch):
    made = BatchDataset(training_data(), plan(), 48)

    def damaged(*_):
        raise ValueError("cannot reshape")

    monkeypatch.setattr(made.training_data.clips, "read_window", damaged)
    with pytest.raises(TrainingError, match=r"step 0, .*(left|right).*: cannot reshape.*prepared/"):
        feed(workers=workers, batches=made).next()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_is_cut_short_during_training_is_named(workers, tmp_path):
    shown = case(name="left", size=(PX, PX))
    atomic.write_npy(tmp_path / "frames.npy", shown.frames)
    mapped = SimpleNamespace(**(vars(shown) | {"frames": atomic.open_npy(tmp_path / "frames.npy")}))
    one = feed(workers=workers, batches=BatchDataset(TrainingData(ClipSampler([mapped], [1], whole(PX))), plan()))
    one.next()
    idle = 0
    while workers and idle < 5:  # no worker reads the file while it is cut
        time.sleep(0.02)
        idle = idle + 1 if (one.in_progress[:, 1] == -1).all() else 0
    os.truncate(tmp_path / "frames.npy", 200)
    with pytest.raises(TrainingError, match=r"step [1-4]: case left: frames.npy was truncated.*prepared/"):
        until_it_fails(one)


def test_on_a_cpu_and_from_random_weights_there_are_no_workers():
    assert dataloader_workers(torch.device("cpu"), from_scratch=False) == 0
    assert dataloader_workers(torch.device("cuda"), from_scratch=True) == 0
    assert dataloader_workers(torch.device("cuda"), from_scratch=False) >= 1
