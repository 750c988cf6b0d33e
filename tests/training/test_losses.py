"""Losses whose values are known by hand."""

import math

import pytest
import torch

from slmsam2_cli.model.slmsam2 import SliceOutput
from slmsam2_cli.training.losses import LossWeights, balanced, focal, slice_loss, soft_dice, true_iou


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


def test_an_absent_object_costs_object_score_and_false_pixels_but_no_dice():
    nothing = torch.zeros(1, 1, 8, 8)
    loss = slice_loss(output(torch.full((1, 1, 8, 8), -30.0), object_score=30.0), nothing)
    assert loss.dice == 0 and loss.iou == 0
    assert loss.object_score.item() == pytest.approx(30.0, rel=1e-3)
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-6)
    assert slice_loss(output(torch.full((1, 1, 8, 8), 30.0)), nothing).pixels > 1


def test_of_several_candidate_masks_only_the_best_has_a_loss():
    good, bad = half() * 60 - 30, 30 - half() * 60
    loss = slice_loss(output(torch.cat([bad, good], dim=1), iou=torch.tensor([[0.0, 1.0]])), half())
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-5)
    assert loss.iou.item() == pytest.approx(0.0, abs=1e-5)


def test_low_resolution_candidates_are_resized_to_the_target():
    assert slice_loss(output(torch.ones(1, 1, 2, 2) * 30), torch.ones(1, 1, 8, 8)).dice.item() == pytest.approx(0.0, abs=1e-4)


def test_ignored_pixels_cost_nothing():
    """The ignored half of the slice is predicted wrongly; the other half is right."""
    valid = 1 - half()
    loss = slice_loss(output(torch.full((1, 1, 8, 8), 30.0), object_score=30.0), 1 - half(), valid)
    assert loss.iou.item() == pytest.approx(1.0)  # predicted as 0, and 1 on the pixels that count
    assert loss.pixels.item() == pytest.approx(0.0, abs=1e-6) and loss.dice.item() == pytest.approx(0.0, abs=1e-6)


def test_object_score_of_an_absent_object_has_no_loss_on_a_slice_with_ignored_pixels():
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


def test_balanced_cross_entropy_counts_only_pixels_that_are_not_ignored():
    valid = 1 - half()[0, 0]
    assert balanced(torch.where(valid > 0, -30.0, 30.0), torch.zeros(8, 8), valid).item() == pytest.approx(0.0, abs=1e-6)


def test_the_total_is_the_weighted_sum_of_the_terms():
    weights = LossWeights(pixels=0.3, balanced=True, iou=0.0, object_score=0.0)
    loss = slice_loss(output(torch.zeros(1, 1, 8, 8)), half(), weights=weights)
    assert loss.pixels.item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss.total.item() == pytest.approx(0.3 * math.log(2) + loss.dice.item(), rel=1e-5)


def test_false_pixels_of_an_absent_object_are_weighted_by_absent():
    nothing, mask = torch.zeros(1, 1, 8, 8), output(torch.zeros(1, 1, 8, 8))
    once, ten_times = (slice_loss(mask, nothing, weights=LossWeights(balanced=True, absent=times)).pixels for times in (1.0, 10.0))
    assert ten_times.item() == pytest.approx(10 * once.item())


def test_object_score_is_compared_with_the_teachers_score_whatever_the_ground_truth():
    even = torch.tensor([0.5])
    for target in (half(), torch.zeros(1, 1, 8, 8)):
        assert slice_loss(
            output(torch.zeros(1, 1, 8, 8), object_score=0.0), target, target_scores=even
        ).object_score.item() == pytest.approx(math.log(2))
        sure = slice_loss(output(torch.zeros(1, 1, 8, 8), object_score=4.0), target, target_scores=torch.tensor([1.0])).object_score
        assert sure.item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-4)
