"""Losses whose values are known by hand."""

import math

import pytest
import torch

from slmsam2_cli.model.slmsam2 import SliceOutput
from slmsam2_cli.training.losses import Weights, balanced, focal, slice_loss, soft_dice, true_iou


def output(candidates, iou=None, object_score=0.0):
    batch, count = candidates.shape[:2]
    best = torch.zeros(batch, dtype=torch.long)
    return SliceOutput(
        candidates,
        torch.zeros(batch, count) if iou is None else iou,
        best,
        torch.full((batch, 1), object_score),
        candidates[:, :1],
        candidates[:, :1],
        torch.zeros(batch, 4),
    )


def half():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return mask


def test_focal_loss_of_an_undecided_mask_is_a_quarter_of_ln2_weighted_by_class():
    expected = 0.25 * math.log(2) * (0.25 * 0.5 + 0.75 * 0.5)
    assert focal(torch.zeros(8, 8), half()[0, 0]).item() == pytest.approx(expected, rel=1e-5)


def test_dice_loss_of_a_perfect_confident_mask_is_zero_and_of_its_complement_nearly_one():
    sure = half() * 60 - 30
    assert soft_dice(sure, half()).item() == pytest.approx(0.0, abs=1e-5)
    assert soft_dice(-sure, half()).item() == pytest.approx(1 - 1 / 65, abs=1e-4)


def test_iou_of_half_against_everything_is_one_half_and_of_two_empty_masks_one():
    assert true_iou(torch.ones(1, 1, 8, 8), half()).item() == pytest.approx(0.5)
    assert true_iou(-torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).item() == 1.0


def test_an_absent_object_costs_object_score_and_a_mask_that_does_not_vanish_but_no_dice():
    nothing = torch.zeros(1, 1, 8, 8)
    loss = slice_loss(output(torch.full((1, 1, 8, 8), -30.0), object_score=30.0), nothing)
    assert loss.dice == 0 and loss.iou == 0
    assert loss.object_score.item() == pytest.approx(30.0, rel=1e-3)
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-6)
    assert slice_loss(output(torch.full((1, 1, 8, 8), 30.0)), nothing).pixels > 1


def test_of_several_candidates_only_the_best_is_asked_to_be_right():
    good, bad = half() * 60 - 30, 30 - half() * 60
    loss = slice_loss(output(torch.cat([bad, good], dim=1), iou=torch.tensor([[0.0, 1.0]])), half())
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-5)
    assert loss.iou.item() == pytest.approx(0.0, abs=1e-5)


def test_low_resolution_candidates_are_compared_at_the_masks_size():
    assert slice_loss(output(torch.ones(1, 1, 2, 2) * 30), torch.ones(1, 1, 8, 8)).dice.item() == pytest.approx(0.0, abs=1e-4)


def test_what_nobody_looked_at_costs_nothing():
    """The unknown half of the slice is predicted wrongly; the known half is right."""
    known = 1 - half()
    loss = slice_loss(output(torch.full((1, 1, 8, 8), 30.0), object_score=30.0), 1 - half(), known)
    assert loss.iou.item() == pytest.approx(1.0)  # the IoU was predicted as 0 and is 1 where it is known
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-6) and loss.dice.item() == pytest.approx(0.0, abs=1e-6)


def test_object_score_is_not_judged_where_the_object_may_hide_in_what_nobody_looked_at():
    nothing = torch.zeros(1, 1, 8, 8)
    assert slice_loss(output(-torch.ones(1, 1, 8, 8), object_score=30.0), nothing, half()).object_score == 0
    assert slice_loss(output(-torch.ones(1, 1, 8, 8), object_score=30.0), nothing, torch.ones(1, 1, 8, 8)).object_score > 1


def test_balanced_cross_entropy_counts_inside_and_outside_one_half_each_whatever_their_size():
    corner = torch.zeros(8, 8)
    corner[0, 0] = 1
    assert balanced(torch.zeros(8, 8), corner).item() == pytest.approx(math.log(2), rel=1e-5)
    outside_right = torch.full((8, 8), -30.0)
    assert balanced(outside_right, corner).item() == pytest.approx(15.0, rel=1e-4)  # all of the inside wrong by 30
    assert balanced(torch.zeros(8, 8), torch.zeros(8, 8)).item() == pytest.approx(math.log(2) / 2, rel=1e-5)


def test_balanced_cross_entropy_heeds_only_what_somebody_looked_at():
    known = 1 - half()[0, 0]
    assert balanced(torch.where(known > 0, -30.0, 30.0), torch.zeros(8, 8), known).item() == pytest.approx(0.0, abs=1e-6)


def test_weights_say_what_each_term_counts():
    weights = Weights(pixels=0.3, balanced=True, iou=0.0, object_score=0.0)
    loss = slice_loss(output(torch.zeros(1, 1, 8, 8)), half(), weights=weights)
    assert loss.pixels.item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss.total.item() == pytest.approx(0.3 * math.log(2) + loss.dice.item(), rel=1e-5)


def test_a_mask_where_nothing_is_may_count_more():
    nothing, mask = torch.zeros(1, 1, 8, 8), output(torch.zeros(1, 1, 8, 8))
    once, ten_times = (slice_loss(mask, nothing, weights=Weights(balanced=True, absent=times)).pixels for times in (1.0, 10.0))
    assert ten_times.item() == pytest.approx(10 * once.item())


def test_object_score_that_is_kept_is_compared_with_what_was_predicted_whatever_the_truth():
    even = torch.tensor([0.5])
    for target in (half(), torch.zeros(1, 1, 8, 8)):
        assert slice_loss(
            output(torch.zeros(1, 1, 8, 8), object_score=0.0), target, target_scores=even
        ).object_score.item() == pytest.approx(math.log(2))
        sure = slice_loss(output(torch.zeros(1, 1, 8, 8), object_score=4.0), target, target_scores=torch.tensor([1.0])).object_score
        assert sure.item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-4)
