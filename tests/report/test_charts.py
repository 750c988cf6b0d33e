"""Charts and strips: shapes whose places can be worked out by hand."""

from __future__ import annotations

import pytest
from report.example import COLUMNS

from slmsam2_cli.report.charts import (
    Scale,
    curves,
    dice_class,
    distributions,
    format_coordinate,
    length_scale,
    slice_range,
    strip,
    strips_of,
    unit_scale,
)
from slmsam2_cli.report.schema import CaseReport, CurvePoint, Report, SliceMark, Structure


def liver(*marks: SliceMark, dice: float | None = None, hd95: float | None = None) -> Structure:
    return Structure("1", "Liver", "ok", {"Dice": dice, "HD95": hd95}, slices=marks)


def cohort(*cases: CaseReport, **more: object) -> Report:
    return Report("evaluation", "t", (), cases, {"1": "Liver"}, COLUMNS, **more)  # type: ignore[arg-type]


def test_coordinates_have_no_needless_characters() -> None:
    assert [format_coordinate(value) for value in (12.5, 3.0, -0.001, 100.0, 33.333)] == ["12.5", "3", "0", "100", "33.33"]


def test_a_value_lies_where_its_share_of_the_axis_says() -> None:
    scale = Scale(0.5, 1.0)
    assert [scale.percent(value) for value in (0.5, 0.75, 1.0, 0.2, 1.5)] == ["0", "50", "100", "0", "100"]


