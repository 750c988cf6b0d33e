"""Strategies: who learns, at which rate, and that nobody else moves; an interrupted run ends like an uninterrupted one."""

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.model import adapters
from slmsam2_cli.model.label_unet import LabelUNet
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, NetworkPlan, TrainingPlan
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.state import load_state, save_state
from slmsam2_cli.training.trainable import parameter_groups, prepare, trainable_names
from slmsam2_cli.training.trainer import new_learner, train

PX = 32
STRATEGIES = ("full", "frozen-encoder", "decoder+memory", "adapters")


def plan(strategy, **changes):
    usual = {"steps": 4, "clip_slices": 3, "clips_per_step": 1, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01}
    return TrainingPlan(**{**usual, "strategy": strategy, **changes})


def prepared(settings):
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    prepare(model, settings, "MR")
    return model


def learner(settings):
    return new_learner(prepared(settings), settings, from_scratch=False)


def run(one, settings, until=None):
    sampler = ClipSampler([case(slices=8, held=range(2, 6), size=(PX, PX))], [1], whole(PX))
    return list(train(one, TrainingData(sampler), settings, lambda: until is not None and one.step >= until))


def state(one):
    return {f"{which}/{n}": t for which in ("model", "ema") for n, t in getattr(one, which).state_dict().items()}


@pytest.mark.parametrize("settings", list(map(plan, STRATEGIES)))
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(settings, tmp_path):
    whole, first, second = learner(settings), learner(settings), learner(settings)
    run(whole, settings)
    run(first, settings, until=2)
    save_state(tmp_path / "state.safetensors", first, "settings")
    torch.manual_seed(99)
    load_state(tmp_path / "state.safetensors", second, "settings")
    run(second, settings)
    expected, found = state(whole), state(second)
    assert second.step == 4 and all(torch.equal(expected[name], found[name]) for name in expected)
    kept, wanted = adapters.full_state(second.ema), adapters.full_state(whole.ema)
    assert all(torch.equal(wanted[name], kept[name]) for name in wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_learns_moves_and_the_optimiser_holds_nothing_else(strategy):
    settings = plan(strategy)
    one = learner(settings)
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    run(one, settings, until=2)
    moved = {name for name, p in one.model.named_parameters() if not torch.equal(before[name], p)}
    allowed = set(trainable_names(one.model, settings, "MR"))
    assert moved and moved <= allowed
    held = {id(p) for group in one.optimiser.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in one.model.named_parameters() if name in allowed}
    averaged = {name for name, p in one.ema.named_parameters() if not torch.equal(before[name], p)}
    assert averaged <= allowed


def test_each_strategy_trains_less_than_the_one_before():
    counts = [adapters.count(p for p in prepared(plan(s)).parameters() if p.requires_grad) for s in STRATEGIES]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4


def test_under_adapters_both_the_pairs_and_the_heads_learn_and_the_base_stays():
    settings = plan("adapters")
    one = learner(settings)
    base = {name: tensor.clone() for name, tensor in adapters.split(adapters.full_state(one.model))[0].items()}
    run(one, settings)
    kept, own = adapters.split(adapters.full_state(one.ema))
    assert all(torch.equal(base[name], kept[name]) for name in base)
    assert own["MR"]["image_encoder.trunk.blocks.0.attn.qkv.up"].abs().sum() > 0
    assert not torch.equal(own["MR"]["tuned.stream_fuser.gate"], base["stream_fuser.gate"])


def test_new_parameters_have_a_learning_rate_of_1e_4_at_least_unless_all_are_trained():
    groups = parameter_groups(prepared(plan("adapters", learning_rate=1e-5)), plan("adapters", learning_rate=1e-5))
    assert {round(group["scale"], 6) for group in groups} == {1.0, 10.0}
    fast = parameter_groups(prepared(plan("adapters", learning_rate=1e-3)), plan("adapters", learning_rate=1e-3))
    assert {group["scale"] for group in fast} == {1.0}
    assert {group["scale"] for group in parameter_groups(prepared(plan("full")), plan("full", learning_rate=1e-5))} == {1.0}


@pytest.mark.parametrize("strategy", ["full", "frozen-encoder", "decoder+memory", "adapters"])
def test_a_label_unet_has_its_own_learning_rate_under_every_strategy(strategy):
    model = prepared(plan(strategy, learning_rate=1e-4))
    model.label_unet = LabelUNet(1, [1], 32, width=8)
    (fast,) = (
        group["scale"]
        for group in parameter_groups(model, plan(strategy, learning_rate=1e-4))
        if group["weight_decay"] and group["scale"] > 1
    )
    assert fast * 1e-4 == pytest.approx(1e-3)


def test_the_adapter_of_the_modality_is_trained_further_and_others_are_frozen():
    model = prepared(plan("adapters"))
    adapters.add(model, "CT", AdapterPlan())
    (note,) = prepare(model, plan("adapters"), "MR")
    assert "the adapter for MR" in note and set(adapters.modalities(model)) == {"MR", "CT"}
    assert not any(p.requires_grad for p in adapters.branch_parameters(model, "CT"))


def test_full_training_merges_the_adapter_of_the_modality_and_names_those_that_are_dropped():
    model = prepared(plan("adapters"))
    adapters.add(model, "CT", AdapterPlan())
    notes = prepare(model, plan("full"), "MR")
    assert "MR was merged" in notes[0] and "CT" in notes[1]
    assert not adapters.modalities(model) and all(p.requires_grad for p in model.parameters())
