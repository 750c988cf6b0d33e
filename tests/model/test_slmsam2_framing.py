"""Changing the input size of a network, and the faster layers for CPUs."""

import copy

import pytest
import torch

from slmsam2_cli.model.cpu_ops import optimise_for_cpu
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2, set_input_size
from slmsam2_cli.planning.plan import NetworkPlan


def network(input_size):
    torch.manual_seed(0)
    return SlmSam2(NetworkPlan(size="nano"), input_size).eval()


@torch.no_grad()
def tracked(model):
    """Logits of the second of two slices, the first with its left half annotated."""
    frames = torch.rand(2, 3, model.input_size, model.input_size, generator=torch.Generator().manual_seed(0))
    features, mask = model.encode(frames), torch.zeros(1, 1, model.input_size, model.input_size)
    mask[..., : model.input_size // 2] = 1
    first = features.at(slice(0, 1))
    bank = MemoryBank({0: model.remember(first, model.condition_on_mask(first, mask), mask)})
    return model.track(features.at(slice(1, 2)), bank, ReadContext(1, 1, bank.conditioning, bank.tracked, 2)).chosen


def test_after_set_input_size_the_output_is_that_of_a_network_built_for_that_size():
    changed, made_for_it = network(96), network(64)
    made_for_it.load_state_dict(changed.state_dict())
    set_input_size(changed, 64)
    assert torch.equal(tracked(changed), tracked(made_for_it))


def test_an_input_size_that_is_no_multiple_of_32_is_rejected():
    with pytest.raises(ValueError, match="multiple of 32"):
        set_input_size(network(64), 100)


def test_optimise_for_cpu_changes_neither_keys_nor_results():
    plain = network(64)
    quick = copy.deepcopy(plain)
    optimise_for_cpu(quick)
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert torch.allclose(tracked(quick), tracked(plain), atol=1e-4)
