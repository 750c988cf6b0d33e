"""Scoring masks from files: grids are compared, failed cases stop no other, any number of processes gives the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slmsam2_cli import parallel
from slmsam2_cli.evaluation import scoring
from slmsam2_cli.evaluation.scoring import Job, fill_missing_labels, score_all, score_case

SHAPE = (6, 5, 4)


def labels(**boxes):
    """A label volume; v1=(first, last) puts a 2 x 2 column of ones on those slices."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    for name, (first, last) in boxes.items():
        value = int(name[1:])
        array[first : last + 1, value % 4 : value % 4 + 2, 1:3] = value
    return array


def save(path, array, spacing=(1.0, 1.0, 3.0), origin=(0.0, 0.0, 0.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture
def job(tmp_path):
    """job(reference, prediction or None, **options): both written as NIfTI, prediction with the grid asked for."""

    def make(reference, prediction, case="a", grid=None, **options):
        truth = save(tmp_path / "labels" / f"{case}.nii.gz", reference)
        predicted = None if prediction is None else save(tmp_path / "predictions" / f"{case}.nii.gz", prediction, **(grid or {}))
        folders = {"reference_root": tmp_path / "labels", "prediction_root": tmp_path / "predictions"}
        return Job(case, "held_out", truth, predicted, **({"values": (1,)} | folders | options))

    return make


def test_a_case_is_measured_label_by_label(job):
    found = score_case(job(labels(v1=(1, 4), v2=(2, 2)), labels(v1=(1, 2), v2=(2, 2)), values=(1, 2)))
    assert (found.status, found.reference_file, found.prediction_file) == ("ok", "a.nii.gz", "a.nii.gz")
    assert found.labels[1].all["Dice"] == pytest.approx(2 * 6 / (14 + 6))  # label 2 covers two of label 1's voxels
    assert found.labels[2].all["Dice"] == 1.0


def test_slices_are_numbered_along_the_coarsest_axis_unless_the_manifest_says_otherwise(job):
    along_z = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 4)))).labels[1].all
    along_y = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 4)), slice_axis=1)).labels[1].all
    assert (along_z["over_slices"], along_z["over_extent_mm"], along_y["over_slices"]) == (2, 6.0, 0)


def test_annotated_slices_are_left_out_label_by_label(job):
    masks = labels(v1=(1, 2), v2=(4, 4)), labels(v1=(1, 1), v2=(4, 4))
    found = score_case(job(*masks, values=(1, 2), annotated={1: (1,)}))
    assert (found.labels[1].unprompted_status, found.labels[1].unprompted["Dice"]) == ("pred_empty", 0.0)
    assert found.labels[2].unprompted == found.labels[2].all


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ({"spacing": (1.0, 1.0, 3.01)}, "spacing (3, 1, 1) but (3.01, 1, 1)"),
        ({"origin": (0.0, 0.5, 0.0)}, "origin (0, 0, 0) but (0, 0.5, 0)"),
    ],
)
def test_a_prediction_on_another_grid_fails_and_the_error_names_both_grids(job, grid, named):
    found = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 2)), grid=grid))
    assert (found.status, found.labels) == ("failed", {})
    assert found.problem.startswith("case a: a.nii.gz:")
    assert named in found.problem


def nifti(path, array, qform=None, code=1, units="mm"):
    """An axial NIfTI of array (z, y, x). qform: another affine than the sform's; code: of both."""
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(array.T, affine)
    image.set_sform(affine, code)
    image.set_qform(affine if qform is None else qform, code)
    image.header.set_xyzt_units(units)
    nibabel.save(image, path)


MOVED = np.diag([1.0, 1.0, 3.0, 1.0]) + np.array([[0, 0, 0, 50.0]] + [[0] * 4] * 3)


@pytest.mark.parametrize(
    ("uncertain", "warning"),
    [
        ({"code": 0}, "the orientation of one of the files is uncertain"),
        ({"qform": MOVED}, "sform and qform"),
        ({"units": "micron"}, "the spacing of one of the files is uncertain"),
    ],
)
def test_an_uncertain_part_of_the_geometry_is_a_warning_and_not_a_failure(job, tmp_path, uncertain, warning):
    masks = labels(v1=(1, 2)), labels(v1=(1, 2))
    made = job(*masks)
    nifti(made.reference, masks[0], **uncertain)
    nibabel.save(nibabel.Nifti1Image(masks[1].T, uncertain.get("qform", np.diag([1.0, 1.0, 3.0, 1.0]))), made.prediction)
    found = score_case(made)
    assert (found.status, found.problem) == ("ok", None)
    assert found.labels[1].all["Dice"] == 1.0
    assert any(warning in line for line in found.warnings)


