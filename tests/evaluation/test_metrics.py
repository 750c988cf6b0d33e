"""Every measure on shapes whose result can be computed by hand; masks (z, y, x), mm."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slmsam2_cli.evaluation.metrics import (
    Pair,
    coarsest_axis,
    dice,
    hd95,
    measure,
    measure_missing,
    metric_names,
)

SHAPE = (10, 12, 14)
UNIT = (1.0, 1.0, 1.0)


def block(z, y, x, shape=SHAPE):
    """A mask filled on z, y, x, each a (first, last) pair, last included."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b + 1) for a, b in (z, y, x))] = True
    return mask


def slab(at, shape=SHAPE):
    return block((at, at), (0, shape[1] - 1), (0, shape[2] - 1), shape)


NOTHING = np.zeros(SHAPE, dtype=bool)
CUBE = block((3, 6), (3, 6), (3, 6))


def score(reference, prediction, spacing=UNIT, axis=0, annotated=None):
    return measure(Pair.of(reference, prediction, spacing, axis), annotated)


def test_hd95_of_two_parallel_slabs_is_their_gap_in_mm():
    assert hd95(slab(at=4), slab(at=7), spacing_mm=(2.0, 1.0, 1.0)) == pytest.approx(6.0)


def test_dice_of_a_cube_and_its_half_is_two_thirds():
    assert dice(CUBE, block((3, 4), (3, 6), (3, 6))) == pytest.approx(2 / 3)


def test_iou_of_a_cube_and_its_half_is_one_half():
    assert score(CUBE, block((3, 4), (3, 6), (3, 6))).all["IoU"] == pytest.approx(0.5)


def test_precision_of_a_half_is_one_and_its_recall_one_half():
    record = score(CUBE, block((3, 4), (3, 6), (3, 6))).all
    assert (record["precision"], record["recall"]) == (1.0, 0.5)


def test_voxels_are_counted_as_true_and_false_positives_and_negatives():
    record = score(CUBE, block((4, 7), (3, 6), (3, 6))).all
    assert [record[k] for k in ("TP", "FP", "FN", "TN", "n_ref", "n_pred")] == [48, 16, 16, 10 * 12 * 14 - 80, 64, 64]


def test_volumes_are_in_ml_and_their_difference_is_signed():
    record = score(CUBE, block((3, 4), (3, 6), (3, 6)), spacing=(5.0, 1.0, 2.0)).all
    assert record["ref_ml"] == pytest.approx(0.64)
    assert record["volume_difference_ml"] == pytest.approx(-0.32)
    assert record["volume_difference_percent"] == pytest.approx(-50)
    assert record["volume_similarity"] == pytest.approx(1 - 32 / 96)


