"""Prediction as a stage: geometry, the person's slices, isolation of cases, and what a second call does."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from small_runs import small_workspace

from slmsam2_cli import console
from slmsam2_cli.commands import predict as stage
from slmsam2_cli.commands.evaluate import evaluate
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, DeviceError, LockError, OutputError, UsageError, WeightsError
from slmsam2_cli.inference import manifest
from slmsam2_cli.inference.load_model import matching_label_unet
from slmsam2_cli.model import adapters
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import RequiredBase, load_weights, read_checkpoint, save_adapter, save_checkpoint, tensors_digest
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, read_plan, write_plan
from slmsam2_cli.workspace import Workspace


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=5, shape=(8, 40, 40))
    finetune(folder, small_workspace(folder / "slmsam2", folder), cases=1, weights="random", steps=1)
    return folder


@pytest.fixture
def images(dataset, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((dataset / "imagesTr").iterdir())[:2]:
        shutil.copy(path, folder)
    return folder


def run(images, masks, dataset, **options):
    options.setdefault("simulate_from", dataset / "labelsTr")
    if options.get("prompts"):
        options["simulate_from"] = None
    return predict(images, masks, workspace=Workspace(dataset / "slmsam2"), **options)


def written(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_every_image_gets_a_mask_of_its_name_and_grid_and_a_manifest(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    assert run(images, masks, dataset) == 0
    assert written(masks) == ["manifest.json", *written(images), "report.html"]
    for name in written(images):
        image, mask = nibabel.load(images / name), nibabel.load(masks / name)
        assert mask.shape == image.shape and np.abs(mask.affine - image.affine).max() <= 1e-6
        assert mask.get_data_dtype() == np.uint8


def test_simulated_prompts_are_returned_unchanged_on_their_slices(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    manifest = json.loads((masks / "manifest.json").read_text())
    for case in manifest["cases"].values():
        mask = np.asarray(nibabel.load(masks / case["output"]).dataobj).T
        truth = np.asarray(nibabel.load(dataset / "labelsTr" / case["output"]).dataobj).T
        assert case["annotated_slices"]
        for label, slices in case["annotated_slices"].items():
            for s in slices:
                assert np.array_equal(mask.take(s, case["array_axis"]) == int(label), truth.take(s, case["array_axis"]) == int(label))


def sparse_prompts(folder, images, dataset, slice_=4):
    """Annotated masks: one annotated slice each, of the file's last axis."""
    folder.mkdir()
    for name in written(images):
        truth = nibabel.load(dataset / "labelsTr" / name)
        sparse = np.zeros(truth.shape, np.uint8)
        sparse[..., slice_] = np.asarray(truth.dataobj)[..., slice_]
        nibabel.save(nibabel.Nifti1Image(sparse, truth.affine, truth.header), folder / name)
    return folder


def test_an_annotated_slice_is_returned_bit_exact(images, tmp_path, dataset):
    prompts, masks = sparse_prompts(tmp_path / "prompts", images, dataset), tmp_path / "masks"
    assert run(images, masks, dataset, prompts=prompts) == 0
    for name in written(images):
        drawn = np.asarray(nibabel.load(prompts / name).dataobj)[..., 4]
        assert drawn.any() and np.array_equal(np.asarray(nibabel.load(masks / name).dataobj)[..., 4], drawn)


def test_the_manifest_holds_the_disagreement_between_two_annotated_slices(images, tmp_path, dataset):
    prompts, masks = sparse_prompts(tmp_path / "prompts", images, dataset), tmp_path / "masks"
    first, *_ = written(images)
    truth, sparse = (nibabel.load(folder / first) for folder in (dataset / "labelsTr", prompts))
    both = np.asarray(sparse.dataobj).copy()
    both[..., 1] = np.asarray(truth.dataobj)[..., 1]
    nibabel.save(nibabel.Nifti1Image(both, truth.affine, truth.header), prompts / first)
    assert run(images, masks, dataset, prompts=prompts) == 0
    two_slices, one_slice = metadata(masks).values()
    in_both = {str(v) for v in np.unique(both[..., 1]) if v} & {str(v) for v in np.unique(both[..., 4]) if v}
    assert in_both and {label: [*map(int, slices)] for label, slices in two_slices["disagreement"].items()} == {v: [2, 3] for v in in_both}
    assert all(0 <= share <= 1 for slices in two_slices["disagreement"].values() for share in slices.values())
    assert one_slice["disagreement"] == {}


