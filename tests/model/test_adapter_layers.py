"""More than three channels: means of groups at step 0, learned from then on, kept with the modality, absent for fewer."""

import copy
from functools import cache

import pytest
import torch

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import adapters
from slmsam2_cli.model.adapter_layers import Projection, means
from slmsam2_cli.model.checkpoint import (
    Checkpoint,
    Needs,
    Provenance,
    combine_with_base,
    fit,
    read_checkpoint,
    save_adapter,
    save_checkpoint,
    tensors_digest,
)
from slmsam2_cli.model.roi import to_input
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import AdapterPlan, ChannelIntensity, GeometryPlan, NetworkPlan, Plan, TrainingPlan
from slmsam2_cli.training.state import load_state, save_state
from slmsam2_cli.training.trainable import parameter_groups, prepare
from slmsam2_cli.training.trainer import new_learner

PX, KEY = 32, "adapters.MR.input.weight"
STRATEGIES = ("full", "frozen-encoder", "decoder+memory", "adapters")


@cache
def base(seed):
    torch.manual_seed(seed)
    return SlmSam2(NetworkPlan(size="nano"), PX).eval()


def build(seed=0):
    return copy.deepcopy(base(seed))


def training(strategy="full"):
    return TrainingPlan(steps=4, clip_slices=3, clips_per_step=1, learning_rate=1e-3, warmup_steps=1, weight_decay=0.01, strategy=strategy)


def plan(*channels, strategy="full"):
    return Plan(
        tool_version="0",
        dataset_name="x",
        modality="MR",
        channels=channels,
        labels={1: "organ"},
        geometry=GeometryPlan(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, input_size=PX, crop_to_nonzero=True),
        intensity=tuple(ChannelIntensity(name=name, scheme="percentile", lower=0.5, upper=99.5) for name in channels),
        network=NetworkPlan(size="nano"),
        training=training(strategy),
        fingerprint_digest="0",
    )


FOUR = plan("T1", "T2", "FLAIR", "T1c")


def reading(channels=4, strategy="full", moved=True):
    """A model made ready to learn from so many channels of MR; moved: what it learns is no longer what it started as."""
    model = build()
    prepare(model, training(strategy), "MR", channels)
    if moved:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return model


