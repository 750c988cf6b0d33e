"""Adapters: nothing at step 0, the counted sizes, the same merged as unmerged, one modality at a time."""

import copy
from functools import cache

import pytest
import torch

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import adapters
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, NetworkPlan

PX = 64
LORA, BOTTLENECK = AdapterPlan(), AdapterPlan(kind="bottleneck")


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
    """The adapter in use, no longer zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*adapters.branch_parameters(model, model.adapters.active), *adapters.tuned_parameters(model).values()]:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return model


@torch.no_grad()
def seen(model):
    """Mask logits of two slices tracked from one annotated."""
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
    sites = adapters.encoder_sites(model, plan.kind) if prefix == "image_encoder." else adapters.memory_sites(model)
    adapters.add(model, "MR", plan)
    return adapters.count(p for site in sites for p in model.adapters.branches["MR"][site].parameters())


# How large they are


@pytest.mark.parametrize(
    ("plan", "where", "parameters"),
    [
        (LORA, "image_encoder.", 284_928),
        (AdapterPlan(rank=4), "image_encoder.", 142_464),
        (LORA, "memory", 532_480),
        (AdapterPlan(rank=4), "memory", 266_240),
        (BOTTLENECK, "image_encoder.", 2_306_544),
    ],
)
def test_on_hiera_tiny_they_have_the_counted_sizes(plan, where, parameters):
    assert counted(plan, where) == parameters


def test_what_a_modality_tunes_whole_is_two_of_tinys_forty_six_million_parameters():
    assert adapters.count(adapters.tuned_parameters(tiny()).values()) == 2_002_373
    assert adapters.count(tiny().parameters()) == 45_963_330


def test_the_memory_stacks_without_their_feed_forward_would_be_less_than_half_of_it():
    model = copy.deepcopy(tiny())
    adapters.add(model, "MR", LORA)
    attention = [b for site, b in model.adapters.branches["MR"].items() if "memory_attention" in site and "attn" in site]
    assert adapters.count(p for branch in attention for p in branch.parameters()) == 237_568


def test_a_modality_of_tiny_takes_a_few_megabytes_of_the_hundred_and_eighty():
    model = copy.deepcopy(tiny())
    adapters.add(model, "MR", LORA)
    assert 2 < 4 * adapters.count(adapters.adapter_state(model, "MR").values()) / 2**20 < 12
    assert 4 * adapters.count(adapters.full_state(tiny()).values()) / 2**20 > 170


# What they change


@pytest.mark.parametrize("plan", [LORA, BOTTLENECK])
def test_at_step_0_the_model_is_the_base_bit_for_bit(plan):
    assert torch.equal(seen(with_adapter(plan)), seen(build()))


def test_merged_is_unmerged():
    model = moved(with_adapter())
    before = seen(model)
    assert not torch.allclose(before, seen(build()), atol=1e-2)
    adapters.merge(model)
    assert set(model.state_dict()) == set(build().state_dict())
    assert torch.allclose(seen(model), before, atol=1e-5, rtol=1e-5)


def test_a_bottleneck_says_that_it_cannot_be_merged():
    model = moved(with_adapter(BOTTLENECK))
    assert not adapters.can_merge(model)
    with pytest.raises(ValueError, match="not linear"):
        adapters.merge(model)


def test_one_modality_is_in_use_at_a_time_and_none_is_the_base():
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


def test_a_copy_of_the_model_asks_its_own_adapters():
    model = with_adapter()
    other = copy.deepcopy(model)
    moved(model)
    assert torch.equal(seen(other), seen(build()))
    assert (
        other.adapters.branches["MR"]["memory_attention.layers.0.linear1"]
        is not model.adapters.branches["MR"]["memory_attention.layers.0.linear1"]
    )


def test_slices_do_not_see_each_other_in_the_encoder():
    model = moved(with_adapter())
    frames = torch.rand(2, 3, PX, PX, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        together, alone = model.encode(frames).top, model.encode(frames[1:]).top
    assert torch.allclose(together[1:], alone, atol=1e-5)


# What is kept of them


def test_the_whole_state_holds_the_base_untouched_and_one_folder_per_modality():
    model = moved(with_adapter())
    base, found = adapters.split(adapters.full_state(model))
    assert all(torch.equal(tensor, base[name]) for name, tensor in build().state_dict().items()) and set(found) == {"MR"}
    assert "image_encoder.trunk.blocks.0.attn.qkv.down" in found["MR"] and "tuned.stream_fuser.gate" in found["MR"]


@pytest.mark.parametrize("plan", [LORA, BOTTLENECK])
def test_a_saved_adapter_does_the_same_on_a_fresh_base(plan):
    model, other = moved(with_adapter(plan)), build()
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
        (lambda s: s.update({"elsewhere": torch.zeros(1)}), "elsewhere"),
    ],
)
def test_an_adapter_of_another_network_is_refused_by_name(change, name):
    state = adapters.adapter_state(with_adapter(), "MR")
    change(state)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        adapters.attach(build(), "MR", state, "file")


@pytest.mark.parametrize("modality", ["", "a.b", "../x", "shelf", "forward", "MR" * 20])
def test_what_cannot_stand_in_a_tensors_name_names_no_adapter(modality):
    with pytest.raises(WeightsError, match="cannot name an adapter"):
        adapters.add(build(), modality, LORA)


def test_there_is_one_adapter_a_modality_and_none_that_was_not_added():
    model = with_adapter()
    with pytest.raises(ValueError, match="already"):
        adapters.add(model, "MR", LORA)
    with pytest.raises(ValueError, match="no adapter for CT"):
        adapters.use(model, "CT")