def test_finished_cases_are_skipped_and_nothing_is_touched(images, tmp_path, dataset, capsys):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    before = {name: (masks / name).stat().st_mtime_ns for name in written(images)}
    assert run(images, masks, dataset) == 0
    assert "2 already there" in capsys.readouterr().err
    assert before == {name: (masks / name).stat().st_mtime_ns for name in written(images)}


def test_only_the_case_of_a_changed_prompt_is_predicted_again(images, tmp_path, dataset, capsys):
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
    assert "outdated (image, prompts, model or settings changed), recomputing" in capsys.readouterr().err
    assert {name for name in stamps if (masks / name).stat().st_mtime_ns != stamps[name]} == {first}


def test_a_mask_that_predict_did_not_write_is_not_overwritten(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    masks.mkdir()
    name = written(images)[0]
    shutil.copy(dataset / "labelsTr" / name, masks / name)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        run(images, masks, dataset)
    assert written(masks) == [name]
    assert run(images, masks, dataset, overwrite=True) == 0


def test_a_truncated_mask_is_predicted_again(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    masks.mkdir()
    name = written(images)[0]
    (masks / name).write_bytes((dataset / "labelsTr" / name).read_bytes()[:60])
    assert run(images, masks, dataset) == 0
    assert nibabel.load(masks / name).get_fdata().shape == nibabel.load(images / name).shape


def test_a_run_killed_between_mask_and_record_resumes(images, tmp_path, dataset, monkeypatch):
    masks, reference, write = tmp_path / "masks", tmp_path / "reference", manifest.write_mask
    run(images, reference, dataset)

    def killed(path, *arguments):
        write(path, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write_mask", killed)
    with pytest.raises(KeyboardInterrupt):
        run(images, masks, dataset)
    monkeypatch.setattr(manifest, "write_mask", write)
    assert written(masks) == ["manifest.json", written(images)[0]] and metadata(masks) == {}
    assert run(images, masks, dataset) == 0
    assert all((masks / name).read_bytes() == (reference / name).read_bytes() for name in written(images))


def metadata(masks):
    return json.loads((masks / "manifest.json").read_text())["cases"]


def test_the_manifest_of_an_interrupted_run_lists_its_masks(images, tmp_path, dataset, monkeypatch):
    masks, segment_case, seen = tmp_path / "masks", stage.segment_case, []

    def interrupted(case, *arguments):
        seen.append(case.id)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return segment_case(case, *arguments)

    monkeypatch.setattr(stage, "segment_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(images, masks, dataset)
    assert list(metadata(masks)) == seen[:1]


def test_the_stale_mask_of_a_failing_case_is_not_in_the_manifest(images, tmp_path, dataset, capsys):
    masks, first = tmp_path / "masks", images / written(images)[0]
    run(images, masks, dataset)
    whole, (case, other) = first.read_bytes(), metadata(masks)
    first.write_bytes(whole[:100])
    assert run(images, masks, dataset) == 1
    assert list(metadata(masks)) == [other] and (masks / first.name).exists()
    assert f"{first.name} is from an earlier run and out of date" in capsys.readouterr().err
    first.write_bytes(whole)
    assert run(images, masks, dataset) == 0
    assert list(metadata(masks)) == [case, other]


def test_the_manifest_names_model_and_prompts_of_every_mask(images, tmp_path, dataset):
    masks, one, other = tmp_path / "masks", tmp_path / "one", tmp_path / "other"
    for folder, name in zip((one, other), written(images)):
        folder.mkdir()
        shutil.copy(images / name, folder)
    model = read_checkpoint(Workspace(dataset / "slmsam2").model)
    changed = tmp_path / "changed.safetensors"
    network = SlmSam2(model.network, 32)
    save_checkpoint(changed, network, model.plan, model.provenance)
    run(one, masks, dataset)
    run(other, masks, dataset, model=changed, prompt_slice="largest")
    first, second = metadata(masks).values()
    assert (first["model"]["weights_digest"], first["prompts"]) == (model.digest, "simulated: middle")
    assert (second["model"]["weights_digest"], second["prompts"]) == (tensors_digest(network.state_dict()), "simulated: largest")


def test_a_damaged_record_affects_only_its_own_mask(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    run(images, masks, dataset)
    record = sorted((masks / ".slmsam2").glob("*.json"))[0]
    lost = json.loads(record.read_text())["case"]
    record.write_text('{"case"')
    shutil.rmtree(images)
    images.mkdir()
    shutil.copy(dataset / "imagesTr" / "phantom_003.nii.gz", images)
    assert run(images, masks, dataset) == 0
    assert lost not in metadata(masks) and len(metadata(masks)) == 2


def test_changed_voxels_with_an_unchanged_header_are_noticed(images, tmp_path, dataset, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    name = written(images)[0].removesuffix(".nii.gz")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(images / f"{name}.nii.gz")), str(scans / f"{name}.mhd"))
    assert run(scans, tmp_path / "masks", dataset) == 0
    raw = scans / f"{name}.raw"
    raw.write_bytes(raw.read_bytes()[::-1])
    capsys.readouterr()
    assert run(scans, tmp_path / "masks", dataset) == 0
    assert "outdated (image, prompts, model or settings changed), recomputing" in capsys.readouterr().err


def test_an_invalid_image_is_named_and_the_others_are_predicted(images, tmp_path, dataset, capsys):
    broken = written(images)[0]
    (images / broken).write_bytes((images / broken).read_bytes()[:100])
    assert run(images, tmp_path / "masks", dataset) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: case"))
    assert broken.removesuffix(".nii.gz") in line and "Traceback" not in line
    assert written(tmp_path / "masks") == ["manifest.json", *written(images)[1:], "report.html"]


def test_an_image_without_a_prompt_is_an_error_of_that_case(images, tmp_path, dataset, capsys):
    prompts = sparse_prompts(tmp_path / "prompts", images, dataset)
    os.remove(prompts / written(images)[0])
    assert run(images, tmp_path / "masks", dataset, prompts=prompts) == 1
    assert "no annotated slice" in capsys.readouterr().err


def test_an_error_says_when_no_case_could_be_segmented(images, tmp_path, dataset):
    for name in written(images):
        (images / name).write_bytes(b"")
    with pytest.raises(DatasetError, match="no case"):
        run(images, tmp_path / "masks", dataset)


def test_the_output_folder_cannot_be_the_image_folder_or_a_link_to_it(images, tmp_path, dataset):
    link = tmp_path / "link"
    link.symlink_to(images)
    for masks in (images, link):
        with pytest.raises(UsageError, match="same folder"):
            run(images, masks, dataset)


def test_parts_share_the_cases_and_write_one_manifest(images, tmp_path, dataset):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(images, whole, dataset)
    run(images, parts, dataset, num_parts=2, part_id=0)
    assert written(parts) == ["manifest.json", written(images)[0], "report.html"]
    assert [f"{case}.nii.gz" for case in metadata(parts)] == written(images)[:1]
    run(images, parts, dataset, num_parts=2, part_id=1)
    for name in written(images):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    one, other = (json.loads((folder / "manifest.json").read_text())["cases"] for folder in (whole, parts))
    assert set(one) == set(other)
    assert (whole / "report.html").read_bytes() == (parts / "report.html").read_bytes()


def test_the_report_includes_masks_of_earlier_runs(images, tmp_path, dataset):
    masks, (first, second) = tmp_path / "masks", written(images)
    run(images / first, masks, dataset)
    assert second.removesuffix(".nii.gz") not in (masks / "report.html").read_text()
    run(images / second, masks, dataset)
    page = (masks / "report.html").read_text()
    assert all(name.removesuffix(".nii.gz") in page for name in (first, second)) and "Masks of 2 cases" in page


def test_a_report_is_written_only_if_requested_and_if_masks_changed(images, tmp_path, dataset):
    masks = tmp_path / "masks"
    assert run(images, masks, dataset, report=False) == 0
    assert written(masks) == ["manifest.json", *written(images)]
    assert run(images, masks, dataset) == 0
    stamp = (masks / "report.html").stat().st_mtime_ns
    assert run(images, masks, dataset) == 0
    assert (masks / "report.html").stat().st_mtime_ns == stamp


def test_a_report_that_cannot_be_written_is_a_warning(images, tmp_path, dataset, capsys):
    masks = tmp_path / "masks"
    (masks / "report.html").mkdir(parents=True)
    assert run(images, masks, dataset) == 0
    assert "warning: could not write report.html" in capsys.readouterr().err
    assert [*metadata(masks)] == [name.removesuffix(".nii.gz") for name in written(images)]


def test_two_runs_cannot_write_the_same_folder(images, tmp_path, dataset):
    from slmsam2_cli.io.atomic import lock_folder

    masks = tmp_path / "masks"
    with lock_folder(masks), pytest.raises(LockError):
        run(images, masks, dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 2, "part_id": 2}, "parts are numbered"),
        ({"prompts": "x", "simulate_from": "y"}, "cannot be combined"),
        ({"simulate_from": None}, "no prompts"),
    ],
)
def test_invalid_options_are_rejected_before_anything_is_read(images, tmp_path, dataset, options, message):
    arguments = {"simulate_from": dataset / "labelsTr", **options}
    with pytest.raises(UsageError, match=message):
        predict(images, tmp_path / "masks", workspace=Workspace(dataset / "slmsam2"), **arguments)
    assert not (tmp_path / "masks").exists()


def test_a_folder_of_predictions_is_rejected_as_prompts_with_the_command_that_scores_it(images, tmp_path, dataset):
    run(images, tmp_path / "predicted", dataset)
    with pytest.raises(UsageError, match=r"a folder of predictions \(it holds manifest.json\), .* slmsam2 evaluate -p"):
        run(images, tmp_path / "masks", dataset, prompts=tmp_path / "predicted")
    assert not (tmp_path / "masks").exists()


def test_prompts_in_a_folder_with_a_manifest_of_something_else_are_accepted(images, tmp_path, dataset):
    prompts = sparse_prompts(tmp_path / "prompts", images, dataset)
    (prompts / "manifest.json").write_text("{}")
    assert run(images, tmp_path / "masks", dataset, prompts=prompts) == 0


def test_a_prompt_saved_while_predict_runs_is_used(images, tmp_path, dataset, monkeypatch):
    prompts = sparse_prompts(tmp_path / "prompts", images, dataset)
    late = written(images)[-1]
    os.rename(prompts / late, tmp_path / late)
    segment = stage.segment_case

    def segment_then_save(*arguments):
        result = segment(*arguments)
        if not (prompts / late).exists():
            shutil.move(tmp_path / late, prompts / late)
        return result

    monkeypatch.setattr(stage, "segment_case", segment_then_save)
    assert run(images, tmp_path / "masks", dataset, prompts=prompts) == 0
    assert set(written(images)) <= set(written(tmp_path / "masks"))


def test_if_all_cases_were_used_for_training_they_are_segmented_and_none_counts_as_held_out(tmp_path, capsys):
    write_phantom_dataset(tmp_path / "data", cases=1, test_cases=0, seed=5, shape=(8, 40, 40))
    workspace = Workspace(tmp_path / "space")
    finetune(tmp_path / "data", workspace, cases=1, weights="random", steps=1)
    assert predict(None, None, dataset=tmp_path / "data", workspace=workspace) == 0
    assert "all labelled cases were used for training; scores will be optimistic" in capsys.readouterr().err
    assert [case["training"] for case in metadata(workspace.predictions).values()] == [True]
    assert evaluate((), None, workspace, None, dataset=tmp_path / "data") == 0
    summary = json.loads((workspace.evaluation / "summary.json").read_text())
    assert (summary["cases"]["held_out"], summary["foreground_mean"]["Dice"]) == (0, None)
    assert summary["training"]["foreground_mean"]["Dice"] is not None
    assert "there is no score on held-out cases" in capsys.readouterr().err


def test_a_case_that_finetune_skipped_does_not_count_as_held_out(tmp_path, capsys):
    data, workspace = tmp_path / "data", Workspace(tmp_path / "space")
    write_phantom_dataset(data, cases=2, test_cases=0, seed=5, shape=(8, 40, 40))
    broken = data / "imagesTr" / "phantom_001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:100])
    finetune(data, workspace, cases=1, weights="random", steps=1, skip_invalid=True)
    assert predict(None, None, dataset=data, workspace=workspace) == 1
    assert list(metadata(workspace.predictions)) == ["phantom_000"]
    assert "all labelled cases were used for training" in capsys.readouterr().err


def test_a_training_case_is_recognised_under_another_name(images, tmp_path, dataset):
    (learned,) = json.loads(Workspace(dataset / "slmsam2").split.read_text())["training"]
    renamed, prompts, masks = tmp_path / "renamed", tmp_path / "full", tmp_path / "masks"
    for folder, source in ((renamed, "imagesTr"), (prompts, "labelsTr")):
        folder.mkdir()
        for case in {"phantom_000", "phantom_001", learned}:
            shutil.copy(dataset / source / f"{case}.nii.gz", folder / f"x_{case}.nii.gz")
    assert run(renamed, masks, dataset, simulate_from=prompts) == 0
    assert [case for case, entry in metadata(masks).items() if entry["training"]] == [f"x_{learned}"]


def test_prompts_are_simulated_from_the_data_sets_labels_wherever_they_are(tmp_path):
    data, workspace = tmp_path / "data", Workspace(tmp_path / "space")
    write_phantom_dataset(data, cases=2, test_cases=0, seed=5, shape=(8, 40, 40))
    (data / "labelsTr").rename(data / "masks")
    for path in (data / "masks").iterdir():
        path.rename(path.with_name(f"truth_{path.name}"))
    described = json.loads((data / "dataset.json").read_text())
    described["training"] = [{"image": f"./imagesTr/{name}", "label": f"./masks/truth_{name}"} for name in written(data / "imagesTr")]
    (data / "dataset.json").write_text(json.dumps(described))
    finetune(data, workspace, cases=1, weights="random", steps=1)
    assert predict(None, None, dataset=data, workspace=workspace) == 0
    (case,) = metadata(workspace.predictions).values()
    assert case["annotated_slices"]
    with pytest.raises(UsageError, match="same folder"):
        predict(None, data / "masks", dataset=data, workspace=workspace)


def test_a_single_image_file_is_predicted(images, tmp_path, dataset):
    masks, (first, _) = tmp_path / "masks", written(images)
    assert run(images / first, masks, dataset) == 0
    assert written(masks) == ["manifest.json", first, "report.html"]
    with pytest.raises(UsageError, match="same folder"):
        run(images / first, images, dataset)


def test_a_file_that_is_no_volume_is_rejected(images, tmp_path, dataset):
    (images / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="unsupported file type"):
        run(images / "notes.txt", tmp_path / "masks", dataset)


def test_pretrained_weights_use_the_workspaces_plan_and_a_model_its_own(images, tmp_path, dataset):
    space, elsewhere = Workspace(dataset / "slmsam2"), Workspace(tmp_path / "space")
    tuned = read_checkpoint(space.model)
    planned = read_plan(space.plan)
    labels = planned.labels | {9: "what the base knows"}
    foreign = tmp_path / "base.safetensors"
    network = SlmSam2(tuned.network, 64)
    save_checkpoint(foreign, network, planned.model_copy(update={"labels": labels}), tuned.provenance)
    write_plan(elsewhere.plan, planned)

    def restore_labels(masks, **options):
        assert predict(images, masks, simulate_from=dataset / "labelsTr", workspace=elsewhere, **options) == 0
        return set(json.loads((masks / "manifest.json").read_text())["labels"])

    assert restore_labels(tmp_path / "as-base", weights=str(foreign)) == {str(value) for value in planned.labels}
    assert restore_labels(tmp_path / "as-model", model=foreign) == {str(value) for value in labels}


def test_a_plan_for_other_channels_than_the_data_sets_is_rejected(tmp_path, dataset, capsys):
    space, elsewhere = Workspace(dataset / "slmsam2"), Workspace(tmp_path / "space")
    stale = read_plan(space.plan)
    write_plan(elsewhere.plan, stale.model_copy(update={"channels": ("other",)}))
    assert predict(None, tmp_path / "masks", dataset=dataset, workspace=elsewhere, weights=str(space.model)) == 0
    assert "plan.json has the channels ('other',)" in capsys.readouterr().err


def test_a_model_of_an_unfinished_run_is_used_with_a_warning(images, tmp_path, dataset, capsys):
    space = Workspace(tmp_path / "space")
    shutil.copytree(dataset / "slmsam2" / "finetuned", space.finetuned)
    split = json.loads(space.split.read_text())
    space.split.write_text(json.dumps(split | {"finished": False}))
    assert predict(images, tmp_path / "masks", simulate_from=dataset / "labelsTr", workspace=space) == 0
    assert "is from an unfinished run" in capsys.readouterr().err


def stumbling(error, at, times=99):
    """segment, but for the case `at`, where it raises the error so many times."""
    segment_case, left = stage.segment_case, [times]

    def stumbles(case, *arguments):
        if case.id == at and left[0]:
            left[0] -= 1
            raise error
        return segment_case(case, *arguments)

    return stumbles


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("4 channels cannot be shown as RGB"), "cannot be segmented: ValueError: 4 channels"),
        (RuntimeError("sizes must match\nand so on"), "cannot be segmented: RuntimeError: sizes must match. Run again with --debug"),
        (MemoryError(), "out of memory on cpu. Use fewer --workers, close other programs"),
        (
            RuntimeError("[enforce fail] can't allocate memory: you tried"),
            "out of memory on cpu. Use fewer --workers, close other programs",
        ),
    ],
)
def test_a_failing_case_is_in_the_table_and_the_others_are_predicted(images, tmp_path, dataset, monkeypatch, capsys, error, said):
    first, other = (name.removesuffix(".nii.gz") for name in written(images))
    monkeypatch.setattr(stage, "segment_case", stumbling(error, first))
    assert run(images, tmp_path / "masks", dataset) == 1
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: case {first}: {said}")
    assert "Traceback" not in shown.err
    assert list(metadata(tmp_path / "masks")) == [other]
    assert shown.out.splitlines()[0] == "failed cases: 1" and shown.out.splitlines()[2].startswith(first)


