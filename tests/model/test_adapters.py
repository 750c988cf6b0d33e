"""Low-rank adapters: no change at step 0, their sizes, merging, switching between modalities, saving."""

import copy
from functools import cache

import pytest
import torch

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import adapters
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, NetworkPlan

PX = 64
LORA = AdapterPlan()


def build(seed=0):
    torch.manual_seed(seed)
    return SlmSam2(NetworkPlan(size="nano"), PX).eval()


@cache
def tiny():
    return SlmSam2(NetworkPlan(size="tiny"), 64).to("meta")


def with_adapter(plan=LORA, modality="MR", seed=0):
    model = build()
    adapters.add(model, modality, plan, seed)
    adapters.use(model, modality)
    return model


def moved(model, seed=1):
    """Change the adapter in use, which starts at zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*adapters.branch_parameters(model, model.adapters.active), *adapters.tuned_parameters(model).values()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return model


@torch.no_grad()
def seen(model):
    """Outputs on two slices that are tracked from an annotated one."""
    frames = torch.rand(3, 3, PX, PX, generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(1, 1, PX, PX)
    mask[..., 10:40, 20:50] = 1
    features, bank = model.encode(frames), MemoryBank()
    first = features.at(slice(0, 1))
    bank.conditioning[0] = model.remember(first, model.condition_on_mask(first, mask), mask)
    found = []
    for t in (1, 2):
        here = features.at(slice(t, t + 1))
        output = model.track(here, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, 3))
        bank.tracked[t] = model.remember(here, output)
        found += [output.candidates, output.iou, output.object_score]
    return torch.cat([tensor.flatten() for tensor in found])


def counted(plan, prefix):
    model = copy.deepcopy(tiny())
    adapters.add(model, "MR", plan)
    branches = model.adapters.branches["MR"].items()
    return adapters.count(p for site, branch in branches if prefix in site for p in branch.parameters())


# Sizes


@pytest.mark.parametrize(
    ("plan", "where", "parameters"),
    [
        (LORA, "image_encoder.", 284_928),
        (AdapterPlan(rank=4), "image_encoder.", 142_464),
        (LORA, "memory", 532_480),
        (AdapterPlan(rank=4), "memory", 266_240),
    ],
)
def test_the_pairs_of_tiny_have_the_parameters_of_their_rank(plan, where, parameters):
    assert counted(plan, where) == parameters


def test_tuned_parameters_are_two_of_the_forty_six_million_of_tiny():
    assert adapters.count(adapters.tuned_parameters(tiny()).values()) == 2_002_373
    assert adapters.count(tiny().parameters()) == 45_963_330


def test_the_attention_pairs_of_tinys_memory_have_237568_parameters_without_feed_forward():
    model = copy.deepcopy(tiny())
    adapters.add(model, "MR", LORA)
    attention = [b for site, b in model.adapters.branches["MR"].items() if "memory_attention" in site and "attn" in site]
    assert adapters.count(p for branch in attention for p in branch.parameters()) == 237_568


def test_an_adapter_of_tiny_takes_2_to_12_mb_and_the_network_more_than_170():
    model = copy.deepcopy(tiny())
    adapters.add(model, "MR", LORA)
    assert 2 < 4 * adapters.count(adapters.adapter_state(model, "MR").values()) / 2**20 < 12
    assert 4 * adapters.count(adapters.full_state(tiny()).values()) / 2**20 > 170


# Effect


def test_a_new_adapter_does_not_change_a_bit_of_the_output():
    assert torch.equal(seen(with_adapter()), seen(build()))


def test_merging_does_not_change_the_output():
    model = moved(with_adapter())
    before = seen(model)
    assert not torch.allclose(before, seen(build()), atol=1e-2)
    adapters.merge(model)
    assert set(model.state_dict()) == set(build().state_dict())
    assert torch.allclose(seen(model), before, atol=1e-5, rtol=1e-5)


def test_each_modality_keeps_its_output_when_another_or_the_base_was_in_use():
    model = moved(with_adapter(modality="MR"))
    mr = seen(model)
    adapters.add(model, "CT", LORA, seed=5)
    adapters.use(model, "CT")
    assert torch.equal(seen(model), seen(build()))
    moved(model, seed=2)
    ct = seen(model)
    adapters.use(model, None)
    assert torch.equal(seen(model), seen(build()))
    adapters.use(model, "MR")
    assert torch.equal(seen(model), mr) and not torch.allclose(mr, ct, atol=1e-3)
    adapters.use(model, "CT")
    assert torch.equal(seen(model), ct)


def test_a_copy_of_the_model_uses_its_own_adapters():
    model = with_adapter()
    other = copy.deepcopy(model)
    moved(model)
    assert torch.equal(seen(other), seen(build()))
    assert (
        other.adapters.branches["MR"]["memory_attention.layers.0.linear1"]
        is not model.adapters.branches["MR"]["memory_attention.layers.0.linear1"]
    )


def test_slices_of_a_batch_do_not_affect_each_other_in_the_encoder():
    model = moved(with_adapter())
    frames = torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        together, alone = model.encode(frames).top, model.encode(frames[1:]).top
    assert torch.allclose(together[1:], alone, atol=1e-5)


# Saving


def test_the_full_state_holds_the_unchanged_base_and_one_prefix_per_modality():
    model = moved(with_adapter())
    base, found = adapters.split(adapters.full_state(model))
    assert all(torch.equal(tensor, base[name]) for name, tensor in build().state_dict().items()) and set(found) == {"MR"}
    assert "image_encoder.trunk.blocks.0.attn.qkv.down" in found["MR"] and "tuned.stream_fuser.gate" in found["MR"]


def test_a_saved_adapter_gives_the_same_output_on_the_base():
    model, other = moved(with_adapter()), build()
    adapters.attach(other, "MR", adapters.adapter_state(model, "MR"), "file")
    assert torch.equal(seen(other), seen(build()))
    adapters.use(other, "MR")
    assert torch.equal(seen(other), seen(model))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.update({"tuned.memory_encoder.x": torch.zeros(1)}), "tuned.memory_encoder.x"),
        (lambda s: s.update({"tuned.stream_fuser.gate": torch.zeros(3)}), "tuned.stream_fuser.gate"),
        (lambda s: s.update({"no_mem_embed.down": torch.zeros(1, 8, 3)}), "no_mem_embed"),
        (lambda s: s.pop("memory_attention.layers.0.linear1.up"), "memory_attention.layers.0.linear1"),
        (lambda s: s.update({"memory_attention.layers.0.linear1.side": torch.zeros(1)}), "memory_attention.layers.0.linear1"),
        (
            lambda s: s.update({"memory_attention.layers.0.linear1.down.weight": torch.zeros(1)}),
            "memory_attention.layers.0.linear1",
        ),  # a bottleneck
        (lambda s: s.update({"elsewhere": torch.zeros(1)}), "elsewhere"),
    ],
)
def test_an_adapter_of_another_network_is_rejected_with_the_name_of_a_tensor(change, name):
    state = adapters.adapter_state(with_adapter(), "MR")
    change(state)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        adapters.attach(build(), "MR", state, "file")


@pytest.mark.parametrize("modality", ["", "a.b", "../x", "stored_values", "forward", "MR" * 20])
def test_a_modality_that_cannot_be_part_of_a_tensor_name_is_rejected(modality):
    with pytest.raises(WeightsError, match="cannot name an adapter"):
        adapters.add(build(), modality, LORA)


def test_a_second_adapter_of_a_modality_and_an_unknown_modality_are_errors():
    model = with_adapter()
    with pytest.raises(ValueError, match="the network has an adapter for MR"):
        adapters.add(model, "MR", LORA)
    with pytest.raises(ValueError, match="no adapter for CT"):
        adapters.use(model, "CT")
