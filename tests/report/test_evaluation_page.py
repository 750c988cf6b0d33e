"""From a summary and its scores to a report: the numbers of the summary, in words, worst first, with pictures where there are files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report.cases import block, saved

from slmsam2_cli.evaluation.metrics import empty_record
from slmsam2_cli.evaluation.scoring import CaseScore, Job, failed, fill_missing_labels, score_case
from slmsam2_cli.evaluation.summary import About, summarise
from slmsam2_cli.inference.manifest import Manifest, ManifestCase
from slmsam2_cli.report.case_files import Sources
from slmsam2_cli.report.case_images import Budget, file_name
from slmsam2_cli.report.evaluation_page import evaluation_report
from slmsam2_cli.report.flags import evaluation_flags, named
from slmsam2_cli.report.schema import Structure, Table

TRUTH = block((12, 20, 24), z=(3, 7))
PREDICTIONS = {
    "exact": TRUTH,
    "long": block((12, 20, 24), z=(3, 11)),
    "empty": np.zeros_like(TRUTH),
    "shifted": block((12, 20, 24), z=(3, 7), x=(12, 24)),
}


@pytest.fixture
def files(tmp_path):
    """Case -> its sources; `absent` was never predicted."""
    image = saved(tmp_path / "image.nii.gz", TRUTH * 50)
    reference = saved(tmp_path / "truth" / "t.nii.gz", TRUTH)
    found = {case: saved(tmp_path / "masks" / f"{case}.nii.gz", mask) for case, mask in PREDICTIONS.items()}
    return {case: Sources(found.get(case), (image,), reference, tmp_path, 0) for case in (*PREDICTIONS, "absent")}


def job(case, sources, group="held_out", prompted=None):
    given = {1: (4,)} if prompted is None else prompted
    return Job(case, group, sources.reference, sources.prediction, sources.root, sources.root, (1,), slice_axis=0, prompted=given)


def report(sources, scores=None, labels=None, **options):
    found = scores if scores is not None else [score_case(job(case, files)) for case, files in sources.items()]
    names = labels or {1: "liver"}
    scored = fill_missing_labels(found, list(names))
    summary = summarise(scored, About("1.2", names, model={"name": "tuned", "weights_digest": "ab"}, predicted_with="1.1"))
    return evaluation_report(summary, scored, sources, **options), summary


def by_id(made):
    return {case.id: case for case in made.cases}


def test_failed_and_missing_cases_come_first_then_the_worst(files):
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


def test_flags_say_in_words_what_is_wrong(files):
    cases = by_id(report(files)[0])
    assert cases["exact"].flags == ()
    assert cases["long"].flags == (
        "Dice 0.67",
        "HD95 12.0 mm",
        "volume 100 % too large",
        "goes on 4 slices (12 mm) too far towards the head",
    )
    assert cases["empty"].flags == ("nothing found, 1.44 ml are there",)
    assert cases["absent"].flags == ("no prediction",)


def test_flags_from_elsewhere_stand_first(files):
    made, _ = report(files, flags={"exact": ["labels A and B look exchanged"]}, tables=[Table("tuned against base", ("a",), (("1",),))])
    assert by_id(made)["exact"].flags == ("labels A and B look exchanged",)
    assert made.tables[0].title == "tuned against base"


def test_slices_carry_the_confidence_that_predict_wrote(files):
    told = ManifestCase(confidence={"1": {"slices": {"3": 0.5}}}, disagreement={"1": {"3": 0.25}})
    marks = by_id(report(files, manifest=Manifest(cases={"exact": told}))[0])["exact"].structures[0].slices
    assert [(m.slice, m.prompted, m.distance) for m in marks] == [(3, False, -1), (4, True, 0), (5, False, 1), (6, False, 2)]
    assert [(m.confidence, m.disagreement) for m in marks] == [(0.5, 0.25), (None, None), (None, None), (None, None)]


def test_the_confidence_of_slices_on_another_grid_is_left_out(files):
    score = replace(score_case(job("exact", files["exact"])), resampled=True)
    told = Manifest(cases={"exact": ManifestCase(confidence={"1": {"3": 0.5}})})
    made, _ = report({"exact": files["exact"]}, [score], manifest=told)
    assert {mark.confidence for mark in made.cases[0].structures[0].slices} == {None}


def test_every_case_with_files_has_pictures_and_volumes(files):
    made, _ = report(files)
    cases = by_id(made)
    assert all(case.pictures for case in made.cases)
    assert [p.slice for p in cases["long"].pictures] == [7, 9]
    assert cases["absent"].volumes is None and cases["long"].volumes.image is not None
    assert {case.slice_mm for case in made.cases} == {3.0} and cases["long"].structures[0].slice_count == 12
    assert [p.case for p in made.worst][:4] == ["absent", "absent", "empty", "empty"]


def test_without_files_the_report_is_told_in_numbers(files):
    scores = [score_case(job(case, found)) for case, found in files.items()]
    made, _ = report({}, scores)
    long = by_id(made)["long"]
    assert (long.pictures, long.volumes, made.worst, long.slice_mm) == ((), None, (), 3.0)
    assert long.flags[-1] == "goes on 4 slices (12 mm) too far at the last slices"


def test_a_file_that_cannot_be_read_any_more_costs_its_own_pictures_alone(files):
    scores = [score_case(job(case, found)) for case, found in files.items()]
    files["long"].prediction.write_bytes(b"")
    gone = replace(files["shifted"], prediction=files["long"].prediction, reference=files["long"].prediction)
    cases = by_id(report({**files, "shifted": gone}, scores)[0])
    assert cases["shifted"].pictures == () and cases["shifted"].structures[0].measures["Dice"] is not None
    assert cases["long"].volumes is None and cases["exact"].pictures


def test_an_image_that_cannot_be_shown_is_named(files, tmp_path):
    (tmp_path / "image.nii.gz").write_bytes(b"no image")
    case = by_id(report(files)[0])["long"]
    assert case.flags[-1] == "its image is not shown: it cannot be read, or lies on another grid"
    assert case.pictures and case.volumes.image is None


def test_what_the_page_cannot_carry_goes_beside_it_and_what_that_cannot_goes_nowhere(files):
    written = {}

    def beside(name, case, volumes):
        written[case] = (name, volumes.size)

    size = by_id(report(files)[0])["exact"].volumes.size
    made, _ = report(files, beside=beside, budget=Budget(embedded=0, beside=2 * size + size // 2))
    assert 2 <= len(written) < 4 and all(name == file_name(case) for case, (name, _) in written.items())
    assert {case.id: case.volumes_file for case in made.cases if case.volumes_file} == {case: name for case, (name, _) in written.items()}
    assert not [case for case in made.cases if case.volumes]
    assert set(written) >= {"empty", "shifted"}  # the worst that has a prediction, and the middle one


def test_names_beside_the_page_are_safe_and_never_shared():
    names = [file_name(case) for case in ("a", "A", "../a", "a/b", "", "ü" * 300, "\udcff")]
    assert len({name.lower() for name in names}) == len(names)
    assert all(name.startswith("report_files/") and name.count("/") == 1 and name.isascii() and len(name) < 100 for name in names)


def test_progress_is_told_once_a_case(files):
    told = []
    report(files, advance=lambda: told.append(1))
    assert len(told) == 5


def test_when_every_case_was_learned_from_the_headline_says_so(files):
    made, _ = report(files, [score_case(job("exact", files["exact"], group="training"))])
    assert made.headline == (("Mean Dice", "-", "no held-out case: the model has learned from every case"),)
    assert made.tables[0].title == "Training cases (the model has seen them): 1"


def test_a_case_that_failed_has_no_numbers(files):
    made, _ = report({}, [CaseScore("a", "held_out", "failed", "a.nii.gz", None, problem="p")])
    assert made.cases[0].structures == (Structure("1", "liver", "failed", empty_record(), empty_record()),)


def flagged(status="ok", **measures):
    return evaluation_flags(Structure("1", "liver", status, measures), None, None)


def test_what_was_found_where_there_is_nothing_is_told_in_ml():
    assert flagged("ref_empty", pred_ml=3.21) == ["3.21 ml found where there is nothing"]
    assert flagged("both_empty") == [] and flagged(Dice=0.9, HD95=2.0, volume_difference_percent=-19.0) == []
    assert flagged(volume_difference_percent=-38.2) == ["volume 38 % too small"]


def test_a_structure_is_named_where_there_are_several():
    one, other = (Structure(key, name, "ok", {}) for key, name in (("1", "left"), ("2", "right")))
    assert named([one, other], [["a"], ["b", "c"]]) == ["left: a", "right: b", "right: c"]
    assert named([one], [["a"]]) == ["a"]
