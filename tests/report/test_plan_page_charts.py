"""A data set's charts: shapes whose places can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from report.planning import case_of, dataset, plan_of

from slmsam2_cli.planning.plan import ChannelIntensity
from slmsam2_cli.report.contact_sheet import Greys, Look
from slmsam2_cli.report.plan_page import BINS, extents, histograms, spacings


@pytest.fixture
def two(tmp_path):
    """Slices 2 and 4 mm apart, pixels of 1 mm."""
    _, fingerprint = dataset(tmp_path, case_of("a", (2.0, 1.0, 1.0)), case_of("b", (4.0, 1.0, 1.0)))
    return fingerprint


def seen(case, everything, labelled, window):
    return Look(case, "SI", 0, 1, (1, 1, 1), (1.0, 1.0, 1.0), 1, 1, (), (Greys(window, np.array(everything), np.array(labelled)),))


def one_channel(fingerprint, scheme, lower, upper):
    return plan_of(fingerprint).model_copy(
        update={"intensity": (ChannelIntensity(name="x", scheme=scheme, lower=lower, upper=upper),), "channels": ("x",)}
    )


def where(shown, value):
    """Per cent along the axis, by its first and last tick."""
    (x0, low), (x1, high) = ((float(x), float(text)) for x, text in (shown.ticks[0], shown.ticks[-1]))
    return x0 + (value - low) * (x1 - x0) / (high - low)


def test_a_dot_lies_where_the_spacing_of_its_case_says(two):
    through, within = spacings(two, plan_of(two).geometry)
    (lane,) = through.lanes
    assert [(dot.x, dot.title) for dot in lane.dots] == [("50", "a: 2 mm"), ("100", "b: 4 mm")]
    assert lane.text == "median 3, 2 to 4, n 2"
    assert [lane.name for lane in within.lanes] == ["between rows", "between columns"]
    assert {dot.x for lane in within.lanes for dot in lane.dots} == {"100"}


def test_the_planned_pixel_is_marked_and_slices_left_as_stored_are_not(two):
    through, within = spacings(two, plan_of(two).geometry)
    assert through.mark is None
    assert within.mark == ("100", "planned: 1 mm")


def test_rows_and_columns_are_those_of_the_planned_slices(two):
    through, within = spacings(two, plan_of(two, axis="AP").geometry)
    assert {dot.title for dot in through.lanes[0].dots} == {"a: 1 mm", "b: 1 mm"}
    assert [dot.title for dot in within.lanes[0].dots] == ["a: 2 mm", "b: 4 mm"]


def test_an_extent_is_the_number_of_slices_that_hold_the_label(two):
    by_axis = {axis: extents(two, plan_of(two, axis=axis).geometry) for axis in ("SI", "AP", "LR")}
    assert {axis: spread.lanes[0].dots[0].title for axis, spread in by_axis.items()} == {
        "SI": "a: 3 slices",
        "AP": "a: 10 slices",
        "LR": "a: 12 slices",
    }
    assert by_axis["SI"].lanes[0].name == "organ"


def test_a_label_that_some_cases_lack_says_of_how_many(tmp_path):
    full, empty = case_of("a"), case_of("b")
    empty.labels[:] = 0
    _, fingerprint = dataset(tmp_path, full, empty)
    (lane,) = extents(fingerprint, plan_of(fingerprint).geometry).lanes
    assert lane.text.endswith("n 1 of 2")


def test_no_labels_no_extents(tmp_path):
    case = case_of("a")
    case.labels[:] = 0
    _, fingerprint = dataset(tmp_path, case)
    assert extents(fingerprint, plan_of(fingerprint).geometry) is None


def test_a_window_in_hu_lies_between_its_bounds(two):
    looks = [seen("a", [-1000.0, 0.0, 50.0, 1000.0], [40.0, 60.0], (-100.0, 300.0))]
    (shown,) = histograms(looks, one_channel(two, "ct", -100.0, 300.0))
    assert shown.bounds == ("-100 HU", "300 HU")
    assert float(shown.window[0]) == pytest.approx(where(shown, -100), abs=0.02)
    assert float(shown.window[1]) == pytest.approx(where(shown, 300), abs=0.02)
    assert shown.dots[0].title == "a: 50" and float(shown.dots[0].x) == pytest.approx(where(shown, 50), abs=0.02)


def test_cases_of_any_brightness_meet_on_the_scale_of_their_windows(two):
    looks = [seen("dim", [10.0, 20.0], [15.0], (10.0, 20.0)), seen("bright", [1e6, 2e6], [1.5e6], (1e6, 2e6))]
    (shown,) = histograms(looks, one_channel(two, "percentile", 0.5, 99.5))
    assert [dot.title for dot in shown.dots] == ["dim: 0.5", "bright: 0.5"]
    assert shown.dots[0].x == shown.dots[1].x == "50"
    assert shown.bounds == ("percentile 0.5", "percentile 99.5")


def test_what_the_window_cuts_off_of_the_labels_is_said(two):
    looks = [seen("a", [0.0, 100.0], [-5.0, 50.0, 50.0, 150.0], (0.0, 100.0))]
    (shown,) = histograms(looks, one_channel(two, "ct", 0.0, 100.0))
    assert shown.outside == "of the labelled voxels 25.0 % lie below the window, 25.0 % above"


def test_air_does_not_flatten_what_is_inside_the_window(two):
    looks = [seen("a", [-1000.0] * 98 + [50.0] * 2, [50.0], (0.0, 100.0))]
    (shown,) = histograms(looks, one_channel(two, "ct", 0.0, 100.0))
    assert shown.everything.count("V0h1") == 2  # the air, cut off, and the tissue, as high as the plot
    assert shown.everything.count("h1") <= BINS


def test_a_case_without_contrast_or_labels_is_left_out(two):
    percentile = one_channel(two, "percentile", 0.5, 99.5)
    assert histograms([seen("flat", [7.0], [7.0], (7.0, 7.0))], percentile) == ()
    (shown,) = histograms([seen("a", [0.0, 1.0], [], (0.0, 1.0))], percentile)
    assert (shown.labelled, shown.dots, shown.outside) == ("", (), "")