def test_the_traceback_of_a_failed_case_is_shown_with_debug(images, tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(stage, "segment_case", stumbling(ValueError("odd"), written(images)[0].removesuffix(".nii.gz")))
    monkeypatch.setattr(console.settings, "debug", True)
    run(images, tmp_path / "masks", dataset)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ValueError: odd" in shown


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_after_running_out_of_memory_slices_are_encoded_one_by_one(images, tmp_path, dataset, monkeypatch, capsys, error):
    batches, stumbles = [], stumbling(error, written(images)[0].removesuffix(".nii.gz"), times=1)

    def noting(case, *arguments):
        batches.append(arguments[-1].plan.inference.batch_slices)
        return stumbles(case, *arguments)

    monkeypatch.setattr(stage, "segment_case", noting)
    assert run(images, tmp_path / "masks", dataset) == 0
    assert batches == [8, 1, 1]
    assert capsys.readouterr().err.count("retrying with batch size 1") == 1


def test_inside_a_data_set_the_held_out_cases_are_predicted_into_the_workspace(dataset):
    workspace = Workspace(dataset / "slmsam2")
    assert predict(None, None, dataset=dataset, workspace=workspace) == 0
    held_out = json.loads(workspace.split.read_text())["held_out"]
    assert written(workspace.predictions) == ["manifest.json", *[f"{case}.nii.gz" for case in held_out], "report.html"]


@pytest.fixture
def small_device(monkeypatch):
    """Every device says that it is a GPU."""

    class OnGpu(stage._Runner):
        def _load(self):
            segmenter = super()._load()
            self.device = torch.device("cuda")
            return segmenter

    monkeypatch.setattr(stage, "_Runner", OnGpu)


def out_of_memory(images):
    return stumbling(torch.OutOfMemoryError("CUDA out of memory"), written(images)[0].removesuffix(".nii.gz"), times=2)


def test_with_device_auto_a_device_with_too_little_memory_is_left_for_the_cpu(images, tmp_path, dataset, monkeypatch, capsys, small_device):
    monkeypatch.setattr(stage, "segment_case", out_of_memory(images))
    assert run(images, tmp_path / "masks", dataset) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.rpartition(": ")[2] for line in warned] == [
        "out of memory on cuda, retrying with batch size 1",
        "out of memory on cuda, falling back to CPU",
    ]


