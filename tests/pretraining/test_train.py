"""Parts of a step: drawn again alike, by every prompt and policy, with every weight reached and memory that may be missing."""

import json
import random

import pytest
import torch

from slmsam2_cli.errors import TrainingError
from slmsam2_cli.model.memory.policy import ReadContext
from slmsam2_cli.pretraining import step
from slmsam2_cli.pretraining.recipe import NANO, Recipe
from slmsam2_cli.pretraining.step import RandomBank, Reader, build, choose_prompt_kind, clip_losses, compute, drawn, seed_of
from slmsam2_cli.pretraining.train import new_learner, train
from slmsam2_cli.pretraining.validation import check, held_out
from slmsam2_cli.pretraining.workers import gather_gradients, share

CPU = torch.device("cpu")


def recipe(**changes):
    small = {"input_size": 32, "other_input_sizes": {}, "slices_per_step": 8, "parts": 1, "most_windows": 2, "steps": 4, "minutes": None}
    return Recipe.model_validate_json(json.dumps(json.loads(NANO.read_text()) | small | {"warmup_steps": 1} | changes))


def only(policy, **missing):
    return {"policies": {policy: 1.0}, "drop_tracked": 0.0, "drop_carried": 0.0, "drop_all": 0.0, "two_conditioning_slices": 0.0} | missing


def of_length(length):
    return [{"until": 1.0, "lengths": [length]}]


def losses_of(chosen, seed=0):
    """One part's losses, and the model."""
    model = build(chosen, CPU)
    model.train()
    clips = drawn(chosen, 0, 0, 0.0, CPU)
    chance = random.Random(seed)
    given = choose_prompt_kind(chosen, len(clips.masks), 0.0, chance)
    return clip_losses(model, clips, chosen, given, chance, torch.Generator().manual_seed(seed)), model


def test_every_step_and_part_has_clips_of_its_own_and_always_the_same():
    chosen = recipe()
    first, again, part, step = (drawn(chosen, s, p, 0.5, CPU) for s, p in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, part.frames) and not torch.equal(first.frames, step.frames)
    assert len({seed_of(0, s, p, k) for s in range(9) for p in range(9) for k in range(4)}) == 9 * 9 * 4


def test_larger_slices_are_fewer_so_that_a_step_has_as_many_pixels():
    chosen = recipe(input_size=64, other_input_sizes={"128": 1.0}, slices_per_step=16, most_windows=16, phases=of_length(2))
    clips = drawn(chosen, 0, 0, 0.0, CPU)
    assert clips.frames.shape[:2] == (2, 2) and clips.frames.shape[-1] == 128


@pytest.mark.parametrize(("prompts", "slices"), [({"box": 0, "points": 0}, 3), ({"box": 1, "points": 0}, 4), ({"box": 0, "points": 1}, 4)])
def test_a_slice_costs_where_the_model_drew_it_and_not_where_its_mask_was_given(prompts, slices):
    losses, _ = losses_of(recipe(prompts=prompts, phases=of_length(4), reading=only("fifo")))
    assert len(losses) == slices


def test_a_single_image_is_given_as_another_mask_a_box_or_points_and_never_as_its_own_mask():
    chosen = recipe(phases=of_length(1))
    assert {choose_prompt_kind(chosen, 1, 0.0, random.Random(seed)) for seed in range(50)} == {"nearly", "box", "points"}
    assert all(len(losses_of(chosen, seed)[0]) == 1 for seed in range(5))


def test_a_phase_may_ask_for_masks_only():
    chosen = recipe(prompts={"box": 1.0, "points": 0.0}, phases=[{"until": 0.5, "lengths": [2], "masks_only": True}, *of_length(2)])
    assert [choose_prompt_kind(chosen, 2, done, random.Random(0)) for done in (0.0, 0.5)] == ["mask", "box"]


def test_a_last_slice_that_is_annotated_too_is_not_tracked():
    losses, _ = losses_of(recipe(prompts={"box": 0, "points": 0}, phases=of_length(5), reading=only("fifo", two_conditioning_slices=1.0)))
    assert len(losses) == 3


