"""Boxes and points: drawn where the mask says, and enough for a mask of their own."""

import pytest
import torch

from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.network import NetworkPlan
from slmsam2_cli.pretraining.prompting import box_of, points_of, prompted

PX = 64


def rng():
    return torch.Generator().manual_seed(0)


def rectangle(left=10, top=20, right=29, bottom=35):
    mask = torch.zeros(1, 1, PX, PX)
    mask[..., top : bottom + 1, left : right + 1] = 1
    return mask


def test_the_box_of_a_rectangle_is_its_two_corners():
    points, labels = box_of(rectangle(), rng(), jitter=0.0)
    assert points.tolist() == [[[10, 20], [29, 35]]] and labels.tolist() == [[2, 3]]


def test_a_shifted_box_stays_in_the_frame_and_near_the_mask():
    masks = rectangle(0, 0, 63, 9).expand(50, -1, -1, -1)
    points, _ = box_of(masks, rng(), jitter=0.1)
    assert points.min() >= 0 and points.max() <= PX - 1
    assert (points[:, 1, 1] - 9).abs().max() <= 1.0 and points[:, 1, 1].std() > 0


def test_the_first_point_is_inside_and_the_others_are_what_their_labels_say():
    mask = rectangle()
    points, labels = points_of(mask.expand(40, -1, -1, -1), 3, rng())
    x, y = points.long().unbind(-1)
    assert torch.equal(mask[0, 0][y, x].long(), labels)
    assert labels[:, 0].all() and 0 < labels[:, 1:].float().mean() < 1


def test_where_everything_is_inside_no_point_is_outside():
    _, labels = points_of(torch.ones(8, 1, PX, PX), 3, rng())
    assert labels.all()


@pytest.mark.parametrize(("points", "candidates"), [(1, 3), (2, 1)])
def test_one_point_may_mean_three_things_and_several_mean_one(points, candidates):
    model = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    with torch.no_grad():
        output = prompted(model, model.encode(torch.rand(2, 3, PX, PX)), *points_of(rectangle().expand(2, -1, -1, -1), points, rng()))
    assert output.candidates.shape == (2, candidates, PX // 4, PX // 4) and output.iou.shape == (2, candidates)


def test_a_model_learns_where_a_box_is():
    """Noise shows nothing: only the prompt can tell the two rectangles apart."""
    torch.manual_seed(0)
    model, masks = SlmSam2(NetworkPlan(size="nano"), PX), torch.cat([rectangle(4, 4, 23, 23), rectangle(40, 36, 59, 55)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    frames, target = torch.rand(2, 3, PX, PX), torch.nn.functional.max_pool2d(masks, 4)
    for _ in range(25):
        output = prompted(model, model.encode(frames), *box_of(masks, rng(), 0.0))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output.candidates, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    drawn = output.candidates > 0
    assert ((drawn & (target > 0)).sum(dim=(1, 2, 3)) > 0.5 * target.sum(dim=(1, 2, 3))).all()
    assert not torch.equal(drawn[0], drawn[1])
