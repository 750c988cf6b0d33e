"""The refiner: no change when new, its inputs, and none in the networks of SAM 2."""

import pytest
import torch

from slmsam2_cli.model.batch import select
from slmsam2_cli.model.block_matching import warp_to_slice
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.refiner import PriorSlice, RefinerFeatures, transfer_masks
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


def randomise(refiner):
    """Give the last layers non-zero weights."""
    torch.manual_seed(2)
    for parameter in (*refiner.logits.parameters(), *refiner.scores[-1].parameters()):
        torch.nn.init.normal_(parameter, std=0.5)


@torch.no_grad()
def test_a_new_refiner_gives_the_result_of_block_matching():
    model = network()
    features = model.encode(frames())
    bank, here = annotated(model, features), features.at(slice(1, 2))
    conditioned = model.condition(here, bank, ReadContext(1, 1, bank.conditioning, bank.tracked, 3))
    refined = model.decode_after(conditioned, here, bank, bank[0])
    carried = warp_to_slice(here.refiner_features.grey, features.refiner_features.grey[:1], bank[0].chosen.sigmoid())
    plain = model.decode(conditioned, here.fine, carried.logit(eps=1e-6))
    assert torch.allclose(refined.candidates, plain.candidates, atol=1e-2)
    assert torch.allclose(refined.object_score, plain.object_score, atol=1e-2) and torch.allclose(refined.iou, plain.iou, atol=1e-2)


@torch.no_grad()
def test_the_output_depends_on_the_features_of_the_previous_slice():
    model = network()
    randomise(model.refiner)
    features = model.encode(frames())
    bank = annotated(model, features)
    before = tracked(model, bank, features).candidates
    bank.conditioning[0].refiner_features = select(features.refiner_features, slice(2, 3))
    assert not torch.allclose(before, tracked(model, bank, features).candidates)


@torch.no_grad()
def test_objects_of_a_batch_do_not_affect_each_other():
    model = network()
    randomise(model.refiner)
    features = model.encode(frames())
    masks = torch.zeros(2, 1, PX, PX)
    masks[0, :, 8:24, 8:24], masks[1, :, 30:60, 20:50] = 1, 1
    together = features.at(torch.tensor([0, 0]))
    both = MemoryBank({0: model.remember(together, model.condition_on_mask(together, masks), masks)})
    here = features.at(torch.tensor([1, 1]))
    context = ReadContext(1, 1, both.conditioning, both.tracked, 3)
    found = model.track(here, both, context)
    for one in (0, 1):
        index = torch.tensor([one])
        alone = model.track(here.at(index), both.at(index), context)
        assert torch.allclose(alone.candidates[0], found.candidates[one], atol=1e-4)


@torch.no_grad()
def test_a_position_with_a_unique_code_matches_the_same_position_of_the_previous_slice():
    """With one-hot codes every position can match only itself."""
    edge = 8
    codes = torch.eye(edge * edge).reshape(1, edge * edge, edge, edge)
    inside = torch.zeros(1, 1, 8 * edge, 8 * edge)
    inside[..., 16:40, 24:48] = 1
    features = RefinerFeatures(codes, codes, codes, codes, codes)
    found = transfer_masks(features, [PriorSlice(features, inside, torch.ones(1, 1))], torch.tensor(400.0), torch.tensor(50.0))
    assert torch.equal(found > 0.5, inside[..., ::4, ::4] > 0.5)


@torch.no_grad()
def test_without_a_previous_slice_the_refiner_is_not_used():
    model = network(policy="fifo")
    randomise(model.refiner)
    features = model.encode(frames())
    bank = annotated(model, features)
    context, here = ReadContext(2, 1, bank.conditioning, bank.tracked, 3), features.at(slice(2, 3))
    plain = model.decode(model.condition(here, bank, context), here.fine, None)
    assert torch.equal(model.track(here, bank, context).candidates, plain.candidates)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_networks_of_sam_2_have_no_refiner(size):
    model = network(size)
    assert model.refiner is None and model.encode(frames(1)).refiner_features is None
