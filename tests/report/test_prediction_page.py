"""Masks without a truth: what is said of them can be counted by hand, and what is odd comes first."""

from __future__ import annotations

import json

import numpy as np
import pytest
from report.cases import block, opened, saved

from slmsam2_cli import console
from slmsam2_cli.report.case_files import Sources
from slmsam2_cli.report.prediction_page import prediction_report, write_prediction_report
from slmsam2_cli.report.prediction_qc import Cohort, Found, doubts, measure, structure_flags
from slmsam2_cli.report.render import PAGE_BEGINS, VOLUMES_BEGIN, render, volumes_script
from slmsam2_cli.report.schema import ViewerVolumes

SHAPE = (12, 20, 24)
ALONE = Cohort((1.0,), True)


def entry(name, **more):
    told = {"output": f"{name}.nii.gz", "array_axis": 0, "training": False, "annotated_slices": {"1": [4]}, "seconds": 1.0}
    return told | {"confidence": {"1": {"mean": 0.5, "slices": {str(k): 0.9 for k in range(12)}}}, "disagreement": {}} | more


def manifest(cases):
    return {
        "format_version": 1,
        "tool_version": "1.2",
        "model": {"name": "tuned"},
        "labels": {"1": "liver"},
        "prompts": "given",
        "cases": cases,
    }


@pytest.fixture
def folder(tmp_path):
    """Two masks alike and an empty one, and an image of the first."""
    for case, mask in {"a": block(SHAPE, z=(3, 7)), "b": block(SHAPE, z=(3, 7)), "empty": block(SHAPE, z=(0, 0))}.items():
        saved(tmp_path / f"{case}.nii.gz", mask)
    saved(tmp_path / "images" / "a.nii.gz", block(SHAPE, value=90))
    return tmp_path


def sources(folder, *cases):
    return {case: Sources(folder / f"{case}.nii.gz", (folder / "images" / f"{case}.nii.gz",), None, folder, 0) for case in cases}


def made(folder, cases, **options):
    return prediction_report(manifest(cases), sources(folder, *cases), **options)


def test_a_mask_is_measured_in_ml_slices_and_confidence_without_the_given_slice(folder):
    told = {"3": 0.5, "4": 1.0, "5": 0.75, "6": 0.25, "9": 0.1}
    report = made(folder, {"a": entry("a", confidence={"1": {"slices": told}}, disagreement={"1": {"5": 0.2, "6": 0.4}})})
    (structure,) = report.cases[0].structures
    assert structure.measures == pytest.approx(
        {"volume_ml": 4 * 10 * 12 * 3 / 1000, "confidence": 0.5, "confidence_lowest": 0.25, "disagreement": 0.3, "slices": 4}
    )
    assert [(m.slice, m.prediction_px, m.prompted, m.distance, m.confidence) for m in structure.slices] == [
        *((3, 120, False, -1, 0.5), (4, 120, True, 0, 1.0), (5, 120, False, 1, 0.75), (6, 120, False, 2, 0.25)),
    ]
    assert all(m.reference_px is None and m.dice is None for m in structure.slices)
    assert (structure.key, structure.name, structure.status, structure.slice_count) == ("1", "liver", "ok", 12)


def test_the_headline_says_that_confidence_is_uncalibrated_and_how_many_are_flagged(folder):
    report = made(folder, {"a": entry("a"), "b": entry("b"), "empty": entry("empty")})
    assert [card[:2] for card in report.headline] == [("Cases", "3"), ("Mean confidence", "0.900"), ("Flagged", "1")]
    assert "uncalibrated" in report.headline[1][2] and ("model", "tuned") in report.facts


@pytest.mark.parametrize(
    ("calibrated", "said"),
    [
        ((True, True), "calibrated: the Dice to expect of a slice, by what was found in slices like it; of ten volumes"),
        ((True, False), "calibrated for some cases only"),
        ((False, False), "uncalibrated: it says where to look first"),
    ],
)
def test_confidence_is_called_calibrated_where_predict_says_so(folder, calibrated, said):
    cases = {name: entry(name, calibrated=each) for name, each in zip("ab", calibrated, strict=True)}
    report = prediction_report(manifest(cases) | {"calibration": {"note": "of ten volumes"}}, sources(folder, *cases))
    (definition,) = [text for key, text in report.definitions if key == "confidence"]
    assert report.headline[1][2].startswith(said) and definition.endswith(report.headline[1][2])


