"""The command pretrain: the files it writes, resuming, and the use of its weights by other commands."""

import csv
import json
import signal

import pytest
import torch
from safetensors import safe_open
from small_runs import small_workspace, write_organs

from slmsam2_cli.commands import pretrain as command
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.commands.pretrain import pretrain
from slmsam2_cli.errors import PlanError, UsageError, WeightsError
from slmsam2_cli.model.checkpoint import load_base_weights, load_weights, read_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.pretraining.recipe import SMOKE, read_recipe

TINY = {"input_size": 32, "slices_per_step": 4, "max_windows": 2, "steps": 4, "minutes": None, "validation": {"windows": 2, "length": 4}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Four steps of two images or one short clip, at 32 px."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(json.loads(SMOKE.read_text()) | TINY))
    return path


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(run, recipe=recipe, commit="abc", device="cpu") == 0
    return run


def test_it_writes_exactly_these_files(done):
    assert {p.name for p in done.iterdir() if not p.name.startswith(".")} == {
        "recipe.json",
        "log.csv",
        "log.jsonl",
        "checks.csv",
        "checks.jsonl",
        "nano.safetensors",
    }
    assert len((done / "log.csv").read_text().splitlines()) == 1 + 4
    assert len((done / "checks.csv").read_text().splitlines()) == 1 + 1


def test_weights_are_saved_in_half_precision_with_their_recipe_and_loaded_in_full_precision(done):
    read = read_checkpoint(done / "nano.safetensors")
    with safe_open(done / "nano.safetensors", framework="pt") as file:
        header = file.metadata()
    assert {t.dtype for t in read.state.values()} == {torch.float16}
    assert json.loads(header["recipe"]) == json.loads((done / "recipe.json").read_text()) and header["commit"] == "abc"
    assert (read.provenance.licence, read.provenance.steps, read.provenance.random) == ("Apache-2.0", 4, False)
    model = SlmSam2(read.network, 64)
    load_weights(model, read)
    assert model.carry_gain.dtype == torch.float32
    assert model.network == NetworkPlan(size="nano", policy="shortlong") and not read.warnings


def test_finetune_and_predict_accept_the_weights(done, tmp_path):
    workspace = small_workspace(tmp_path / "workspace", write_organs(tmp_path / "data", cases=2))
    weights = str(done / "nano.safetensors")
    assert finetune(tmp_path / "data", workspace, cases=1, weights=weights, steps=1) == 0
    tuned = read_checkpoint(workspace.model)
    assert tuned.provenance.pretrained_digest == read_checkpoint(done / "nano.safetensors").digest and not tuned.provenance.random
    labels = tmp_path / "data" / "labelsTr"
    images = tmp_path / "data" / "imagesTr"
    assert predict(images, tmp_path / "masks", simulate_from=labels, weights=weights, workspace=workspace, report=False) == 0
    assert {p.name for p in (tmp_path / "masks").glob("*.nii.gz")} == {p.name for p in labels.iterdir()}


def test_the_bundled_weights_are_read_from_such_a_file(done, monkeypatch):
    monkeypatch.setattr("slmsam2_cli.model.checkpoint.BUNDLED_WEIGHTS", done / "nano.safetensors")
    assert load_base_weights("auto").digest == read_checkpoint(done / "nano.safetensors").digest


def test_a_resumed_run_ends_with_the_same_bits_as_an_uninterrupted_one(done, recipe, tmp_path, monkeypatch):
    """SIGINT after the second of four steps."""
    train = command.train

    def interrupted(learner, *rest):
        for step in train(learner, *rest):
            if step.step == 2:
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(command, "train", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run", recipe=recipe, device="cpu")
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(command, "train", train)
    assert read_checkpoint(tmp_path / "run" / "nano.safetensors").provenance.steps == 2
    with pytest.raises(UsageError, match="--continue"):
        pretrain(tmp_path / "run", recipe=recipe, device="cpu")
    torch.manual_seed(99)
    assert pretrain(tmp_path / "run", resume=True, device="cpu") == 0
    assert read_checkpoint(tmp_path / "run" / "nano.safetensors").digest == read_checkpoint(done / "nano.safetensors").digest
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_the_loss_falls(recipe, tmp_path):
    path = tmp_path / "images.json"
    changes = {"steps": 50, "slices_per_step": 6, "max_windows": 6, "phases": [{"until": 1.0, "lengths": [1]}]}
    path.write_text(json.dumps(json.loads(recipe.read_text()) | changes))
    pretrain(tmp_path / "run", recipe=path, device="cpu")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    totals = [float(row["total"]) for row in rows]
    assert sum(totals[-10:]) < 0.75 * sum(totals[:10])


def test_parts_computed_in_parallel_give_the_same_weights_as_in_sequence(recipe, tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps(json.loads(recipe.read_text()) | {"parts": 2, "steps": 2}))
    pretrain(tmp_path / "one", recipe=path, device="cpu", threads=1)
    pretrain(tmp_path / "both", recipe=path, device="cpu", threads=2)
    one, both = (read_checkpoint(tmp_path / name / "nano.safetensors") for name in ("one", "both"))
    assert one.digest == both.digest


def test_smoke_selects_the_short_recipe(tmp_path):
    assert pretrain(tmp_path / "run", smoke=True, steps=1, device="cpu", threads=1) == 0
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert found == read_recipe(SMOKE).model_dump(mode="json") | {"steps": 1, "minutes": None}


def test_training_from_given_weights_records_their_name_and_digest(done, recipe, tmp_path):
    given = done / "nano.safetensors"
    assert pretrain(tmp_path / "run", recipe=recipe, weights=str(given), steps=1, device="cpu") == 0
    found, before = read_checkpoint(tmp_path / "run" / "nano.safetensors"), read_checkpoint(given)
    assert found.provenance.pretrained_digest == before.digest != found.digest
    assert json.loads((tmp_path / "run" / "started_from.json").read_text()) == {"name": before.name, "digest": before.digest}
    apart = max(float((found.state[name].float() - tensor.float()).abs().max()) for name, tensor in before.state.items())
    assert 0 < apart < 0.01  # one step; random weights would differ more


def test_continue_rejects_weights(done, tmp_path):
    with pytest.raises(UsageError, match="Omit .*--weights"):
        pretrain(tmp_path / "run", weights=str(done / "nano.safetensors"), resume=True)


def test_a_finished_run_is_replaced_only_with_overwrite(done, recipe):
    with pytest.raises(UsageError, match="--overwrite"):
        pretrain(done, recipe=recipe)


def test_continuing_nothing_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="nothing to continue"):
        pretrain(tmp_path / "run", resume=True)


def test_continuing_a_finished_run_is_an_error(done):
    with pytest.raises(WeightsError, match="nothing to continue"):
        pretrain(done, resume=True, device="cpu")


def test_an_unknown_recipe_key_is_rejected(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(SMOKE.read_text()) | {"learning_speed": 1}))
    with pytest.raises(PlanError, match="mine.json.*learning_speed: unknown key"):
        pretrain(tmp_path / "run", recipe=path)
