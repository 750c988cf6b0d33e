"""Prepared cases are made once, redone when anything they rest on changes, and never trusted half-made."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK

from slmsam2_cli.dataset.cache import PreprocessSettings, check_not_truncated, open_prepared, prepare, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.dataset.slices import View
from slmsam2_cli.errors import CaseError, OutputError
from slmsam2_cli.io import atomic

GEOMETRY = SimpleNamespace(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, storage_size=64, crop_to_nonzero=True)
INTENSITY = (SimpleNamespace(scheme="percentile", lower=0.5, upper=99.5),)
SETTINGS = PreprocessSettings(GEOMETRY, INTENSITY)


@pytest.fixture
def data(tmp_path):
    write_phantom_dataset(tmp_path / "data", cases=2, test_cases=0, shape=(5, 24, 24))
    return read_dataset(tmp_path / "data")


def again(data, folder, geometry=GEOMETRY, intensity=INTENSITY, **options):
    told = []
    outcome = prepare_all(data, PreprocessSettings(geometry, intensity), folder, log=told.append, **options)
    return outcome, told


def test_a_prepared_case_holds_slices_between_0_and_1_and_its_view(data, tmp_path):
    case = prepare(data.training[0], data, SETTINGS, tmp_path / "out")
    assert case.frames.dtype == np.float16
    assert case.frames.shape == (1, *case.view.stack_shape)
    assert case.labels.shape == case.view.stack_shape
    assert 0 == case.frames.min() < case.frames.max() == 1
    assert set(np.unique(case.labels)) <= {0, 1, 2, 3}


def test_preprocessing_writes_these_files(data, tmp_path):
    prepare(data.training[0], data, SETTINGS, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "phantom_000").iterdir()) == ["frames.npy", "labels.npy", "record.json"]


def test_memory_maps_are_sent_to_processes_by_path_and_views_as_arrays(data, tmp_path):
    case = prepare(data.training[0], data, SETTINGS, tmp_path / "out")
    sent, upper = pickle.dumps(case), replace(case, frames=case.frames[:, 2:])
    assert len(sent) < case.frames.nbytes
    there, there_upper = pickle.loads(sent), pickle.loads(pickle.dumps(upper))
    assert np.array_equal(there.frames, case.frames) and np.array_equal(there.labels, case.labels) and not there.frames.flags.writeable
    assert np.array_equal(there_upper.frames, case.frames[:, 2:])


def test_a_case_without_a_label_has_none(data, tmp_path):
    case = prepare(replace(data.training[0], label=None), data, SETTINGS, tmp_path / "out")
    assert case.labels is None
    assert not (tmp_path / "out" / "phantom_000" / "labels.npy").exists()


def test_the_record_holds_no_absolute_path(data, tmp_path):
    case = prepare(data.training[0], data, SETTINGS, tmp_path / "out")
    assert set(case.record["inputs"]) == {"imagesTr/phantom_000.nii.gz", "labelsTr/phantom_000.nii.gz"}
    assert str(tmp_path) not in json.dumps(case.record)


def test_the_second_run_does_nothing(data, tmp_path):
    assert again(data, tmp_path / "out")[0].prepared_now == 2
    before = (tmp_path / "out" / "phantom_000" / "frames.npy").stat().st_mtime_ns
    outcome, told = again(data, tmp_path / "out")
    assert (outcome.prepared_now, told, len(outcome.cases)) == (0, [], 2)
    assert (tmp_path / "out" / "phantom_000" / "frames.npy").stat().st_mtime_ns == before


def test_a_changed_image_is_preprocessed_again_with_a_reason(data, tmp_path):
    again(data, tmp_path / "out")
    shutil.copy(data.training[1].images[0], data.training[0].images[0])
    shutil.copy(data.training[1].label, data.training[0].label)
    outcome, told = again(data, tmp_path / "out")
    assert outcome.prepared_now == 1
    assert told == ["case phantom_000: preprocessing again: imagesTr/phantom_000.nii.gz changed"]
    assert np.array_equal(outcome.cases[0].frames, outcome.cases[1].frames)


def test_new_voxels_behind_an_unchanged_header_are_noticed(data, tmp_path):
    image = data.training[0].images[0]
    header = image.with_name("phantom_000.mhd")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(image)), str(header))
    apart = replace(data, training=(replace(data.training[0], images=(header,)),))
    assert again(apart, tmp_path / "out")[0].prepared_now == 1
    raw = header.with_suffix(".raw")
    raw.write_bytes(raw.read_bytes()[::-1])
    assert again(apart, tmp_path / "out")[1] == ["case phantom_000: preprocessing again: imagesTr/phantom_000.raw changed"]
    raw.unlink()
    assert [problem.case for problem in again(apart, tmp_path / "out")[0].problems] == ["phantom_000"]


@pytest.mark.parametrize(
    "change", [{"storage_size": 32}, {"slice_axis": "AP"}, {"in_plane_mm": 2.0}, {"through_plane_mm": 1.0}, {"crop_to_nonzero": False}]
)
def test_a_changed_plan_preprocesses_everything_again(data, tmp_path, change):
    again(data, tmp_path / "out")
    outcome, told = again(data, tmp_path / "out", SimpleNamespace(**{**vars(GEOMETRY), **change}))
    assert outcome.prepared_now == 2
    assert all("geometry or intensity changed in the plan" in line for line in told)


def test_a_changed_intensity_window_preprocesses_again(tmp_path):
    other = (SimpleNamespace(scheme="percentile", lower=1.0, upper=99.5),)
    assert SETTINGS.digest() != PreprocessSettings(GEOMETRY, other).digest()


def test_overwrite_preprocesses_again_and_reports_it(data, tmp_path):
    again(data, tmp_path / "out")
    assert again(data, tmp_path / "out", overwrite=True)[1][0].endswith("preprocessing again: --overwrite")


@pytest.mark.parametrize("spoil", ["frames.npy", "labels.npy", "record.json"])
def test_a_damaged_file_is_made_again(data, tmp_path, spoil):
    good = again(data, tmp_path / "out")[0].cases[0].frames.copy()
    path = tmp_path / "out" / "phantom_000" / spoil
    path.write_bytes(path.read_bytes()[:-9] + b"!")
    outcome, told = again(data, tmp_path / "out")
    assert len(told) == 1 and "damaged" in told[0]
    assert np.array_equal(outcome.cases[0].frames, good)


def test_an_unfinished_case_is_not_opened(data, tmp_path):
    again(data, tmp_path / "out")
    (tmp_path / "out" / "phantom_000" / "record.json").unlink()
    with pytest.raises(CaseError, match=r"case phantom_000: not preprocessed, or incomplete. Run slmsam2 preprocess"):
        open_prepared(tmp_path / "out", "phantom_000")
    assert "was interrupted" in again(data, tmp_path / "out")[1][0]


def test_a_truncated_array_is_not_opened(data, tmp_path):
    again(data, tmp_path / "out")
    path = tmp_path / "out" / "phantom_000" / "frames.npy"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CaseError, match="not preprocessed, or incomplete"):
        open_prepared(tmp_path / "out", "phantom_000")


@pytest.mark.parametrize("name", ["frames", "labels"])
def test_a_file_that_is_truncated_while_mapped_is_reported_before_it_is_read(data, tmp_path, name):
    case = again(data, tmp_path / "out")[0].cases[0]
    part = replace(case, frames=case.frames[:, 2:], labels=case.labels[2:])
    for one in (case, part):
        check_not_truncated(one)
    path = tmp_path / "out" / case.id / f"{name}.npy"
    os.truncate(path, path.stat().st_size - 1)
    for one in (case, part):
        with pytest.raises(atomic.ArrayError, match=rf"case {case.id}: {name}.npy was truncated"):
            check_not_truncated(one)


def test_a_file_that_another_one_replaces_stays_readable(data, tmp_path):
    case = again(data, tmp_path / "out")[0].cases[0]
    before = case.frames.copy()
    again(data, tmp_path / "out", overwrite=True)
    check_not_truncated(case)
    assert np.array_equal(case.frames, before)


def test_a_record_that_names_files_outside_its_folder_is_ignored(data, tmp_path):
    again(data, tmp_path / "out")
    path = tmp_path / "out" / "phantom_000" / "record.json"
    record = json.loads(path.read_text())
    record["outputs"]["../phantom_001/frames.npy"] = "0"
    path.write_text(json.dumps(record))
    with pytest.raises(CaseError, match="not preprocessed"):
        open_prepared(tmp_path / "out", "phantom_000")


def test_one_bad_case_does_not_stop_the_others(data, tmp_path):
    data.training[0].images[0].write_bytes(b"not an image")
    outcome, _ = again(data, tmp_path / "out")
    assert [case.id for case in outcome.cases] == ["phantom_001"]
    assert [problem.case for problem in outcome.problems] == ["phantom_000"]


def test_a_missing_image_is_a_problem_of_its_case_alone(data, tmp_path):
    data.training[1].images[0].unlink()
    outcome, _ = again(data, tmp_path / "out")
    assert [problem.case for problem in outcome.problems] == ["phantom_001"]


def test_a_fault_at_any_step_leaves_a_complete_case_or_none(data, tmp_path):
    want = prepare(data.training[0], data, SETTINGS, tmp_path / "good").frames
    for step in range(1, 40):
        folder = tmp_path / f"out{step}"
        try:
            with atomic.fail_at(step):
                prepare(data.training[0], data, SETTINGS, folder)
            break
        except OutputError:
            pass
        outcome, _ = again(data, folder)
        assert np.array_equal(outcome.cases[0].frames, want)
    else:
        pytest.fail("never ran through")


def test_labels_of_a_prepared_case_are_restored_to_the_native_grid(data, tmp_path):
    case = prepare(data.training[0], data, SETTINGS, tmp_path / "out")
    assert isinstance(case.view, View)
    stack = np.asarray(case.labels)
    back = case.view.restore(lambda t: np.where(stack[t] == 1, 1.0, -1.0)[None].astype(np.float32), [1])
    assert back.shape == case.view.grid.shape