def test_a_prediction_of_another_shape_fails(job):
    found = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 2))[:5]))
    assert "shape (6, 5, 4) but (5, 5, 4)" in found.problem


def test_a_rounding_difference_in_the_header_is_accepted(job):
    assert score_case(job(labels(v1=(1, 2)), labels(v1=(1, 2)), grid={"spacing": (1.0, 1.0, 3.001)})).status == "ok"


def test_a_truncated_file_fails_its_case_only(job):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=name) for name in "abc"]
    data = jobs[1].prediction.read_bytes()
    jobs[1].prediction.write_bytes(data[: len(data) // 2])
    assert [score.status for score in score_all(jobs)] == ["ok", "failed", "ok"]


def test_ignored_voxels_are_not_scored(job):
    truth, predicted = labels(v1=(1, 2)), labels(v1=(1, 4))
    truth[3:] = 9
    found = score_case(job(truth, predicted, ignore=9))
    assert (found.labels[1].all["Dice"], found.labels[1].all["TN"]) == (1.0, 3 * 20 - 8)
    assert not [line for line in found.warnings if "declared" in line]


def test_undeclared_values_of_a_prediction_are_listed_with_their_counts(job):
    found = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 2), v2=(4, 4))))
    assert list(found.labels) == [1]
    assert "case a: label 2 is not declared and not scored (4 voxels in the prediction)" in found.warnings


def test_undeclared_values_of_a_label_fail_the_case(job):
    found = score_case(job(labels(v1=(1, 2), v2=(4, 4)), labels(v1=(1, 2))))
    assert (found.status, "label values 2 (4 voxels) are not declared" in found.problem) == ("failed", True)


def test_without_declared_labels_every_value_of_any_case_is_a_label_of_every_case(job):
    one = job(labels(v1=(1, 2)), labels(v1=(1, 2)), case="a", values=None)
    two = job(labels(v2=(1, 2)), labels(v3=(4, 4)), case="b", values=None)
    gone = job(labels(v1=(1, 2)), None, case="c", values=None)
    a, b, c = fill_missing_labels(score_all([one, two, gone]), [1, 2, 3])
    assert [a.labels[v].status for v in (1, 2, 3)] == ["ok", "both_empty", "both_empty"]
    assert [b.labels[v].status for v in (1, 2, 3)] == ["both_empty", "pred_empty", "ref_empty"]
    assert [c.labels[v].status for v in (1, 2, 3)] == ["pred_missing"] * 3


def test_an_annotated_slice_outside_the_volume_fails_the_case(job):
    found = score_case(job(labels(v1=(1, 2)), labels(v1=(1, 2)), annotated={1: (6,)}))
    assert "annotated slice 6, but the volume has slices 0 to 5" in found.problem


def test_any_number_of_processes_gives_the_same_scores(job):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2 + i % 3)), case=f"c{i}", annotated={1: (1,)}) for i in range(5)]
    alone = score_all(jobs, workers=1)
    together = score_all(jobs, workers=2)
    assert [(s.case, s.labels[1].all, s.labels[1].unprompted) for s in alone] == [
        (s.case, s.labels[1].all, s.labels[1].unprompted) for s in together
    ]


def test_scoring_imports_no_slow_packages():
    wanted = "import sys, slmsam2_cli.evaluation.scoring; print(*(m.partition('.')[0] for m in sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", wanted], capture_output=True, text=True, check=True).stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "pydantic", "typer", "SimpleITK", "PIL", "rich", "jinja2", "sam2"}


@dataclass(frozen=True)
class MaskSums:
    """Makes a result of 100 bytes that holds the sums of both masks."""

    size: int = 100
    seen: tuple = ()

    def __call__(self, score, compared):
        prediction = None if compared.prediction is None else int(compared.prediction.sum())
        return MaskSums(seen=(score.status, int(compared.reference.sum()), prediction, compared.box, compared.resampled))


