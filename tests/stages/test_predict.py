"""Prediction as a stage: geometry, the person's slices, isolation of cases, and what a second call does."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK

from slmsam2_cli.data.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, LockError, OutputError, UsageError
from slmsam2_cli.model.checkpoint import digest_of, read_checkpoint, save_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.stages import predict as stage
from slmsam2_cli.stages.finetune import finetune
from slmsam2_cli.stages.predict import predict
from slmsam2_cli.workspace import Workspace


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=5, shape=(8, 40, 40))
    finetune(folder, Workspace(folder / "slmsam2"), cases=1, weights="random", steps=1)
    return folder


@pytest.fixture
def images(dataset, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((dataset / "imagesTr").iterdir())[:2]:
        shutil.copy(path, folder)
    return folder


def run(images, masks, dataset, **options):
    options.setdefault("prompts_from", dataset / "labelsTr")
    if options.get("prompts"):
        options["prompts_from"] = None
    return predict(images, masks, workspace=Workspace(dataset / "slmsam2"), **options)


def written(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_every_image_gets_one_mask_of_its_own_name_and_grid_and_a_manifest(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    assert run(images, masks, dataset) == 0
    assert written(masks) == ["manifest.json", *written(images)]
    for name in written(images):
        image, mask = nibabel.load(images / name), nibabel.load(masks / name)
        assert mask.shape == image.shape and np.abs(mask.affine - image.affine).max() <= 1e-6
        assert mask.get_data_dtype() == np.uint8


def test_simulated_prompts_come_back_exactly_on_their_slices(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    manifest = json.loads((masks / "manifest.json").read_text())
    for case in manifest["cases"].values():
        mask = np.asarray(nibabel.load(masks / case["output"]).dataobj).T
        truth = np.asarray(nibabel.load(dataset / "labelsTr" / case["output"]).dataobj).T
        assert case["prompted_slices"]
        for label, slices in case["prompted_slices"].items():
            for s in slices:
                assert np.array_equal(mask.take(s, case["array_axis"]) == int(label), truth.take(s, case["array_axis"]) == int(label))


def sparse_prompts(folder, images, dataset, slice_=4):
    """A person's masks: one painted slice each, of the file's last axis."""
    folder.mkdir()
    for name in written(images):
        truth = nibabel.load(dataset / "labelsTr" / name)
        sparse = np.zeros(truth.shape, np.uint8)
        sparse[..., slice_] = np.asarray(truth.dataobj)[..., slice_]
        nibabel.save(nibabel.Nifti1Image(sparse, truth.affine, truth.header), folder / name)
    return folder


def test_a_persons_slice_comes_back_bit_exact_as_a_whole(images, tmp_path, dataset):
    prompts, masks = sparse_prompts(tmp_path / "prompts", images, dataset), tmp_path / "masks"
    assert run(images, masks, dataset, prompts=prompts) == 0
    for name in written(images):
        drawn = np.asarray(nibabel.load(prompts / name).dataobj)[..., 4]
        assert drawn.any() and np.array_equal(np.asarray(nibabel.load(masks / name).dataobj)[..., 4], drawn)


def test_finished_cases_are_skipped_and_nothing_is_touched(images, tmp_path, dataset, capsys):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    before = {name: (masks / name).stat().st_mtime_ns for name in written(images)}
    assert run(images, masks, dataset) == 0
    assert "2 already there" in capsys.readouterr().err
    assert before == {name: (masks / name).stat().st_mtime_ns for name in written(images)}


def test_a_changed_prompt_is_noticed_and_only_its_case_is_redone(images, tmp_path, dataset, capsys):
    prompts, masks = sparse_prompts(tmp_path / "prompts", images, dataset), tmp_path / "masks"
    run(images, masks, dataset, prompts=prompts)
    first = written(images)[0]
    stamps = {name: (masks / name).stat().st_mtime_ns for name in written(images)}
    shutil.rmtree(prompts)
    sparse_prompts(prompts, images, dataset)
    moved = nibabel.load(prompts / first)
    nibabel.save(nibabel.Nifti1Image(np.roll(np.asarray(moved.dataobj), 1, axis=2), moved.affine, moved.header), prompts / first)
    capsys.readouterr()
    assert run(images, masks, dataset, prompts=prompts) == 0
    assert "segmented again" in capsys.readouterr().err
    assert (masks / first).stat().st_mtime_ns != stamps[first]


def test_a_mask_that_somebody_else_made_is_not_overwritten(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    masks.mkdir()
    name = written(images)[0]
    shutil.copy(dataset / "labelsTr" / name, masks / name)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        run(images, masks, dataset)
    assert written(masks) == [name]
    assert run(images, masks, dataset, overwrite=True) == 0


def test_a_half_written_mask_is_made_again(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    masks.mkdir()
    name = written(images)[0]
    (masks / name).write_bytes((dataset / "labelsTr" / name).read_bytes()[:60])
    assert run(images, masks, dataset) == 0
    assert nibabel.load(masks / name).get_fdata().shape == nibabel.load(images / name).shape


def test_a_run_killed_between_a_mask_and_its_record_goes_on_by_itself(images, tmp_path, dataset, monkeypatch):
    masks, reference, write = tmp_path / "masks", tmp_path / "reference", stage.write_mask
    run(images, reference, dataset)

    def killed(path, *arguments):
        write(path, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "write_mask", killed)
    with pytest.raises(KeyboardInterrupt):
        run(images, masks, dataset)
    monkeypatch.setattr(stage, "write_mask", write)
    assert written(masks) == ["manifest.json", written(images)[0]] and account(masks) == {}
    assert run(images, masks, dataset) == 0
    assert all((masks / name).read_bytes() == (reference / name).read_bytes() for name in written(images))


def account(masks):
    return json.loads((masks / "manifest.json").read_text())["cases"]


def test_an_interrupted_run_accounts_for_the_masks_it_wrote(images, tmp_path, dataset, monkeypatch):
    masks, segment, seen = tmp_path / "masks", stage.segment, []

    def interrupted(case, *arguments):
        seen.append(case.id)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return segment(case, *arguments)

    monkeypatch.setattr(stage, "segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(images, masks, dataset)
    assert list(account(masks)) == seen[:1]


def test_an_earlier_mask_of_a_case_that_now_fails_leaves_the_manifest_until_it_is_made_again(images, tmp_path, dataset, capsys):
    masks, first = tmp_path / "masks", images / written(images)[0]
    run(images, masks, dataset)
    whole, (case, other) = first.read_bytes(), account(masks)
    first.write_bytes(whole[:100])
    assert run(images, masks, dataset) == 1
    assert list(account(masks)) == [other] and (masks / first.name).exists()
    assert f"{first.name} is from an earlier run and out of date" in capsys.readouterr().err
    first.write_bytes(whole)
    assert run(images, masks, dataset) == 0
    assert list(account(masks)) == [case, other]


def test_every_mask_says_which_model_and_which_prompts_made_it(images, tmp_path, dataset):
    masks, one, other = tmp_path / "masks", tmp_path / "one", tmp_path / "other"
    for folder, name in zip((one, other), written(images)):
        folder.mkdir()
        shutil.copy(images / name, folder)
    model = read_checkpoint(Workspace(dataset / "slmsam2").model)
    changed = tmp_path / "changed.safetensors"
    network = SlmSam2(model.network, 32)
    save_checkpoint(changed, network, model.plan, model.provenance)
    run(one, masks, dataset)
    run(other, masks, dataset, model=changed, where="largest")
    first, second = account(masks).values()
    assert (first["model"]["weights_digest"], first["prompts"]) == (model.digest, "simulated: middle")
    assert (second["model"]["weights_digest"], second["prompts"]) == (digest_of(network.state_dict()), "simulated: largest")


def test_a_damaged_record_costs_its_own_mask_alone(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    record = sorted((masks / ".slmsam2").glob("*.json"))[0]
    lost = json.loads(record.read_text())["case"]
    record.write_text('{"case"')
    shutil.rmtree(images)
    images.mkdir()
    shutil.copy(dataset / "imagesTr" / "phantom_003.nii.gz", images)
    assert run(images, masks, dataset) == 0
    assert lost not in account(masks) and len(account(masks)) == 2


def test_new_voxels_behind_an_unchanged_header_are_noticed(images, tmp_path, dataset, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    name = written(images)[0].removesuffix(".nii.gz")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(images / f"{name}.nii.gz")), str(scans / f"{name}.mhd"))
    assert run(scans, tmp_path / "masks", dataset) == 0
    raw = scans / f"{name}.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    capsys.readouterr()
    assert run(scans, tmp_path / "masks", dataset) == 0
    assert "segmented again" in capsys.readouterr().err


def test_a_broken_image_is_named_and_the_others_are_done(images, tmp_path, dataset, capsys):
    broken = written(images)[0]
    (images / broken).write_bytes((images / broken).read_bytes()[:100])
    assert run(images, tmp_path / "masks", dataset) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: case"))
    assert broken.removesuffix(".nii.gz") in line and "Traceback" not in line
    assert written(tmp_path / "masks") == ["manifest.json", *written(images)[1:]]


def test_an_image_without_a_prompt_is_an_error_of_that_case(images, tmp_path, dataset, capsys):
    prompts = sparse_prompts(tmp_path / "prompts", images, dataset)
    os.remove(prompts / written(images)[0])
    assert run(images, tmp_path / "masks", dataset, prompts=prompts) == 1
    assert "has no annotated slice" in capsys.readouterr().err


def test_when_no_case_can_be_done_that_is_said(images, tmp_path, dataset):
    for name in written(images):
        (images / name).write_bytes(b"")
    with pytest.raises(DatasetError, match="no case"):
        run(images, tmp_path / "masks", dataset)


def test_masks_never_go_where_images_come_from_not_even_through_a_link(images, tmp_path, dataset):
    link = tmp_path / "link"
    link.symlink_to(images)
    for masks in (images, link):
        with pytest.raises(UsageError, match="same folder"):
            run(images, masks, dataset)


def test_parts_share_the_work_and_end_in_one_manifest(images, tmp_path, dataset):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(images, whole, dataset)
    for part in (0, 1):
        run(images, parts, dataset, num_parts=2, part_id=part)
    for name in written(images):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    one, other = (json.loads((folder / "manifest.json").read_text())["cases"] for folder in (whole, parts))
    assert set(one) == set(other)


def test_two_writers_at_once_are_refused(images, tmp_path, dataset):
    from slmsam2_cli.data.store import one_writer

    masks = tmp_path / "masks"
    with one_writer(masks), pytest.raises(LockError):
        run(images, masks, dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 2, "part_id": 2}, "parts are numbered"),
        ({"prompts": "x", "prompts_from": "y"}, "both give prompts"),
        ({"prompts_from": None}, "no prompts"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_read(images, tmp_path, dataset, options, message):
    arguments = {"prompts_from": dataset / "labelsTr", **options}
    with pytest.raises(UsageError, match=message):
        predict(images, tmp_path / "masks", workspace=Workspace(dataset / "slmsam2"), **arguments)
    assert not (tmp_path / "masks").exists()


def test_when_every_case_was_learned_from_that_is_said(dataset, tmp_path):
    workspace = Workspace(tmp_path)
    finetune(dataset, workspace, cases=4, weights="random", steps=1)
    with pytest.raises(DatasetError, match="no case is unseen"):
        predict(None, None, dataset=dataset, workspace=workspace)


def test_inside_a_data_set_the_unseen_cases_are_predicted_into_the_workspace(dataset):
    workspace = Workspace(dataset / "slmsam2")
    assert predict(None, None, dataset=dataset, workspace=workspace) == 0
    unseen = json.loads(workspace.split.read_text())["unseen"]
    assert written(workspace.predictions) == ["manifest.json", *[f"{case}.nii.gz" for case in unseen]]
