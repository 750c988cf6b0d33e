"""Training steps: reproducible parts, every kind of prompt and policy, dropped memory, workers and validation."""

import json
import random

import pytest
import torch

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.pretraining import step
from slmsam2_cli.pretraining.recipe import NANO, Recipe
from slmsam2_cli.pretraining.step import (
    Generators,
    MemoryReader,
    RandomBank,
    build_model,
    choose_prompt_kind,
    clip_losses,
    compute_part,
    derive_seed,
    draw_part_clips,
)
from slmsam2_cli.pretraining.train import new_learner, train
from slmsam2_cli.pretraining.validation import score_clips, validation_clips
from slmsam2_cli.pretraining.workers import flatten_gradients, share_weights

CPU = torch.device("cpu")


def recipe(**changes):
    small = {"input_size": 32, "other_input_sizes": {}, "slices_per_step": 8, "parts": 1, "max_windows": 2, "steps": 4, "minutes": None}
    return Recipe.model_validate_json(json.dumps(json.loads(NANO.read_text()) | small | {"warmup_steps": 1} | changes))


def only(policy, **changes):
    return {
        "policies": {policy: 1.0},
        "drop_tracked": 0.0,
        "drop_previous_mask": 0.0,
        "previous_mask_only": 0.0,
        "two_conditioning_slices": 0.0,
    } | changes


def of_length(length):
    return [{"until": 1.0, "lengths": [length]}]


def losses_of(chosen, seed=0):
    """The losses of one part, and the model."""
    model = build_model(chosen, CPU)
    model.train()
    clips = draw_part_clips(chosen, 0, 0, 0.0, CPU)
    generators = Generators(random.Random(seed), torch.Generator().manual_seed(seed))
    prompt = choose_prompt_kind(chosen, len(clips.masks), 0.0, generators.choices)
    return clip_losses(model, clips, chosen, prompt, generators), model


def test_every_part_of_every_step_has_its_own_clips_and_they_are_reproducible():
    chosen = recipe()
    first, again, part, step = (draw_part_clips(chosen, s, p, 0.5, CPU) for s, p in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, part.frames) and not torch.equal(first.frames, step.frames)
    assert len({derive_seed(0, s, p, k) for s in range(9) for p in range(9) for k in range(4)}) == 9 * 9 * 4


def test_steps_of_larger_slices_have_fewer_slices_and_the_same_number_of_pixels():
    chosen = recipe(input_size=64, other_input_sizes={"128": 1.0}, slices_per_step=16, max_windows=16, phases=of_length(2))
    clips = draw_part_clips(chosen, 0, 0, 0.0, CPU)
    assert clips.frames.shape[:2] == (2, 2) and clips.frames.shape[-1] == 128


@pytest.mark.parametrize(("prompts", "slices"), [({"box": 0, "points": 0}, 3), ({"box": 1, "points": 0}, 4), ({"box": 0, "points": 1}, 4)])
def test_a_slice_has_a_loss_unless_its_mask_is_the_prompt(prompts, slices):
    losses, _ = losses_of(recipe(prompts=prompts, phases=of_length(4), memory=only("fifo")))
    assert len(losses) == slices


def test_the_prompt_of_a_single_image_is_never_its_own_mask():
    chosen = recipe(phases=of_length(1))
    assert {choose_prompt_kind(chosen, 1, 0.0, random.Random(seed)) for seed in range(50)} == {"perturbed", "box", "points"}
    assert all(len(losses_of(chosen, seed)[0]) == 1 for seed in range(5))


def test_a_phase_can_restrict_prompts_to_masks():
    chosen = recipe(prompts={"box": 1.0, "points": 0.0}, phases=[{"until": 0.5, "lengths": [2], "masks_only": True}, *of_length(2)])
    assert [choose_prompt_kind(chosen, 2, done, random.Random(0)) for done in (0.0, 0.5)] == ["mask", "box"]


def test_a_second_annotated_slice_is_not_tracked():
    losses, _ = losses_of(recipe(prompts={"box": 0, "points": 0}, phases=of_length(5), memory=only("fifo", two_conditioning_slices=1.0)))
    assert len(losses) == 3


