"""The projection of more than three channels: its start, training under every strategy, saving, merging."""

import copy
from functools import cache

import pytest
import torch

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import adapters
from slmsam2_cli.model.adapter_layers import Projection, channel_means
from slmsam2_cli.model.checkpoint import (
    Checkpoint,
    Provenance,
    RequiredBase,
    combine_with_base,
    load_weights,
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
    """A model prepared for training on so many channels of MR. moved: with a projection that differs from its start."""
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


# Start


def test_four_channels_start_as_the_mean_of_two_and_the_other_two():
    shown = Projection(channel_means(4))(torch.tensor([0.2, 0.4, 0.6, 1.0]).view(1, 4, 1, 1))
    assert shown.flatten().tolist() == pytest.approx([0.3, 0.6, 1.0])


def test_five_channels_start_as_two_means_of_two_and_the_fifth():
    shown = Projection(channel_means(5))(torch.tensor([0.0, 1.0, 0.2, 0.6, 0.9]).view(1, 5, 1, 1))
    assert shown.flatten().tolist() == pytest.approx([0.5, 0.4, 0.9])


@pytest.mark.parametrize("channels", [4, 5, 16])
def test_a_new_projection_keeps_values_between_0_and_1_and_zeros_at_zero(channels):
    shown = Projection(channel_means(channels))(slices(channels))
    assert shown.min() >= 0 and shown.max() <= 1
    assert not Projection(channel_means(channels))(torch.zeros(1, channels, 2, 2)).any()


def test_a_new_projection_encodes_like_the_base_does_the_means():
    frames = slices(4, 2)
    shown = torch.stack([frames[:, :2].mean(dim=1), frames[:, 2], frames[:, 3]], dim=1)
    with torch.no_grad():
        assert torch.allclose(reading(moved=False).encode(frames).top, build().encode(shown).top, atol=1e-5)


@pytest.mark.parametrize(("channels", "shown"), [(1, 3), (2, 3), (3, 3), (4, 4), (5, 5)])
def test_stacks_of_more_than_three_channels_keep_them_all(channels, shown):
    assert to_input(torch.zeros(channels, 6, 8, 9)).shape == (6, shown, 8, 9)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_up_to_three_channels_add_no_tensor(channels, strategy):
    model, without = build(), build()
    prepare(model, training(strategy), "MR", channels)
    prepare(without, training(strategy), "MR")
    assert set(adapters.full_state(model)) == set(adapters.full_state(without)) and KEY not in adapters.full_state(model)
    assert strategy == "adapters" or set(model.state_dict()) == set(build().state_dict())


# Training


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_the_projection_without_weight_decay(strategy):
    model = reading(strategy=strategy, moved=False)
    model.encode(slices(4)).top.square().mean().backward()
    weight = model.get_parameter(KEY)
    assert weight.requires_grad and (weight.grad.abs() > 0).all()
    groups = parameter_groups(model, training(strategy))
    assert [group["weight_decay"] for group in groups if any(p is weight for p in group["params"])] == [0.0]


def test_a_resumed_run_restores_the_projection(tmp_path):
    first, second = (new_learner(reading(moved=moved), training(), from_scratch=False) for moved in (True, False))
    save_state(tmp_path / "state.safetensors", first, "settings")
    load_state(tmp_path / "state.safetensors", second, "settings")
    assert torch.equal(second.model.get_parameter(KEY), first.model.get_parameter(KEY))
    assert torch.equal(second.ema.get_parameter(KEY), first.ema.get_parameter(KEY))


# One per modality


def test_a_fully_fine_tuned_model_has_one_tensor_more_than_its_network():
    assert set(adapters.full_state(reading())) == {*build().state_dict(), KEY}


def test_merging_the_adapter_keeps_the_projection_and_the_output():
    model = reading(strategy="adapters")
    before = seen(model)
    assert not torch.allclose(before, seen(reading(moved=False)), atol=1e-2)
    adapters.merge(model)
    assert set(model.state_dict()) == {*build().state_dict(), KEY}
    assert torch.allclose(seen(model), before, atol=1e-5, rtol=1e-5)


def test_other_modalities_of_the_same_model_still_read_three_channels():
    model = reading(strategy="adapters")
    adapters.add(model, "CT", AdapterPlan())
    four = seen(model)
    for other in ("CT", None):
        adapters.use(model, other)
        assert torch.equal(seen(model, 3), seen(build(), 3))
    adapters.use(model, "MR")
    assert torch.equal(seen(model), four)


@pytest.mark.parametrize(("model", "channels"), [(build, 4), (reading, 3), (reading, 5)])
def test_slices_with_another_number_of_channels_are_rejected(model, channels):
    with pytest.raises(ValueError, match=f"slices have {channels} channels, but the network reads [34]"):
        model().encode(slices(channels))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_trained_on_four_channels_of_a_modality_cannot_be_trained_on_another_number(channels, strategy):
    learned = reading()
    with pytest.raises(WeightsError, match=rf"tuned on 4 channels of MR, but the plan has {channels}\. Use other weights"):
        prepare(learned, training(strategy), "MR", channels)


def test_the_projection_of_the_base_is_trained_further():
    model = reading()
    learned = model.get_parameter(KEY).detach().clone()
    assert prepare(model, training("adapters"), "MR", 4)[-1].startswith("training a new adapter for MR")
    assert torch.equal(model.get_parameter(KEY), learned) and model.get_parameter(KEY).requires_grad


def test_the_projection_of_another_modality_is_kept_with_adapters_and_dropped_by_full_training():
    beside, full = reading(), reading()
    learned = beside.get_parameter(KEY).detach().clone()
    prepare(beside, training("adapters"), "PET", 5)
    assert torch.equal(beside.get_parameter(KEY), learned) and not beside.get_parameter(KEY).requires_grad
    assert seen(beside, 5).isfinite().all()
    assert prepare(full, training("full"), "PET", 5)[0] == "adapters for MR were dropped"
    assert {name for name in full.state_dict() if name.startswith("adapters.")} == {"adapters.PET.input.weight"}


# Saving


def saved(tmp_path, model, made_for=FOUR):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, made_for, Provenance(pretrained="base0"))
    return read_checkpoint(path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_saved_model_has_its_projection_and_gives_the_same_output(strategy, tmp_path):
    model, fresh = reading(strategy=strategy), build(seed=1)
    checkpoint = saved(tmp_path, model)
    assert KEY in checkpoint.state and checkpoint.digest == tensors_digest(adapters.full_state(model))
    load_weights(fresh, checkpoint, "MR")
    assert torch.equal(seen(fresh), seen(model))


def test_the_projection_is_part_of_the_digest_but_not_of_the_base_digest(tmp_path):
    one, other = saved(tmp_path, reading()), saved(tmp_path, reading(moved=False))
    assert one.digest != other.digest and one.base_digest == other.base_digest == tensors_digest(build().state_dict())


def test_an_adapter_file_contains_the_projection(tmp_path):
    model, path, state = reading(strategy="adapters"), tmp_path / "adapter.safetensors", build().state_dict()
    below = Checkpoint("base0", state, tensors_digest(state))
    save_adapter(path, model, FOUR, Provenance(pretrained="base0"), RequiredBase(name="base0", digest=below.digest))
    assert KEY in read_checkpoint(path).state
    whole, fresh = combine_with_base(read_checkpoint(path), below), build(seed=1)
    load_weights(fresh, whole, "MR")
    assert whole.digest == tensors_digest(adapters.full_state(model)) and torch.equal(seen(fresh), seen(model))


@pytest.mark.parametrize(("model", "said"), [(build, "reads none"), (lambda: reading(5), "reads 5")])
def test_a_file_without_the_projection_that_its_plan_needs_is_rejected(model, said, tmp_path):
    with pytest.raises(WeightsError, match=f"corrupt: the plan has 4 channels, {KEY} {said}"):
        saved(tmp_path, model())


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 1, 1), (3, 17, 1, 1), (2, 4, 1, 1), (3, 4, 3, 3)])
def test_a_tensor_of_another_shape_than_a_projection_is_rejected_by_name(shape):
    with pytest.raises(WeightsError, match=r"file: the adapter for MR does not fit this network: input\.weight"):
        adapters.attach(build(), "MR", {"input.weight": torch.zeros(shape)}, "file")


def test_a_copy_of_the_model_has_its_own_projection():
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
