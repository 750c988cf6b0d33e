"""The first prediction of a folder of scans: no data set, no plan, only images and what was painted on one slice of each."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from made_models import save_base

from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, PlanError
from slmsam2_cli.io import volume
from slmsam2_cli.planning.plan import read_plan


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=2, test_cases=0, seed=5, shape=(12, 40, 40))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("weights") / "base.safetensors")


@pytest.fixture
def scans(dataset, tmp_path):
    return shutil.copytree(dataset / "imagesTr", tmp_path / "scans")


def painted(folder, dataset, axis=2):
    """Label 1 on a slice in its middle, of each mask, along an axis of the file (x, y, z)."""
    folder.mkdir()
    for path in (dataset / "labelsTr").iterdir():
        mask = nibabel.load(path)
        whole, sparse = np.asarray(mask.dataobj), np.zeros(mask.shape, np.uint8)
        held = np.flatnonzero((whole == 1).any(axis=tuple({0, 1, 2} - {axis})))
        place = (*[slice(None)] * axis, held[len(held) // 2])
        sparse[place] = whole[place] == 1
        nibabel.save(nibabel.Nifti1Image(sparse, mask.affine), folder / path.name)
    return folder


@pytest.mark.parametrize(("axis", "named"), [(2, "SI"), (0, "LR")])
def test_the_slice_axis_is_that_of_the_annotated_slices(scans, dataset, weights, tmp_path, axis, named):
    masks, prompts = tmp_path / "masks", painted(tmp_path / "prompts", dataset, axis)
    assert predict(scans, masks, prompts=prompts, weights=weights, report=False) == 0
    plan = read_plan(masks / "plan.json")
    assert plan.geometry.slice_axis == named and plan.labels == {1: "label 1"} and plan.geometry.roi_scale
    for path in prompts.iterdir():
        found, given = (np.asarray(nibabel.load(folder / path.name).dataobj) for folder in (masks, prompts))
        (slice_,) = np.flatnonzero(given.any(axis=tuple({0, 1, 2} - {axis})))
        assert np.array_equal(found.take(slice_, axis), given.take(slice_, axis))


def test_the_list_of_slices_can_name_another_axis(scans, dataset, weights, tmp_path):
    prompts = painted(tmp_path / "prompts", dataset)
    for path in list(prompts.iterdir()):
        listing = {"axis": "AP", "annotated_slices": [20]}
        (prompts / f"{path.name.removesuffix('.nii.gz')}.prompts.json").write_text(json.dumps(listing))
    assert predict(scans, tmp_path / "masks", prompts=prompts, weights=weights, report=False) == 0
    assert read_plan(tmp_path / "masks" / "plan.json").geometry.slice_axis == "AP"


def test_a_second_run_into_the_same_folder_uses_the_first_runs_plan(scans, dataset, weights, tmp_path, capsys):
    masks, prompts = tmp_path / "masks", painted(tmp_path / "prompts", dataset)
    one, other = sorted(scans.iterdir())
    kept = other.rename(tmp_path / other.name)
    predict(scans, masks, prompts=prompts, weights=weights, report=False)
    before = (masks / "plan.json").read_text()
    kept.rename(other)
    capsys.readouterr()
    assert predict(scans, masks, prompts=prompts, weights=weights, report=False) == 0
    assert (masks / "plan.json").read_text() == before
    assert "1 masks written, 1 already there" in capsys.readouterr().err
    assert {one.name, other.name} <= {path.name for path in masks.iterdir()}


def test_a_new_label_is_accepted_after_planning_again(scans, dataset, weights, tmp_path):
    masks, prompts = tmp_path / "masks", painted(tmp_path / "prompts", dataset)
    predict(scans, masks, prompts=prompts, weights=weights, report=False)
    for path in prompts.iterdir():
        mask = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(mask.dataobj) * 2, mask.affine), path)
    assert predict(scans, masks, prompts=prompts, weights=weights, overwrite=True, report=False) == 0
    assert read_plan(masks / "plan.json").labels == {2: "label 2"}


def test_full_masks_give_the_plan_of_a_data_set(scans, dataset, weights, tmp_path):
    assert predict(scans, tmp_path / "masks", simulate_from=dataset / "labelsTr", weights=weights, report=False) == 0
    assert len(read_plan(tmp_path / "masks" / "plan.json").labels) > 1


def test_images_without_any_prompt_are_rejected_and_nothing_is_written(scans, weights, tmp_path):
    (tmp_path / "prompts").mkdir()
    with pytest.raises(DatasetError, match="no image has a prompt mask of the same name"):
        predict(scans, tmp_path / "masks", prompts=tmp_path / "prompts", weights=weights, report=False)
    assert not (tmp_path / "masks").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 9}', '{"format_version": 2}'])
def test_an_unusable_plan_is_rejected_with_one_remedy(scans, dataset, weights, tmp_path, content):
    prompts = painted(tmp_path / "prompts", dataset)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=r"plan.json.* Run slmsam2 predict with --overwrite to make a new plan") as caught:
        predict(scans, tmp_path / "masks", prompts=prompts, weights=weights, report=False)
    assert "slmsam2 plan" not in str(caught.value)


def test_images_and_prompts_are_decoded_once_for_the_plan_and_the_masks(scans, dataset, weights, tmp_path, monkeypatch):
    decoded, decode = [], volume._decode

    def noting(path, max_voxels):
        decoded.append(path)
        return decode(path, max_voxels)

    monkeypatch.setattr(volume, "_decode", noting)
    prompts = painted(tmp_path / "prompts", dataset)
    assert predict(scans, tmp_path / "masks", prompts=prompts, weights=weights, report=False) == 0
    inputs = [path for path in decoded if path.parent in (scans, prompts)]
    assert sorted(inputs) == sorted([*scans.iterdir(), *prompts.iterdir()])
