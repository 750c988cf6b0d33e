"""Training: losses fall, schedules hold, and an interrupted run ends like an uninterrupted one."""

from functools import partial

import numpy as np
import pytest
import torch
from stacks import case, whole

from slmsam2_cli.errors import TrainingError, WeightsError
from slmsam2_cli.model.cpu_ops import optimise_for_cpu
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, TrainingPlan
from slmsam2_cli.training import trainer
from slmsam2_cli.training.clips import ClipSampler
from slmsam2_cli.training.dataloader import TrainingData
from slmsam2_cli.training.distributed import ProcessGroup
from slmsam2_cli.training.label_unet import SliceSampler, new_label_unet
from slmsam2_cli.training.learner import fraction_done
from slmsam2_cli.training.losses import LossWeights
from slmsam2_cli.training.state import backup_path, load_state, save_state
from slmsam2_cli.training.trainer import clip_losses, clip_slices, new_learner, teacher_scores, train

PX = 32


def plan(steps=4, **changes):
    return TrainingPlan(
        **{"steps": steps, "clip_slices": 3, "clips_per_step": 1, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.01, **changes}
    )


def learner(steps=4, from_scratch=False, **changes):
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    optimise_for_cpu(model)
    model.label_unet = new_label_unet(slices(), 1, 0)
    return new_learner(model, plan(steps, **changes), from_scratch)


def annotated():
    return case(slices=8, held=range(2, 6), size=(PX, PX))


def slices():
    return SliceSampler([annotated()], [1], PX)


def sampler():
    return ClipSampler([annotated()], [1], whole(PX))


def run(one, until=None, steps=4, cores=2):
    stop, data = (lambda: until is not None and one.step >= until), TrainingData(sampler(), slices())
    return list(train(one, data, plan(steps), stop, ProcessGroup(cores=cores)))


def weights(one):
    return {**{f"m/{n}": t for n, t in one.model.state_dict().items()}, **{f"a/{n}": t for n, t in one.ema.state_dict().items()}}


@pytest.mark.parametrize(("cores", "object_score"), [(1, "ground_truth"), (1, "teacher"), (2, "teacher")])
def test_a_run_resumed_from_disk_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, cores, object_score):
    """With two cores, the next step is prepared before this one is over."""
    whole = learner(steps=3, object_score_target=object_score)
    run(whole, steps=3, cores=cores)
    first = learner(steps=3, object_score_target=object_score)
    run(first, until=1, steps=3, cores=cores)
    save_state(tmp_path / "state.safetensors", first, "settings")
    second = learner(steps=3, object_score_target=object_score)
    torch.manual_seed(99)
    assert load_state(tmp_path / "state.safetensors", second, "settings") == ""
    assert second.step == 1
    run(second, steps=3, cores=cores)
    expected, found = weights(whole), weights(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_damaged_state_is_replaced_by_the_one_before_with_a_warning(tmp_path):
    path = tmp_path / "state.safetensors"
    one = learner()
    run(one, until=1)
    save_state(path, one, "settings")
    run(one, until=2)
    save_state(path, one, "settings")
    path.write_bytes(path.read_bytes()[:1000])
    other = learner()
    assert "state.previous.safetensors" in load_state(path, other, "settings")
    assert other.step == 1 and backup_path(path).exists()


def test_after_a_damaged_state_the_good_one_survives_an_interrupted_save(tmp_path, monkeypatch):
    path, one = tmp_path / "state.safetensors", learner()
    save_state(path, one, "settings")
    save_state(path, one, "settings")
    path.write_bytes(path.read_bytes()[:1000])
    load_state(path, one, "settings")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("slmsam2_cli.io.atomic.write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, one, "settings")
    assert "state.previous.safetensors" in load_state(path, one, "settings")


def test_a_gradient_that_is_not_finite_changes_no_weight():
    one = learner()
    one.model.carry_gain.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: tensor.clone() for name, tensor in weights(one).items()}
    (progress,) = run(one, until=1)
    assert progress.losses == {"skipped": 1.0}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(one).items())


def test_losses_are_computed_without_the_attention_whose_gradients_are_not_always_finite(monkeypatch):
    real, seen = trainer.clip_losses, []
    monkeypatch.setattr(trainer, "clip_losses", lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or real(*given))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    run(learner(), until=1)
    assert seen == [False]


def test_a_flipped_byte_in_a_state_is_noticed(tmp_path):
    path = tmp_path / "state.safetensors"
    one = learner()
    save_state(path, one, "settings")
    save_state(path, one, "settings")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    assert "damaged" in load_state(path, learner(), "settings")


def test_training_that_diverges_is_an_error_that_names_the_learning_rate(monkeypatch):
    monkeypatch.setattr("slmsam2_cli.training.trainer.training_step", lambda *given: {**given[4].result(), "skipped": 1.0})
    one = new_learner(SlmSam2(NetworkPlan(size="nano"), PX), plan(100), from_scratch=False)
    with pytest.raises(TrainingError, match="learning_rate"):
        list(train(one, TrainingData(sampler()), plan(100), lambda: False))


