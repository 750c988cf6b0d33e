"""One training run from its first step to its last: what it learns from, its learner, a bar to watch, states to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from slmsam2_cli import console
from slmsam2_cli.data.prepared import PreparedCase, check_whole
from slmsam2_cli.errors import PlanError
from slmsam2_cli.finetuning.clips import ClipSampler
from slmsam2_cli.finetuning.feeding import Material
from slmsam2_cli.finetuning.learner import Progress
from slmsam2_cli.finetuning.loop import Learner, new_learner, train
from slmsam2_cli.finetuning.recognising import SliceSampler, new_recogniser
from slmsam2_cli.finetuning.resume import save_state
from slmsam2_cli.finetuning.sharing import Ranks, shared
from slmsam2_cli.finetuning.strategies import prepare
from slmsam2_cli.model.checkpoint import Checkpoint, fit
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import Plan, TrainingPlan

_WHOLE = 1000  # parts of a bar


def material_of(cases: Sequence[PreparedCase], plan: Plan) -> Material:
    """DatasetError when none of the cases can be learned from, ArrayError when a file of one was cut short."""
    for case in cases:
        check_whole(case)
    values, px = tuple(plan.labels), plan.geometry.stack_px
    clips = ClipSampler(cases, values, plan.geometry, plan.ignore)
    return Material(clips, SliceSampler(cases, values, px, plan.ignore) if plan.training.recogniser else None)


def absent_labels(cases: Sequence[PreparedCase], plan: Plan) -> list[str]:
    """The plan's labels that none of the cases holds, by name and value."""
    held = {int(value) for case in cases if case.labels is not None for value in np.unique(case.labels)}
    return [f"{name} ({value})" for value, name in plan.labels.items() if value not in held]


def new_model(plan: Plan, base: Checkpoint | None, seed: int = 0) -> SlmSam2:
    """The plan's network with the base's weights, or with random ones drawn from the seed, ready for the plan's strategy.

    WeightsError when the weights do not fit; PlanError when there are none for the strategy to build on.
    """
    if base is None and plan.training.strategy != "full":
        raise PlanError(
            f"training.strategy is {plan.training.strategy}, which trains a part of the network, but --weights random has no other part. "
            "Start from trained weights, or set it to full in plan.json"
        )
    torch.manual_seed(seed)
    model = SlmSam2(plan.network, plan.geometry.frame_px)
    if base is not None:
        fit(model, base)
    for note in prepare(model, plan.training, plan.modality, len(plan.channels)):
        console.detail(note)
    return model


def fresh_learner(plan: Plan, base: Checkpoint | None, material: Material, device: torch.device) -> Learner:
    """A learner at step 0; the seed is the plan's."""
    model = new_model(plan, base, plan.training.seed)
    if material.slices is not None:
        model.recogniser = new_recogniser(material.slices, len(plan.channels), plan.training.seed)
        model.recogniser.raises = plan.training.finds is not False
    lowered = base.provenance.lowered if base is not None and base.provenance is not None else 0.0
    return new_learner(model.to(device), plan.training, base is None, lowered)


def follow(
    learner: Learner,
    material: Material,
    training: TrainingPlan,
    stopped: Callable[[], bool],
    *,
    title: str,
    state: Path,
    settings: str,
    every_s: float,
    told: Callable[[Progress], str],
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Train with a bar; every so many seconds the state is saved, and `saved` told. `told` sees each step, and says what the bar shows."""
    last, begun, at = time.monotonic(), learner.step, 0
    helping = partial(_helping, material, training)
    with console.progress(title, _WHOLE) as advance, shared(learner, training.processes, helping) as ranks:
        for progress in train(learner, material, training, stopped, ranks):
            said, now_at = told(progress), int(progress.done * _WHOLE)
            advance(now_at - at, said)
            at = now_at
            if time.monotonic() - last > every_s:
                save_state(state, learner, settings)
                saved()
                last = time.monotonic()
    if learner.step == begun:
        console.say("nothing was left to train")


def _helping(material: Material, training: TrainingPlan, learner: Learner, ranks: Ranks) -> None:
    """What a process that shares the steps does: each of them, until the first one says that it is over."""
    for _ in train(learner, material, training, lambda: False, ranks):
        pass
