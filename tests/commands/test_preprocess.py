"""slmsam2 preprocess: every case once, invalid cases reported, no incomplete files."""

from __future__ import annotations

import json

import pytest

from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.preprocess import preprocess
from slmsam2_cli.dataset.cache import open_prepared
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, LockError, PlanError
from slmsam2_cli.io.atomic import lock_folder
from slmsam2_cli.workspace import Workspace


@pytest.fixture
def data(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=3, test_cases=0, shape=(5, 24, 24))
    return tmp_path / "data"


@pytest.fixture
def workspace(data, tmp_path):
    made = Workspace(tmp_path / "work")
    plan(data, made)
    return made


def test_every_case_is_preprocessed(data, workspace, capsys):
    assert preprocess(data, workspace) == 0
    assert sorted(p.name for p in workspace.prepared.iterdir()) == ["phantom_000", "phantom_001", "phantom_002"]
    assert open_prepared(workspace.prepared, "phantom_001").frames.max() == 1
    assert "3 cases ready, 3 preprocessed in this run" in capsys.readouterr().err


def test_a_second_run_preprocesses_nothing(data, workspace, capsys):
    preprocess(data, workspace)
    assert preprocess(data, workspace) == 0
    assert "3 cases ready, 0 preprocessed in this run" in capsys.readouterr().err


def test_the_error_without_a_plan_names_the_command_to_run(data, tmp_path):
    with pytest.raises(PlanError, match="Run slmsam2 plan first"):
        preprocess(data, Workspace(tmp_path / "empty"))


def test_one_bad_case_is_named_and_the_others_are_ready(data, workspace, capsys):
    (data / "labelsTr" / "phantom_000.nii.gz").write_bytes(b"")
    assert preprocess(data, workspace) == 1
    assert "error: case phantom_000: labelsTr/phantom_000.nii.gz" in capsys.readouterr().err
    assert sorted(p.name for p in workspace.prepared.iterdir()) == ["phantom_001", "phantom_002"]


def test_no_usable_case_is_an_error_with_every_problem(data, workspace):
    for image in (data / "imagesTr").iterdir():
        image.write_bytes(b"nonsense")
    with pytest.raises(DatasetError) as error:
        preprocess(data, workspace)
    assert len(error.value.problems) == 3


def test_cases_are_preprocessed_again_after_an_edit_of_the_plan(data, workspace, capsys):
    preprocess(data, workspace)
    value = json.loads(workspace.plan.read_text())
    value["geometry"]["in_plane_mm"] = 0.25
    workspace.plan.write_text(json.dumps(value))
    assert preprocess(data, workspace) == 0
    printed = capsys.readouterr().err
    assert printed.count("preprocessing again: geometry or intensity changed in the plan") == 3
    assert printed.count("to fit 32 pixels") == 3
    assert open_prepared(workspace.prepared, "phantom_000").frames.shape[-1] <= 32


def test_a_plan_for_other_channels_is_rejected(data, workspace):
    described = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**described, "modality": {"0": "CT"}}))
    with pytest.raises(PlanError, match="channels"):
        preprocess(data, workspace)


def test_two_runs_cannot_write_the_same_workspace(data, workspace):
    with lock_folder(workspace.root), pytest.raises(LockError):
        preprocess(data, workspace)
