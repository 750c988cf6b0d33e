"""Structures that are too thin for the predicted masks are detected before training."""

from __future__ import annotations

import numpy as np
import pytest
from measured_cases import known

from slmsam2_cli.dataset.slices import AXES, Orientation
from slmsam2_cli.errors import DatasetError
from slmsam2_cli.planning.fingerprint import CaseFingerprint, ChannelFingerprint
from slmsam2_cli.planning.label_stats import measure_labels
from slmsam2_cli.planning.resolution import choose_roi_input_size, resolution_warning, thinnest_structure, width_mm
from slmsam2_cli.planning.rules import decide


def holding(mask, spacing=(3.0, 1.0, 1.0)):
    """Return a case whose label 1 is the mask (S, P, L)."""
    return CaseFingerprint(
        id="a",
        stored_shape=mask.shape,
        orientation="LPS",
        shape=mask.shape,
        spacing_mm=spacing,
        content_mm=tuple(n * mm for n, mm in zip(mask.shape, spacing, strict=True)),
        channels=(ChannelFingerprint(whole=None, foreground=None),),
        labels=measure_labels(mask.astype(np.uint8), [1], Orientation((0, 1, 2), (False, False, False))),
    )


def bar(width, length, slices=3, edge=260):
    """Return a mask of `width` rows of `length` voxels, in slices of 100 x `edge`."""
    mask = np.zeros((slices, 100, edge), bool)
    mask[:, 10 : 10 + width, 5 : 5 + length] = True
    return mask


@pytest.mark.parametrize(("rows", "columns"), [(2, 200), (4, 40), (5, 5), (1, 1)])
def test_the_width_of_a_rectangle_is_its_shorter_edge(rows, columns):
    assert width_mm(holding(bar(rows, columns)), 1, "SI") == pytest.approx(rows)


def test_the_width_is_measured_in_millimetres_on_the_slices():
    assert width_mm(holding(bar(2, 200), spacing=(3.0, 0.5, 1.0)), 1, "SI") == pytest.approx(1.0)
    assert width_mm(holding(bar(2, 200), spacing=(0.1, 1.0, 1.0)), 1, "SI") == pytest.approx(2.0)


def test_a_disc_counts_as_half_of_its_diameter():
    rows, columns = np.ogrid[:100, :100]
    disc = (rows - 50) ** 2 + (columns - 50) ** 2 <= 40**2
    # area pi / 4 d^2, border 4 d: (2 - sqrt(4 - pi)) / 2 d
    assert width_mm(holding(np.stack([disc, disc])), 1, "SI") == pytest.approx(0.537 * 80, rel=0.03)


def test_two_small_parts_count_as_at_least_half_as_wide_as_one():
    two = bar(6, 6)
    two[:, 60:66, 200:206] = True
    assert 3 < width_mm(holding(two), 1, "SI") < 6


@pytest.mark.parametrize(("edge", "px"), [(10, 96), (24, 96), (25, 128), (90, 128)])
def test_the_input_for_a_structure_of_few_voxels_is_no_finer_than_the_image(edge, px):
    # ROI of 2 * 24 stored pixels, two input pixels per mask pixel: 96
    decision = choose_roi_input_size(known(holding(bar(edge, edge))), "SI", 2.0, 1.0)
    assert decision.value == px and ("adds no detail" in decision.reason) == (px == 96)


def test_a_finer_storage_resolution_allows_a_larger_input():
    found = known(holding(bar(20, 20)))
    assert (choose_roi_input_size(found, "SI", 2.0, 1.0).value, choose_roi_input_size(found, "SI", 2.0, 0.5).value) == (96, 128)


def test_a_wide_structure_is_seen_at_the_default_input_size():
    # ROI of 2 * 40 mm, 64 mask pixels: 1.25 mm each
    found = known(holding(bar(4, 40)))
    assert thinnest_structure(found, "SI", "nano", 128, 2.0, 1.0).pixels == pytest.approx(4 / 1.25)
    assert choose_roi_input_size(found, "SI", 2.0, 1.0).value == 128


def test_a_structure_thinner_than_a_mask_pixel_doubles_the_input_size():
    decision = choose_roi_input_size(known(holding(bar(3, 120))), "SI", 2.0, 1.0)  # 240 / 64 mm per mask pixel
    assert decision.value == 256 and "organ, the thinnest structure, is 3 mm wide, a mask pixel 3.8 mm" in decision.reason


def test_an_roi_is_not_larger_than_the_slice():
    # 2 * 240 mm, but slices of 260: 260 / 64 mm per mask pixel
    assert thinnest_structure(known(holding(bar(4, 240))), "SI", "nano", 128, 2.0, 1.0).pixel_mm == pytest.approx(260 / 64)


def test_a_structure_that_may_be_too_thin_for_its_roi_is_a_warning():
    found = known(holding(bar(1, 240)))  # 260 / 128 mm per mask pixel at 256 px
    warning = resolution_warning(found, "SI", "nano", 256, 2.0)
    assert warning.startswith("organ is 1 mm wide, but mask pixels may be 2 mm wide, so parts of it may be missed")
    assert resolution_warning(known(holding(bar(2, 240))), "SI", "nano", 256, 2.0) is None
    assert decide(found).geometry.input_size == 256


def test_a_structure_too_thin_for_a_network_of_whole_slices_is_rejected():
    with pytest.raises(
        DatasetError, match=r"organ is 1 mm wide, but tiny predicts masks with .* mm pixels, so it cannot be segmented. Use --network nano"
    ):
        decide(known(holding(bar(1, 240, edge=2000))), "tiny")


def test_a_label_without_measured_borders_has_no_width():
    case = holding(bar(1, 200))
    plain = case.model_copy(update={"labels": {1: case.labels[1].model_copy(update={"borders": {}})}})
    assert width_mm(plain, 1, "SI") is None
    assert thinnest_structure(known(plain), "SI", "nano", 128, 2.0, 1.0) is None


def test_every_voxel_alone_has_six_faces():
    label = holding(np.ones((1, 1, 1), bool)).labels[1]
    assert label.borders == dict.fromkeys(AXES, 2)