def test_the_most_suspicious_case_comes_first_then_the_least_sure(folder):
    low = {"confidence": {"1": {"slices": {str(k): 0.6 for k in range(12)}}}}
    report = made(folder, {"a": entry("a"), "b": entry("b", **low), "empty": entry("empty")})
    assert [case.id for case in report.cases] == ["empty", "b", "a"]
    assert report.cases[0].flags == ("empty; 2 other cases hold it",) and report.cases[1].flags == ()
    assert [case.structures[0].status for case in report.cases] == ["pred_empty", "ok", "ok"]


def test_pictures_show_where_the_model_was_least_sure(folder):
    slices = {str(k): 0.9 for k in range(12)} | {"6": 0.2}
    report = made(folder, {"a": entry("a", confidence={"1": {"slices": slices}})})
    assert report.cases[0].pictures[0].caption == "slice 6: confidence 0.20"
    assert isinstance(report.cases[0].volumes, ViewerVolumes) and report.cases[0].volumes.image and not report.cases[0].volumes.truth


def test_what_is_odd_is_shown_before_what_is_unsure(folder):
    mask = block(SHAPE, z=(2, 8), y=(5, 7), x=(8, 10)) | block(SHAPE, z=(6, 7))
    saved(folder / "jump.nii.gz", mask)
    slices = {str(k): 0.9 for k in range(12)} | {"2": 0.1}
    report = made(folder, {"jump": entry("jump", confidence={"1": {"slices": slices}})})
    assert report.cases[0].flags == ("area jumps from 4 to 120 pixels between slices 5 and 6",)
    assert [picture.caption for picture in report.cases[0].pictures][:2] == ["slice 6: area jumps", "slice 2: confidence 0.10"]


def test_a_mask_that_is_gone_is_a_case_without_a_result(folder):
    report = made(folder, {"a": entry("a"), "gone": entry("gone")})
    assert [(case.id, case.status) for case in report.cases] == [("gone", "failed"), ("a", "ok")]


def test_structures_that_nobody_asked_for_are_not_listed(folder):
    told = manifest({"a": entry("a")})
    told["labels"] = {"1": "liver", "2": "spleen"}
    assert prediction_report(told, sources(folder, "a")).structures == {"1": "liver"}


def test_progress_is_told_twice_a_case(folder):
    told = []
    made(folder, {"a": entry("a"), "b": entry("b")}, advance=lambda: told.append(1))
    assert len(told) == 4


def found(areas, parts=None, volume=1.0, slices=30):
    return Found(dict(enumerate(areas, start=2)), volume, parts or (sum(areas),), slices, ("feet", "head"))


def odd(one, cohort=ALONE):
    return structure_flags(one, cohort)


def test_a_mask_is_measured_by_slices_and_parts():
    mask = (
        block(SHAPE, z=(2, 4), y=(0, 4), x=(0, 5))
        + block(SHAPE, z=(8, 9), y=(0, 4), x=(0, 5))
        + block(SHAPE, z=(11, 12), y=(0, 1), x=(0, 1))
    )
    one = measure(opened(mask * 3))[3]
    assert (one.areas, one.parts) == ({2: 20, 3: 20, 8: 20, 11: 1}, (40, 20))
    assert one.volume_ml == pytest.approx(61 * 3 / 1000)


def test_slices_are_counted_along_the_axis_of_propagation():
    assert measure(opened(block(SHAPE, x=(8, 10)), axis=2))[1].areas == {8: 40, 9: 40}


def test_nothing_is_odd_about_a_structure_that_swells_and_shrinks():
    assert odd(found([10, 30, 60, 80, 90, 80, 60, 30, 10])) == []


