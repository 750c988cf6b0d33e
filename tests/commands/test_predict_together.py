"""predict --together: volumes learn from each other's annotated slices, none from its own; a second call learns nothing again."""

import json

import pytest

from slmsam2_cli.commands import predict as stage
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import UsageError
from slmsam2_cli.training import annotated_slices


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=5, shape=(8, 40, 40))
    return folder


@pytest.fixture(autouse=True)
def learned_in_seconds(monkeypatch):
    """Two steps of two slices, in this process, whose settings the others do not see."""
    monkeypatch.setattr(annotated_slices, "STEPS_FROM_RANDOM", 2)
    monkeypatch.setattr(annotated_slices, "LABEL_UNET_BATCH", 2)
    monkeypatch.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)


def run(phantoms, masks, **options):
    options = {"together": True, "device": "cpu", "report": False} | options
    return predict(phantoms / "imagesTr", masks, simulate_from=phantoms / "labelsTr", **options)


def cases_of(masks):
    return json.loads((masks / "manifest.json").read_text())["cases"]


def contents(masks):
    return {path.name: path.read_bytes() for path in masks.glob("*.nii.gz")}


def test_the_manifest_says_from_how_many_volumes_each_case_learned(phantoms, tmp_path):
    assert run(phantoms, tmp_path) == 0
    told = [case["together"] for case in cases_of(tmp_path).values()]
    assert sorted(one["half"] for one in told) == [0, 0, 1, 1]
    assert all(one["annotated_volumes"] == 2 and one["labelled_volumes"] == [] for one in told)
    assert len({one["learned_from"] for one in told}) == 1


def test_a_second_call_learns_nothing_and_writes_nothing(phantoms, tmp_path, monkeypatch):
    run(phantoms, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(stage, "train_label_unets", lambda *rest: pytest.fail("learned again"))
    assert run(phantoms, tmp_path) == 0 and contents(tmp_path) == before


def test_a_run_that_ends_after_learning_goes_on_with_what_was_learned(phantoms, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_predict_cases", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(phantoms, tmp_path)
    assert not contents(tmp_path)
    monkeypatch.setattr(stage, "train_label_unets", lambda *rest: pytest.fail("learned again"))
    assert run(phantoms, tmp_path) == 0 and len(contents(tmp_path)) == 4


def test_masks_do_not_depend_on_the_number_of_workers(phantoms, tmp_path):
    run(phantoms, tmp_path / "one", workers=1)
    run(phantoms, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


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
