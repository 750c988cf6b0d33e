"""Charts of plan.html: positions that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from report.planning import case_of, dataset, plan_of

from slmsam2_cli.planning.plan import ChannelIntensity
from slmsam2_cli.report.contact_sheet import IntensitySample, Thumbnail
from slmsam2_cli.report.plan_page import BINS, extents, histograms, spacings


@pytest.fixture
def two(tmp_path):
    """Measure two cases with a slice spacing of 2 and 4 mm and pixels of 1 mm."""
    _, fingerprint = dataset(tmp_path, case_of("a", (2.0, 1.0, 1.0)), case_of("b", (4.0, 1.0, 1.0)))
    return fingerprint


def thumbnail_of(case, everything, labelled, window):
    return Thumbnail(
        case, "SI", 0, 1, (1, 1, 1), (1.0, 1.0, 1.0), 1, 1, (), (IntensitySample(window, np.array(everything), np.array(labelled)),)
    )


def one_channel(fingerprint, scheme, lower, upper):
    return plan_of(fingerprint).model_copy(
        update={"intensity": (ChannelIntensity(name="x", scheme=scheme, lower=lower, upper=upper),), "channels": ("x",)}
    )


def where(shown, value):
    """Return the position of a value in per cent of the axis, from its first and last tick."""
    (x0, low), (x1, high) = ((float(x), float(text)) for x, text in (shown.ticks[0], shown.ticks[-1]))
    return x0 + (value - low) * (x1 - x0) / (high - low)


def test_a_dot_is_at_the_spacing_of_its_case(two):
    through, within = spacings(two, plan_of(two).geometry)
    (lane,) = through.lanes
    assert [(dot.x, dot.title) for dot in lane.dots] == [("50", "a: 2 mm"), ("100", "b: 4 mm")]
    assert lane.text == "median 3, 2 to 4, n = 2"
    assert [lane.name for lane in within.lanes] == ["between rows", "between columns"]
    assert {dot.x for lane in within.lanes for dot in lane.dots} == {"100"}


def test_planned_in_plane_spacing_is_marked_and_native_slice_spacing_is_not(two):
    through, within = spacings(two, plan_of(two).geometry)
    assert through.mark is None
    assert within.mark == ("100", "planned: 1 mm")


def test_rows_and_columns_are_those_of_the_planned_slices(two):
    through, within = spacings(two, plan_of(two, axis="AP").geometry)
    assert {dot.title for dot in through.lanes[0].dots} == {"a: 1 mm", "b: 1 mm"}
    assert [dot.title for dot in within.lanes[0].dots] == ["a: 2 mm", "b: 4 mm"]


def test_the_extent_is_the_number_of_slices_with_the_label(two):
    by_axis = {axis: extents(two, plan_of(two, axis=axis).geometry) for axis in ("SI", "AP", "LR")}
    assert {axis: plot.lanes[0].dots[0].title for axis, plot in by_axis.items()} == {
        "SI": "a: 3 slices",
        "AP": "a: 10 slices",
        "LR": "a: 12 slices",
    }
    assert by_axis["SI"].lanes[0].name == "organ"


def test_the_text_of_a_label_absent_in_some_cases_gives_the_number_of_cases(tmp_path):
    full, empty = case_of("a"), case_of("b")
    empty.labels[:] = 0
    _, fingerprint = dataset(tmp_path, full, empty)
    (lane,) = extents(fingerprint, plan_of(fingerprint).geometry).lanes
    assert lane.text.endswith("n = 1 of 2")


def test_without_labels_there_are_no_extents(tmp_path):
    case = case_of("a")
    case.labels[:] = 0
    _, fingerprint = dataset(tmp_path, case)
    assert extents(fingerprint, plan_of(fingerprint).geometry) is None


def test_the_ct_window_is_drawn_at_its_hu_values(two):
    thumbnails = [thumbnail_of("a", [-1000.0, 0.0, 50.0, 1000.0], [40.0, 60.0], (-100.0, 300.0))]
    (shown,) = histograms(thumbnails, one_channel(two, "ct", -100.0, 300.0))
    assert shown.bounds == ("-100 HU", "300 HU")
    assert float(shown.window[0]) == pytest.approx(where(shown, -100), abs=0.02)
    assert float(shown.window[1]) == pytest.approx(where(shown, 300), abs=0.02)
    assert shown.dots[0].title == "a: 50" and float(shown.dots[0].x) == pytest.approx(where(shown, 50), abs=0.02)


def test_cases_are_shown_relative_to_their_windows(two):
    thumbnails = [thumbnail_of("dim", [10.0, 20.0], [15.0], (10.0, 20.0)), thumbnail_of("bright", [1e6, 2e6], [1.5e6], (1e6, 2e6))]
    (shown,) = histograms(thumbnails, one_channel(two, "percentile", 0.5, 99.5))
    assert [dot.title for dot in shown.dots] == ["dim: 0.5", "bright: 0.5"]
    assert shown.dots[0].x == shown.dots[1].x == "50"
    assert shown.bounds == ("percentile 0.5", "percentile 99.5")


def test_the_fraction_of_labelled_voxels_outside_the_window_is_given(two):
    thumbnails = [thumbnail_of("a", [0.0, 100.0], [-5.0, 50.0, 50.0, 150.0], (0.0, 100.0))]
    (shown,) = histograms(thumbnails, one_channel(two, "ct", 0.0, 100.0))
    assert shown.outside == "25.0 % below and 25.0 % above the window"


def test_air_does_not_flatten_the_histogram_inside_the_window(two):
    thumbnails = [thumbnail_of("a", [-1000.0] * 98 + [50.0] * 2, [50.0], (0.0, 100.0))]
    (shown,) = histograms(thumbnails, one_channel(two, "ct", 0.0, 100.0))
    assert shown.everything.count("V0h1") == 2  # air, cut off, and tissue, at full height
    assert shown.everything.count("h1") <= BINS


def test_a_case_without_contrast_or_labels_is_left_out(two):
    percentile = one_channel(two, "percentile", 0.5, 99.5)
    assert histograms([thumbnail_of("flat", [7.0], [7.0], (7.0, 7.0))], percentile) == ()
    (shown,) = histograms([thumbnail_of("a", [0.0, 1.0], [], (0.0, 1.0))], percentile)
    assert (shown.labelled, shown.dots, shown.outside) == ("", (), "")
