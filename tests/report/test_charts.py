"""Charts and strips: positions that can be worked out by hand."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from report.example import COLUMNS

from slmsam2_cli.report.charts import (
    Scale,
    Strip,
    curves,
    dice_class,
    distributions,
    format_coordinate,
    length_scale,
    list_slices,
    slice_range,
    strips_of,
    unit_scale,
)
from slmsam2_cli.report.schema import CaseReport, CurvePoint, Report, SliceMark, Structure

Points = list[tuple[float, float]]


def liver(*marks: SliceMark, dice: float | None = None, hd95: float | None = None) -> Structure:
    return Structure("1", "Liver", "ok", {"Dice": dice, "HD95": hd95}, slices=marks)


def cohort(*cases: CaseReport, **more: object) -> Report:
    return Report("evaluation", "t", (), cases, {"1": "Liver"}, COLUMNS, **more)  # type: ignore[arg-type]


def strip(*marks: SliceMark) -> Strip:
    (found,) = strips_of([liver(*marks)])
    assert found is not None
    return found


def corners(path: str) -> list[Points]:
    """Return the corners (x, y) of every part of an SVG path with the commands M, L, h, v, V and Z."""
    parts: list[Points] = []
    for command, text in re.findall(r"([MLhvVZz])([^MLhvVZz]*)", path):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", text)]
        if command == "M":
            parts.append([(numbers[0], numbers[1])])
        elif command in "LhvV":
            x, y = parts[-1][-1]
            parts[-1].append({"L": tuple(numbers), "h": (x + numbers[0], y), "v": (x, y + numbers[0]), "V": (x, numbers[0])}[command])
    return parts


def heights(path: str) -> dict[int, float]:
    """Return the height in per cent of the shape above the baseline over each slice; only slices with a shape."""
    found = {}
    for part in corners(path):
        for (x0, y0), (x1, y1) in pairwise(part):
            if x1 > x0 and y0 == y1:
                found |= {int(x0 + k): 100 - y0 for k in range(max(1, round(x1 - x0)))}
    return found


def test_coordinates_have_no_trailing_zeros() -> None:
    assert [format_coordinate(value) for value in (12.5, 3.0, -0.001, 100.0, 33.333)] == ["12.5", "3", "0", "100", "33.33"]


def test_positions_on_an_axis_are_in_per_cent_and_stay_within_its_ends() -> None:
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


def test_slices_are_listed_as_ranges() -> None:
    assert [list_slices(indices) for indices in ([3], [3, 4, 5, 9], [1, 3])] == ["slice 3", "slices 3-5, 9", "slices 1, 3"]


def test_strips_of_a_case_share_their_slices() -> None:
    structures = (liver(SliceMark(4, 1), SliceMark(5, 1)), liver(SliceMark(9, 1)), liver())
    assert slice_range(structures) == (4, 6)
    assert slice_range(()) == (0, 0)
    drawn = strips_of(structures)
    assert [(one.first, one.count) if one else None for one in drawn] == [(4, 6), (4, 6), None]


def test_bars_are_as_high_as_dice_on_their_slices_and_grouped_by_dice_class() -> None:
    drawn = strip(SliceMark(10, 5, 5, 0.95), SliceMark(11, 5, 5, 0.4), SliceMark(12, 5, 5, 0.96))
    assert {index: heights(path) for index, path in drawn.bars} == {0: {1: 40}, 4: {0: 95, 2: 96}}


def test_false_positive_and_missed_slices_are_runs_without_bars() -> None:
    drawn = strip(SliceMark(0, 0, 9, 0.0), SliceMark(1, 0, 9, 0.0), SliceMark(2, 9, 9, 1.0), SliceMark(3, 9, 0, 0.0))
    assert [(run.x, run.width, run.centre, run.first, run.last) for run in drawn.missed] == [("0", "50", "25", 0, 1)]
    assert [(run.x, run.width, run.centre) for run in drawn.false] == [("75", "25", "87.5")]
    assert {index: heights(path) for index, path in drawn.bars} == {4: {2: 100}}
    assert "missed on slices 0-1" in drawn.summary and "false positive on slice 3" in drawn.summary


def test_a_line_goes_through_slice_centres_and_breaks_where_a_value_or_a_slice_is_missing() -> None:
    drawn = strip(SliceMark(0, 1, confidence=1.0), SliceMark(1, 1, confidence=0.5), SliceMark(2, 1), SliceMark(4, 1, confidence=0.0))
    first, second = corners(drawn.confidence)
    assert (first[0], first[-1], second[0]) == ((0.5, 0), (1.5, 50), (4.5, 100))
    assert drawn.disagreement == ""


def test_areas_are_in_per_cent_of_the_largest_slice() -> None:
    drawn = strip(SliceMark(0, 5, 10, 0.6), SliceMark(1, 0, 5, 0.0), SliceMark(2, 10, 0, 0.0))
    assert drawn.largest_px == 10
    assert heights(drawn.prediction_area) == {0: 50, 2: 100} and heights(drawn.reference_area) == {0: 100, 1: 50}


def test_annotated_slices_are_marked_at_their_centre() -> None:
    drawn = strip(SliceMark(0, 1), SliceMark(1, 1, prompted=True))
    assert drawn.prompts == ("75",) and "annotated: slice 1" in drawn.summary


def test_without_a_reference_there_are_no_bars_and_no_reference_area() -> None:
    drawn = strip(SliceMark(0, 4), SliceMark(1, 4))
    assert (drawn.bars, drawn.reference_area, drawn.false, drawn.missed) == ((), "", (), ())


@pytest.mark.parametrize(("dice", "index"), [(0.0, 0), (0.5, 1), (0.79, 2), (0.8, 3), (1.0, 4)])
def test_dice_classes(dice: float, index: int) -> None:
    assert dice_class(dice) == index


def test_a_distribution_shows_all_cases_and_boxes_the_held_out_ones() -> None:
    cases = [CaseReport(f"c{i}", "held_out", "ok", (liver(dice=value),)) for i, value in enumerate((0.6, 0.7, 0.8, 0.9, 1.0))]
    cases.append(CaseReport("learned", "training", "ok", (liver(dice=0.5),)))
    cases.append(CaseReport("empty", "held_out", "ok", (liver(dice=None),)))
    (chart,) = distributions(cohort(*cases))
    (lane,) = chart.lanes
    assert chart.heading == "Dice" and len(lane.points) == 6
    assert [lane.box.least, lane.box.q1, lane.box.median, lane.box.q3, lane.box.greatest] == ["20", "40", "60", "80", "100"]
    assert "median 0.800" in lane.text and "n 5 of 6" in lane.text
    assert [point.training for point in lane.points] == [False] * 5 + [True]


def test_a_distribution_of_training_cases_only_is_labelled_as_such() -> None:
    (chart,) = distributions(cohort(CaseReport("a", "training", "ok", (liver(dice=0.9),))))
    assert chart.lanes[0].text.endswith("training cases")


def test_without_dice_and_hd95_the_columns_with_a_better_end_are_distributed() -> None:
    case = CaseReport("a", "held_out", "ok", (Structure("1", "Liver", "ok", {"doubt": 0.2, "ml": 30.0}),))
    report = Report("prediction", "t", (), (case,), {"1": "Liver"}, (("doubt", "Doubt", 2, "low"), ("ml", "Volume", 1, "")))
    assert [chart.heading for chart in distributions(report)] == ["Doubt"]


def test_a_curve_goes_through_its_medians_and_its_band_through_the_percentiles() -> None:
    points = (CurvePoint(0, 10, 0.8, 1.0, 1.0), CurvePoint(2, 5, 0.6, 0.8, 0.9))
    (curve,) = curves(cohort(curve={"1": points}))
    assert curve.distance == 2
    assert corners(curve.median) == [[(0, 0), (2, 50)]]
    assert corners(curve.band) == [[(0, 0), (2, 25), (2, 100), (0, 50)]]
    assert curve.dots == (("0", "0"), ("100", "50"))
    assert curve.counts == (("0", 10), ("100", 5))
    assert [100 - min(y for _, y in bar) for bar in corners(curve.bars)] == [100, 50]


def test_without_cases_there_are_no_charts() -> None:
    assert distributions(cohort()) == () and curves(cohort(curve={"1": ()})) == ()
