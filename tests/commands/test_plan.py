"""slmsam2 plan: measures a dataset, writes a plan with reasons, and keeps manual edits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from slmsam2_cli.commands.plan import compare, plan
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import DatasetError, OutputError, PlanError, UsageError
from slmsam2_cli.model import speed
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory):
    """A dataset and a workspace with its plan, for tests to copy."""
    root = tmp_path_factory.mktemp("planned")
    write_phantom_dataset(root / "data", cases=3, test_cases=1, shape=(5, 24, 24))
    assert plan(root / "data", Workspace(root / "work")) == 0
    return root


@pytest.fixture
def data(planned_once, tmp_path):
    return Path(shutil.copytree(planned_once / "data", tmp_path / "data"))


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "work")


@pytest.fixture
def planned(planned_once, workspace):
    """The workspace, in which the dataset was planned."""
    shutil.copytree(planned_once / "work", workspace.root)
    return workspace


def edit(workspace, **geometry):
    value = json.loads(workspace.plan.read_text())
    value["geometry"].update(geometry)
    workspace.plan.write_text(json.dumps(value))


def test_the_files_written_are_these(data, workspace):
    assert plan(data, workspace) == 0
    assert sorted(p.name for p in workspace.root.iterdir() if not p.name.startswith(".")) == [
        "fingerprint.json",
        "plan.html",
        "plan.json",
    ]


def test_settings_are_printed_with_their_reasons(data, workspace, capsys):
    plan(data, workspace)
    shown = capsys.readouterr().out
    assert "geometry.slice_axis" in shown and "coarsest axis" in shown
    assert "1 organ" in shown and "3 of 3" in shown


def test_one_bad_case_is_named_and_the_others_are_planned(data, workspace, capsys):
    (data / "imagesTr" / "phantom_001.nii.gz").write_bytes(b"nonsense")
    assert plan(data, workspace) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "case phantom_001: imagesTr/phantom_001.nii.gz" in errors[0]
    assert read_plan(workspace.plan)


def test_no_usable_case_is_an_error_with_every_problem(data, workspace):
    for image in (data / "imagesTr").iterdir():
        image.write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="none of its 3 training cases is usable") as error:
        plan(data, workspace)
    assert len(error.value.problems) == 3
    assert not workspace.plan.exists()


def test_planning_again_changes_nothing(data, planned):
    before = planned.plan.read_bytes(), planned.fingerprint.read_bytes()
    plan(data, planned)
    assert (planned.plan.read_bytes(), planned.fingerprint.read_bytes()) == before


def test_manual_edits_are_kept_with_a_warning(data, planned, capsys):
    edit(planned, input_size=224)
    assert plan(data, planned) == 0
    assert read_plan(planned.plan).geometry.input_size == 224
    assert "keeping geometry.input_size = 224 (default: 96; use --overwrite to reset)" in capsys.readouterr().err


def test_overwrite_drops_the_edits(data, planned):
    edit(planned, input_size=224)
    plan(data, planned, overwrite=True)
    assert read_plan(planned.plan).geometry.input_size == 96


def test_overwrite_replaces_a_broken_plan(data, planned):
    planned.plan.write_text("{")
    with pytest.raises(PlanError):
        plan(data, planned)
    assert plan(data, planned, overwrite=True) == 0


def test_manual_edits_are_rejected_when_the_dataset_changed(data, planned):
    edit(planned, input_size=224)
    before = planned.plan.read_bytes()
    (data / "labelsTr" / "phantom_002.nii.gz").unlink()
    with pytest.raises(PlanError, match=r"geometry\.input_size is 224"):
        plan(data, planned)
    assert planned.plan.read_bytes() == before


def test_a_requested_network_is_kept_by_later_runs(data, workspace):
    plan(data, workspace, network="tiny")
    plan(data, workspace)
    assert read_plan(workspace.plan).network.size == "tiny"


def test_the_network_option_does_not_drop_manual_edits(data, planned):
    edit(planned, input_size=224)
    with pytest.raises(PlanError, match=r"manual edit of network.size that conflicts with this option. Set it to tiny in plan.json"):
        plan(data, planned, network="tiny")


def test_the_error_for_an_unwritable_workspace_names_the_option(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose a workspace you can write to with -w"):
        plan(data, Workspace(tmp_path / "file" / "work"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_error_for_a_read_only_dataset_names_the_option(data):
    data.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="-w"):
            plan(data, Workspace.of(data, None))
    finally:
        data.chmod(0o755)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared volumes are not next to this checkout")
@pytest.mark.parametrize(
    ("name", "modality", "axis", "storage_size", "roi_px", "whole_px"),
    [
        ("Sarcoma_CT", "CT", "SI", 224, 128, 544),
        ("Sarcoma_MR_T1", "MR", "SI", 192, 128, 480),
        ("Sarcoma_PET", "PET", "SI", 64, 96, 128),
        ("SpinalCord_MRI", "MR", "SI", 288, 128, 384),
        ("SpinalGM_T2star", "MR", "SI", 64, 96, 160),
        ("Task04_Hippocampus", "MR", "LR", 64, 96, 160),
        ("Task09_Spleen_crop", "CT", "SI", 192, 128, 448),
    ],
)
def test_the_settings_for_real_datasets(workspace, name, modality, axis, storage_size, roi_px, whole_px):
    """storage_size, roi_px: of nano, which sees ROI crops; whole_px: of tiny, which sees whole slices."""
    assert plan(SHARED / name, workspace) == 0
    written = read_plan(workspace.plan)
    assert (written.modality, written.geometry.slice_axis, written.geometry.storage_size) == (modality, axis, storage_size)
    assert (written.geometry.roi_scale, written.geometry.input_size) == (2.0, roi_px)
    assert plan(SHARED / name, workspace, network="tiny", overwrite=True) == 0
    assert read_plan(workspace.plan).geometry.input_size == whole_px


def test_a_requested_axis_is_kept_by_later_runs(data, workspace):
    plan(data, workspace, axis="LR")
    plan(data, workspace)
    final = read_plan(workspace.plan)
    assert (final.geometry.slice_axis, final.overrides, final.edited) == ("LR", ("geometry.slice_axis",), False)
    assert final.reasons["geometry.slice_axis"].startswith("set by the user; the data suggest SI")


def test_axis_auto_resets_a_requested_axis(data, workspace):
    plan(data, workspace, axis="LR")
    plan(data, workspace, axis="auto")
    final = read_plan(workspace.plan)
    assert (final.geometry.slice_axis, final.overrides) == ("SI", ())


def test_the_axis_option_does_not_drop_manual_edits(data, planned):
    edit(planned, input_size=160)
    with pytest.raises(
        PlanError, match="manual edit of geometry.slice_axis that conflicts .* Set it to LR in plan.json, or use --overwrite"
    ):
        plan(data, planned, axis="LR")
    assert read_plan(planned.plan).geometry.input_size == 160


def test_a_comparison_shows_manual_edits_and_writes_nothing(data, planned, capsys):
    edit(planned, input_size=160)
    before = {path: path.read_bytes() for path in planned.root.iterdir() if path.is_file()}
    capsys.readouterr()
    assert compare(data, planned.plan) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("geometry.input_size"))
    assert row.split()[1:3] == ["160", "96"]
    assert {path: path.read_bytes() for path in planned.root.iterdir() if path.is_file()} == before


def test_a_comparison_of_an_unedited_plan_has_no_differences(data, planned, capsys):
    capsys.readouterr()
    compare(data, planned.plan)
    assert capsys.readouterr().out == "plan.json is up to date: no differences\n"


def test_a_comparison_says_that_the_data_have_changed(data, planned, capsys):
    value = json.loads(planned.plan.read_text())
    value["fingerprint_digest"] = "0" * 64
    planned.plan.write_text(json.dumps(value))
    compare(data, planned.plan)
    assert "was made for different data, or the dataset has changed since" in capsys.readouterr().err


def test_slices_to_annotate_and_dataset_warnings_are_printed(data, workspace, capsys):
    for folder in ("imagesTr", "labelsTr"):
        (data / folder / "phantom_001.nii.gz").write_bytes((data / folder / "phantom_000.nii.gz").read_bytes())
    plan(data, workspace)
    shown = capsys.readouterr()
    assert "Slices to annotate per volume" in shown.out
    assert "cases phantom_000, phantom_001: duplicate images and masks" in shown.err


def test_the_page_shows_what_the_terminal_shows(data, workspace, capsys):
    plan(data, workspace)
    page, shown = workspace.plan_page.read_text(), capsys.readouterr()
    for part in ("annotate the middle slice", "geometry.slice_axis", "phantom_002"):
        assert part in page
    assert f"wrote {workspace.plan_page}" in shown.err


def test_a_page_that_cannot_be_written_is_only_a_warning(data, workspace, capsys):
    workspace.plan_page.parent.mkdir()
    workspace.plan_page.write_text("mine")
    assert plan(data, workspace) == 0
    assert read_plan(workspace.plan) and workspace.plan_page.read_text() == "mine"
    assert "warning: could not write plan.html" in capsys.readouterr().err


def test_without_a_report_no_page_is_written(data, workspace):
    plan(data, workspace, report=False)
    assert read_plan(workspace.plan) and not workspace.plan_page.exists()


def test_time_and_memory_limits_are_kept_by_later_runs(data, workspace):
    plan(data, workspace, minutes=7.0, max_memory_gb=0.95)
    first = read_plan(workspace.plan)
    plan(data, workspace)
    again = read_plan(workspace.plan)
    assert again.training == first.training and first.training.minutes == 7.0 and 2 <= first.training.clip_slices < 8
    assert set(again.overrides) == {"training.minutes", "training.clip_slices"} and not again.edited


def test_a_memory_limit_that_is_too_small_is_rejected_with_the_minimum(data, workspace):
    with pytest.raises(UsageError, match=r"--max-memory 0.3: even clips of 2 slices need \d\.\d\d GB"):
        plan(data, workspace, max_memory_gb=0.3)
    assert not workspace.plan.exists()


def test_a_memory_limit_is_rejected_for_networks_without_estimates(data, workspace):
    with pytest.raises(UsageError, match="no estimate for network tiny"):
        plan(data, workspace, network="tiny", max_memory_gb=8.0)


def test_an_unknown_modality_is_a_warning_that_names_the_choices(data, workspace, capsys):
    described = json.loads((data / "dataset.json").read_text())
    key = "modality" if "modality" in described else "channel_names"
    described[key] = {"0": "scan"}
    (data / "dataset.json").write_text(json.dumps(described))
    plan(data, workspace)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "name the channel in dataset.json" in line]
    assert len(warnings) == 1 and "CT, MR, PET, US, XR, RGB" in warnings[0]


def test_a_limit_of_0_or_one_removed_by_hand_is_reset(data, workspace):
    plan(data, workspace, minutes=7.0, max_memory_gb=0.95)
    plan(data, workspace, max_memory_gb=0)
    assert read_plan(workspace.plan).overrides == ("training.minutes",)
    value = json.loads(workspace.plan.read_text())
    value["training"]["minutes"] = None
    workspace.plan.write_text(json.dumps(value))
    assert compare(data, workspace.plan) == 0
    assert plan(data, workspace) == 0 and read_plan(workspace.plan).training.minutes is None


def test_overrides_contain_only_keys_that_have_an_option(data, planned):
    value = json.loads(planned.plan.read_text())
    value["overrides"] = ["training.stepz"]
    planned.plan.write_text(json.dumps(value))
    with pytest.raises(PlanError, match=r"overrides\.0: Input should be 'geometry.slice_axis'"):
        plan(data, planned)


def test_a_manual_edit_that_exceeds_the_memory_limit_is_rejected(data, planned):
    value = json.loads(planned.plan.read_text())
    value["training"] |= {"clips_per_step": 8, "clip_slices": 4}
    planned.plan.write_text(json.dumps(value))
    with pytest.raises(PlanError, match="manual edit of training.clip_slices that conflicts"):
        plan(data, planned, max_memory_gb=1.25)


def test_axis_auto_is_rejected_for_an_edited_plan(data, workspace):
    plan(data, workspace, axis="LR")
    value = json.loads(workspace.plan.read_text())
    value["training"]["learning_rate"] = 2e-4
    workspace.plan.write_text(json.dumps(value))
    with pytest.raises(PlanError, match="manual edit of geometry.slice_axis that conflicts .* Set it to SI in plan.json"):
        plan(data, workspace, axis="auto")


def test_estimates_have_no_time_where_the_speed_cannot_be_measured(data, workspace, capsys, monkeypatch):
    def out_of_memory(*_):
        raise RuntimeError("not enough memory: you tried to allocate 1 bytes")

    speed.seconds_per_slice.cache_clear()  # conftest.py keeps it for all tests
    monkeypatch.setattr("slmsam2_cli.model.slmsam2.SlmSam2.encode", out_of_memory)
    assert plan(data, workspace) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("finetune -n 1"))
    assert row.split()[3:] == ["-", row.split()[4], "GB"]


def test_the_page_is_reproducible(data, planned):
    first = planned.plan_page.read_bytes()
    plan(data, planned)
    assert planned.plan_page.read_bytes() == first