@pytest.mark.parametrize("policy", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
def test_every_policy_sends_gradients_to_the_weights_that_it_uses(policy):
    losses, model = losses_of(recipe(prompts={"box": 0, "points": 0}, phases=of_length(4), memory=only(policy)))
    sum(loss.total for loss in losses).backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"image_encoder", "memory_attention", "memory_encoder", "sam_mask_decoder", "carry_gain", "maskmem_tpos_enc"} <= moved
    assert ("stream_fuser" in moved) == policy.startswith("shortlong")


def test_with_the_previous_mask_alone_memory_attention_gets_no_gradient():
    losses, model = losses_of(
        recipe(prompts={"box": 0, "points": 0}, phases=of_length(4), memory=only("shortlong", previous_mask_only=1.0))
    )
    sum(loss.total for loss in losses).backward()
    still = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert {"memory_attention", "short_memory_attention"} <= still


def test_a_short_stream_keeps_the_previous_slice_when_all_tracked_slices_are_dropped():
    for policy, tracked in (("fifo", []), ("selfsort", []), ("shortlong", [2]), ("shortlong+selfsort", [2])):
        chosen = recipe(memory=only(policy, drop_tracked=1.0))
        reader = MemoryReader(build_model(chosen, CPU), chosen, 8, random.Random(0))
        assert reader.readable([1, 2], 3) == tracked


def test_the_random_bank_uses_the_temporal_codes_of_the_self_sorting_bank():
    (long,) = RandomBank(temporal_row=6, nearest=2, short=False).read(ReadContext(4, 1, [0], [3, 1, 2], 9))
    assert long.spatial == ((0, 6), (1, 6), (2, 6)) and long.pointers == ((0, 1), (1, 1), (2, 1))


def test_gradients_of_parts_add_up_to_their_mean():
    chosen = recipe(parts=2, max_windows=4)
    model = build_model(chosen, CPU)
    model.train()
    gradients = flatten_gradients(model)
    alone = []
    for part in (0, 1):
        gradients.zero_()
        compute_part(model, chosen, 0, part, 0.5)
        alone.append(gradients.clone())
    gradients.zero_()
    for part in (0, 1):
        compute_part(model, chosen, 0, part, 0.5)
    assert alone[0].abs().sum() > 0 and torch.allclose(gradients, alone[0] + alone[1], atol=1e-6)


def test_losses_are_computed_without_cudnn_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(
        step, "clip_losses", lambda *arguments: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or clip_losses(*arguments)
    )
    assert torch.backends.cuda.cudnn_sdp_enabled()
    compute_part(build_model(recipe(), CPU).train(), recipe(), 0, 0, 0.5)
    assert seen == [False]


def test_moving_weights_to_shared_memory_changes_no_value():
    model = build_model(recipe(), CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = share_weights(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())  # as torch aligns tensors, so that products are rounded the same
    flat.zero_()
    assert not any(p.any() for p in model.parameters())


def test_steps_without_a_finite_gradient_change_no_weight_and_20_of_them_end_the_run():
    learner = new_learner(recipe(steps=100), CPU)
    learner.model.no_mem_embed.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    steps = train(learner, recipe(steps=100, phases=of_length(1)), lambda: False)
    assert all(next(steps).losses == {"skipped": 1.0} for _ in range(19))
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        next(steps)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())


def test_validation_uses_the_same_clips_and_copying_the_mask_of_a_static_clip_has_dice_1():
    chosen = recipe(validation={"windows": 2, "length": 4})
    clips, again = validation_clips(chosen, CPU), validation_clips(chosen, CPU)
    assert torch.equal(clips.frames, again.frames)
    still = clips.__class__(clips.frames, clips.masks[:1].expand(4, -1, -1, -1, -1), clips.window, clips.reverse, clips.slices)
    scores = score_clips(build_model(chosen, CPU).eval(), still)
    assert scores.dice_copied == pytest.approx(1.0)
    assert 0 <= scores.dice < 1 and scores.false_positive_rate == 0.0