def test_a_requested_device_with_too_little_memory_is_an_error(images, tmp_path, dataset, monkeypatch, small_device):
    monkeypatch.setattr(stage, "segment_case", out_of_memory(images))
    with pytest.raises(DeviceError, match="out of memory on cuda. Use --device cpu"):
        run(images, tmp_path / "masks", dataset, device="cpu")


def test_a_case_without_the_structure_gets_an_empty_mask_and_a_warning(images, tmp_path, dataset, capsys):
    labels = tmp_path / "labels"
    shutil.copytree(dataset / "labelsTr", labels)
    name = written(images)[0]
    truth = nibabel.load(labels / name)
    nibabel.save(nibabel.Nifti1Image(np.zeros(truth.shape, np.uint8), truth.affine, truth.header), labels / name)
    assert run(images, tmp_path / "masks", dataset, simulate_from=labels) == 0
    assert "no foreground" in capsys.readouterr().err
    assert not np.asarray(nibabel.load(tmp_path / "masks" / name).dataobj).any()


def test_an_undeclared_label_is_named_with_its_number_of_voxels(images, tmp_path, dataset, capsys):
    labels = tmp_path / "labels"
    shutil.copytree(dataset / "labelsTr", labels)
    name = written(images)[0]
    truth = nibabel.load(labels / name)
    changed = np.asarray(truth.dataobj).copy()
    changed[0, 0, 0] = 9
    nibabel.save(nibabel.Nifti1Image(changed, truth.affine, truth.header), labels / name)
    assert run(images, tmp_path / "masks", dataset, simulate_from=labels) == 1
    assert "9 (1 voxels)" in capsys.readouterr().err