def test_ticks_are_round() -> None:
    assert Scale(0, 1).ticks(5) == (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert Scale(3, 27).ticks(5) == (5, 10, 15, 20, 25)


def test_axes_end_at_round_numbers() -> None:
    assert unit_scale([0.73, 0.99]) == Scale(0.7, 1.0)
    assert unit_scale([1.0]) == Scale(0.9, 1.0)
    assert unit_scale([]) == Scale(0.0, 1.0)
    assert length_scale([3.2, 17.0]).high == 20
    assert length_scale([0.0]).high == 1
    assert length_scale([]).high == 1


def test_strips_of_a_case_share_their_slices() -> None:
    structures = (liver(SliceMark(4, 1), SliceMark(5, 1)), liver(SliceMark(9, 1)), liver())
    assert slice_range(structures) == (4, 6)
    assert slice_range(()) == (0, 0)
    drawn = strips_of(structures)
    assert [(one.first, one.count) if one else None for one in drawn] == [(4, 6), (4, 6), None]


def test_a_bar_is_as_high_as_dice_and_stands_on_its_slice() -> None:
    drawn = strip(liver(SliceMark(10, 5, 5, 0.95), SliceMark(11, 5, 5, 0.4), SliceMark(12, 5, 5, 0.96)), 10, 4)
    assert drawn is not None
    assert drawn.bars == ((0, "M1.1 100v-40h.8v40z"), (4, "M0.1 100v-95h.8v95zM2.1 100v-96h.8v96z"))


def test_false_and_missed_slices_are_runs_and_have_no_bar() -> None:
    marks = (SliceMark(0, 0, 9, 0.0), SliceMark(1, 0, 9, 0.0), SliceMark(2, 9, 9, 1.0), SliceMark(3, 9, 0, 0.0))
    drawn = strip(liver(*marks), 0, 4)
    assert drawn is not None
    assert [(run.x, run.width, run.centre, run.first, run.last) for run in drawn.missed] == [("0", "50", "25", 0, 1)]
    assert [(run.x, run.width, run.centre) for run in drawn.false] == [("75", "25", "87.5")]
    assert drawn.bars == ((4, "M2.1 100v-100h.8v100z"),)
    assert "missed on 0-1" in drawn.summary and "false on 3" in drawn.summary


def test_a_line_breaks_where_a_value_or_a_slice_is_missing() -> None:
    marks = (SliceMark(0, 1, confidence=1.0), SliceMark(1, 1, confidence=0.5), SliceMark(2, 1), SliceMark(4, 1, confidence=0.0))
    drawn = strip(liver(*marks), 0, 5)
    assert drawn is not None
    assert drawn.confidence == "M0.5 0h.01L1.5 50M4.5 100h.01"
    assert drawn.disagreement == ""


def test_areas_are_steps_in_per_cent_of_the_largest() -> None:
    drawn = strip(liver(SliceMark(0, 5, 10, 0.6), SliceMark(1, 0, 5, 0.0), SliceMark(2, 10, 0, 0.0)), 0, 3)
    assert drawn is not None
    assert (drawn.largest_px, drawn.prediction_area, drawn.reference_area) == (10, "M0 100V50h1V100M2 100V0h1V100", "M0 100V0h1V50h1V100")


def test_prompts_are_marked_at_the_middle_of_their_slice() -> None:
    drawn = strip(liver(SliceMark(0, 1), SliceMark(1, 1, prompted=True)), 0, 2)
    assert drawn is not None and drawn.prompts == ("75",)


def test_without_a_truth_there_are_no_bars_and_no_area_of_it() -> None:
    drawn = strip(liver(SliceMark(0, 4), SliceMark(1, 4)), 0, 2)
    assert drawn is not None
    assert (drawn.bars, drawn.reference_area, drawn.false, drawn.missed) == ((), "", (), ())


@pytest.mark.parametrize(("dice", "index"), [(0.0, 0), (0.5, 1), (0.79, 2), (0.8, 3), (1.0, 4)])
def test_dice_classes(dice: float, index: int) -> None:
    assert dice_class(dice) == index


def test_a_distribution_boxes_held_out_cases_only_and_shows_all() -> None:
    cases = [CaseReport(f"c{i}", "held_out", "ok", (liver(dice=value),)) for i, value in enumerate((0.6, 0.7, 0.8, 0.9, 1.0))]
    cases.append(CaseReport("learned", "training", "ok", (liver(dice=0.5),)))
    cases.append(CaseReport("empty", "held_out", "ok", (liver(dice=None),)))
    (chart,) = distributions(cohort(*cases))
    (lane,) = chart.lanes
    assert chart.heading == "Dice" and len(lane.points) == 6
    assert lane.box is not None
    assert [lane.box.least, lane.box.q1, lane.box.median, lane.box.q3, lane.box.greatest] == ["20", "40", "60", "80", "100"]
    assert "median 0.80" in lane.text and "n 5 of 6" in lane.text
    assert [point.training for point in lane.points] == [False] * 5 + [True]


def test_only_training_cases_are_boxed_and_said_to_be_such() -> None:
    (chart,) = distributions(cohort(CaseReport("a", "training", "ok", (liver(dice=0.9),))))
    assert chart.lanes[0].text.endswith("training cases")


def test_without_dice_and_hd95_the_columns_are_distributed() -> None:
    case = CaseReport("a", "held_out", "ok", (Structure("1", "Liver", "ok", {"doubt": 0.2, "ml": 30.0}),))
    report = Report("prediction", "t", (), (case,), {"1": "Liver"}, (("doubt", "Doubt", 2, "low"), ("ml", "Volume", 1, "")))
    assert [chart.heading for chart in distributions(report)] == ["Doubt"]


def test_a_curve_goes_through_its_medians_and_its_band_through_the_percentiles() -> None:
    points = (CurvePoint(0, 10, 0.8, 1.0, 1.0), CurvePoint(2, 5, 0.6, 0.8, 0.9))
    (curve,) = curves(cohort(curve={"1": points}))
    assert curve.distance == 2
    assert curve.median == "M0 0L2 50"
    assert curve.band == "M0 0L2 25L2 100L0 50Z"
    assert curve.dots == (("0", "0"), ("100", "50"))
    assert curve.counts == (("0", 10), ("100", 5))


def test_no_cases_no_charts() -> None:
    assert distributions(cohort()) == () and curves(cohort(curve={"1": ()})) == ()
