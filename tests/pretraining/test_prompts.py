"""Simulated boxes, points and perturbed masks, and the masks that a network segments from them."""

import pytest
import torch

from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.pretraining.prompts import (
    boxes_around,
    boxes_to_masks,
    perturb_masks,
    refine_masks,
    sample_points,
    segment_from_boxes,
    segment_from_points,
    to_mask_logits,
)

PX = 64


def rng():
    return torch.Generator().manual_seed(0)


def rectangle(left=10, top=20, right=29, bottom=35):
    mask = torch.zeros(1, 1, PX, PX)
    mask[..., top : bottom + 1, left : right + 1] = 1
    return mask


def test_the_box_around_a_rectangle_is_its_two_corners():
    box = boxes_around(rectangle(), rng(), jitter=0.0)
    assert box.tolist() == [[[10, 20], [29, 35]]]
    assert torch.equal(boxes_to_masks(box, PX), rectangle())


def test_a_jittered_box_stays_in_the_image_and_near_the_mask():
    masks = rectangle(0, 0, 63, 9).expand(50, -1, -1, -1)
    points = boxes_around(masks, rng(), jitter=0.1)
    assert points.min() >= 0 and points.max() <= PX - 1
    assert (points[:, 1, 1] - 9).abs().max() <= 1.0 and points[:, 1, 1].std() > 0


def test_the_first_point_is_inside_and_the_others_match_their_labels():
    mask = rectangle()
    points, labels = sample_points(mask.expand(40, -1, -1, -1), 3, rng())
    x, y = points.long().unbind(-1)
    assert torch.equal(mask[0, 0][y, x].long(), labels)
    assert labels[:, 0].all() and 0 < labels[:, 1:].float().mean() < 1


def test_a_mask_that_fills_the_image_has_no_points_outside():
    _, labels = sample_points(torch.ones(8, 1, PX, PX), 3, rng())
    assert labels.all()


@pytest.mark.parametrize(("points", "candidates"), [(1, 3), (2, 1)])
def test_one_point_results_in_three_candidates_and_several_points_in_one(points, candidates):
    model = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    with torch.no_grad():
        output = segment_from_points(
            model, model.encode(torch.rand(2, 3, PX, PX)), *sample_points(rectangle().expand(2, -1, -1, -1), points, rng())
        )
    assert output.candidates.shape == (2, candidates, PX, PX) and output.iou.shape == (2, candidates)


def test_a_perturbed_mask_overlaps_the_mask_and_is_binary():
    masks = rectangle().expand(50, -1, -1, -1)
    others = perturb_masks(masks, rng(), shift=0.25, scale=1.4)
    shared = (others * masks).sum(dim=(1, 2, 3)) / torch.maximum(others, masks).sum(dim=(1, 2, 3))
    assert shared.min() > 0.2 and shared.max() < 1.01 and shared.std() > 0.05
    assert set(others.unique().tolist()) == {0.0, 1.0}


def test_a_mask_that_is_neither_shifted_nor_scaled_stays_the_same():
    assert torch.equal(perturb_masks(rectangle(), rng(), shift=0.0, scale=1.0), rectangle())


def test_a_mask_that_would_leave_the_image_stays():
    pixel = rectangle(63, 63, 63, 63).expand(20, -1, -1, -1)
    assert perturb_masks(pixel, rng(), shift=1.0, scale=4.0).flatten(1).any(dim=1).all()


@torch.no_grad()
def test_an_untrained_network_that_carries_masks_returns_its_box_or_mask_prompt():
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    features, box = model.encode(torch.rand(1, 3, PX, PX)), torch.tensor([[[8.0, 8.0], [39.0, 31.0]]])
    given = to_mask_logits(model, boxes_to_masks(box, PX)) > 0
    assert torch.equal(segment_from_boxes(model, features, box).chosen > 0, given)
    assert torch.equal(refine_masks(model, features, boxes_to_masks(box, PX)).chosen > 0, given)
