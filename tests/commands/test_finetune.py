"""The command finetune: what it writes, its errors, and what it does on a second call."""

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from published import tuned_slm_sam2
from safetensors import safe_open
from small_runs import beside, small, small_workspace, write_organs

from slmsam2_cli.commands import finetune as stage
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, DeviceError, OutputError, PlanError, UsageError, WeightsError
from slmsam2_cli.io import atomic
from slmsam2_cli.model.checkpoint import Provenance, combine_with_base, label_unet_of, read_checkpoint, save_checkpoint
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import read_plan, with_digest, write_plan
from slmsam2_cli.planning.rules import choose_training, decide, override_training, training_for
from slmsam2_cli.training import trainer
from slmsam2_cli.training.interrupts import memory_warning
from slmsam2_cli.training.state import save_model
from slmsam2_cli.workspace import Workspace

SHAPE = (10, 40, 40)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four phantoms with one label, on enough slices to calibrate a model trained on two of them."""
    return write_organs(tmp_path_factory.mktemp("phantoms"), cases=4, test_cases=1, shape=(16, 32, 32))


@pytest.fixture(scope="module")
def organs(tmp_path_factory):
    """Four smaller phantoms with one label."""
    return write_organs(tmp_path_factory.mktemp("organs"), cases=4, test_cases=1)


@pytest.fixture
def workspace(organs, tmp_path):
    """A workspace with a plan for `organs` whose steps are quick."""
    return small_workspace(tmp_path / "workspace", organs)


@pytest.fixture(scope="module")
def tuned(dataset):
    workspace = Workspace(dataset / "slmsam2")
    assert finetune(dataset, workspace, cases=2, weights="random", steps=1) == 0
    return workspace


@pytest.fixture
def copied(tuned, tmp_path):
    """A copy of `tuned` that a test may change."""
    return Workspace(shutil.copytree(tuned.root, tmp_path / "copied"))


@pytest.fixture(scope="module")
def tuned_again(tuned, dataset, tmp_path_factory):
    """A workspace in which the model of `tuned` was trained on one more case."""
    workspace = beside(tuned, tmp_path_factory.mktemp("tuned_again"))
    write_plan(workspace.plan, small(read_plan(tuned.plan)))
    finetune(dataset, workspace, cases=1, weights=str(tuned.model), steps=1, seed=1)
    return workspace


def test_a_run_plans_preprocesses_and_trains_and_writes_exactly_these_files(tuned):
    assert tuned.plan.exists() and tuned.fingerprint.exists()
    written = {"split.json", "model.safetensors", "log.csv", "log.jsonl", "progress.png"}
    assert {p.name for p in tuned.finetuned.iterdir()} - {"tensorboard"} == written


def test_the_split_names_training_and_held_out_cases_and_they_do_not_overlap(tuned):
    split = json.loads(tuned.split.read_text())
    assert len(split["training"]) == 2 and len(split["held_out"]) == 2
    assert not set(split["training"]) & set(split["held_out"])
    assert split["finished"] is True


def test_the_model_contains_plan_and_provenance_and_is_marked_as_random(tuned):
    checkpoint = read_checkpoint(tuned.model)
    assert checkpoint.plan is not None and checkpoint.plan.training.steps == 1
    assert checkpoint.provenance.random and checkpoint.provenance.pretrained == "random"
    assert list(checkpoint.provenance.training) == json.loads(tuned.split.read_text())["training"]
    with safe_open(tuned.model, framework="pt") as file:
        assert file.metadata()["digest"] == checkpoint.digest


def test_the_log_has_one_row_per_step(tuned):
    rows = (tuned.finetuned / "log.csv").read_text().splitlines()
    assert rows[0].startswith("step,seconds") and len(rows) == 2


def test_a_finished_run_is_not_repeated(tuned, dataset, capsys):
    before = tuned.model.stat().st_mtime_ns
    assert finetune(dataset, tuned, cases=2, weights="random", steps=1) == 0
    assert "already finished" in capsys.readouterr().err
    assert tuned.model.stat().st_mtime_ns == before


def test_a_split_of_an_earlier_format_is_an_error_that_names_overwrite(tuned, dataset):
    saved = tuned.split.read_bytes()
    tuned.split.write_text(json.dumps(json.loads(saved) | {"format_version": 1}))
    with pytest.raises(UsageError, match=r"split.json: format_version 1 is not supported \(supported: 2\). Use --overwrite"):
        finetune(dataset, tuned, cases=2, weights="random", steps=1)
    tuned.split.write_bytes(saved)


def test_another_runs_model_is_not_overwritten_without_overwrite(tuned, dataset):
    with pytest.raises(UsageError, match="--overwrite"):
        finetune(dataset, tuned, cases=1, weights="random", steps=1)


def test_without_bundled_weights_the_error_names_weights_random(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("slmsam2_cli.model.checkpoint.BUNDLED_WEIGHTS", tmp_path / "absent")
    with pytest.raises(WeightsError, match="--weights random"):
        finetune(dataset, Workspace(tmp_path), cases=1)


def test_continuing_nothing_is_an_error(dataset, tmp_path):
    with pytest.raises(WeightsError, match="nothing to continue"):
        finetune(dataset, Workspace(tmp_path), cases=1, weights="random", steps=1, resume=True)


def test_a_label_that_is_absent_from_all_training_cases_is_named(tmp_path, capsys):
    write_organs(tmp_path / "data", cases=1)
    description = tmp_path / "data" / "dataset.json"
    value = json.loads(description.read_text())
    description.write_text(json.dumps(value | {"labels": value["labels"] | {"9": "ghost"}}))
    assert finetune(tmp_path / "data", small_workspace(tmp_path / "w", tmp_path / "data"), cases=1, weights="random", steps=1) == 0
    assert "warning: ghost (9): absent from all training cases" in capsys.readouterr().err


def test_zero_cases_are_an_error(dataset, tmp_path):
    with pytest.raises(UsageError, match="-n 0"):
        finetune(dataset, Workspace(tmp_path), cases=0, weights="random")


def test_another_network_than_the_plans_is_an_error(tuned, dataset):
    with pytest.raises(PlanError, match="--network tiny"):
        finetune(dataset, tuned, cases=2, weights="random", network="tiny")


def test_a_plan_for_other_channels_is_an_error_before_preprocessing(tuned, tmp_path):
    write_phantom_dataset(tmp_path / "other", cases=1, test_cases=0, seed=3, shape=SHAPE)
    description = tmp_path / "other" / "dataset.json"
    description.write_text(description.read_text().replace('"MRI"', '"T2"'))
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    workspace.plan.write_bytes(tuned.plan.read_bytes())
    with pytest.raises(PlanError, match="MRI.*T2"):
        finetune(tmp_path / "other", workspace, cases=1, weights="random")
    assert not workspace.prepared.exists()


def test_running_out_of_memory_is_one_line_with_a_setting_that_needs_half(dataset, tuned, tmp_path, monkeypatch):
    def starved(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    workspace = Workspace(tmp_path)
    workspace.plan.write_bytes(tuned.plan.read_bytes())
    monkeypatch.setattr("slmsam2_cli.training.trainer.train", starved)
    with pytest.raises(DeviceError, match=r"^out of memory. Set training.clip_slices to 4 in plan.json \(now 8\), or close other"):
        finetune(dataset, workspace, cases=1, weights="random", steps=1, device="cpu")


def test_two_workers_share_the_steps_of_a_run(organs, workspace, capsys):
    assert finetune(organs, workspace, cases=2, weights="random", steps=2, workers=2) == 0
    assert ", 2 processes" in capsys.readouterr().err
    assert read_checkpoint(workspace.model).plan.training.workers == 2
    assert json.loads(workspace.split.read_text())["options"]["workers"] == 2


def test_more_workers_than_cores_are_an_error_before_training(dataset, tmp_path):
    with pytest.raises(DeviceError, match="--workers 64 needs 64 CPU cores"):
        finetune(dataset, Workspace(tmp_path), cases=1, weights="random", steps=1, workers=64)


def test_an_interrupted_run_resumes_with_its_own_options_and_ends_like_an_uninterrupted_one(organs, workspace, tmp_path, monkeypatch):
    """SIGINT after the second of three steps; --continue needs nothing but itself."""
    import signal

    from slmsam2_cli.training import trainer as stage

    whole, broken = workspace, beside(workspace, tmp_path / "broken")
    finetune(organs, whole, cases=1, weights="random", steps=3, seed=1)
    train = stage.train

    def interrupted(learner, *rest):
        for progress in train(learner, *rest):
            if learner.step == 2:
                signal.raise_signal(signal.SIGINT)
            yield progress

    monkeypatch.setattr(stage, "train", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        finetune(organs, broken, cases=1, weights="random", steps=3, seed=1)
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(stage, "train", train)
    assert json.loads(broken.split.read_text())["finished"] is False and broken.model.exists()
    assert finetune(organs, broken, resume=True) == 0
    assert read_checkpoint(broken.model).digest == read_checkpoint(whole.model).digest
    assert [row.split(",")[0] for row in (broken.finetuned / "log.csv").read_text().splitlines()] == ["step", "1", "2", "3"]


def test_a_disk_that_fails_during_training_is_one_line_that_says_how_to_resume(organs, workspace, monkeypatch):
    train, broken, disk, begun = trainer.train, workspace, ExitStack(), []

    def until_the_disk_fails(learner, *rest):
        begun.append(learner.step)
        for progress in train(learner, *rest):
            if learner.step == 2 and len(begun) == 1:
                disk.enter_context(atomic.fail_at(1))
            yield progress

    monkeypatch.setattr(trainer, "train", until_the_disk_fails)
    monkeypatch.setattr(stage, "SAVE_EVERY_S", 0.0)
    with disk, pytest.raises(OutputError, match="could not be written: .*then run: slmsam2 finetune --continue$"):
        finetune(organs, broken, cases=1, weights="random", steps=3, seed=1)
    assert not broken.model.exists()
    assert finetune(organs, broken, resume=True) == 0
    assert begun == [0, 1]
    assert read_checkpoint(broken.model).provenance.steps == 3


def test_a_disk_that_fails_before_training_is_a_line_without_continue(copied, dataset):
    shutil.rmtree(copied.prepared)
    with atomic.fail_at(1), pytest.raises(OutputError, match="Fix this and try again, or choose a workspace") as caught:
        finetune(dataset, copied, cases=1, weights="random", steps=1, seed=2, overwrite=True)
    assert "--continue" not in str(caught.value)


def test_an_invalid_training_case_is_an_error_unless_it_may_be_skipped(tmp_path):
    write_organs(tmp_path, cases=3)
    workspace = Workspace(tmp_path / "slmsam2")
    broken = sorted((tmp_path / "imagesTr").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DatasetError) as caught:
        finetune(tmp_path, workspace, cases=2, weights="random", steps=1)
    assert [problem.case for problem in caught.value.problems] == [broken.name.removesuffix(".nii.gz")]
    assert not workspace.model.exists()
    assert finetune(tmp_path, workspace, cases=2, weights="random", steps=1, skip_invalid=True) == 0


def test_a_model_fine_tuned_from_random_weights_stays_marked_as_random(tuned, tuned_again):
    provenance = read_checkpoint(tuned_again.model).provenance
    assert provenance.random and provenance.pretrained_digest == read_checkpoint(tuned.model).digest


def test_training_cases_of_the_pretrained_model_never_count_as_held_out(tuned, tuned_again):
    before = json.loads(tuned.split.read_text())["training"]
    split = json.loads(tuned_again.split.read_text())
    assert set(before) <= set(split["training"]) and not set(before) & set(split["held_out"])
    assert set(before) <= set(read_checkpoint(tuned_again.model).provenance.training)


def test_an_unfinished_run_is_not_replaced_silently(copied, dataset):
    copied.model.rename(copied.finetuned / "state.safetensors")
    with pytest.raises(UsageError, match="--continue"):
        finetune(dataset, copied, cases=1, weights="random", steps=1)


def by_rule(count, from_scratch=False, **changes):
    return choose_training("nano", count, from_scratch).value.model_copy(update=changes)


def test_edited_training_settings_are_kept_and_default_ones_fitted_to_the_run(tuned):
    planned = read_plan(tuned.plan)
    assert training_for(planned, 2, from_scratch=True) == by_rule(2, from_scratch=True, can_add=True)
    own = planned.model_copy(update={"training": planned.training.model_copy(update={"learning_rate": 1e-5})})
    assert training_for(own, 2, from_scratch=True).learning_rate == 1e-5


def test_an_edit_outside_training_leaves_the_default_settings_of_the_number_of_cases(tuned):
    planned = read_plan(tuned.plan)
    many = with_digest(planned.model_copy(update={"training": choose_training("nano", 20).value}))
    edited = many.model_copy(update={"network": many.network.model_copy(update={"policy": "fifo"})})
    assert edited.edited and training_for(edited, 1) == by_rule(1, can_add=False)
    timid = many.model_copy(update={"training": many.training.model_copy(update={"can_add": False, "object_score_target": "ground_truth"})})
    assert training_for(timid, 5) == by_rule(5, can_add=False, object_score_target="ground_truth")


def test_continue_and_overwrite_together_are_an_error(dataset, tmp_path):
    with pytest.raises(UsageError, match="cannot be combined"):
        finetune(dataset, Workspace(tmp_path), cases=1, weights="random", resume=True, overwrite=True)


def test_a_published_slm_sam2_is_fine_tuned_with_its_own_fuser(organs, workspace, tmp_path, capsys):
    base = tuned_slm_sam2(tmp_path / "slm.pt")
    finetune(organs, workspace, cases=1, weights=str(base), steps=1)
    assert "warning: plan.json has network.fuser gated, but slm.pt has sum: using sum" in capsys.readouterr().err
    model = read_checkpoint(workspace.model)
    assert model.network.fuser == model.plan.network.fuser == "sum" and "stream_fuser.gate" not in model.state


def test_a_new_plan_has_the_fuser_of_the_weights(dataset, tmp_path, capsys):
    from slmsam2_cli.commands.finetune import _plan

    workspace, base = Workspace(tmp_path / "space"), read_checkpoint(tuned_slm_sam2(tmp_path / "slm.pt"))
    workspace.root.mkdir()
    assert _plan(read_dataset(dataset), workspace, None, base).network.fuser == "sum"
    assert _plan(read_dataset(dataset), workspace, None, base).network.fuser == read_plan(workspace.plan).network.fuser == "sum"
    assert "network.fuser" not in capsys.readouterr().err


# Label U-Net


def test_the_model_has_a_label_unet_and_predict_records_its_dice_on_annotated_slices(tuned, dataset, tmp_path):
    known = label_unet_of(read_checkpoint(tuned.model))
    assert known.values == list(read_plan(tuned.plan).labels)
    assert predict(None, tmp_path / "masks", dataset=dataset, workspace=tuned, report=False) == 0
    cases = json.loads((tmp_path / "masks" / "manifest.json").read_text(encoding="utf-8"))["cases"]
    scores = [score for case in cases.values() for score in case["label_prior_dice"].values()]
    assert scores and all(0 <= score <= 1 for score in scores)


def test_a_plan_may_exclude_the_label_unet(organs, tmp_path):
    workspace = small_workspace(tmp_path, organs, label_unet=False)
    finetune(organs, workspace, cases=2, weights="random", steps=1)
    assert label_unet_of(read_checkpoint(workspace.model)) is None


def test_a_plan_without_edits_is_trained_with_the_current_default_settings(tuned):
    planned = read_plan(tuned.plan)
    earlier = with_digest(planned.model_copy(update={"training": planned.training.model_copy(update={"steps": 520, "clips_per_step": 2})}))
    assert training_for(earlier, 2, from_scratch=False) == by_rule(2, can_add=False)


def test_a_saved_model_keeps_whether_its_label_unet_may_add_structures(tuned, tmp_path):
    planned, path = read_plan(tuned.plan), tmp_path / "one.safetensors"
    model = SlmSam2(planned.network, planned.geometry.input_size)
    model.label_unet = LabelUNet(1, list(planned.labels), 32, width=8)
    for may in (False, True):
        model.label_unet.can_add = may
        save_model(path, model, planned, Provenance(pretrained="base"), None, None)  # whatever the run's plan says
        assert label_unet_of(read_checkpoint(path)).can_add is may


@pytest.mark.parametrize(("object_score", "may"), [("teacher", False), ("ground_truth", True)])
def test_without_can_add_in_the_plan_the_object_score_target_decides(tuned, tmp_path, object_score, may):
    planned, path = read_plan(tuned.plan), tmp_path / "one.safetensors"
    model = SlmSam2(planned.network, planned.geometry.input_size)
    model.label_unet = LabelUNet(1, list(planned.labels), 32, width=8)
    earlier = planned.model_copy(update={"training": planned.training.model_copy(update={"object_score_target": object_score})})
    save_checkpoint(path, model, earlier, Provenance(pretrained="base"))
    assert label_unet_of(read_checkpoint(path)).can_add is may


# Strategies


@pytest.fixture(scope="module")
def adapted(dataset, tuned, tmp_path_factory):
    """A workspace whose plan has the strategy adapters, trained for two steps from `tuned`."""
    workspace = Workspace(tmp_path_factory.mktemp("adapted"))
    planned = read_plan(tuned.plan)
    write_plan(workspace.plan, small(planned, strategy="adapters"))
    assert finetune(dataset, workspace, cases=2, weights=str(tuned.model), steps=2) == 0
    return workspace


def test_adapters_are_saved_in_the_model_and_in_a_file_that_names_its_base(adapted, tuned):
    whole, small = read_checkpoint(adapted.model), read_checkpoint(adapted.finetuned / "adapter.safetensors")
    assert {p.name for p in adapted.finetuned.iterdir()} - {"tensorboard"} == {
        "split.json",
        "model.safetensors",
        "adapter.safetensors",
        "log.csv",
        "log.jsonl",
        "progress.png",
    }
    assert whole.base_digest == read_checkpoint(tuned.model).base_digest == small.required_base.digest
    assert whole.modalities == small.modalities == (whole.plan.modality,)
    assert whole.plan.training.strategy == "adapters" and whole.plan.training.steps == 2
    assert combine_with_base(small, read_checkpoint(tuned.model)).digest == whole.digest


def test_an_interrupted_run_with_adapters_ends_like_an_uninterrupted_one(adapted, dataset, tuned, tmp_path, monkeypatch):
    import signal

    from slmsam2_cli.training import trainer as stage

    broken = Workspace(tmp_path)
    broken.plan.write_bytes(adapted.plan.read_bytes())
    train = stage.train

    def interrupted(learner, *rest):
        for progress in train(learner, *rest):
            signal.raise_signal(signal.SIGINT)
            yield progress

    monkeypatch.setattr(stage, "train", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, broken, cases=2, weights=str(tuned.model), steps=2)
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(stage, "train", train)
    assert finetune(dataset, broken, weights=str(tuned.model), resume=True) == 0
    assert read_checkpoint(broken.model).digest == read_checkpoint(adapted.model).digest


def test_adapters_need_pretrained_weights(adapted, dataset, tmp_path):
    workspace = Workspace(tmp_path)
    workspace.plan.write_bytes(adapted.plan.read_bytes())
    with pytest.raises(PlanError, match="training.strategy is adapters"):
        finetune(dataset, workspace, cases=2, weights="random", steps=1)
    assert not workspace.prepared.exists()


def test_full_training_from_a_model_with_an_adapter_merges_it(adapted, tuned, dataset, tmp_path):
    workspace = Workspace(tmp_path)
    write_plan(workspace.plan, small(read_plan(tuned.plan)))
    finetune(dataset, workspace, cases=1, weights=str(adapted.model), steps=1)
    assert read_checkpoint(workspace.model).modalities == ()
    assert not (workspace.finetuned / "adapter.safetensors").exists()


def test_the_model_contains_its_calibration_and_the_cases_it_was_fitted_on(tuned, capsys):
    found = read_checkpoint(tuned.model).calibration
    assert found is not None and found.slices >= 20 and "training cases" in found.note
    assert found.error_after < found.error_before


def test_settings_set_by_options_of_plan_hold_for_any_number_of_cases(tuned):
    asked = override_training(read_plan(tuned.plan), {"minutes": 7.0, "clip_slices": 4})
    settled = training_for(asked, 3, from_scratch=False)
    assert (settled.minutes, settled.clip_slices) == (7.0, 4)
    assert settled.steps == choose_training("nano", 3).value.steps


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory):
    """The fingerprint of phantoms with three labels, and the plan by which a run on one of them starts from random weights."""
    folder = tmp_path_factory.mktemp("three")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=3, shape=SHAPE)
    measured, _ = measure(read_dataset(folder), lambda *_: None)
    write_fingerprint(folder / "fingerprint.json", measured)
    planned = decide(measured)
    return folder / "fingerprint.json", planned.model_copy(update={"training": training_for(planned, 1, from_scratch=True)})


@pytest.mark.parametrize(
    ("free", "advice"),
    [(10e9, None), (0.9e9, "Run: slmsam2 plan --max-memory "), (0.01e9, "Close other programs, or use a machine with more")],
)
def test_too_little_memory_is_a_warning_with_the_setting_that_fits(three_labels, monkeypatch, free, advice):
    monkeypatch.setattr("slmsam2_cli.training.interrupts.free_bytes", lambda: int(free))
    fingerprint, settled = three_labels
    warning = memory_warning(settled, fingerprint, 1, torch.device("cpu"))
    assert (advice in warning and "GB of memory" in warning) if advice else warning is None


def test_a_run_with_too_little_memory_prints_the_warning_and_its_time_spent_waiting_for_data(organs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slmsam2_cli.training.interrupts.free_bytes", lambda: int(0.01e9))
    workspace = small_workspace(tmp_path, organs)
    write_fingerprint(workspace.fingerprint, measure(read_dataset(organs), lambda *_: None)[0])
    assert finetune(organs, workspace, cases=1, weights="random", steps=1) == 0
    printed = capsys.readouterr().err
    assert any("GB of memory" in line and "Close other programs" in line for line in printed.splitlines())
    assert re.search(r"1 steps, \d+ s, \d+ % of it waiting for data|1 steps, \d+ s, \d+% of it waiting for data", printed)


def test_a_corrected_label_makes_it_another_run(dataset, tuned, copied, tmp_path, capsys):
    """A run that was trained on the old labels does not count as finished."""
    root = Path(shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns("slmsam2")))
    finetune(root, copied, cases=2, weights="random", steps=1)
    assert "already finished" in capsys.readouterr().err
    case = json.loads(copied.split.read_text())["training"][0]
    (label,) = (root / "labelsTr").glob(f"{case}.nii*")
    was = nibabel.load(label)
    voxels = np.asarray(was.dataobj).copy()
    voxels[:, :20] = 0
    nibabel.save(nibabel.Nifti1Image(voxels, was.affine, was.header), label)
    with pytest.raises(UsageError, match="their files"):
        finetune(root, copied, cases=2, weights="random", steps=1)


def test_a_run_that_is_stopped_during_calibration_can_be_resumed_and_the_same_seed_gives_the_same_weights(
    dataset, tuned, tmp_path, monkeypatch, capsys
):
    import signal

    from slmsam2_cli.commands import finetune as stage

    calibrate_model, workspace = stage.calibrate_model, Workspace(tmp_path)

    def interrupted(model, cases, plan, stopped, processes):
        signal.raise_signal(signal.SIGINT)
        return calibrate_model(model, cases, plan, stopped, processes)

    monkeypatch.setattr(stage, "calibrate_model", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, workspace, cases=2, weights="random", steps=1)
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(stage, "calibrate_model", calibrate_model)
    assert json.loads(workspace.split.read_text())["finished"] is False
    assert finetune(dataset, workspace, resume=True) == 0
    assert json.loads(workspace.split.read_text())["finished"] is True
    assert read_checkpoint(workspace.model).digest == read_checkpoint(tuned.model).digest
