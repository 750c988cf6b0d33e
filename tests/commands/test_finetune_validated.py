"""Fine-tuning with cross-validation: what it records, which model it keeps, and how it resumes."""

import json

import numpy as np
import pytest
import torch
from small_runs import beside, small_workspace, write_organs

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.errors import UsageError
from slmsam2_cli.model.checkpoint import label_unet_of, load_base_weights, read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.training import background, cross_validation
from slmsam2_cli.training.cross_validation import FoldScore

STEPS = 2  # folds have one


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_organs(tmp_path_factory.mktemp("phantoms"), cases=3)


@pytest.fixture(autouse=True, scope="module")
def short_folds():
    """Folds of any length are run and scored once, in this process as with one core."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(background, "available_cpus", lambda: 1)
        patched.setattr(cross_validation, "MIN_STEPS", 1)
        patched.setattr(cross_validation, "CHECKPOINTS", (1.0,))
        yield


@pytest.fixture(scope="module")
def without_interrupts(dataset, short_folds, tmp_path_factory):
    workspace = small_workspace(tmp_path_factory.mktemp("uninterrupted"), dataset)
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0
    return workspace


@pytest.fixture
def workspace(without_interrupts, tmp_path):
    """A workspace with the same plan and prepared cases, in which nothing was trained."""
    return beside(without_interrupts, tmp_path / "workspace")


@pytest.fixture
def scored(monkeypatch):
    """Sets the score of the folds after fine-tuning, with and without the label U-Net; before it, 0.5."""

    def set_scores(with_it, without):
        scored_before = set()

        def score_fold(model, fold, plan, use_label_prior):
            first = fold.name not in scored_before
            scored_before.add(fold.name)
            return FoldScore(0.5 if first else with_it if use_label_prior else without, np.asarray(fold.held_out.labels))

        monkeypatch.setattr(cross_validation, "score_fold", score_fold)

    return set_scores


def provenance(workspace):
    return read_checkpoint(workspace.model).provenance


def test_two_cases_are_each_held_out_once_and_the_model_contains_the_result(without_interrupts):
    workspace = without_interrupts
    result, split = provenance(workspace).validation, json.loads(workspace.split.read_text())
    assert sorted(result.held_out) == split["training"] and 0 <= result.pretrained <= 1 and 0 <= result.fine_tuned <= 1
    assert result.kept == ("fine_tuned" if result.fine_tuned >= result.pretrained else "pretrained")
    record = json.loads((workspace.finetuned / "validation.json").read_text())
    assert (
        sorted(record["done"]) == split["training"]
        and record["format_version"] == 2
        and all(set(scores) == {"0", "1"} for scores in record["checkpoints"].values())
    )
    assert {path.name for path in workspace.finetuned.glob("held_out_*.png")} == {f"held_out_{name}.png" for name in split["training"]}
    assert not list(workspace.finetuned.glob("fold*")) and not list(workspace.finetuned.glob("state*"))


def test_where_fine_tuning_lowers_dice_the_pretrained_model_is_kept(dataset, workspace, scored, capsys):
    scored(0.4, 0.3)
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0
    kept, base = read_checkpoint(workspace.model), load_base_weights("auto").state
    assert set(kept.state) == set(base) and all(torch.equal(kept.state[name].float(), base[name].float()) for name in base)
    assert kept.provenance.steps == 0 and kept.provenance.validation.kept == "pretrained"
    printed = capsys.readouterr().err
    assert "Dice 0.500 pretrained, 0.400 fine-tuned. Keeping the pretrained model" in printed
    assert json.loads(workspace.split.read_text())["finished"] is True
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0  # not repeated
    assert "already finished" in capsys.readouterr().err


def test_a_label_unet_that_did_not_improve_dice_is_not_in_the_model(dataset, workspace, scored, capsys):
    scored(0.4, 0.6)
    finetune(dataset, workspace, cases=2, steps=STEPS)
    assert label_unet_of(read_checkpoint(workspace.model)) is None and provenance(workspace).steps == STEPS
    assert "without the label U-Net, which did not improve Dice" in capsys.readouterr().err


def test_a_run_interrupted_in_a_fold_resumes_there_and_ends_like_an_uninterrupted_one(without_interrupts, dataset, workspace, monkeypatch):
    """The process ends when a model is scored for the sixth time: in the second fold, with the first one recorded."""
    broken = workspace
    really, calls = cross_validation.score_fold, []

    def score_fold(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return really(*arguments, **options)

    monkeypatch.setattr(cross_validation, "score_fold", score_fold)
    monkeypatch.setattr("slmsam2_cli.commands.finetune.SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, broken, cases=2, steps=STEPS)
    with pytest.raises(UsageError, match="there is an unfinished run. Resume it with slmsam2 finetune --continue"):
        finetune(dataset, broken, cases=2, steps=STEPS)
    assert finetune(dataset, broken, resume=True) == 0
    assert read_checkpoint(broken.model).digest == read_checkpoint(without_interrupts.model).digest
    records = [(workspace.finetuned / "validation.json").read_text() for workspace in (without_interrupts, broken)]
    assert records[0] == records[1]
    assert {path.name for path in broken.finetuned.iterdir()} == {path.name for path in without_interrupts.finetuned.iterdir()}


def test_a_fold_that_gets_worse_is_stopped(dataset, workspace, monkeypatch):
    """The second checkpoint is far worse than the first, so there is no third."""
    monkeypatch.setattr(cross_validation, "draw_overlays", lambda *arguments: None)
    monkeypatch.setattr(cross_validation, "FOLD_FRACTION", 1.0)
    steps = 3
    monkeypatch.setattr(cross_validation, "MIN_STEPS", steps)  # more than the fold has when it is stopped
    monkeypatch.setattr(cross_validation, "CHECKPOINTS", (1 / 3, 2 / 3, 1.0))
    scored_folds = []

    def score_fold(model, fold, plan, use_label_prior):
        scored_folds.append(fold.name)
        return FoldScore({0: 0.5, 1: 0.9, 2: 0.9}.get(scored_folds.count(fold.name) - 1, 0.1), np.asarray(fold.held_out.labels))

    monkeypatch.setattr(cross_validation, "score_fold", score_fold)
    finetune(dataset, workspace, cases=2, steps=steps)
    folds = json.loads((workspace.finetuned / "validation.json").read_text())["checkpoints"]
    assert all(set(found) == {"0", "1", "2"} for found in folds.values())
    assert provenance(workspace).validation.kept == "pretrained" and provenance(workspace).validation.fine_tuned == 0.1


def test_a_pretrained_model_with_a_label_unet_is_scored_and_kept_with_it(without_interrupts, dataset, workspace, scored):
    scored(0.4, 0.3)
    finetune(dataset, workspace, cases=1, seed=5, steps=8, weights=str(without_interrupts.model))  # the case on which it was not trained
    kept, base = read_checkpoint(workspace.model), read_checkpoint(without_interrupts.model)
    assert kept.provenance.validation.kept == "pretrained"
    assert (label_unet_of(kept) is None) == (label_unet_of(base) is None) and set(kept.state) == set(base.state)


def test_training_cases_of_the_pretrained_model_are_not_held_out(without_interrupts, dataset, workspace, capsys):
    finetune(dataset, workspace, cases=2, steps=STEPS, weights=str(without_interrupts.model))
    assert "skipping cross-validation: the pretrained model was trained on these cases" in capsys.readouterr().err
    assert provenance(workspace).validation is None and provenance(workspace).steps == STEPS


def test_a_plan_may_exclude_cross_validation(dataset, workspace):
    planned = read_plan(workspace.plan)
    write_plan(workspace.plan, planned.model_copy(update={"training": planned.training.model_copy(update={"validation": "none"})}))
    finetune(dataset, workspace, cases=2, steps=STEPS)
    assert provenance(workspace).validation is None and not (workspace.finetuned / "validation.json").exists()


def test_with_a_damaged_record_cross_validation_starts_again_and_a_label_unet_that_improved_dice_is_in_the_model(
    dataset, workspace, monkeypatch, capsys, scored
):
    monkeypatch.setattr(cross_validation, "score_fold", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, workspace, cases=2, steps=STEPS)
    scored(0.6, 0.4)
    (workspace.finetuned / "validation.json").write_text("[")
    assert finetune(dataset, workspace, resume=True) == 0
    assert "validation.json is damaged; cross-validation starts again" in capsys.readouterr().err
    assert label_unet_of(read_checkpoint(workspace.model)) is not None
