"""The report of predicted masks: measures that can be counted by hand, and unusual cases first."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from report.cases import block, loaded_case, saved

from slmsam2_cli import console
from slmsam2_cli.report import prediction_page
from slmsam2_cli.report.case_files import CaseFiles
from slmsam2_cli.report.case_images import PageOutput
from slmsam2_cli.report.prediction_page import prediction_report, write_prediction_report
from slmsam2_cli.report.prediction_qc import Cohort, StructureStats, confidence_flags, measure, structure_flags
from slmsam2_cli.report.render import PAGE_BEGINS, VOLUMES_BEGIN, render, volumes_script
from slmsam2_cli.report.schema import ViewerVolumes

SHAPE = (12, 20, 24)
ALONE = Cohort((1.0,), True)


def entry(name, **more):
    metadata = {"output": f"{name}.nii.gz", "array_axis": 0, "training": False, "annotated_slices": {"1": [4]}, "seconds": 1.0}
    return metadata | {"confidence": {"1": {"mean": 0.5, "slices": {str(k): 0.9 for k in range(12)}}}, "disagreement": {}} | more


def manifest(cases):
    return {
        "format_version": 1,
        "tool_version": "1.2",
        "model": {"name": "fine-tuned"},
        "labels": {"1": "liver"},
        "prompts": "given",
        "cases": cases,
    }


@pytest.fixture
def folder(tmp_path):
    """Write two equal masks and an empty one, and an image of the first."""
    for case, mask in {"a": block(SHAPE, z=(3, 7)), "b": block(SHAPE, z=(3, 7)), "empty": block(SHAPE, z=(0, 0))}.items():
        saved(tmp_path / f"{case}.nii.gz", mask)
    saved(tmp_path / "images" / "a.nii.gz", block(SHAPE, value=90))
    return tmp_path


def files(folder, *cases):
    return {case: CaseFiles(folder / f"{case}.nii.gz", (folder / "images" / f"{case}.nii.gz",), None, folder, 0) for case in cases}


def made(folder, cases, **options):
    return prediction_report(manifest(cases), files(folder, *cases), **options)


def test_measures_are_volume_slices_and_confidence_of_unprompted_slices(folder):
    confidence = {"3": 0.5, "4": 1.0, "5": 0.75, "6": 0.25, "9": 0.1}
    report = made(folder, {"a": entry("a", confidence={"1": {"slices": confidence}}, disagreement={"1": {"5": 0.2, "6": 0.4}})})
    (structure,) = report.cases[0].structures
    assert structure.measures == pytest.approx(
        {"volume_ml": 4 * 10 * 12 * 3 / 1000, "confidence": 0.5, "confidence_lowest": 0.25, "disagreement": 0.3, "slices": 4}
    )
    assert [(m.slice, m.prediction_px, m.prompted, m.distance, m.confidence) for m in structure.slices] == [
        *((3, 120, False, -1, 0.5), (4, 120, True, 0, 1.0), (5, 120, False, 1, 0.75), (6, 120, False, 2, 0.25)),
    ]
    assert all(m.reference_px is None and m.dice is None for m in structure.slices)
    assert (structure.key, structure.name, structure.status, structure.slice_count) == ("1", "liver", "ok", 12)


def test_the_headline_shows_confidence_as_uncalibrated_and_the_number_of_flagged_cases(folder):
    report = made(folder, {"a": entry("a"), "b": entry("b"), "empty": entry("empty")})
    assert [card[:2] for card in report.headline] == [("Cases", "3"), ("Mean confidence", "0.900"), ("Flagged", "1")]
    assert "uncalibrated" in report.headline[1][2] and ("model", "fine-tuned") in report.facts


@pytest.mark.parametrize(
    ("calibrated", "meaning"),
    [
        ((True, True), "calibrated: the expected Dice of a slice; of ten volumes"),
        ((True, False), "calibrated for some cases only"),
        ((False, False), "uncalibrated: use it to rank cases for review"),
    ],
)
def test_confidence_is_called_calibrated_if_the_manifest_says_so(folder, calibrated, meaning):
    cases = {name: entry(name, calibrated=each) for name, each in zip("ab", calibrated, strict=True)}
    report = prediction_report(manifest(cases) | {"calibration": {"note": "of ten volumes"}}, files(folder, *cases))
    (definition,) = [text for key, text in report.definitions if key == "confidence"]
    assert report.headline[1][2].startswith(meaning) and definition.endswith(report.headline[1][2])


def test_flagged_cases_come_first_then_low_confidence(folder):
    low = {"confidence": {"1": {"slices": {str(k): 0.6 for k in range(12)}}}}
    report = made(folder, {"a": entry("a"), "b": entry("b", **low), "empty": entry("empty")})
    assert [case.id for case in report.cases] == ["empty", "b", "a"]
    assert (
        report.cases[0].flags == ("empty prediction, but 2 other cases contain this structure; check the prompt",)
        and report.cases[1].flags == ()
    )
    assert [case.structures[0].status for case in report.cases] == ["pred_empty", "ok", "ok"]


def test_pictures_show_the_slices_with_the_lowest_confidence(folder):
    slices = {str(k): 0.9 for k in range(12)} | {"6": 0.2}
    report = made(folder, {"a": entry("a", confidence={"1": {"slices": slices}})})
    assert report.cases[0].pictures[0].caption == "slice 6: confidence 0.200"
    assert isinstance(report.cases[0].volumes, ViewerVolumes) and report.cases[0].volumes.image and not report.cases[0].volumes.reference


def test_pictures_of_flagged_slices_come_before_those_of_low_confidence(folder):
    mask = block(SHAPE, z=(2, 8), y=(5, 7), x=(8, 10)) | block(SHAPE, z=(6, 7))
    saved(folder / "jump.nii.gz", mask)
    slices = {str(k): 0.9 for k in range(12)} | {"2": 0.1}
    report = made(folder, {"jump": entry("jump", confidence={"1": {"slices": slices}})})
    assert report.cases[0].flags == ("area jumps from 4 to 120 pixels between slices 5 and 6; check both slices",)
    assert [picture.caption for picture in report.cases[0].pictures][:2] == ["slice 6: area jumps", "slice 2: confidence 0.100"]


def test_a_missing_mask_is_a_failed_case(folder):
    report = made(folder, {"a": entry("a"), "gone": entry("gone")})
    assert [(case.id, case.status) for case in report.cases] == [("gone", "failed"), ("a", "ok")]


def test_labels_neither_annotated_nor_predicted_are_not_listed(folder):
    without_spleen = manifest({"a": entry("a")})
    without_spleen["labels"] = {"1": "liver", "2": "spleen"}
    assert prediction_report(without_spleen, files(folder, "a")).structures == {"1": "liver"}


def test_progress_advances_twice_per_case(folder):
    advanced = []
    made(folder, {"a": entry("a"), "b": entry("b")}, output=PageOutput(advance=lambda: advanced.append(1)))
    assert len(advanced) == 4


def found(areas, parts=None, volume=1.0, slices=30):
    return StructureStats(dict(enumerate(areas, start=2)), volume, parts or (sum(areas),), slices, ("feet", "head"))


def flags(one, cohort=ALONE):
    return structure_flags(one, cohort)


def test_measuring_a_mask_gives_areas_per_slice_and_its_larger_parts():
    mask = (
        block(SHAPE, z=(2, 4), y=(0, 4), x=(0, 5))
        + block(SHAPE, z=(8, 9), y=(0, 4), x=(0, 5))
        + block(SHAPE, z=(11, 12), y=(0, 1), x=(0, 1))
    )
    one = measure(loaded_case(mask * 3))[3]
    assert (one.areas, one.parts) == ({2: 20, 3: 20, 8: 20, 11: 1}, (40, 20))
    assert one.volume_ml == pytest.approx(61 * 3 / 1000)


def test_areas_are_measured_along_the_slice_axis():
    assert measure(loaded_case(block(SHAPE, x=(8, 10)), axis=2))[1].areas == {8: 40, 9: 40}


def test_a_structure_that_grows_and_shrinks_smoothly_is_not_flagged():
    assert flags(found([10, 30, 60, 80, 90, 80, 60, 30, 10])) == []


def test_an_unusual_volume_is_flagged_with_the_median_of_all_cases():
    cohort = Cohort((90.0, 95.0, 100.0, 105.0, 400.0), True)
    (flag, *_) = flags(found([9] * 5, volume=400.0), cohort)
    assert flag == "unusually large volume: 400 ml, median of all cases 100 ml; check its extent"
    assert "unusually" not in " ".join(flags(found([9] * 5, volume=105.0), cohort))


def test_robust_z_is_none_for_few_cases_or_no_spread():
    assert Cohort((1.0, 2.0, 3.0, 900.0), True).robust_z(900.0) is None
    assert Cohort((1.0,) * 9, True).robust_z(2.0) is None
    assert Cohort(tuple(np.exp([0.0, 1, 2, 3, 4])), True).robust_z(float(np.exp(5))) == pytest.approx(0.6745 * 3)


def test_an_area_jump_is_flagged_with_both_slices():
    assert flags(found([20, 60, 100, 20, 20, 10])) == ["area jumps from 100 to 20 pixels between slices 4 and 5; check both slices"]
    assert flags(found([20, 60, 100, 90, 80])) == ["area jumps from 80 to 0 pixels between slices 6 and 7; check both slices"]
    assert flags(found([100, 20])) == []


def test_a_structure_cut_off_at_the_end_of_the_volume_is_flagged():
    cut_off = found([20, 40, 60, 80, 80], slices=7)
    assert flags(cut_off) == ["reaches the head end of the volume with 100 % of its largest area on slice 6; check whether it is cut off"]
    assert flags(found([20, 40, 60, 80, 30], slices=7)) == []
    assert flags(cut_off, Cohort.of([cut_off] * 5, True)) == []


def test_reaching_the_end_of_the_volume_is_flagged_where_other_cases_do_not():
    trail, whole = found([20, 40, 60, 30, 12], slices=7), found([20, 40, 60, 30, 12])
    assert flags(trail) == []
    assert flags(trail, Cohort.of([trail, *[whole] * 4], True)) == [
        "reaches the head end of the volume with 20 % of its largest area on slice 6; check whether it is cut off"
    ]


def test_separate_parts_are_flagged_where_they_are_not_usual():
    two = found([10, 30, 40, 30, 10], parts=(70, 50))
    assert flags(two) == ["2 separate parts (58 %, 42 %); check the smaller ones"]
    assert flags(two, Cohort.of([two] * 5, True)) == []


def test_a_structure_missing_in_one_case_is_flagged_only_if_it_was_annotated():
    assert flags(None, Cohort((1.0, 2.0), True)) == ["empty prediction, but 2 other cases contain this structure; check the prompt"]
    assert flags(None, Cohort((1.0,), False)) == flags(None, Cohort((), True)) == []


def test_low_confidence_that_is_usual_is_one_warning_and_no_flag(tmp_path):
    names = "abcdef"
    for name in names:
        saved(tmp_path / f"{name}.nii.gz", block(SHAPE, z=(3, 7)))
    low = {"1": {"slices": {str(k): 0.3 for k in range(12)}}}
    report = made(tmp_path, {name: entry(name, confidence=low if name != "f" else entry(name)["confidence"]) for name in names})
    assert [case.flags for case in report.cases] == [()] * 6
    assert report.warnings == ("liver: mean confidence is below 0.5 in 5 of 6 cases, so that low confidence alone is not flagged",)
    few = made(tmp_path, {name: entry(name, confidence=low) for name in names[:4]})
    assert [case.flags for case in few.cases] == [
        ("mean confidence 0.300 (below 0.5); check the slices with the lowest confidence",)
    ] * 4 and few.warnings == ()


def test_a_mask_outside_the_folder_is_not_shown(tmp_path):
    saved(tmp_path / "secret.nii.gz", block(SHAPE))
    saved(tmp_path / "masks" / "a.nii.gz", block(SHAPE))
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps(manifest({"a": entry("a"), "b": entry("b", output="../secret.nii.gz")})))
    write_prediction_report(tmp_path / "masks", {})
    page = (tmp_path / "masks" / "report.html").read_text(encoding="utf-8")
    assert 'data-volumes="a"' in page and 'data-volumes="b"' not in page


def test_low_confidence_and_disagreement_are_flagged():
    assert confidence_flags(0.3, {4: 0.2, 5: 0.8}) == [
        "mean confidence 0.300 (below 0.5); check the slices with the lowest confidence",
        "forward and backward pass disagree by 0.800 on slice 5; annotate this slice",
    ]
    assert confidence_flags(None, {}) == confidence_flags(0.9, {4: 0.2}) == []


def written(folder, cases):
    (folder / "manifest.json").write_text(json.dumps(manifest(cases)))
    return folder / "report.html"


def test_a_folder_gets_one_page_that_names_every_case_and_no_path(folder, capsys):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {"a": (folder / "images" / "a.nii.gz",)})
    text = page.read_text()
    assert "Masks of 2 cases" in text and str(folder) not in text and "warning" not in capsys.readouterr().err


def test_a_page_of_the_same_masks_is_kept_and_any_other_is_replaced(folder):
    page = written(folder, {"a": entry("a")})
    write_prediction_report(folder, {})
    first = page.stat().st_mtime_ns
    written(folder, {"a": entry("a", seconds=9.0)})
    write_prediction_report(folder, {}, force=False)
    assert page.stat().st_mtime_ns == first
    written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {}, force=False)
    assert page.stat().st_mtime_ns != first and "Masks of 2 cases" in page.read_text()


def test_the_same_masks_give_the_same_bytes(folder):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    write_prediction_report(folder, {})
    first = page.read_bytes()
    write_prediction_report(folder, {})
    assert page.read_bytes() == first


def test_a_page_of_another_program_is_kept_with_a_warning(folder, capsys):
    page = written(folder, {"a": entry("a")})
    page.write_text("<html>mine</html>")
    write_prediction_report(folder, {})
    assert page.read_text() == "<html>mine</html>"
    assert "report.html: was not written by slmsam2" in capsys.readouterr().err


def test_any_error_of_the_page_is_a_warning(folder, capsys, monkeypatch):
    monkeypatch.setattr(console.settings, "debug", False)
    write_prediction_report(folder, {})
    written(folder, {"a": {"output": 5}})
    write_prediction_report(folder, {})
    assert capsys.readouterr().err.count("warning: could not write report.html") == 2


def test_without_masks_no_page_is_written(folder):
    page = written(folder, {})
    write_prediction_report(folder, {})
    assert not page.exists()


def test_volume_files_are_removed_with_their_case_but_files_of_others_are_kept(folder, monkeypatch):
    page = written(folder, {"a": entry("a"), "b": entry("b")})
    monkeypatch.setattr(prediction_page, "PageOutput", partial(PageOutput, embedded_bytes=0))
    write_prediction_report(folder, {})
    volumes = folder / "report_files"
    (volumes / "mine.js").write_text("mine")
    assert [p.name[0] for p in sorted(volumes.iterdir())] == ["a", "b", "m"]
    assert all(f"report_files/{p.name}" in page.read_text() for p in volumes.iterdir() if p.name != "mine.js")
    written(folder, {"a": entry("a")})
    write_prediction_report(folder, {})
    assert [p.name[0] for p in sorted(volumes.iterdir())] == ["a", "m"]


def test_own_files_are_recognised_by_their_first_bytes(folder):
    assert render(made(folder, {"a": entry("a")})).encode().startswith(PAGE_BEGINS + b"\n<html")
    assert volumes_script("a", ViewerVolumes("")).encode().startswith(VOLUMES_BEGIN)


def test_a_gross_outlier_comes_before_cases_with_more_flags(tmp_path):
    """Two voxels among blocks of about the same size; another case has two flags."""
    for number, name in enumerate("abcde"):
        saved(tmp_path / f"{name}.nii.gz", block(SHAPE, z=(3, 7), x=(4, 15 + number)))
    saved(tmp_path / "jumps.nii.gz", block(SHAPE, z=(2, 8), y=(5, 7), x=(8, 10)) | block(SHAPE, z=(5, 8), x=(4, 17)))
    saved(tmp_path / "speck.nii.gz", block(SHAPE, z=(5, 6), y=(5, 6), x=(5, 7)))
    low = {"confidence": {"1": {"slices": {str(k): 0.3 for k in range(12)}}}}
    report = made(tmp_path, {name: entry(name, **(low if name == "jumps" else {})) for name in [*"abcde", "jumps", "speck"]})
    assert [(case.id, len(case.flags)) for case in report.cases[:2]] == [("speck", 1), ("jumps", 2)]
