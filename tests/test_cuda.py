"""Masks, fine-tuning, resuming, cross-validation and pretraining on a GPU; skipped without one."""

from __future__ import annotations

import csv
import math

import nibabel
import numpy as np
import pytest
import torch

from slmsam2_cli.commands import finetune as stage
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.commands.pretrain import pretrain
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.training import cross_validation, trainer
from slmsam2_cli.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=3, test_cases=0, seed=3, shape=(16, 64, 64))
    return folder


@pytest.fixture(scope="module")
def tuned(dataset):
    workspace = Workspace(dataset / "slmsam2")
    assert finetune(dataset, workspace, cases=1, steps=6, seed=1, device="cuda") == 0
    return workspace


def masks_of(folder):
    return [np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))]


def test_masks_of_the_bundled_model_are_those_of_the_cpu(dataset, tmp_path):
    for device in ("cpu", "cuda"):
        assert predict(dataset / "imagesTr", tmp_path / device, simulate_from=dataset / "labelsTr", report=False, device=device) == 0
    pairs = list(zip(masks_of(tmp_path / "cpu"), masks_of(tmp_path / "cuda"), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        for label in range(1, int(one.max()) + 1):
            assert dice(one == label, other == label) > 0.97


def test_a_model_fine_tuned_on_cuda_predicts_on_the_cpu_and_has_finite_losses(tuned, dataset, tmp_path):
    rows = list(csv.DictReader((tuned.finetuned / "log.csv").open()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert all(math.isfinite(float(row["total"])) for row in rows)
    assert predict(None, tmp_path / "masks", dataset=dataset, workspace=tuned, report=False, device="cpu") == 0
    assert all(mask.any() for mask in masks_of(tmp_path / "masks"))


def test_cross_validation_runs_on_cuda(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cross_validation, "MIN_STEPS", 1)
    assert finetune(dataset, Workspace(tmp_path), cases=2, steps=4, seed=1, device="cuda") == 0
    found = read_checkpoint(Workspace(tmp_path).model).provenance.validation
    assert len(found.held_out) == 2 and 0 < found.pretrained < 1 and 0 < found.fine_tuned < 1


def test_an_interrupted_run_resumes_on_cuda(dataset, tmp_path, monkeypatch):
    class PoweredOff(Exception):
        pass

    train, broken, begun = trainer.train, Workspace(tmp_path), []

    def cut_short(learner, *rest):
        begun.append(learner.step)
        for progress in train(learner, *rest):
            yield progress
            if learner.step == 3 and len(begun) == 1:
                raise PoweredOff

    monkeypatch.setattr(trainer, "train", cut_short)
    monkeypatch.setattr(stage, "SAVE_EVERY_S", 0.0)
    with pytest.raises(PoweredOff):
        finetune(dataset, broken, cases=1, steps=6, seed=1, device="cuda")
    assert finetune(dataset, broken, resume=True, device="cuda") == 0
    assert begun == [0, 3]
    rows = list(csv.DictReader((broken.finetuned / "log.csv").open()))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert read_checkpoint(broken.model).provenance.steps == 6


def test_pretraining_runs_on_cuda(tmp_path):
    assert pretrain(tmp_path / "run", smoke=True, steps=3, device="cuda") == 0
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(row["total"])) for row in rows)
    assert (tmp_path / "run" / "nano.safetensors").is_file()