def test_a_volume_far_from_all_others_is_told_with_their_median():
    cohort = Cohort((90.0, 95.0, 100.0, 105.0, 400.0), True)
    (flag, *_) = odd(found([9] * 5, volume=400.0), cohort)
    assert flag == "unusually large: 400 ml, the median of all cases is 100 ml"
    assert "unusually" not in " ".join(odd(found([9] * 5, volume=105.0), cohort))


def test_robust_z_is_none_for_few_cases_or_no_spread():
    assert Cohort((1.0, 2.0, 3.0, 900.0), True).robust_z(900.0) is None
    assert Cohort((1.0,) * 9, True).robust_z(2.0) is None
    assert Cohort(tuple(np.exp([0.0, 1, 2, 3, 4])), True).robust_z(float(np.exp(5))) == pytest.approx(0.6745 * 3)


def test_an_area_that_jumps_is_told_with_both_slices():
    assert odd(found([20, 60, 100, 20, 20, 10])) == ["area jumps from 100 to 20 pixels between slices 4 and 5"]
    assert odd(found([20, 60, 100, 90, 80])) == ["area jumps from 80 to 0 pixels between slices 6 and 7"]
    assert odd(found([100, 20])) == []


def test_a_structure_cut_off_by_the_volume_may_go_on_beyond():
    clips_foreground = found([20, 40, 60, 80, 80], slices=7)
    assert odd(clips_foreground) == ["still at 100 % of its largest area where the volume ends towards the head"]
    assert odd(found([20, 40, 60, 80, 30], slices=7)) == []
    assert odd(clips_foreground, Cohort.of([clips_foreground] * 5, True)) == []


def test_reaching_the_end_of_the_volume_at_all_is_odd_where_other_cases_do_not():
    trail, whole = found([20, 40, 60, 30, 12], slices=7), found([20, 40, 60, 30, 12])
    assert odd(trail) == []
    assert odd(trail, Cohort.of([trail, *[whole] * 4], True)) == [
        "still at 20 % of its largest area where the volume ends towards the head"
    ]


def test_separate_parts_are_odd_where_they_are_not_usual():
    two = found([10, 30, 40, 30, 10], parts=(70, 50))
    assert odd(two) == ["2 separate parts (58 %, 42 %)"]
    assert odd(two, Cohort.of([two] * 5, True)) == []


def test_a_structure_missing_in_one_case_is_odd_only_where_it_was_asked_for():
    assert odd(None, Cohort((1.0, 2.0), True)) == ["empty; 2 other cases hold it"]
    assert odd(None, Cohort((1.0,), False)) == odd(None, Cohort((), True)) == []


def test_low_confidence_that_is_usual_is_said_once_and_flags_no_case(tmp_path):
    """So that what is really odd comes first."""
    names = "abcdef"
    for name in names:
        saved(tmp_path / f"{name}.nii.gz", block(SHAPE, z=(3, 7)))
    low = {"1": {"slices": {str(k): 0.3 for k in range(12)}}}
    report = made(tmp_path, {name: entry(name, confidence=low if name != "f" else entry(name)["confidence"]) for name in names})
    assert [case.flags for case in report.cases] == [()] * 6
    assert report.warnings == ("liver: mean confidence is below 0.5 in 5 of 6 cases, so that alone is not flagged",)
    few = made(tmp_path, {name: entry(name, confidence=low) for name in names[:4]})
    assert [case.flags for case in few.cases] == [("mean confidence 0.30",)] * 4 and few.warnings == ()


def test_a_mask_outside_the_folder_is_not_shown(tmp_path):
    saved(tmp_path / "secret.nii.gz", block(SHAPE))
    saved(tmp_path / "masks" / "a.nii.gz", block(SHAPE))
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps(manifest({"a": entry("a"), "b": entry("b", output="../secret.nii.gz")})))
    write_prediction_report(tmp_path / "masks", {})
    page = (tmp_path / "masks" / "report.html").read_text(encoding="utf-8")
    assert 'data-volumes="a"' in page and 'data-volumes="b"' not in page


def test_the_models_own_doubt_is_told():
    assert doubts(0.3, {4: 0.2, 5: 0.8}) == ["mean confidence 0.30", "the passes from both sides disagree by 0.80 on slice 5"]
    assert doubts(None, {}) == doubts(0.9, {4: 0.2}) == []


