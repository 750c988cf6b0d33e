"""Learners that share their steps. Processes that are spawned import this by its name, as they cannot the tests themselves."""

import os
import signal

import torch
from stacks import case, whole

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, TrainingPlan
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import ALONE
from slmsam2_cli.training.label_unet import SliceSampler, new_label_unet
from slmsam2_cli.training.trainer import new_learner, train

PX = 32


def plan(**changes):
    base = {"steps": 3, "clip_slices": 3, "clips_per_step": 2, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**base, **changes})


def training_data():
    """A label on four slices of one volume and three of another, of which the last were not looked at."""
    two = [case(slices=8, held=range(2, 6), size=(PX, PX)), case(slices=8, held=range(3, 6), size=(PX, PX), name="b")]
    two[1].labels[6:] = 9
    return TrainingData(ClipSampler(two, [1], whole(PX), 9), SliceSampler(two, [1], PX, 9))


def learner(settings):
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    model.label_unet = new_label_unet(training_data().slices, 1, 0)
    return new_learner(model, settings, from_scratch=False)


def steps(one, settings, ranks=ALONE, until=None):
    return list(train(one, training_data(), settings, lambda: until is not None and one.step >= until, ranks))


def help_on(settings, one, ranks):
    steps(one, settings, ranks)


def die_on(settings, one, ranks):
    for _ in train(one, training_data(), settings, lambda: False, ranks):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_on(settings, one, ranks):
    raise TrainingError("step 1, a: the volume is damaged")
