"""Making summary.json, tables and CSV files from the scores of two or three small cases."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from slmsam2_cli.evaluation import tables
from slmsam2_cli.evaluation.metrics import Pair, measure, measure_missing
from slmsam2_cli.evaluation.scoring import CaseScore
from slmsam2_cli.evaluation.summary import About, summarise

SHAPE = (6, 4, 4)
EMPTY = np.zeros(SHAPE, dtype=bool)


def column(first, last):
    """Slices first to last, one voxel each."""
    mask = EMPTY.copy()
    mask[first : last + 1, 1, 1] = True
    return mask


def case(name, *pairs, group="held_out", status="ok", annotated=(2,)):
    """A case with one (reference, prediction) pair per label 1, 2, …; prediction None for a missing file."""
    labels = {}
    for value, (reference, prediction) in enumerate(pairs, start=1):
        pair = Pair.of(reference, EMPTY if prediction is None else prediction, (3.0, 1.0, 1.0))
        labels[value] = measure_missing(pair, known=True) if prediction is None else measure(pair, annotated)
    return CaseScore(name, group, status, f"labelsTr/{name}.nii.gz", None if status == "pred_missing" else f"{name}.nii.gz", labels)


PERFECT = case("b", (column(1, 4), column(1, 4)))
HALF = case("a", (column(1, 4), column(1, 2)))
MISSING = case("c", (column(1, 4), None), status="pred_missing")
TRAINING = case("t", (column(1, 4), column(1, 4)), group="training")
BROKEN = CaseScore("z", "held_out", "failed", "labelsTr/z.nii.gz", "z.nii.gz", problem="case z: z.nii.gz: truncated. Copy it again")
ABOUT = About("1.2", {1: "PZ"}, {"weights_sha256": "ab"}, "1.1")


def summary(*scores, about=ABOUT):
    return summarise(scores, about)


def test_the_main_result_is_the_mean_of_the_held_out_cases():
    found = summary(HALF, PERFECT, TRAINING)
    assert found["mean"]["1"]["Dice"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["foreground_mean"]["Dice"] == found["mean"]["1"]["Dice"]
    assert found["training"]["mean"]["1"]["Dice"] == 1.0
    assert (found["cases"]["held_out"], found["cases"]["training"]) == (2, 1)


def test_without_held_out_cases_the_main_result_is_null():
    found = summary(TRAINING)
    assert found["foreground_mean"]["Dice"] is None
    assert found["statistics"]["1"]["Dice"]["n"] == 0


def test_a_case_has_the_keys_of_nnunet():
    found = summary(HALF)["metric_per_case"][0]
    assert (found["reference_file"], found["prediction_file"], found["case"], found["status"]) == (
        "labelsTr/a.nii.gz",
        "a.nii.gz",
        "a",
        "ok",
    )
    assert {k: found["metrics"]["1"][k] for k in ("TP", "FP", "FN", "TN", "n_pred", "n_ref")} == {
        "TP": 2,
        "FP": 0,
        "FN": 2,
        "TN": 92,
        "n_pred": 2,
        "n_ref": 4,
    }
    assert found["metrics"]["1"]["HD95"] == pytest.approx(5.55)  # 0, 0, 3, 6 mm: rank 2.85 of 0..3
    assert found["metrics"]["1"]["status"] == "ok"


def test_unprompted_values_are_reported_separately():
    found = summary(HALF)
    assert found["metric_per_case"][0]["unprompted"]["1"]["Dice"] == pytest.approx(2 * 1 / (3 + 1))
    assert found["unprompted"]["mean"]["1"]["Dice"] == pytest.approx(0.5)


def test_unprompted_values_are_null_when_the_annotated_slices_are_unknown():
    found = summary(case("a", (column(1, 4), column(1, 4)), annotated=None))
    assert found["metric_per_case"][0]["unprompted"]["1"]["Dice"] is None
    assert found["unprompted"]["statistics"]["1"]["Dice"]["n"] == 0


def test_a_missing_prediction_counts_as_zero_in_both_means():
    found = summary(PERFECT, MISSING)
    assert (found["mean"]["1"]["Dice"], found["unprompted"]["mean"]["1"]["Dice"]) == (0.5, 0.5)
    assert found["mean"]["1"]["HD95"] == 0.0
    assert found["statistics"]["1"]["HD95"]["mean_penalised"] == pytest.approx(np.hypot(18, np.hypot(4, 4)) / 2)
    assert found["status_counts"]["1"] == {"ok": 1, "pred_missing": 1}
    assert found["cases"]["pred_missing"] == ["c"]


def test_a_failed_case_is_null_and_listed_first_and_in_no_mean():
    found = summary(PERFECT, BROKEN)
    first = found["metric_per_case"][0]
    assert (first["case"], first["status"], first["metrics"]["1"]["Dice"], first["metrics"]["1"]["status"]) == (
        "z",
        "failed",
        None,
        "failed",
    )
    assert found["mean"]["1"]["Dice"] == 1.0
    assert found["cases"]["failed"] == [{"case": "z", "problem": "case z: z.nii.gz: truncated. Copy it again"}]


def test_the_foreground_mean_is_the_mean_of_the_label_means():
    two = case("a", (column(1, 4), column(1, 4)), (column(0, 0), EMPTY))
    found = summary(two, about=About("1", {1: "PZ", 2: "TZ"}))
    assert (found["foreground_mean"]["Dice"], found["foreground_statistics"]["Dice"]["labels"]) == (0.5, 2)


def test_the_order_of_the_cases_does_not_matter():
    assert json.dumps(summary(HALF, PERFECT, TRAINING, MISSING)) == json.dumps(summary(MISSING, TRAINING, PERFECT, HALF))


def test_the_summary_is_strict_json_of_format_version_2_with_definitions_and_provenance():
    text = json.dumps(summary(HALF, BROKEN, MISSING), allow_nan=False)
    found = json.loads(text)
    assert found["format_version"] == 2
    assert found["definitions"]["surface"] == "voxel"
    assert "larger of the two directed 95th percentiles" in found["definitions"]["HD95"]
    assert (found["tool"], found["tool_version"], found["predicted_with"], found["model"]) == (
        "slmsam2",
        "1.2",
        "1.1",
        {"weights_sha256": "ab"},
    )


def test_the_slice_curve_is_dice_by_distance_from_the_annotated_slice():
    curve = summary(HALF, PERFECT, TRAINING)["slice_curve"]["1"]
    assert [(point["distance_slices"], point["n"]) for point in curve] == [(0, 2), (1, 4), (2, 2)]
    assert (curve[2]["p10"], curve[2]["p50"], curve[2]["p90"]) == pytest.approx((0.1, 0.5, 0.9))


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_has_a_row_per_case_and_label_and_definitions_in_its_header():
    found = rows(tables.cases_csv(summary(HALF, PERFECT, BROKEN)))
    assert [(r["case"], r["label"], r["name"], r["status"]) for r in found] == [
        ("z", "1", "PZ", "failed"),
        ("a", "1", "PZ", "ok"),
        ("b", "1", "PZ", "ok"),
    ]
    assert float(found[1]["HD95_max_directed_voxel_mm"]) == pytest.approx(5.55)
    assert float(found[1]["unprompted_Dice"]) == pytest.approx(0.5)
    assert found[0]["Dice"] == ""


def test_text_that_a_spreadsheet_would_run_starts_with_a_quote():
    names = About("1", {1: "=cmd|' /C calc'!A0"})
    found = rows(tables.cases_csv(summary(case("@x", (column(1, 4), column(1, 2))), about=names)))[0]
    assert (found["case"], found["name"]) == ("'@x", "'=cmd|' /C calc'!A0")
    assert float(found["volume_difference_ml"]) == pytest.approx(-0.006)


def test_the_slice_table_has_a_row_per_slice_of_the_label():
    found = rows(tables.slices_csv([HALF]))
    assert [(r["slice"], r["prompt_distance_slices"], r["prompt_distance_mm"], r["Dice"]) for r in found] == [
        ("1", "-1", "-3.0", "1.0"), ("2", "0", "0.0", "1.0"), ("3", "1", "3.0", "0.0"), ("4", "2", "6.0", "0.0")
    ]  # fmt: skip


def test_the_table_shows_means_their_interval_and_the_worst_case():
    found = summary(HALF, PERFECT)
    row = dict(zip(tables.label_columns(found), tables.label_rows(found, found)[0], strict=True))
    assert row == {
        "label": "1 PZ", "n": "2", "Dice [95 %]": "0.833 [0.667, 1.000]", "unprompted": "0.750", "HD95 mm": "2.77", "penalised": "2.77",
        "NSD 2 mm": row["NSD 2 mm"], "over mm": "0.0", "worst case": "a (0.667)",
    }  # fmt: skip


def test_an_unprompted_mean_over_fewer_cases_shows_their_number():
    found = summary(HALF, case("b", (column(1, 4), column(1, 4)), annotated=None))
    assert tables.label_rows(found, found)[0][3] == "0.500 (n=1)"


def test_the_markdown_page_lists_the_cases_that_are_missing_and_escapes_their_names():
    page = tables.markdown(summary(PERFECT, case("c|<b>", (column(1, 4), None), status="pred_missing"), BROKEN, TRAINING))
    assert "## Cases that failed or are missing (2)" in page
    assert "c\\|\\<b\\>" in page
    assert "## Training cases (used for training; scores are optimistic): 1" in page
