"""Fine-tuning that leaves volumes out first: what it records, when it keeps the base, how it goes on after an end nobody chose."""

import json

import numpy as np
import pytest
import torch

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import UsageError
from slmsam2_cli.model.checkpoint import label_unet_of, load_base_weights, read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.training import cross_validation
from slmsam2_cli.training.cross_validation import FoldScore
from slmsam2_cli.workspace import Workspace

STEPS = 3  # folds of one


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=3, test_cases=0, seed=3, shape=(8, 32, 32))
    return folder


@pytest.fixture(autouse=True, scope="module")
def short_folds():
    """Folds of any length are run and judged once, and every step's state is on disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cross_validation, "MIN_STEPS", 1)
        for module in (cross_validation, cross_validation):
            patched.setattr(module, "CHECKPOINTS", (1.0,))
        patched.setattr("slmsam2_cli.commands.finetune.SAVE_EVERY_S", 0.0)
        yield


@pytest.fixture(scope="module")
def without_interrupts(dataset, short_folds, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("uninterrupted"))
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0
    return workspace


@pytest.fixture
def scored(monkeypatch):
    """Lets a test say what the folds are worth after tuning, with and without the label U-Net; before it, 0.5."""

    def tell(with_it, alone):
        judged_before = set()

        def judged(model, fold, plan, weighted):
            first = fold.name not in judged_before
            judged_before.add(fold.name)
            return FoldScore(0.5 if first else with_it if weighted else alone, np.asarray(fold.held.labels))

        monkeypatch.setattr(cross_validation, "judged", judged)

    return tell


def provenance(workspace):
    return read_checkpoint(workspace.model).provenance


def test_two_volumes_are_each_left_out_once_and_the_model_says_what_came_of_it(without_interrupts):
    workspace = without_interrupts
    told, split = provenance(workspace).validation, json.loads(workspace.split.read_text())
    assert sorted(told.held_out) == split["training"] and 0 <= told.pretrained <= 1 and 0 <= told.fine_tuned <= 1
    assert told.kept == ("fine_tuned" if told.fine_tuned >= told.pretrained else "pretrained")
    record = json.loads((workspace.finetuned / "validation.json").read_text())
    assert sorted(record["done"]) == split["training"] and all(set(looks) == {"0", "1"} for looks in record["looks"].values())
    assert {path.name for path in workspace.finetuned.glob("left_out_*.png")} == {f"left_out_{name}.png" for name in split["training"]}
    assert not list(workspace.finetuned.glob("fold*")) and not list(workspace.finetuned.glob("state*"))


def test_where_tuning_makes_it_worse_the_base_is_kept_and_said_to_be(dataset, tmp_path, scored, capsys):
    scored(0.4, 0.3)
    workspace = Workspace(tmp_path)
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0
    kept, base = read_checkpoint(workspace.model), load_base_weights("auto").state
    assert set(kept.state) == set(base) and all(torch.equal(kept.state[name].float(), base[name].float()) for name in base)
    assert kept.provenance.steps == 0 and kept.provenance.validation.kept == "pretrained"
    said = capsys.readouterr().err
    assert "Dice 0.500 before tuning, 0.400 after. The base is kept as it is" in said
    assert json.loads(workspace.split.read_text())["finished"] is True
    assert finetune(dataset, workspace, cases=2, steps=STEPS) == 0  # not done twice
    assert "finished already" in capsys.readouterr().err


def test_a_label_unet_that_did_not_help_is_not_in_the_model(dataset, tmp_path, scored, capsys):
    scored(0.4, 0.6)
    workspace = Workspace(tmp_path)
    finetune(dataset, workspace, cases=2, steps=STEPS)
    assert label_unet_of(read_checkpoint(workspace.model)) is None and provenance(workspace).steps == STEPS
    assert "without the label U-Net, which did not help there" in capsys.readouterr().err


def test_a_label_unet_that_helped_is(dataset, tmp_path, scored):
    scored(0.6, 0.4)
    workspace = Workspace(tmp_path)
    finetune(dataset, workspace, cases=2, steps=STEPS)
    assert label_unet_of(read_checkpoint(workspace.model)) is not None


@pytest.mark.parametrize("moment", [3, 6])
def test_a_run_that_ends_in_a_fold_goes_on_there_and_ends_like_an_uninterrupted_one(
    without_interrupts, dataset, tmp_path, monkeypatch, moment
):
    """Whatever is judged for the so-manieth time takes the process with it: a look at the first fold, one at the second."""
    broken = Workspace(tmp_path)
    really, calls = cross_validation.judged, []

    def judged(*arguments, **options):
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return really(*arguments, **options)

    monkeypatch.setattr(cross_validation, "judged", judged)
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, broken, cases=2, steps=STEPS)
    if moment > 1:  # by then there is something to lose
        with pytest.raises(UsageError, match="an unfinished run is here. Resume with slmsam2 finetune --continue"):
            finetune(dataset, broken, cases=2, steps=STEPS)
    assert finetune(dataset, broken, resume=True) == 0
    assert read_checkpoint(broken.model).digest == read_checkpoint(without_interrupts.model).digest
    told = [(workspace.finetuned / "validation.json").read_text() for workspace in (without_interrupts, broken)]
    assert told[0] == told[1]
    assert {path.name for path in broken.finetuned.iterdir()} == {path.name for path in without_interrupts.finetuned.iterdir()}


def test_a_fold_that_worsens_is_given_up_also_when_it_is_gone_on_with(dataset, tmp_path, monkeypatch):
    """The second look is far worse than the first; a run that ends at its picture does not train on when it goes on."""
    monkeypatch.setattr(cross_validation, "draw_overlays", lambda *arguments: None)
    monkeypatch.setattr(cross_validation, "FOLD_FRACTION", 1.0)
    monkeypatch.setattr(cross_validation, "MIN_STEPS", STEPS)  # so that it is given up before it has so many
    for module in (cross_validation, cross_validation):
        monkeypatch.setattr(module, "CHECKPOINTS", (1 / 3, 2 / 3, 1.0))
    asked = []

    def judged(model, fold, plan, weighted):
        asked.append(fold.name)
        return FoldScore({0: 0.5, 1: 0.9, 2: 0.9}.get(asked.count(fold.name) - 1, 0.1), np.asarray(fold.held.labels))

    monkeypatch.setattr(cross_validation, "judged", judged)
    workspace = Workspace(tmp_path)
    finetune(dataset, workspace, cases=2, steps=STEPS)
    looks = json.loads((workspace.finetuned / "validation.json").read_text())["looks"]
    assert all(set(found) == {"0", "1", "2"} for found in looks.values())
    assert provenance(workspace).validation.kept == "pretrained" and provenance(workspace).validation.fine_tuned == 0.1


def test_a_model_that_knows_the_labels_is_judged_and_kept_with_its_label_unet(without_interrupts, dataset, tmp_path, scored):
    scored(0.4, 0.3)
    workspace = Workspace(tmp_path)
    finetune(dataset, workspace, cases=1, seed=5, steps=8, weights=str(without_interrupts.model))  # the one that it has not learned from
    kept, base = read_checkpoint(workspace.model), read_checkpoint(without_interrupts.model)
    assert kept.provenance.validation.kept == "pretrained"
    assert (label_unet_of(kept) is None) == (label_unet_of(base) is None) and set(kept.state) == set(base.state)


def test_nothing_is_left_out_of_volumes_that_the_base_has_learned_from(without_interrupts, dataset, tmp_path, capsys):
    finetune(dataset, Workspace(tmp_path), cases=2, steps=2, weights=str(without_interrupts.model))
    assert "the base has learned from these very volumes" in capsys.readouterr().err
    assert provenance(Workspace(tmp_path)).validation is None and provenance(Workspace(tmp_path)).steps == 2


def test_a_plan_can_do_without(dataset, tmp_path):
    workspace = Workspace(tmp_path)
    plan(dataset, workspace, report=False)
    planned = read_plan(workspace.plan)
    write_plan(workspace.plan, planned.model_copy(update={"training": planned.training.model_copy(update={"validation": "none"})}))
    finetune(dataset, workspace, cases=2, steps=2)
    assert provenance(workspace).validation is None and not (workspace.finetuned / "validation.json").exists()


def test_a_damaged_record_is_said_and_made_again(dataset, tmp_path, monkeypatch, capsys):
    workspace = Workspace(tmp_path)
    really = cross_validation.judged
    monkeypatch.setattr(cross_validation, "judged", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, workspace, cases=2, steps=STEPS)
    monkeypatch.setattr(cross_validation, "judged", really)
    (workspace.finetuned / "validation.json").write_text("[")
    assert finetune(dataset, workspace, resume=True) == 0
    assert "validation.json is damaged: the folds are run again" in capsys.readouterr().err