# Adapters and calibrated confidence


def adapter_at(folder, dataset, modality=None):
    """The workspace's model as base, an adapter on it that changes something, whole and by itself. Returns both files and the modality."""
    tuned = read_checkpoint(Workspace(dataset / "slmsam2").model)
    modality = modality or tuned.plan.modality
    model = SlmSam2(tuned.network, tuned.plan.geometry.input_size)
    load_weights(model, tuned)
    model.label_unet = matching_label_unet(tuned, tuned.plan)
    adapters.add(model, modality, AdapterPlan())
    adapters.use(model, modality)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(model, modality):
            parameter.add_(0.05)
    whole, small = folder / "model.safetensors", folder / "small" / "adapter.safetensors"
    save_checkpoint(whole, model, tuned.plan, tuned.provenance)
    save_adapter(small, model, tuned.plan, tuned.provenance, RequiredBase(name=tuned.name, digest=tuned.base_digest))
    return whole, small


def voxels(masks):
    return {name: np.asarray(nibabel.load(masks / name).dataobj) for name in written(masks) if name.endswith(".nii.gz")}


def test_an_adapter_predicts_like_the_complete_model(images, tmp_path, dataset):
    whole, small = adapter_at(tmp_path / "models", dataset)
    base = str(Workspace(dataset / "slmsam2").model)
    assert run(images, tmp_path / "one", dataset, model=whole) == 0
    assert run(images, tmp_path / "two", dataset, model=small.parent, weights=base) == 0
    run(images, tmp_path / "base", dataset)
    one, two = voxels(tmp_path / "one"), voxels(tmp_path / "two")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    said = [[case["confidence"] for case in metadata(tmp_path / name).values()] for name in ("one", "two", "base")]
    assert said[0] == said[1] != said[2]