def slices(channels, count=1):
    return torch.rand(count, channels, PX, PX, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def seen(model, channels=4):
    return model.encode(slices(channels)).top


# What it is at first


def test_four_channels_at_first_are_the_mean_of_two_and_the_other_two():
    shown = Projection(means(4))(torch.tensor([0.2, 0.4, 0.6, 1.0]).view(1, 4, 1, 1))
    assert shown.flatten().tolist() == pytest.approx([0.3, 0.6, 1.0])


def test_five_channels_at_first_are_two_means_of_two_and_the_fifth():
    shown = Projection(means(5))(torch.tensor([0.0, 1.0, 0.2, 0.6, 0.9]).view(1, 5, 1, 1))
    assert shown.flatten().tolist() == pytest.approx([0.5, 0.4, 0.9])


@pytest.mark.parametrize("channels", [4, 5, 16])
def test_at_first_what_is_shown_stays_between_0_and_1_and_nothing_stays_nothing(channels):
    shown = Projection(means(channels))(slices(channels))
    assert shown.min() >= 0 and shown.max() <= 1
    assert not Projection(means(channels))(torch.zeros(1, channels, 2, 2)).any()


def test_at_step_0_the_model_sees_what_the_base_sees_in_the_means():
    frames = slices(4, 2)
    shown = torch.stack([frames[:, :2].mean(dim=1), frames[:, 2], frames[:, 3]], dim=1)
    with torch.no_grad():
        assert torch.allclose(reading(moved=False).encode(frames).top, build().encode(shown).top, atol=1e-5)


@pytest.mark.parametrize(("channels", "shown"), [(1, 3), (2, 3), (3, 3), (4, 4), (5, 5)])
def test_a_stack_keeps_its_channels_from_four_on(channels, shown):
    assert to_input(torch.zeros(channels, 6, 8, 9)).shape == (6, shown, 8, 9)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_up_to_three_channels_add_no_tensor(channels, strategy):
    model, without = build(), build()
    prepare(model, training(strategy), "MR", channels)
    prepare(without, training(strategy), "MR")
    assert set(adapters.full_state(model)) == set(adapters.full_state(without)) and KEY not in adapters.full_state(model)
    assert strategy == "adapters" or set(model.state_dict()) == set(build().state_dict())


# Who learns it


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_learns_under_every_strategy_and_is_not_decayed(strategy):
    model = reading(strategy=strategy, moved=False)
    model.encode(slices(4)).top.square().mean().backward()
    weight = model.get_parameter(KEY)
    assert weight.requires_grad and (weight.grad.abs() > 0).all()
    groups = parameter_groups(model, training(strategy))
    assert [group["weight_decay"] for group in groups if any(p is weight for p in group["params"])] == [0.0]


def test_a_continued_run_has_it_again(tmp_path):
    first, second = (new_learner(reading(moved=moved), training(), from_scratch=False) for moved in (True, False))
    save_state(tmp_path / "state.safetensors", first, "settings")
    load_state(tmp_path / "state.safetensors", second, "settings")
    assert torch.equal(second.model.get_parameter(KEY), first.model.get_parameter(KEY))
    assert torch.equal(second.average.get_parameter(KEY), first.average.get_parameter(KEY))


# Whose it is


def test_a_model_tuned_as_a_whole_has_one_tensor_more_than_its_network():
    assert set(adapters.full_state(reading())) == {*build().state_dict(), KEY}


def test_merging_the_adapter_keeps_the_projection_and_changes_nothing():
    model = reading(strategy="adapters")
    before = seen(model)
    assert not torch.allclose(before, seen(reading(moved=False)), atol=1e-2)
    adapters.merge(model)
    assert set(model.state_dict()) == {*build().state_dict(), KEY}
    assert torch.allclose(seen(model), before, atol=1e-5, rtol=1e-5)


def test_a_modality_without_one_goes_on_with_three_channels_on_the_same_base():
    model = reading(strategy="adapters")
    adapters.add(model, "CT", AdapterPlan())
    four = seen(model)
    for other in ("CT", None):
        adapters.use(model, other)
        assert torch.equal(seen(model, 3), seen(build(), 3))
    adapters.use(model, "MR")
    assert torch.equal(seen(model), four)


@pytest.mark.parametrize(("model", "channels"), [(build, 4), (reading, 3), (reading, 5)])
def test_slices_of_another_number_of_channels_are_refused(model, channels):
    with pytest.raises(ValueError, match=f"slices of {channels} channels, where the network reads [34]"):
        model().encode(slices(channels))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_tuned_on_four_channels_of_a_modality_learns_from_no_other_number_of_it(channels, strategy):
    learned = reading()
    with pytest.raises(WeightsError, match=rf"tuned on 4 channels of MR, the plan has {channels}\. Choose other weights"):
        prepare(learned, training(strategy), "MR", channels)


def test_it_goes_on_learning_where_the_base_brings_one():
    model = reading()
    learned = model.get_parameter(KEY).detach().clone()
    assert prepare(model, training("adapters"), "MR", 4)[-1].startswith("a new adapter for MR")
    assert torch.equal(model.get_parameter(KEY), learned) and model.get_parameter(KEY).requires_grad


def test_another_modalitys_is_left_as_it_is_beside_a_new_adapter_and_not_carried_on_by_full_tuning():
    beside, full = reading(), reading()
    learned = beside.get_parameter(KEY).detach().clone()
    prepare(beside, training("adapters"), "PET", 5)
    assert torch.equal(beside.get_parameter(KEY), learned) and not beside.get_parameter(KEY).requires_grad
    assert seen(beside, 5).isfinite().all()
    assert prepare(full, training("full"), "PET", 5)[0] == "adapters for MR are not carried on"
    assert {name for name in full.state_dict() if name.startswith("adapters.")} == {"adapters.PET.input.weight"}


# What is kept of it


def saved(tmp_path, model, made_for=FOUR):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, made_for, Provenance(base="base0"))
    return read_checkpoint(path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_saved_model_is_read_back_with_it_and_sees_the_same(strategy, tmp_path):
    model, fresh = reading(strategy=strategy), build(seed=1)
    checkpoint = saved(tmp_path, model)
    assert KEY in checkpoint.state and checkpoint.digest == tensors_digest(adapters.full_state(model))
    fit(fresh, checkpoint, "MR")
    assert torch.equal(seen(fresh), seen(model))


def test_it_counts_in_the_digest_and_not_in_that_of_the_base(tmp_path):
    one, other = saved(tmp_path, reading()), saved(tmp_path, reading(moved=False))
    assert one.digest != other.digest and one.base_digest == other.base_digest == tensors_digest(build().state_dict())


def test_an_adapter_file_brings_it_to_its_base(tmp_path):
    model, path, state = reading(strategy="adapters"), tmp_path / "adapter.safetensors", build().state_dict()
    below = Checkpoint("base0", state, tensors_digest(state))
    save_adapter(path, model, "MR", FOUR, Provenance(base="base0"), Needs(name="base0", digest=below.digest))
    assert KEY in read_checkpoint(path).state
    whole, fresh = combine_with_base(read_checkpoint(path), below), build(seed=1)
    fit(fresh, whole, "MR")
    assert whole.digest == tensors_digest(adapters.full_state(model)) and torch.equal(seen(fresh), seen(model))


@pytest.mark.parametrize(("model", "said"), [(build, "reads none"), (lambda: reading(5), "reads 5")])
def test_a_file_without_the_projection_that_its_plan_needs_is_refused(model, said, tmp_path):
    with pytest.raises(WeightsError, match=f"corrupt: its plan has 4 channels, {KEY} {said}"):
        saved(tmp_path, model())


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 1, 1), (3, 17, 1, 1), (2, 4, 1, 1), (3, 4, 3, 3)])
def test_a_tensor_that_is_no_projection_is_refused_by_name(shape):
    with pytest.raises(WeightsError, match=r"file: its adapter for MR does not fit this network: input\.weight"):
        adapters.attach(build(), "MR", {"input.weight": torch.zeros(shape)}, "file")


def test_a_copy_of_the_model_has_its_own():
    model = reading()
    other = copy.deepcopy(model)
    before = seen(other)
    with torch.no_grad():
        model.get_parameter(KEY).zero_()
    assert torch.equal(seen(other), before)


def test_of_one_channel_the_neighbouring_slices_may_be_the_other_colours():
    numbered = torch.arange(4.0).reshape(1, 4, 1, 1)
    assert to_input(numbered, adjacent_slices=True).flatten(1).tolist() == [[0, 0, 1], [1, 0, 2], [2, 1, 3], [3, 2, 3]]
    assert to_input(torch.zeros(1, 1, 2, 2), adjacent_slices=True).shape == (1, 3, 2, 2)