@pytest.mark.parametrize("policy", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
def test_every_policy_reaches_the_weights_it_reads_by(policy):
    losses, model = losses_of(recipe(prompts={"box": 0, "points": 0}, phases=of_length(4), reading=only(policy)))
    sum(loss.total for loss in losses).backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"image_encoder", "memory_attention", "memory_encoder", "sam_mask_decoder", "carry_gain", "maskmem_tpos_enc"} <= moved
    assert ("stream_fuser" in moved) == policy.startswith("shortlong")


def test_all_memories_missing_at_once_leave_the_carried_mask_and_a_finite_loss():
    losses, model = losses_of(recipe(prompts={"box": 0, "points": 0}, phases=of_length(4), reading=only("shortlong", drop_all=1.0)))
    sum(loss.total for loss in losses).backward()
    still = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert {"memory_attention", "short_memory_attention"} <= still


def test_all_tracked_memories_missing_leave_the_anchor_and_to_a_short_stack_the_slice_just_passed():
    for policy, tracked in (("fifo", []), ("selfsort", []), ("shortlong", [2]), ("shortlong+selfsort", [2])):
        chosen = recipe(reading=only(policy, drop_tracked=1.0))
        reader = Reader(build(chosen, CPU), chosen, 8, random.Random(0))
        assert reader._readable([1, 2], 3) == tracked


def test_a_bank_that_sorts_itself_reads_with_the_codes_of_selfsort():
    (long,) = RandomBank(row=6, nearest=2, short=False).read(ReadContext(4, 1, [0], [3, 1, 2], 9))
    assert long.spatial == ((0, 6), (1, 6), (2, 6)) and long.pointers == ((0, 1), (1, 1), (2, 1))


def test_gradients_of_parts_add_up_to_their_mean():
    chosen = recipe(parts=2, most_windows=4)
    model = build(chosen, CPU)
    model.train()
    gradients = gather_gradients(model)
    alone = []
    for part in (0, 1):
        gradients.zero_()
        compute(model, chosen, 0, part, 0.5)
        alone.append(gradients.clone())
    gradients.zero_()
    for part in (0, 1):
        compute(model, chosen, 0, part, 0.5)
    assert alone[0].abs().sum() > 0 and torch.allclose(gradients, alone[0] + alone[1], atol=1e-6)


def test_losses_are_computed_without_the_attention_whose_gradients_are_not_always_finite(monkeypatch):
    seen = []
    monkeypatch.setattr(step, "clip_losses", lambda *given: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or clip_losses(*given))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    compute(build(recipe(), CPU).train(), recipe(), 0, 0, 0.5)
    assert seen == [False]


def test_weights_in_shared_memory_are_the_same_weights():
    model = build(recipe(), CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = share(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())  # as torch lays them, so that no product is rounded otherwise
    flat.zero_()
    assert not any(p.any() for p in model.parameters())


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone_and_many_end_the_run():
    learner = new_learner(recipe(steps=100), CPU)
    learner.model.no_mem_embed.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    steps = train(learner, recipe(steps=100, phases=of_length(1)), lambda: False)
    assert all(next(steps).losses == {"skipped": 1.0} for _ in range(19))
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        next(steps)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.model.state_dict().items())


def test_a_check_looks_at_the_same_clips_every_time_and_knows_what_copying_the_first_mask_brings():
    chosen = recipe(checks={"windows": 2, "length": 4})
    clips, again = held_out(chosen, CPU), held_out(chosen, CPU)
    assert torch.equal(clips.frames, again.frames)
    still = clips.__class__(clips.frames, clips.masks[:1].expand(4, -1, -1, -1, -1), clips.window, clips.reverse, clips.slices)
    found = check(build(chosen, CPU).eval(), still)
    assert found.copy == pytest.approx(1.0)
    assert 0 <= found.dice < 1 and found.beyond == 0.0