def test_the_result_of_post_scoring_is_returned_with_the_scores(job, monkeypatch):
    jobs = [
        job(labels(v1=(1, 2)), labels(v1=(2, 4)), case="a", post_scoring=MaskSums()),
        job(labels(v1=(1, 2), v3=(5, 5)), None, case="b", post_scoring=MaskSums(), ignore=3),
        job(labels(), labels(), case="c", post_scoring=MaskSums()),
        job(labels(v1=(1, 2)), labels(v1=(1, 2)), case="d", grid={"spacing": (2.0, 1.0, 3.0)}, post_scoring=MaskSums()),
    ]
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process knows this file
    a, b, c, d = score_all(jobs, workers=2)
    assert a.made.seen == ("ok", 8, 12, ((1, 5), (1, 3), (1, 3)), False)
    assert b.made.seen == ("pred_missing", 8, None, ((1, 3), (1, 3), (1, 3)), False)
    assert c.made.seen == ("ok", 0, 0, None, False)
    assert (d.status, d.made) == ("failed", None)


def test_results_of_post_scoring_beyond_the_limit_are_dropped(job):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=f"c{i}", post_scoring=MaskSums()) for i in range(4)]
    assert [score.made is not None for score in score_all(jobs, workers=1, max_kept_bytes=250)] == [True, True, False, False]


def killing(job):
    """Stands in for a case whose process the kernel ends."""
    if job.case == "c1":
        os.kill(os.getpid(), signal.SIGKILL)
    return score_case(job)


def test_a_killed_process_fails_its_own_case_only(job, monkeypatch):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=f"c{i}") for i in range(3)]
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process knows the stand-in
    monkeypatch.setattr(scoring, "score_case", killing)
    found = score_all(jobs, workers=2)
    assert [(s.case, s.status) for s in found] == [("c0", "ok"), ("c1", "failed"), ("c2", "ok")]
    assert "the process that scored it was killed" in found[1].problem


@dataclass(frozen=True)
class KillsItsProcess:
    """Kills the process that it is called in."""

    size: int = 0

    def __call__(self, score, compared):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_case_whose_post_scoring_kills_the_process_is_scored_without_it(job, monkeypatch):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=f"c{i}", post_scoring=KillsItsProcess() if i else None) for i in range(2)]
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process knows this file
    assert [(s.case, s.status, s.made) for s in score_all(jobs, workers=2)] == [("c0", "ok", None), ("c1", "ok", None)]


def waiting(job):
    """Stands in for a case that takes until another is counted."""
    counted = job.reference_root.parent / "counted"
    for _ in range(100 if job.case == "c0" else 0):
        time.sleep(0 if counted.exists() else 0.01)
    return replace(score_case(job), problem="not counted" if job.case == "c0" and not counted.exists() else None)


def test_finished_cases_are_counted_while_a_slow_one_is_running(job, monkeypatch, tmp_path):
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=f"c{i}") for i in range(2)]
    monkeypatch.setattr(parallel, "START_METHOD", "fork")  # a forked process knows the stand-in
    monkeypatch.setattr(scoring, "score_case", waiting)
    found = score_all(jobs, workers=2, advance=(tmp_path / "counted").touch)
    assert [(s.case, s.problem) for s in found] == [("c0", None), ("c1", None)]


def test_without_worker_processes_the_cases_are_scored_in_this_one(job, monkeypatch):
    def unavailable(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory")  # what a system without /dev/shm says

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", unavailable)
    jobs = [job(labels(v1=(1, 2)), labels(v1=(1, 2)), case=f"c{i}") for i in range(2)]
    assert [(s.case, s.status) for s in score_all(jobs, workers=2)] == [("c0", "ok"), ("c1", "ok")]


@settings(max_examples=60)
@given(
    arrays(np.uint8, (3, 4, 5), elements=st.sampled_from([0, 0, 0, 1, 3])), arrays(np.uint8, (3, 4, 5), elements=st.sampled_from([0, 0, 3]))
)
def test_the_boxes_of_labels_are_the_smallest_that_hold_them_in_both_masks(one, other):
    values = sorted({*np.unique(one), *np.unique(other)} - {0})
    assert scoring.find_boxes(one, other) == {
        value: tuple(slice(places.min(), places.max() + 1) for places in np.nonzero((one == value) | (other == value))) for value in values
    }