def written(folder, cases):
    (folder / "manifest.json").write_text(json.dumps(manifest(cases)))
    return folder / "report.html"


def test_a_folder_gets_one_page_that_names_every_case_and_no_path(folder, capsys):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {"a": (folder / "images" / "a.nii.gz",)})
    text = page.read_text()
    assert "Masks of 2 cases" in text and str(folder) not in text and "warning" not in capsys.readouterr().err


def test_a_page_that_tells_of_these_masks_is_left_alone_and_any_other_is_made_again(folder):
    page = written(folder, {"a": entry("a")})
    write_prediction_report(folder, {})
    first = page.stat().st_mtime_ns
    written(folder, {"a": entry("a", seconds=9.0)})
    write_prediction_report(folder, {}, again=False)
    assert page.stat().st_mtime_ns == first
    written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {}, again=False)
    assert page.stat().st_mtime_ns != first and "Masks of 2 cases" in page.read_text()


def test_the_same_masks_give_the_same_bytes(folder):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {})
    first = page.read_bytes()
    write_prediction_report(folder, {})
    assert page.read_bytes() == first


def test_somebody_elses_page_is_left_alone_with_a_warning(folder, capsys):
    page = written(folder, {"a": entry("a")})
    page.write_text("<html>mine</html>")
    write_prediction_report(folder, {})
    assert page.read_text() == "<html>mine</html>"
    assert "report.html: was not written by slmsam2" in capsys.readouterr().err


def test_whatever_goes_wrong_with_the_page_is_a_warning(folder, capsys, monkeypatch):
    monkeypatch.setattr(console.settings, "debug", False)
    write_prediction_report(folder, {})
    written(folder, {"a": {"output": 5}})
    write_prediction_report(folder, {})
    assert capsys.readouterr().err.count("warning: report.html could not be made") == 2


def test_no_masks_and_no_page_make_no_page(folder):
    page = written(folder, {})
    write_prediction_report(folder, {})
    assert not page.exists()


def test_volumes_beside_the_page_come_and_go_with_it_but_others_files_stay(folder, monkeypatch):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    monkeypatch.setattr("slmsam2_cli.report.case_images.Budget.__init__.__defaults__", (0, 10**6))
    write_prediction_report(folder, {})
    beside = folder / "report_files"
    (beside / "mine.js").write_text("mine")
    assert [p.name[0] for p in sorted(beside.iterdir())] == ["a", "b", "m"]
    assert all(f"report_files/{p.name}" in page.read_text() for p in beside.iterdir() if p.name != "mine.js")
    written(folder, {"a": entry("a")})
    write_prediction_report(folder, {})
    assert [p.name[0] for p in sorted(beside.iterdir())] == ["a", "m"]


def test_our_own_files_are_known_by_how_they_begin(folder):
    assert render(made(folder, {"a": entry("a")})).encode().startswith(PAGE_BEGINS + b"\n<html")
    assert volumes_script("a", ViewerVolumes("")).encode().startswith(VOLUMES_BEGIN)


def test_one_gross_oddity_comes_before_many_small_ones(tmp_path):
    """A speck among blocks of nearly one size; another case has two flags."""
    for number, name in enumerate("abcde"):
        saved(tmp_path / f"{name}.nii.gz", block(SHAPE, z=(3, 7), x=(4, 15 + number)))
    saved(tmp_path / "jumps.nii.gz", block(SHAPE, z=(2, 8), y=(5, 7), x=(8, 10)) | block(SHAPE, z=(5, 8), x=(4, 17)))
    saved(tmp_path / "speck.nii.gz", block(SHAPE, z=(5, 6), y=(5, 6), x=(5, 7)))
    low = {"confidence": {"1": {"slices": {str(k): 0.3 for k in range(12)}}}}
    report = made(tmp_path, {name: entry(name, **(low if name == "jumps" else {})) for name in [*"abcde", "jumps", "speck"]})
    assert [(case.id, len(case.flags)) for case in report.cases[:2]] == [("speck", 1), ("jumps", 2)]
