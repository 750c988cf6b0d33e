"""Measurements of a dataset are what one counts by hand."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from slmsam2_cli import parallel
from slmsam2_cli.dataset.dataset import Case, Dataset
from slmsam2_cli.dataset.phantom import nifti_bytes
from slmsam2_cli.io.image import Grid
from slmsam2_cli.planning import measure as module
from slmsam2_cli.planning.fingerprint import read_fingerprint, write_fingerprint
from slmsam2_cli.planning.measure import measure, measure_case, orientation_code, worker_count


def dataset(root, *pairs, spacing=(3.0, 1.0, 1.0), labels=None):
    """Write a dataset of (image, labels) arrays."""
    cases = []
    for index, (image, mask) in enumerate(pairs):
        for folder, array in (("images", image.astype(np.float32)), ("labels", mask.astype(np.uint8))):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"c{index}.nii.gz").write_bytes(nifti_bytes(array, spacing))
        cases.append(Case(f"c{index}", (root / "images" / f"c{index}.nii.gz",), root / "labels" / f"c{index}.nii.gz"))
    return Dataset(root, "d", ("MRI",), labels or {1: "a", 2: "b"}, None, ".nii.gz", tuple(cases), (), (), ())


def block(shape=(4, 10, 12)):
    """Return an image of value 5 with zeros around, and a block of value 100 that is label 1."""
    image, mask = np.zeros(shape), np.zeros(shape)
    image[:, 1:9, 1:11] = 5
    image[1:3, 2:6, 3:5] = 100
    mask[1:3, 2:6, 3:5] = 1
    return image, mask


def test_sizes_spacings_and_values_of_a_case(tmp_path):
    fingerprint, problems = measure(dataset(tmp_path, block()))
    assert problems == ()
    case = fingerprint.cases[0]
    assert (case.stored_shape, case.shape, case.spacing_mm, case.orientation) == ((4, 10, 12), (4, 10, 12), (3, 1, 1), "LPS")
    assert case.content_mm == (12, 8, 10)
    assert case.extent_mm == (12, 10, 12)
    whole, foreground = case.channels[0].whole, case.channels[0].foreground
    assert (whole.voxels, whole.min, whole.max, whole.median) == (4 * 8 * 10, 5, 100, 5)
    assert (foreground.voxels, foreground.mean, foreground.std) == (16, 100, 0)


def test_labels_are_measured_along_every_axis(tmp_path):
    label = measure(dataset(tmp_path, block()))[0].cases[0].labels[1]
    assert label.voxels == 16
    spans = {axis: (extent.first, extent.last, extent.slices) for axis, extent in label.extents.items()}
    assert spans == {"SI": (1, 2, 2), "AP": (2, 5, 4), "LR": (3, 4, 2)}
    assert label.overlap == pytest.approx({"SI": 1 / 3, "AP": 3 / 5, "LR": 1 / 3})


def test_a_label_that_does_not_occur_is_not_listed(tmp_path):
    assert set(measure(dataset(tmp_path, block()))[0].cases[0].labels) == {1}


def test_an_ignored_voxel_is_neither_label_nor_foreground(tmp_path):
    image, mask = block()
    mask[0] = 9
    data = replace(dataset(tmp_path, (image, mask)), ignore=9)
    case = measure(data)[0].cases[0]
    assert case.channels[0].foreground.voxels == 16
    assert set(case.labels) == {1}


def test_all_problems_are_found_in_one_pass(tmp_path):
    data = dataset(tmp_path, block(), block(), block())
    data.training[0].images[0].write_bytes(b"nonsense")
    data.training[2].label.unlink()
    fingerprint, problems = measure(data)
    assert [case.id for case in fingerprint.cases] == ["c1"]
    assert [problem.case for problem in problems] == ["c0", "c2"]


def test_undeclared_labels_are_a_problem(tmp_path):
    _, problems = measure(dataset(tmp_path, block(), labels={2: "b"}))
    assert "1 (16 voxels)" in str(problems[0])


def test_an_empty_label_is_a_warning(tmp_path):
    image, mask = block()
    fingerprint, problems = measure(dataset(tmp_path, (image, mask * 0)))
    assert problems == ()
    assert any("no foreground" in warning for warning in fingerprint.cases[0].warnings)
    assert fingerprint.foreground == (None,)


def test_progress_advances_once_per_case(tmp_path):
    advanced = []
    measure(dataset(tmp_path, block(), block()), lambda steps, note: advanced.append(note))
    assert advanced == ["c0", "c1"]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_nothing(tmp_path, workers):
    small, large = block(), (np.full((4, 10, 12), 10.0), np.ones((4, 10, 12)))
    data = dataset(tmp_path, small, large, small, large)
    data.training[1].images[0].write_bytes(b"nonsense")
    data.training[2].label.unlink()
    here, there = measure(data, workers=0), measure(data, workers=workers)
    assert there[0] == here[0]
    assert [str(problem) for problem in there[1]] == [str(problem) for problem in here[1]]
    assert [problem.case for problem in there[1]] == ["c1", "c2"]


def killing(case, dataset):
    """Kill the process at one case, as the kernel does when memory runs out."""
    if case.id == "c1":
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_case(case, dataset)


def test_a_killed_process_is_a_problem_of_its_case_only(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process uses the replaced function
    monkeypatch.setattr(module, "measure_case", killing)
    fingerprint, problems = measure(dataset(tmp_path, block(), block(), block()), workers=2)
    assert [case.id for case in fingerprint.cases] == ["c0", "c2"]
    assert [problem.case for problem in problems] == ["c1"]


def test_running_out_of_memory_is_a_problem_of_the_case(tmp_path, monkeypatch):
    def hungry(case, dataset):
        raise MemoryError

    monkeypatch.setattr(module, "read_pair", hungry)
    _, problems = measure(dataset(tmp_path, block()))
    assert "case c0: not enough memory" in str(problems[0])


def test_a_small_dataset_is_measured_in_this_process(tmp_path):
    assert worker_count(dataset(tmp_path, block(), block(), block()).training) == 0


def test_a_large_dataset_is_measured_by_one_process_per_core_but_at_most_one_per_case(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr(module, "available_cpus", lambda: 2)
    cases = dataset(tmp_path, block(), block(), block()).training
    assert [worker_count(cases[:count]) for count in (1, 2, 3)] == [1, 2, 2]


def test_the_foreground_is_pooled_over_all_cases(tmp_path):
    small, large = block(), (np.full((4, 10, 12), 10.0), np.ones((4, 10, 12)))
    foreground = measure(dataset(tmp_path, small, large))[0].foreground[0]
    assert (foreground.min, foreground.max) == (10, 100)


@pytest.mark.parametrize(
    ("direction", "code"), [(np.eye(3), "LPS"), (np.diag([-1.0, -1.0, 1.0]), "RAS"), (np.eye(3)[:, [1, 2, 0]], "PSL"), (-np.eye(3), "RAI")]
)
def test_the_orientation_code_names_the_direction_of_x_y_and_z(direction, code):
    assert orientation_code(Grid((2, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction)) == code


def test_a_fingerprint_is_read_as_it_was_written(tmp_path):
    fingerprint, _ = measure(dataset(tmp_path, block()))
    write_fingerprint(tmp_path / "fingerprint.json", fingerprint)
    assert read_fingerprint(tmp_path / "fingerprint.json") == fingerprint


def test_the_digest_does_not_depend_on_the_version_of_slmsam2(tmp_path):
    fingerprint, _ = measure(dataset(tmp_path, block()))
    assert fingerprint.model_copy(update={"tool_version": "99"}).digest == fingerprint.digest
