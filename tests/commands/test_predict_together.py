"""predict --together: volumes learn from each other's annotated slices, none from its own; a second call learns nothing again."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from small_runs import small_workspace

from slmsam2_cli.commands import predict as stage
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import UsageError
from slmsam2_cli.training import annotated_slices
from slmsam2_cli.workspace import Workspace


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=5, shape=(8, 32, 32))
    small_workspace(folder / "slmsam2", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def learned_in_seconds():
    """Two steps of two slices, in this process, whose settings the others do not see."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(annotated_slices, "STEPS", 2)
        patched.setattr(annotated_slices, "STEPS_FROM_RANDOM", 2)
        patched.setattr(annotated_slices, "LABEL_UNET_BATCH", 2)
        patched.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)
        yield


@pytest.fixture(scope="module")
def finished(phantoms, tmp_path_factory):
    """The folder of masks of a whole run."""
    masks = tmp_path_factory.mktemp("masks")
    assert run(phantoms, masks) == 0
    return masks


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "masks")
    return tmp_path / "masks"


def run(phantoms, masks, **options):
    options = {"together": True, "device": "cpu", "report": False, "workers": 1, "workspace": Workspace(phantoms / "slmsam2")} | options
    return predict(phantoms / "imagesTr", masks, simulate_from=phantoms / "labelsTr", **options)


def cases_of(masks):
    return json.loads((masks / "manifest.json").read_text())["cases"]


def contents(masks):
    return {path.name: path.read_bytes() for path in masks.glob("*.nii.gz")}


def without_masks(masks):
    """The folder as a run leaves it that ends when all is learned, before the first mask."""
    for path in (*masks.glob("*.nii.gz"), *(masks / ".slmsam2").glob("*.json")):
        path.unlink()
    return masks


def test_the_manifest_says_from_how_many_volumes_each_case_learned(finished):
    told = [case["together"] for case in cases_of(finished).values()]
    assert sorted(one["half"] for one in told) == [0, 0, 1, 1]
    assert all(one["annotated_volumes"] == 2 and one["labelled_volumes"] == [] for one in told)
    assert len({one["learned_from"] for one in told}) == 1


def test_a_second_call_learns_nothing_and_writes_nothing(phantoms, finished, copied, monkeypatch):
    monkeypatch.setattr(stage, "train_label_unets", lambda *rest: pytest.fail("learned again"))
    assert run(phantoms, copied) == 0 and contents(copied) == contents(finished)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_ended_after_learning_goes_on_to_the_same_masks_with_any_number_of_workers(
    phantoms, finished, copied, monkeypatch, workers
):
    monkeypatch.setattr(stage, "train_label_unets", lambda *rest: pytest.fail("learned again"))
    assert run(phantoms, without_masks(copied), workers=workers) == 0 and contents(copied) == contents(finished)


def test_a_run_that_ended_between_the_rounds_learns_the_second_alone(phantoms, finished, copied, monkeypatch):
    (copied / ".slmsam2" / "together-2.safetensors").unlink()
    trained = []
    train = stage.train_label_unets
    monkeypatch.setattr(stage, "train_label_unets", lambda *arguments: trained.append(arguments) or train(*arguments))
    assert run(phantoms, without_masks(copied)) == 0 and len(trained) == 1
    assert contents(copied) == contents(finished)


def test_masks_of_a_run_without_it_are_out_of_date_with_it(phantoms, tmp_path, capsys):
    run(phantoms, tmp_path, together=False)
    assert not any("together" in case for case in cases_of(tmp_path).values())
    run(phantoms, tmp_path)
    assert capsys.readouterr().err.count("outdated") == 4
    assert all("together" in case for case in cases_of(tmp_path).values())


def test_too_few_volumes_are_one_line_with_their_number(phantoms, tmp_path):
    one = next((phantoms / "imagesTr").iterdir())
    with pytest.raises(UsageError, match="at least 4 volumes with annotated slices, and there are 1"):
        predict(one, tmp_path / "masks", simulate_from=phantoms / "labelsTr", together=True)


def test_it_cannot_be_divided_into_parts(phantoms, tmp_path):
    with pytest.raises(UsageError, match="--together learns from all volumes in one run"):
        run(phantoms, tmp_path / "masks", num_parts=2)


@pytest.mark.parametrize("labelled", [True, False])
def test_many_volumes_with_annotated_slices_are_offered_it_where_there_are_labelled_ones(
    fine_tuned, phantoms, tmp_path, capsys, monkeypatch, labelled
):
    folder = fine_tuned if labelled else phantoms
    monkeypatch.setattr(stage, "MIN_OFFERED", 4)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for path in (folder / "labelsTr").iterdir():
        whole = nibabel.load(path)
        one_slice = np.zeros(whole.shape, np.uint8)
        one_slice[..., 4] = np.asarray(whole.dataobj)[..., 4]
        nibabel.save(nibabel.Nifti1Image(one_slice, whole.affine, whole.header), prompts / path.name)
    options = {"prompts": prompts, "device": "cpu", "report": False, "workspace": Workspace(folder / "slmsam2")}
    predict(folder / "imagesTr", tmp_path / "masks", **options)
    assert capsys.readouterr().err.count("add --together") == labelled


def test_without_labelled_volumes_nothing_is_added_where_propagation_finds_nothing(phantoms, copied, monkeypatch):
    seen = []
    segment = stage.segment_case

    def watched(case, root, prompts, segmenter):
        seen.append(segmenter.learned.can_add)
        return segment(case, root, prompts, segmenter)

    monkeypatch.setattr(stage, "segment_case", watched)
    run(phantoms, without_masks(copied))
    assert seen == [False] * 4


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A data set of five cases, and a workspace with a model that was trained on one of them."""
    folder = tmp_path_factory.mktemp("five")
    write_phantom_dataset(folder, cases=5, test_cases=0, seed=5, shape=(8, 32, 32))
    finetune(folder, small_workspace(folder / "slmsam2", folder), cases=1, weights="random", steps=1)
    return folder


def test_labelled_volumes_teach_all_others_and_are_segmented_without_what_they_taught(fine_tuned, tmp_path, monkeypatch):
    learned = {}
    segment = stage.segment_case

    def watched(case, root, prompts, segmenter):
        learned[case.id] = segmenter.learned
        return segment(case, root, prompts, segmenter)

    monkeypatch.setattr(stage, "segment_case", watched)
    assert run(fine_tuned, tmp_path) == 0
    (training,) = (case for case, told in cases_of(tmp_path).items() if told["training"])
    assert learned.pop(training) is None and "together" not in cases_of(tmp_path)[training]
    assert len(learned) == 4 and all(one.can_add for one in learned.values())
    assert all(cases_of(tmp_path)[case]["together"]["labelled_volumes"] == [training] for case in learned)


def test_without_its_workspace_a_model_has_no_labelled_volumes_which_is_said(fine_tuned, tmp_path, capsys):
    model = fine_tuned / "slmsam2" / "finetuned" / "model.safetensors"
    assert run(fine_tuned, tmp_path, workspace=None, model=model) == 0
    assert "Name its workspace: -w" in capsys.readouterr().err
    assert all(case["together"]["labelled_volumes"] == [] for case in cases_of(tmp_path).values())
