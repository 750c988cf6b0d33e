"""A prepared case that is cut short while it is in use: one line, and the saved state stays usable."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
from small_runs import beside, small_workspace, write_organs

from slmsam2_cli.commands import finetune as stage
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.dataset.cache import open_prepared
from slmsam2_cli.errors import OutputError, SlmSam2Error, TrainingError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.training import calibrate, cross_validation, trainer
from slmsam2_cli.training.cross_validation import Fold, label_areas, make_folds, score_fold
from slmsam2_cli.training.interrupts import ResumableError, resumable
from slmsam2_cli.workspace import Workspace

STEPS = 4
OPTIONS = {"cases": 2, "weights": "random", "steps": STEPS, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_organs(tmp_path_factory.mktemp("data"), cases=2)


@pytest.fixture(scope="module")
def without_interrupts(data, tmp_path_factory):
    """A workspace whose model was trained to the end."""
    workspace = small_workspace(tmp_path_factory.mktemp("uninterrupted"), data)
    assert finetune(data, workspace, **OPTIONS) == 0
    return workspace


def cut(workspace, name="frames"):
    for path in workspace.root.rglob(f"{name}.npy"):
        os.truncate(path, 200)


def test_the_run_ends_in_one_line_and_resumes_to_the_same_weights(data, without_interrupts, tmp_path, monkeypatch):
    disturbed = beside(without_interrupts, tmp_path / "disturbed")
    monkeypatch.setattr(stage, "SAVE_EVERY_S", 0.0)
    saved = []

    def save_and_cut(*given):
        cross_validation.save_state(*given)
        saved.append(given[1].step)
        if saved[-1] == STEPS // 2:
            cut(disturbed)

    monkeypatch.setattr(trainer, "save_state", save_and_cut)
    with pytest.raises(TrainingError, match=rf"step {STEPS // 2}: case \w+: frames.npy was truncated.*slmsam2 finetune --continue"):
        finetune(data, disturbed, **OPTIONS)
    assert saved[-1] == STEPS // 2
    assert finetune(data, disturbed, resume=True) == 0
    assert read_checkpoint(disturbed.model).digest == read_checkpoint(without_interrupts.model).digest


@pytest.mark.parametrize("name", ["frames", "labels"])
def test_every_reader_of_a_case_notices_that_it_was_cut_short(without_interrupts, tmp_path, name):
    space = Workspace(shutil.copytree(without_interrupts.root, tmp_path / "work"))
    plan = read_plan(space.plan)
    cases = [open_prepared(space.prepared, f"phantom_00{number}") for number in (0, 1)]
    fold = Fold("one", (cases[1],), replace(cases[0], frames=cases[0].frames[:, :6], labels=cases[0].labels[:6]))
    model = trainer.new_model(plan, read_checkpoint(space.model))
    cut(space, name)
    for read in (
        lambda: score_fold(model, fold, plan, use_label_prior=False),
        lambda: calibrate.confidence_and_dice(model, cases, plan),
        lambda: make_folds(cases, plan),
        lambda: label_areas(cases[0], 1, None),
        lambda: trainer.training_data_of(cases, plan),
        lambda: cross_validation.draw_overlays(tmp_path / "x.png", cases[0], cases[0].labels, "title"),
    ):
        with pytest.raises(atomic.ArrayError, match=rf"case phantom_00[01]: {name}.npy was truncated"):
            read()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            atomic.ArrayError("case a: frames.npy was truncated"),
            r"truncated. Run: slmsam2 finetune --continue, which prepares the file again$",
        ),
        (OutputError("model: the disk is full"), r"full. Fix this, then run: slmsam2 finetune --continue$"),
    ],
)
def test_errors_during_a_run_say_how_to_resume(error, message):
    with pytest.raises(ResumableError, match=message), resumable("slmsam2 finetune"):
        raise error
    with pytest.raises(SlmSam2Error, match="^unchanged$"), resumable("slmsam2 finetune"):
        raise TrainingError("unchanged")
