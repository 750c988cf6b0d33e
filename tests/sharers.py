"""Learners that share their steps; in a module of its own, as spawned processes cannot import the tests."""

import os
import signal

import torch
from stacks import case, whole

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, TrainingPlan
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import SINGLE_PROCESS
from slmsam2_cli.training.label_unet import SliceSampler, new_label_unet
from slmsam2_cli.training.trainer import new_learner, train

PX = 32


def plan(**changes):
    base = {"steps": 3, "clip_slices": 3, "clips_per_step": 2, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**base, **changes})


def training_data():
    """A label on four slices of one volume and three of another, whose last slices are ignored."""
    two = [case(slices=8, held=range(2, 6), size=(PX, PX)), case(slices=8, held=range(3, 6), size=(PX, PX), name="b")]
    two[1].labels[6:] = 9
    return TrainingData(ClipSampler(two, [1], whole(PX), 9), SliceSampler(two, [1], PX, 9))


def learner(settings):
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    model.label_unet = new_label_unet(training_data().slices, 1, 0)
    return new_learner(model, settings, from_scratch=False)


def steps(one, settings, group=SINGLE_PROCESS, until=None):
    return list(train(one, training_data(), settings, lambda: until is not None and one.step >= until, group))


def help_on(settings, one, group):
    steps(one, settings, group)


def die_on(settings, one, group):
    for _ in train(one, training_data(), settings, lambda: False, group):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_on(settings, one, group):
    raise TrainingError("step 1, a: the volume is damaged")