def test_a_modality_without_adapter_is_predicted_without_one_and_with_a_warning(images, tmp_path, dataset, capsys):
    whole, _ = adapter_at(tmp_path / "models", dataset, modality="PET")
    assert run(images, tmp_path / "masks", dataset, model=whole) == 0
    assert "adapters for PET, none for MR: it is used without an adapter" in capsys.readouterr().err
    run(images, tmp_path / "base", dataset)
    found, plain = voxels(tmp_path / "masks"), voxels(tmp_path / "base")
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


def test_an_adapter_for_other_pretrained_weights_is_rejected(images, tmp_path, dataset):
    whole, small = adapter_at(tmp_path / "models", dataset)
    other = tmp_path / "other.safetensors"
    tuned = read_checkpoint(whole)
    save_checkpoint(other, SlmSam2(tuned.network, tuned.plan.geometry.input_size), tuned.plan, tuned.provenance)
    with pytest.raises(WeightsError, match="for the base model.safetensors .*other.safetensors has the weights"):
        run(images, tmp_path / "masks", dataset, model=small, weights=str(other))
    with pytest.raises(UsageError, match="cannot be combined"):
        run(images, tmp_path / "masks", dataset, model=whole, weights=str(other))


def with_table(path, dataset, table):
    """The workspace's model with another calibration."""
    tuned = read_checkpoint(Workspace(dataset / "slmsam2").model)
    model = SlmSam2(tuned.network, tuned.plan.geometry.input_size)
    load_weights(model, tuned)
    save_checkpoint(path, model, tuned.plan, tuned.provenance, table)
    return path