def test_a_missing_state_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="nothing to continue"):
        load_state(tmp_path / "state.safetensors", learner(), "settings")


def test_a_state_of_another_run_is_an_error(tmp_path):
    save_state(tmp_path / "state.safetensors", learner(), "settings")
    with pytest.raises(WeightsError, match="another plan"):
        load_state(tmp_path / "state.safetensors", learner(), "other settings")


def test_the_moving_average_takes_nine_tenths_of_the_first_step():
    one = learner()
    before = {name: p.clone() for name, p in one.model.named_parameters()}
    run(one, until=1)
    assert any(not torch.equal(before[name], p) for name, p in one.model.named_parameters())
    for (name, p), kept in zip(one.model.named_parameters(), one.ema.parameters()):
        assert torch.allclose(kept, 0.1 * before[name] + 0.9 * p, atol=1e-6)


def test_losses_fall_on_one_clip():
    one = learner()
    clips = sampler().draw(np.random.default_rng(0), 1, 3, 4)
    optimiser = torch.optim.AdamW(one.model.parameters(), lr=1e-3)
    totals = []
    for _ in range(12):
        loss = torch.stack([part.total for part in clip_losses(one.model, clips, torch.device("cpu"))]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        totals.append(float(loss.detach()))
    assert totals[-1] < 0.7 * totals[0]


def test_every_part_of_the_model_that_tracking_uses_receives_a_gradient():
    one = learner()
    clips = sampler().draw(np.random.default_rng(0), 1, 3, 4)
    torch.stack([part.total for part in clip_losses(one.model, clips, torch.device("cpu"))]).mean().backward()
    still = {name.split(".")[0] for name, p in one.model.named_parameters() if p.grad is None}
    moved = {name.split(".")[0] for name, p in one.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"image_encoder", "memory_attention", "memory_encoder", "sam_mask_decoder", "stream_fuser", "carry_gain"} <= moved
    assert "short_memory_attention" not in still


def test_clips_grow_from_random_weights_and_are_long_from_pretrained_ones():
    settings = plan(clip_slices=8)
    assert [clip_slices(done, settings, True) for done in (0.0, 0.19, 0.2, 0.34, 0.35, 1.0)] == [2, 2, 4, 4, 8, 8]
    assert clip_slices(0.0, settings, False) == 8


def test_a_run_is_done_by_steps_or_by_minutes_whichever_comes_first():
    one = learner()
    one.step, one.seconds = 2, 30.0
    assert fraction_done(one, plan(4)) == 0.5
    assert fraction_done(one, plan(4, minutes=0.5)) == 1.0


def test_with_the_teachers_object_score_as_target_an_untrained_copy_has_no_gradient():
    torch.manual_seed(0)
    one = new_learner(SlmSam2(NetworkPlan(size="nano"), PX), plan(object_score_target="teacher"), from_scratch=False)
    clips = sampler().draw(np.random.default_rng(0), 1, 3, 4)
    only = LossWeights(pixels=0.0, dice=0.0, iou=0.0, object_score=1.0)
    for teacher, still in ((one.teacher, True), (None, False)):
        one.model.zero_grad()
        target_scores = partial(teacher_scores, teacher, clips) if teacher is not None else None
        losses = clip_losses(one.model, clips, torch.device("cpu"), only, target_scores=target_scores)
        torch.stack([part.total for part in losses]).mean().backward()
        largest = max(float(p.grad.abs().max()) for p in one.model.parameters() if p.grad is not None)
        assert (largest < 1e-6) == still


def test_there_is_a_teacher_only_if_the_plan_says_so_and_weights_are_pretrained():
    model = SlmSam2(NetworkPlan(size="nano"), PX)
    assert new_learner(model, plan(), from_scratch=False).teacher is None
    assert new_learner(model, plan(object_score_target="teacher"), from_scratch=True).teacher is None
    teacher = new_learner(model, plan(object_score_target="teacher"), from_scratch=False).teacher
    assert teacher is not None and not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_not_trained():
    torch.manual_seed(0)
    one = new_learner(SlmSam2(NetworkPlan(size="nano"), PX), plan(2, object_score_target="teacher"), from_scratch=False)
    before = [p.clone() for p in one.teacher.parameters()]
    assert len(list(train(one, TrainingData(sampler()), plan(2, object_score_target="teacher"), lambda: False))) == 2
    assert all(torch.equal(p, q) for p, q in zip(before, one.teacher.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(before, one.model.parameters()))


def test_a_learner_moves_to_a_device_with_all_networks_and_moments():
    one = new_learner(SlmSam2(NetworkPlan(size="nano"), PX), plan(1, object_score_target="teacher"), from_scratch=False)
    list(train(one, TrainingData(sampler()), plan(1, object_score_target="teacher"), lambda: False))
    one.to(torch.device("meta"))
    networks = (one.model, one.ema, one.teacher)
    assert {p.device.type for network in networks for p in network.parameters()} == {"meta"}
    assert {slot["exp_avg"].device.type for slot in one.optimiser.state.values()} == {"meta"}
