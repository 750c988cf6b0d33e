"""What is measured on a data set is what a person would count."""

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
    """A data set of (image, labels) arrays on disk."""
    cases = []
    for index, (image, mask) in enumerate(pairs):
        for folder, array in (("images", image.astype(np.float32)), ("labels", mask.astype(np.uint8))):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"c{index}.nii.gz").write_bytes(nifti_bytes(array, spacing))
        cases.append(Case(f"c{index}", (root / "images" / f"c{index}.nii.gz",), root / "labels" / f"c{index}.nii.gz"))
    return Dataset(root, "d", ("MRI",), labels or {1: "a", 2: "b"}, None, ".nii.gz", tuple(cases), (), (), ())


def block(shape=(4, 10, 12)):
    """An image of 5 with a block of 100 that is label 1, zeros around."""
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


def test_progress_is_told_once_a_case(tmp_path):
    told = []
    measure(dataset(tmp_path, block(), block()), lambda steps, note: told.append(note))
    assert told == ["c0", "c1"]


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
    """Stands in for a case whose process the kernel ends."""
    if case.id == "c1":
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_case(case, dataset)


def test_a_killed_process_is_its_own_case_s_problem_only(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process knows the stand-in
    monkeypatch.setattr(module, "measure_case", killing)
    fingerprint, problems = measure(dataset(tmp_path, block(), block(), block()), workers=2)
    assert [case.id for case in fingerprint.cases] == ["c0", "c2"]
    assert [problem.case for problem in problems] == ["c1"]


def test_want_of_memory_is_the_case_s_problem(tmp_path, monkeypatch):
    def hungry(case, dataset):
        raise MemoryError

    monkeypatch.setattr(module, "read_pair", hungry)
    _, problems = measure(dataset(tmp_path, block()))
    assert "case c0: not enough memory" in str(problems[0])


def test_a_small_data_set_is_measured_without_other_processes(tmp_path):
    assert worker_count(dataset(tmp_path, block(), block(), block()).training) == 0


def test_a_large_data_set_gets_a_process_a_core_but_no_more_than_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr(module, "available_cpus", lambda: 2)
    cases = dataset(tmp_path, block(), block(), block()).training
    assert [worker_count(cases[:count]) for count in (1, 2, 3)] == [1, 2, 2]


def test_the_foreground_is_pooled_over_all_cases(tmp_path):
    small, large = block(), (np.full((4, 10, 12), 10.0), np.ones((4, 10, 12)))
    isotonic = measure(dataset(tmp_path, small, large))[0].foreground[0]
    assert (isotonic.min, isotonic.max) == (10, 100)


@pytest.mark.parametrize(
    ("direction", "code"), [(np.eye(3), "LPS"), (np.diag([-1.0, -1.0, 1.0]), "RAS"), (np.eye(3)[:, [1, 2, 0]], "PSL"), (-np.eye(3), "RAI")]
)
def test_the_orientation_is_told_in_letters(direction, code):
    assert orientation_code(Grid((2, 2, 2), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction)) == code


def test_a_fingerprint_survives_the_disk(tmp_path):
    fingerprint, _ = measure(dataset(tmp_path, block()))
    write_fingerprint(tmp_path / "fingerprint.json", fingerprint)
    assert read_fingerprint(tmp_path / "fingerprint.json") == fingerprint


def test_the_digest_does_not_depend_on_the_tool_s_version(tmp_path):
    fingerprint, _ = measure(dataset(tmp_path, block()))
    assert fingerprint.model_copy(update={"tool_version": "99"}).digest == fingerprint.digest
