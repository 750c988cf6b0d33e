"""Four and five channels from dataset to mask: plan, preprocess, finetune, predict, export."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from safetensors.torch import load_file

from slmsam2_cli import api
from slmsam2_cli.commands.export import export_model, import_model
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import nifti_bytes, phantom_volume
from slmsam2_cli.errors import PlanError, WeightsError
from slmsam2_cli.model.adapter_layers import channel_means
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.workspace import Workspace

FOUR = ("T1", "T2", "FLAIR", "T1c")
FIVE = ("PET", "T1", "T2", "FLAIR", "T1c")
SHAPE = (5, 32, 32)


def write_channels(folder, names, cases=2):
    """Write a dataset in nnU-Net's layout, one file per channel: the same synthetic phantom, each channel darker than the one before."""
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for index in range(cases):
        image, labels, spacing = phantom_volume(np.random.default_rng([3, index]), SHAPE)
        (folder / "labelsTr" / f"p{index}.nii.gz").write_bytes(nifti_bytes((labels == 1).astype(np.uint8), spacing))
        for channel in range(len(names)):
            darker = np.rint(image / (channel + 1)).astype(np.float32)
            (folder / "imagesTr" / f"p{index}_{channel:04d}.nii.gz").write_bytes(nifti_bytes(darker, spacing))
    about = {"channel_names": dict(enumerate(names)), "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | {"numTraining": cases}))
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Return a dataset of four channels, and its workspace with a model fine-tuned for one step."""
    folder = write_channels(tmp_path_factory.mktemp("four"), FOUR)
    workspace = Workspace(folder / "slmsam2")
    assert plan(folder, workspace) == 0
    assert finetune(folder, workspace, cases=1, weights="random", steps=1) == 0
    return folder, workspace


@pytest.fixture(scope="module")
def five(four, tmp_path_factory):
    """Return the same for five channels of another modality, as an adapter on the model for four."""
    folder = write_channels(tmp_path_factory.mktemp("five"), FIVE)
    workspace = Workspace(folder / "slmsam2")
    plan(folder, workspace)
    planned = read_plan(workspace.plan)
    write_plan(workspace.plan, planned.model_copy(update={"training": planned.training.model_copy(update={"strategy": "adapters"})}))
    assert finetune(folder, workspace, cases=1, weights=str(four[1].model), steps=1) == 0
    return folder, workspace


def masks(folder):
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize("which", ["four", "five"])
def test_preprocessed_stacks_hold_every_channel(which, request):
    folder, workspace = request.getfixturevalue(which)
    frames = np.load(workspace.prepared / "p0" / "frames.npy", mmap_mode="r")
    names = read_plan(workspace.plan).channels
    assert frames.shape[:2] == (len(names), nibabel.load(folder / "labelsTr" / "p0.nii.gz").shape[2])
    assert frames.dtype == np.float16 and all(channel.any() for channel in frames)


def test_the_model_has_a_learned_projection_of_four_channels_and_no_other_adapter(four):
    tensors = load_file(four[1].model)
    assert [name for name in tensors if name.startswith("adapters.")] == ["adapters.MR.input.weight"]
    learned = tensors["adapters.MR.input.weight"]
    assert learned.shape == (3, 4, 1, 1) and not learned.equal(channel_means(4))
    assert read_checkpoint(four[1].model).plan.channels == FOUR


def test_it_predicts_the_held_out_case_on_the_image_s_grid(four):
    folder, workspace = four
    assert predict(None, None, dataset=folder, workspace=workspace, report=False) == 0
    (name,) = masks(workspace.predictions)
    assert masks(workspace.predictions)[name].shape == nibabel.load(folder / "labelsTr" / name).shape


def test_adapters_for_four_and_five_channels_of_two_modalities_coexist(four, five):
    _, workspace = five
    whole = read_checkpoint(workspace.model).state
    assert whole["adapters.PET.input.weight"].shape == (3, 5, 1, 1)
    assert whole["adapters.MR.input.weight"].equal(load_file(four[1].model)["adapters.MR.input.weight"])
    assert "adapters.PET.input.weight" in load_file(workspace.finetuned / "adapter.safetensors")


def test_an_exported_adapter_on_its_pretrained_model_predicts_like_the_complete_model(four, five, tmp_path):
    folder, workspace = five
    adapter, base = workspace.finetuned / "adapter.safetensors", str(four[1].model)
    assert export_model(None, adapter, tmp_path / "adapter.zip") == 0
    assert import_model(tmp_path / "adapter.zip", tmp_path / "imported") == 0
    assert "channels    PET, T1, T2, FLAIR, T1c, in this order" in (tmp_path / "imported" / "README.txt").read_text()
    options = {"simulate_from": folder / "labelsTr", "report": False}
    assert predict(folder / "imagesTr", tmp_path / "whole", workspace=workspace, **options) == 0
    assert predict(folder / "imagesTr", tmp_path / "apart", model=tmp_path / "imported", weights=base, **options) == 0
    one, other = masks(tmp_path / "whole"), masks(tmp_path / "apart")
    assert list(one) == list(other) == ["p0.nii.gz", "p1.nii.gz"]
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_model_for_four_channels_is_rejected_for_a_dataset_of_five(four, five, tmp_path):
    with pytest.raises(PlanError, match=r"model\.safetensors reads 4 channels \(T1, T2, FLAIR, T1c\), the data set has 5 \(PET, T1"):
        predict(None, tmp_path / "masks", dataset=five[0], model=four[1].model, workspace=five[1])
    assert not (tmp_path / "masks").exists()


def test_arrays_of_four_channels_are_propagated_from_python_and_others_rejected(four):
    model, frames = api.load(four[1].model), np.random.default_rng(0).random((3, 4, 24, 32), np.float32)
    drawn = np.zeros((24, 32), bool)
    drawn[8:16, 8:20] = True
    assert api.propagate(model, frames, {"organ": {1: drawn}})["organ"].mask.shape == (3, 24, 32)
    with pytest.raises(ValueError, match="slices have 3 channels, but the network reads 4"):
        api.propagate(model, frames[:, :3], {"organ": {1: drawn}})


def test_finetuning_with_five_channels_is_rejected_when_the_pretrained_model_has_four(four, tmp_path):
    folder = write_channels(tmp_path / "data", ("T1", "T2", "FLAIR", "T1c", "ADC"), cases=1)
    workspace = Workspace(tmp_path / "space")
    with pytest.raises(WeightsError, match="tuned on 4 channels of MR, but the plan has 5"):
        finetune(folder, workspace, cases=1, weights=str(four[1].model), steps=1)
    assert not workspace.prepared.exists()


def test_a_warning_names_channels_that_are_called_differently_in_the_model(four, tmp_path, capsys):
    folder = tmp_path / "renamed"
    shutil.copytree(four[0], folder, ignore=shutil.ignore_patterns("slmsam2"))
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "T1", "1": "T2", "2": "FLAIR", "3": "T1gd"}}))
    assert predict(None, tmp_path / "masks", dataset=folder, model=four[1].model, workspace=Workspace(tmp_path), report=False) == 0
    assert "T1, T2, FLAIR, T1gd, are taken for T1, T2, FLAIR, T1c, in this order" in capsys.readouterr().err