def test_confidence_is_calibrated_except_on_annotated_slices(images, tmp_path, dataset, capsys):
    halved = Calibration(
        method="isotonic", confidence=(0.0, 1.0), dice=(0.0, 0.5), slices=99, error_before=0.3, error_after=0.1, note="here"
    )
    raw, table = tmp_path / "raw.safetensors", tmp_path / "table.safetensors"
    assert run(images, tmp_path / "raw", dataset, model=with_table(raw, dataset, None)) == 0
    assert "the model is not calibrated" in capsys.readouterr().err
    assert run(images, tmp_path / "told", dataset, model=with_table(table, dataset, halved)) == 0
    assert "uncalibrated" not in capsys.readouterr().err
    head = json.loads((tmp_path / "told" / "manifest.json").read_text())
    assert head["calibration"]["note"] == "here" and json.loads((tmp_path / "raw" / "manifest.json").read_text())["calibration"] is None
    before, after = metadata(tmp_path / "raw"), metadata(tmp_path / "told")
    for case in before:
        assert (before[case]["calibrated"], after[case]["calibrated"]) == (False, True)
        for label, told in after[case]["confidence"].items():
            for k, share in told["slices"].items():
                was, given = before[case]["confidence"][label]["slices"][k], int(k) in after[case]["annotated_slices"].get(label, ())
                assert share == pytest.approx(was if given else was / 2, abs=1e-4)
    masks = voxels(tmp_path / "raw"), voxels(tmp_path / "told")
    assert all(np.array_equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_a_new_calibration_makes_masks_outdated(images, tmp_path, dataset, capsys):
    model = with_table(tmp_path / "model.safetensors", dataset, None)
    run(images, tmp_path / "masks", dataset, model=model)
    flat = Calibration(method="logistic", confidence=(0.0, 1.0), dice=(0.4, 0.4), slices=20, error_before=0.3, error_after=0.1)
    run(images, tmp_path / "masks", dataset, model=with_table(model, dataset, flat))
    assert "2 masks written, 0 already there" in capsys.readouterr().err