def test_every_distance_between_two_parallel_slabs_is_the_gap():
    record = score(slab(at=4), slab(at=7), spacing=(2.0, 1.0, 1.0)).all
    assert [record[k] for k in ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm")] == pytest.approx([6.0] * 5)


def test_every_distance_between_a_mask_and_itself_is_zero():
    record = score(CUBE, CUBE).all
    assert [record[k] for k in ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm")] == [0.0] * 5
    assert record["nsd@2"] == 1.0


def test_a_mask_that_fills_its_volume_has_the_edge_of_the_volume_as_border():
    record = score(~NOTHING, ~NOTHING).all
    assert (record["HD95"], record["Dice"], record["over_rate"]) == (0.0, 1.0, None)


def test_single_voxels_lie_their_diagonal_apart():
    record = score(block((1, 1), (2, 2), (3, 3)), block((4, 4), (6, 6), (3, 3)), spacing=(1.0, 1.0, 1.0)).all
    assert record["hd_mm"] == record["HD95"] == pytest.approx(5.0)


def test_hd95_is_the_larger_of_both_directions_and_not_pooled():
    line, longer = block((0, 0), (0, 0), (0, 9)), block((0, 0), (0, 0), (0, 10))  # one voxel thick, so all border
    record = score(line, longer).all
    assert record["HD95"] == pytest.approx(0.5)  # from the longer line: ten zeros and a one, rank 9.5 of 0..10
    assert record["hd95_pooled_mm"] == pytest.approx(0.0)  # twenty zeros and a one, rank 19 of 0..20
    assert record["hd_mm"] == 1.0
    assert record["assd_mm"] == pytest.approx(1 / 21)
    assert record["masd_mm"] == pytest.approx((0 + 1 / 11) / 2)


def test_nsd_is_the_share_of_both_borders_within_the_tolerance():
    line, longer = block((0, 0), (0, 0), (0, 9)), block((0, 0), (0, 0), (0, 13))
    assert score(line, longer).all["nsd@2"] == pytest.approx((10 + 12) / 24)  # the longer line ends 1, 2, 3 and 4 mm beyond


def test_the_distances_of_a_shifted_cube_are_those_of_two_opposite_faces():
    found = score(CUBE, np.roll(CUBE, 1, axis=2), spacing=(1.0, 1.0, 2.0)).all
    # of 56 border voxels either way 16 are 2 mm off (the face left behind) and 4 are 1 mm off (the opposite face's middle, now inside)
    assert [found[k] for k in ("HD95", "hd95_pooled_mm", "hd_mm")] == [2.0, 2.0, 2.0]
    assert [found[k] for k in ("assd_mm", "masd_mm")] == pytest.approx([36 / 56] * 2)
    assert measure(Pair.of(CUBE, np.roll(CUBE, 1, axis=2), (1.0, 1.0, 2.0)), tolerance_mm=1.0).all["nsd@1"] == pytest.approx(40 / 56)


def test_nsd_counts_a_distance_equal_to_the_tolerance():
    near = measure(Pair.of(slab(at=4), slab(at=5), (2.0, 1.0, 1.0)), tolerance_mm=2.0)
    far = measure(Pair.of(slab(at=4), slab(at=5), (2.1, 1.0, 1.0)), tolerance_mm=2.0)
    assert (near.all["nsd@2"], far.all["nsd@2"]) == (1.0, 0.0)


def test_nsd_forgives_rounding_at_the_tolerance():
    assert measure(Pair.of(slab(at=1), slab(at=4), (0.1, 1.0, 1.0)), tolerance_mm=0.3).all["nsd@0.3"] == 1.0


def test_a_one_slice_volume_is_scored_in_two_dimensions():
    whole, hollow = block((0, 0), (2, 8), (2, 8), (1, 12, 14)), block((0, 0), (2, 8), (2, 8), (1, 12, 14))
    hollow[0, 5, 5] = False
    # in 3-D every voxel of one slice is border, 1 mm from the hole at most; in 2-D the hole's rim lies 2 mm inside the outline
    assert score(whole, hollow).all["hd_mm"] == pytest.approx(2.0)


def test_cropping_to_the_masks_creates_no_border():
    cube, longer = block((0, 3), (0, 3), (0, 3), (4, 4, 5)), block((0, 3), (0, 3), (0, 4), (4, 4, 5))
    tight, roomy = score(cube, longer).all, score(np.pad(cube, 3), np.pad(longer, 3)).all
    names = ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm", "nsd@2", "Dice")
    assert [tight[k] for k in names] == [roomy[k] for k in names]


def test_one_empty_mask_is_dice_zero_and_no_distance_but_the_diagonal_when_penalised():
    diagonal = math.hypot(10 * 3, 12 * 1, 14 * 2)
    for reference, prediction, status in ((CUBE, NOTHING, "pred_empty"), (NOTHING, CUBE, "ref_empty")):
        found = score(reference, prediction, spacing=(3.0, 1.0, 2.0))
        assert found.status == status
        assert (found.all["Dice"], found.all["IoU"], found.all["nsd@2"]) == (0.0, 0.0, 0.0)
        for name in ("HD95", "hd95_pooled_mm", "hd_mm", "assd_mm", "masd_mm"):
            assert found.all[name] is None
            assert found.all[f"{name}_penalised"] == pytest.approx(diagonal)


def test_both_empty_is_undefined_and_not_penalised():
    found = score(NOTHING, NOTHING)
    undefined = ("Dice", "IoU", "nsd@2", "HD95", "HD95_penalised", "precision", "recall", "under_rate", "slice_f1", "over_extent_mm")
    assert found.status == "both_empty"
    assert [found.all[k] for k in undefined] == [None] * len(undefined)
    assert (found.all["over_rate"], found.all["n_ref"], found.all["TN"]) == (0.0, 0, 10 * 12 * 14)


def test_a_missing_prediction_is_dice_zero_even_for_an_empty_reference():
    for reference in (CUBE, NOTHING):
        found = measure_missing(Pair.of(reference, NOTHING, UNIT), known=True)
        assert (found.status, found.all["Dice"], found.all["HD95"]) == ("pred_missing", 0.0, None)
        assert found.all["HD95_penalised"] == pytest.approx(math.hypot(*SHAPE))
        assert found.unprompted == found.all


def test_a_record_holds_every_metric_in_the_documented_order():
    assert list(score(CUBE, CUBE).all) == list(score(CUBE, NOTHING).all) == metric_names()


def test_extending_beyond_the_last_slice_is_over_propagation():
    record = score(CUBE, block((3, 8), (3, 6), (3, 6)), spacing=(3.0, 1.0, 1.0)).all
    assert record["over_slices"] == 2
    assert record["over_rate"] == pytest.approx(2 / 6)
    assert record["over_voxel_fraction"] == pytest.approx(2 / 6)
    assert record["over_extent_mm"] == pytest.approx(6.0)
    assert (record["end_error_low_mm"], record["end_error_high_mm"]) == (0.0, 6.0)
    assert record["under_rate"] == 0.0
    assert (record["slice_precision"], record["slice_recall"], record["slice_f1"]) == pytest.approx((4 / 6, 1.0, 0.8))


def test_ending_early_is_under_propagation_and_a_negative_end_error():
    record = score(CUBE, block((4, 6), (3, 6), (3, 6)), spacing=(3.0, 1.0, 1.0)).all
    assert record["under_rate"] == pytest.approx(1 / 4)
    assert (record["over_extent_mm"], record["end_error_low_mm"], record["end_error_high_mm"]) == (0.0, -3.0, 0.0)


def test_slices_are_counted_along_the_axis_of_propagation():
    record = score(CUBE, block((3, 6), (3, 6), (3, 8)), spacing=(1.0, 1.0, 2.0), axis=2).all
    assert (record["over_slices"], record["over_extent_mm"]) == (2, 4.0)


def test_an_empty_prediction_has_no_extent_and_every_slice_missed():
    record = score(CUBE, NOTHING).all
    assert (record["over_rate"], record["under_rate"], record["over_extent_mm"], record["over_voxel_fraction"]) == (0.0, 1.0, None, None)


def test_the_slice_table_has_distance_from_the_nearest_annotated_slice_pixels_dice_and_area():
    table = score(CUBE, block((4, 7), (3, 6), (3, 4)), spacing=(3.0, 1.0, 2.0), annotated=[4, 9]).slices
    assert [row["slice"] for row in table] == [3, 4, 5, 6, 7, 9]
    assert [row["prompt_distance_slices"] for row in table] == [-1, 0, 1, 2, -2, 0]
    assert [row["prompt_distance_mm"] for row in table] == [-3, 0, 3, 6, -6, 0]
    assert [(row["reference_px"], row["prediction_px"]) for row in table] == [(16, 0), (16, 8), (16, 8), (16, 8), (0, 8), (0, 0)]
    assert [row["Dice"] for row in table] == pytest.approx([0, 2 / 3, 2 / 3, 2 / 3, 0, None])
    assert [row["area_error_mm2"] for row in table] == [-32, -16, -16, -16, 16, 0]


def test_unprompted_measures_are_none_when_annotated_slices_are_unknown():
    found = score(CUBE, CUBE)
    assert (found.unprompted, found.unprompted_status, found.slices[0]["prompt_distance_slices"]) == (None, None, None)


def test_unprompted_dice_leaves_the_annotated_slices_out_of_both_masks():
    prediction = CUBE.copy()
    prediction[5:7] = False
    found = score(CUBE, prediction, annotated=[3])
    assert found.all["Dice"] == pytest.approx(2 * 2 / (4 + 2))
    assert found.unprompted["Dice"] == pytest.approx(2 * 1 / (3 + 1))
    assert found.unprompted["n_ref"] == 3 * 16


def test_unprompted_distances_are_those_of_border_voxels_outside_the_annotated_slices():
    reference = block((2, 4), (5, 5), (5, 5))
    prediction = np.roll(reference, 4, axis=2)
    prediction[3] = reference[3]
    found = score(reference, prediction, annotated=[3])
    # the reference's two other voxels are 1 mm from the annotated one, the prediction's two are 4 mm from theirs
    assert found.all["assd_mm"] == pytest.approx((1 + 0 + 1 + 4 + 0 + 4) / 6)
    assert found.unprompted["assd_mm"] == pytest.approx((1 + 1 + 4 + 4) / 4)


def test_leaving_out_an_annotated_slice_creates_no_border_inside_a_solid():
    solid = block((2, 7), (2, 7), (2, 7))
    smaller = block((2, 7), (2, 7), (2, 6))
    smaller[4] = solid[4]
    found = score(solid, smaller, annotated=[4])
    assert found.unprompted["hd_mm"] == 1.0
    assert found.unprompted["assd_mm"] > found.all["assd_mm"]


def test_a_label_on_annotated_slices_alone_is_both_empty_without_them():
    one = block((4, 4), (3, 6), (3, 6))
    found = score(one, one, annotated=[4])
    assert (found.status, found.unprompted_status, found.unprompted["Dice"]) == ("ok", "both_empty", None)


def test_predicting_beyond_the_only_slice_is_penalised_without_the_annotated_slice():
    found = score(block((4, 4), (3, 6), (3, 6)), block((4, 6), (3, 6), (3, 6)), annotated=[4])
    assert (found.unprompted_status, found.unprompted["Dice"], found.unprompted["HD95"]) == ("ref_empty", 0.0, None)
    assert found.unprompted["HD95_penalised"] == pytest.approx(math.hypot(*SHAPE))


def test_extents_compare_whole_masks_whatever_is_annotated():
    found = score(CUBE, block((3, 8), (3, 6), (3, 6)), annotated=[6])
    assert found.unprompted["over_extent_mm"] == 2.0


def test_the_coarsest_axis_is_through_plane_and_z_for_isotropic_voxels():
    assert [coarsest_axis(s) for s in ((3.0, 1.0, 1.0), (1.0, 1.0, 4.0), (1.0, 1.0, 1.0), (1.0, 1.0005, 1.0))] == [0, 2, 0, 0]


def test_masks_of_different_shape_are_rejected():
    with pytest.raises(ValueError, match="of one shape"):
        Pair.of(CUBE, CUBE[1:], UNIT)
