"""Properties of the measures that hold for any two masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slmsam2_cli.evaluation import statistics
from slmsam2_cli.evaluation.metrics import Pair, dice, hd95, measure, measure_missing
from slmsam2_cli.evaluation.surface import DISTANCES

SPACING = (3.0, 0.8, 1.25)
SYMMETRIC = ("Dice", "IoU", "volume_similarity", "nsd@2", "slice_f1", *DISTANCES)
SWAPPED = (
    ("precision", "recall"),
    ("FP", "FN"),
    ("over_slices", "under_slices"),
    ("slice_precision", "slice_recall"),
    ("ref_ml", "pred_ml"),
)

shapes = st.tuples(*[st.integers(1, 6)] * 3)


@st.composite
def pairs(draw):
    """Two boolean masks (z, y, x) of one small shape."""
    shape = draw(shapes)
    return draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape))


def record(reference, prediction, spacing=SPACING, axis=0, annotated=None):
    return measure(Pair.of(reference, prediction, spacing, axis), annotated)


def close(left, right):
    return left == right if left is None or right is None else left == pytest.approx(right, abs=1e-9)


@given(pairs())
def test_swapping_reference_and_prediction_swaps_only_directed_measures(masks):
    one, other = record(*masks).all, record(*masks[::-1]).all
    assert all(close(one[name], other[name]) for name in SYMMETRIC)
    assert all(close(one[a], other[b]) and close(one[b], other[a]) for a, b in SWAPPED)


@given(pairs())
def test_doubling_the_spacing_doubles_every_distance(masks):
    one, two = record(*masks).all, record(*masks, spacing=tuple(2 * s for s in SPACING)).all
    for name in (*DISTANCES, *(f"{d}_penalised" for d in DISTANCES), "over_extent_mm"):
        assert close(None if one[name] is None else 2 * one[name], two[name])
    assert one["Dice"] == two["Dice"]


@given(pairs(), st.tuples(*[st.booleans()] * 3), st.permutations([0, 1, 2]))
def test_flipping_and_transposing_changes_no_number(masks, flips, order):
    axes = [i for i, flip in enumerate(flips) if flip]
    turned = [np.flip(mask, axes).transpose(order) for mask in masks]
    one = record(*masks).all
    other = record(*turned, spacing=tuple(SPACING[i] for i in order), axis=order.index(0)).all
    if flips[0]:
        one["end_error_low_mm"], one["end_error_high_mm"] = one["end_error_high_mm"], one["end_error_low_mm"]
    assert all(close(one[name], other[name]) for name in one)


@given(pairs(), st.integers(0, 3))
def test_padding_changes_no_measure_except_those_that_count_background(masks, air):
    if min(masks[0].shape) < 2:  # a single slice is scored in 2-D, a padded one is not
        return
    one, other = record(*masks).all, record(*(np.pad(mask, air) for mask in masks)).all
    assert all(close(one[name], other[name]) for name in ("Dice", "nsd@2", "slice_f1", "over_extent_mm", *DISTANCES))


@given(pairs())
def test_distances_equal_those_of_an_exhaustive_search(masks):
    found = record(*masks).all
    if found["hd_mm"] is None:
        return
    points = [np.argwhere(_border_by_definition(mask)) * SPACING for mask in masks]
    table = np.linalg.norm(points[0][:, np.newaxis] - points[1][np.newaxis], axis=2)
    forth, back = table.min(axis=1), table.min(axis=0)
    assert found["HD95"] == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert found["hd_mm"] == pytest.approx(max(forth.max(), back.max()))
    assert found["assd_mm"] == pytest.approx((forth.sum() + back.sum()) / (len(forth) + len(back)))


def _border_by_definition(mask):
    """Foreground voxels one of whose face neighbours is not foreground; an axis of one voxel has no neighbours."""
    padded = np.pad(mask, 1)
    border = np.zeros_like(mask)
    for axis in [i for i in range(3) if mask.shape[i] > 1]:
        for step in (-1, 1):
            border |= ~np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return mask & (border if max(mask.shape) > 1 else True)


@given(pairs())
def test_no_distance_exceeds_its_penalty(masks):
    found = record(*masks).all
    missed = measure_missing(Pair.of(masks[0], np.zeros_like(masks[0]), SPACING), known=False).all
    assert all(found[name] is None or found[name] <= missed[f"{name}_penalised"] for name in DISTANCES)


@given(pairs(), st.sets(st.integers(0, 5)))
def test_leaving_out_annotated_slices_never_adds_voxels(masks, annotated):
    found = record(*masks, annotated=sorted(k for k in annotated if k < masks[0].shape[0]))
    assert all(found.unprompted[k] <= found.all[k] for k in ("TP", "FP", "FN", "TN", "n_ref", "n_pred"))
    assert found.unprompted == found.all or annotated


@given(pairs())
def test_dice_and_hd95_return_the_values_of_the_record(masks):
    found = record(*masks).all
    assert close(dice(*masks), found["Dice"])
    assert close(hd95(*masks, SPACING), found["HD95"])


@settings(max_examples=100)
@given(st.lists(pairs(), min_size=1, max_size=5), st.data())
def test_missing_one_more_organ_never_improves_an_average(cases, data):
    """Organs go missing one after another, as an empty mask or as no file at all; no average may ever improve."""
    records = [record(*masks).all for masks in cases]
    lost = data.draw(st.permutations(range(len(cases))))
    for case in lost:
        reference = cases[case][0]
        nothing = Pair.of(reference, np.zeros_like(reference), SPACING)
        without_file = data.draw(st.booleans())
        after = list(records)
        if not (without_file or reference.any()):
            continue  # nothing to find and nothing found is no missed organ
        after[case] = measure_missing(nothing, known=False).all if without_file else measure(nothing).all
        agreement, distances = [("Dice", 1), ("IoU", 1), ("nsd@2", 1)], [("HD95_penalised", -1), ("assd_mm_penalised", -1)]
        for name, sign in agreement + (distances if reference.any() else []):
            assert _mean(after, name, sign) <= _mean(records, name, sign) + 1e-12
        records = after


def _mean(records, name, sign):
    """Larger is better; a mean over nothing is as good as can be."""
    found = statistics.mean_of([("", r) for r in records], name)
    return (1.0 if sign > 0 else 0.0) if found is None else sign * found
