"""The report of an evaluation: numbers of summary.json, flags, the worst cases first, and pictures where there are files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report.cases import block, saved

from slmsam2_cli.evaluation.metrics import metric_names
from slmsam2_cli.evaluation.scoring import CaseScore, Job, failed, fill_missing_labels, score_case
from slmsam2_cli.evaluation.summary import About, summarise
from slmsam2_cli.inference.manifest import Manifest, ManifestCase
from slmsam2_cli.report.case_files import CaseFiles
from slmsam2_cli.report.case_images import PageOutput, file_name
from slmsam2_cli.report.evaluation_page import evaluation_report
from slmsam2_cli.report.flags import evaluation_flags, prefix_names
from slmsam2_cli.report.schema import SliceMark, Structure, Table

REFERENCE = block((12, 20, 24), z=(3, 7))
PREDICTIONS = {
    "exact": REFERENCE,
    "long": block((12, 20, 24), z=(3, 11)),
    "empty": np.zeros_like(REFERENCE),
    "shifted": block((12, 20, 24), z=(3, 7), x=(12, 24)),
}


@pytest.fixture
def files(tmp_path):
    """Case -> its files; `absent` has no prediction."""
    image = saved(tmp_path / "image.nii.gz", REFERENCE * 50)
    reference = saved(tmp_path / "labels" / "t.nii.gz", REFERENCE)
    found = {case: saved(tmp_path / "masks" / f"{case}.nii.gz", mask) for case, mask in PREDICTIONS.items()}
    return {case: CaseFiles(found.get(case), (image,), reference, tmp_path, 0) for case in (*PREDICTIONS, "absent")}


def job(case, files, group="held_out"):
    return Job(case, group, files.reference, files.prediction, files.root, files.root, (1,), slice_axis=0, annotated={1: (4,)})


def report(files, scores=None, **options):
    found = scores if scores is not None else [score_case(job(case, found)) for case, found in files.items()]
    names = {1: "liver"}
    scored = fill_missing_labels(found, list(names))
    summary = summarise(scored, About("1.2", names, model={"name": "tuned", "weights_digest": "ab"}, predicted_with="1.1"))
    return evaluation_report(summary, scored, files, **options), summary


def by_id(made):
    return {case.id: case for case in made.cases}


def test_cases_are_sorted_failed_missing_then_by_dice(files):
    scores = [score_case(job(case, found)) for case, found in files.items()]
    scores.append(failed(job("broken", files["exact"]), "case broken: no volume. Export it again"))
    made, _ = report(files, scores)
    assert [case.id for case in made.cases] == ["broken", "absent", "empty", "long", "shifted", "exact"]
    assert (made.cases[0].problem, made.cases[0].status, made.cases[0].pictures) == (
        "case broken: no volume. Export it again",
        "failed",
        (),
    )


def test_the_numbers_are_those_of_the_summary(files):
    made, summary = report(files)
    mean = summary["foreground_mean"]
    assert made.headline[0][:2] == ("Mean Dice", f"{mean['Dice']:.3f}") and "5 held-out cases" in made.headline[0][2]
    assert made.headline[2][1] == f"{mean['HD95']:.2f} mm" and f"{mean['HD95_penalised']:.2f} mm" in made.headline[2][2]
    assert "of 3 structures" in made.headline[2][2]
    row = next(row for row in summary["metric_per_case"] if row["case"] == "long")
    structure = by_id(made)["long"].structures[0]
    assert all(structure.measures[key] == row["metrics"]["1"][key] for key in (*structure.measures,))
    assert structure.unprompted["Dice"] == row["unprompted"]["1"]["Dice"]
    assert all(key in structure.measures for key, *_ in made.columns)
    assert made.tables[0].rows[0][0] == "1 liver" and len(made.tables[0].columns) == len(made.tables[0].rows[0])
    assert [(p.distance, p.n) for p in made.curve["1"]][:2] == [(0, 4), (1, 8)]


def test_flags_name_fault_slices_and_remedy(files):
    cases = by_id(report(files)[0])
    assert cases["exact"].flags == ()
    assert cases["long"].flags == (
        "Dice 0.667 (below 0.7)",
        "HD95 12.0 mm (above 10 mm)",
        "volume 100 % too large",
        "predicted too far on slices 7-10 (12 mm) at the head end; add an end mark",
    )
    assert cases["empty"].flags == ("empty prediction, reference volume 1.44 ml; check that the prompt contains the structure",)
    assert cases["absent"].flags == ("no prediction; run slmsam2 predict on this case",)


def test_hints_of_scoring_are_the_first_flags_and_comparisons_the_first_tables(files):
    scores = [replace(score_case(job(case, found)), hints=("labels 1 and 2 appear swapped",)) for case, found in files.items()]
    made, _ = report(files, scores, tables=[Table("fine-tuned and pretrained", ("a",), (("1",),))])
    assert by_id(made)["exact"].flags == ("labels 1 and 2 appear swapped",)
    assert by_id(made)["long"].flags[:2] == ("labels 1 and 2 appear swapped", "Dice 0.667 (below 0.7)")
    assert made.tables[0].title == "fine-tuned and pretrained"


def test_slices_have_the_confidence_from_the_manifest(files):
    entry = ManifestCase(confidence={"1": {"slices": {"3": 0.5}}}, disagreement={"1": {"3": 0.25}})
    marks = by_id(report(files, manifest=Manifest(cases={"exact": entry}))[0])["exact"].structures[0].slices
    assert [(m.slice, m.prompted, m.distance) for m in marks] == [(3, False, -1), (4, True, 0), (5, False, 1), (6, False, 2)]
    assert [(m.confidence, m.disagreement) for m in marks] == [(0.5, 0.25), (None, None), (None, None), (None, None)]


def test_confidence_is_left_out_for_a_resampled_prediction(files):
    score = replace(score_case(job("exact", files["exact"])), resampled=True)
    manifest = Manifest(cases={"exact": ManifestCase(confidence={"1": {"3": 0.5}})})
    made, _ = report({"exact": files["exact"]}, [score], manifest=manifest)
    assert {mark.confidence for mark in made.cases[0].structures[0].slices} == {None}


def test_every_case_with_files_has_pictures_and_volumes(files):
    made, _ = report(files)
    cases = by_id(made)
    assert all(case.pictures for case in made.cases)
    assert [p.slice for p in cases["long"].pictures] == [7, 9]
    assert cases["absent"].volumes is None and cases["long"].volumes.image is not None
    assert {case.slice_mm for case in made.cases} == {3.0} and cases["long"].structures[0].slice_count == 12
    assert [p.case for p in made.worst][:4] == ["absent", "absent", "empty", "empty"]


def test_without_files_the_report_has_numbers_and_no_pictures(files):
    scores = [score_case(job(case, found)) for case, found in files.items()]
    made, _ = report({}, scores)
    long = by_id(made)["long"]
    assert (long.pictures, long.volumes, made.worst, long.slice_mm) == ((), None, (), 3.0)
    assert long.flags[-1] == "predicted too far on slices 7-10 (12 mm) at the last slices; add an end mark"


def test_an_unreadable_file_removes_only_the_pictures_of_its_case(files):
    scores = [score_case(job(case, found)) for case, found in files.items()]
    files["long"].prediction.write_bytes(b"")
    gone = replace(files["shifted"], prediction=files["long"].prediction, reference=files["long"].prediction)
    cases = by_id(report({**files, "shifted": gone}, scores)[0])
    assert cases["shifted"].pictures == () and cases["shifted"].structures[0].measures["Dice"] is not None
    assert cases["long"].volumes is None and cases["exact"].pictures


def test_an_unreadable_image_is_flagged(files, tmp_path):
    (tmp_path / "image.nii.gz").write_bytes(b"no image")
    case = by_id(report(files)[0])["long"]
    assert case.flags[-1] == "image not shown: it cannot be read, or its grid differs from the reference; check the image file"
    assert case.pictures and case.volumes.image is None


def test_volumes_beyond_the_limit_of_the_page_are_written_to_files_up_to_their_limit(files):
    written = {}

    def write_volumes(name, case, volumes):
        written[case] = (name, volumes.size)

    size = by_id(report(files)[0])["exact"].volumes.size
    made, _ = report(files, output=PageOutput(write_volumes, embedded_bytes=0, separate_bytes=2 * size + size // 2))
    assert 2 <= len(written) < 4 and all(name == file_name(case) for case, (name, _) in written.items())
    assert {case.id: case.volumes_file for case in made.cases if case.volumes_file} == {case: name for case, (name, _) in written.items()}
    assert not [case for case in made.cases if case.volumes]
    assert set(written) >= {"empty", "shifted"}  # the worst with a prediction, and the median


def test_names_of_volume_files_are_safe_and_unique():
    names = [file_name(case) for case in ("a", "A", "../a", "a/b", "", "ü" * 300, "\udcff")]
    assert len({name.lower() for name in names}) == len(names)
    assert all(name.startswith("report_files/") and name.count("/") == 1 and name.isascii() and len(name) < 100 for name in names)


def test_progress_advances_once_per_case(files):
    advanced = []
    report(files, output=PageOutput(advance=lambda: advanced.append(1)))
    assert len(advanced) == 5


def test_without_held_out_cases_the_headline_says_so(files):
    made, _ = report(files, [score_case(job("exact", files["exact"], group="training"))])
    assert made.headline == (("Mean Dice", "-", "no held-out case: all cases were used for training"),)
    assert made.tables[0].title.startswith("Training cases") and made.tables[0].title.endswith(": 1")


def test_a_case_that_failed_has_no_numbers(files):
    made, _ = report({}, [CaseScore("a", "held_out", "failed", "a.nii.gz", None, problem="p")])
    unknown = dict.fromkeys(metric_names())
    assert made.cases[0].structures == (Structure("1", "liver", "failed", unknown, unknown),)


def flagged(status="ok", **measures):
    return evaluation_flags(Structure("1", "liver", status, measures), None, None)


def test_a_false_positive_structure_is_flagged_with_its_volume():
    assert flagged("ref_empty", pred_ml=3.21) == ["false positive of 3.21 ml: the reference is empty; check its label"]
    assert flagged("both_empty") == [] and flagged(Dice=0.9, HD95=2.0, volume_difference_percent=-19.0) == []
    assert flagged(volume_difference_percent=-38.2) == ["volume 38 % too small"]


@pytest.mark.parametrize(
    ("reference", "predicted", "flags"),
    [
        ((3, 9), (0, 9), ["predicted too far on slices 0-2 (9 mm) at the feet end; add an end mark"]),
        ((3, 9), (5, 9), ["missed on slices 3-4 (6 mm) at the feet end; annotate a missed slice"]),
        ((3, 9), (3, 7), ["missed on slices 7-8 (6 mm) at the head end; annotate a missed slice"]),
        ((3, 9), (3, 8), []),
    ],
)
def test_wrong_ends_are_flagged_with_their_slices(reference, predicted, flags):
    marks = tuple(SliceMark(k, 9 * (predicted[0] <= k < predicted[1]), 9 * (reference[0] <= k < reference[1])) for k in range(10))
    assert evaluation_flags(Structure("1", "liver", "ok", {}, slices=marks), ("feet", "head"), 3.0) == flags


def test_gaps_between_predicted_slices_are_flagged():
    marks = tuple(SliceMark(k, 0 if k in (4, 5, 7) else 9, 9) for k in range(10))
    (flag,) = evaluation_flags(Structure("1", "liver", "ok", {}, slices=marks), None, None)
    assert flag == "missed on slices 4-5, 7 between predicted slices; annotate a missed slice"


def test_flags_begin_with_the_structure_where_there_are_several():
    one, other = (Structure(key, name, "ok", {}) for key, name in (("1", "left"), ("2", "right")))
    assert prefix_names([one, other], [["a"], ["b", "c"]]) == ["left: a", "right: b", "right: c"]
    assert prefix_names([one], [["a"]]) == ["a"]
