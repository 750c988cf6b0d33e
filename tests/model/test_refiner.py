"""The refiner: nothing at first, the slice passed and the annotated ones afterwards, and no part in stock SAM 2."""

import pytest
import torch

from slmsam2_cli.model.block_matching import moved
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.refiner import PriorSlice, Refiner, RefinerFeatures
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX = 64


def network(size="nano", policy="shortlong"):
    torch.manual_seed(0)
    return SlmSam2(NetworkPlan(size=size, policy=policy), PX).eval()


def frames(count=3):
    return torch.rand(count, 3, PX, PX, generator=torch.Generator().manual_seed(1))


def annotated(model, features):
    mask = torch.zeros(1, 1, PX, PX)
    mask[..., 16:40, 16:40] = 1
    first = features.at(slice(0, 1))
    return MemoryBank({0: model.remember(first, model.condition_on_mask(first, mask), mask)})


def tracked(model, bank, features, t=1):
    return model.track(features.at(slice(t, t + 1)), bank, ReadContext(t, 1, bank.conditioning, bank.tracked, 3))


def wake(refiner):
    """Weights that say something."""
    torch.manual_seed(2)
    for parameter in (*refiner.logits.parameters(), *refiner.scores[-1].parameters()):
        torch.nn.init.normal_(parameter, std=0.5)


@torch.no_grad()
def test_a_fresh_refiner_says_what_block_matching_says():
    model = network()
    features = model.encode(frames())
    bank, here = annotated(model, features), features.at(slice(1, 2))
    conditioned = model.condition(here, bank, ReadContext(1, 1, bank.conditioning, bank.tracked, 3))
    refined = model.decode_after(conditioned, here, bank, bank[0])
    carried = moved(here.detail.grey, features.detail.grey[:1], bank[0].chosen.sigmoid())
    plain = model.decode(conditioned, here.fine, carried.logit(eps=1e-6))
    assert torch.allclose(refined.candidates, plain.candidates, atol=1e-2)
    assert torch.allclose(refined.object_score, plain.object_score, atol=1e-2) and torch.allclose(refined.iou, plain.iou, atol=1e-2)


@torch.no_grad()
def test_it_sees_the_slice_just_passed_beside_the_one_looked_at():
    model = network()
    wake(model.refiner)
    features = model.encode(frames())
    bank = annotated(model, features)
    before = tracked(model, bank, features).candidates
    bank.conditioning[0].detail = features.detail.at(slice(2, 3))
    assert not torch.allclose(before, tracked(model, bank, features).candidates)


@torch.no_grad()
def test_objects_have_no_part_in_each_other():
    model = network()
    wake(model.refiner)
    features = model.encode(frames())
    masks = torch.zeros(2, 1, PX, PX)
    masks[0, :, 8:24, 8:24], masks[1, :, 30:60, 20:50] = 1, 1
    together = features.at(torch.tensor([0, 0]))
    both = MemoryBank({0: model.remember(together, model.condition_on_mask(together, masks), masks)})
    here = features.at(torch.tensor([1, 1]))
    moment = ReadContext(1, 1, both.conditioning, both.tracked, 3)
    found = model.track(here, both, moment)
    for one in (0, 1):
        index = torch.tensor([one])
        alone = model.track(here.at(index), both.at(index), moment)
        assert torch.allclose(alone.candidates[0], found.candidates[one], atol=1e-4)


@torch.no_grad()
def test_a_place_that_looks_like_nothing_else_finds_itself_on_the_slice_passed():
    """Codes that say where they are from: every place of the slice matches the same place of the other."""
    refiner, edge = Refiner(16, 128), 8
    codes = torch.eye(edge * edge).reshape(1, edge * edge, edge, edge)
    inside = torch.zeros(1, 1, 8 * edge, 8 * edge)
    inside[..., 16:40, 24:48] = 1
    detail = RefinerFeatures(codes, codes, codes, codes, codes)
    refiner.sharpness.fill_(6.0)
    found = refiner._matched(detail, [PriorSlice(detail, inside, torch.ones(1, 1))], 0)
    assert torch.equal(found > 0.5, inside[..., ::4, ::4] > 0.5)


@torch.no_grad()
def test_without_a_slice_passed_there_is_nothing_to_refine_by():
    model = network(policy="fifo")
    wake(model.refiner)
    features = model.encode(frames())
    bank = annotated(model, features)
    moment, here = ReadContext(2, 1, bank.conditioning, bank.tracked, 3), features.at(slice(2, 3))
    plain = model.decode(model.condition(here, bank, moment), here.fine, None)
    assert torch.equal(model.track(here, bank, moment).candidates, plain.candidates)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_sam_2_has_none(size):
    model = network(size)
    assert model.refiner is None and model.encode(frames(1)).detail is None
