"""Parameters and keys of the network, and its output before any training. Comparison with SAM 2's code: test_parity.py."""

from functools import partial

import pytest
import sam2.sam2_video_predictor as stock
import torch
from safetensors.torch import save_file

from slmsam2_cli.inference.propagation import AnnotatedSlice, propagate
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights, read_checkpoint
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.sam2_config import SIZE_OPTIONS, sam2_parts
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2, set_input_size
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.trainer import clip_losses

PX, SLICES, START = 64, 20, 3


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def build(size="tiny", px=PX, seed=0, **network):
    torch.manual_seed(seed)
    return SlmSam2(NetworkPlan(size=size, **network), px).eval()


@pytest.fixture(scope="module")
def frames():
    return torch.rand(SLICES, 3, PX, PX, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask():
    drawn = torch.zeros(PX, PX, dtype=torch.bool)
    drawn[12:40, 20:50] = True
    return drawn


@pytest.fixture(scope="module")
def fifo():
    return build(policy="fifo")


def test_a_new_gated_short_stream_does_not_change_the_output(fifo, frames, mask):
    shortlong = build(policy="shortlong")
    load_weights(shortlong, Checkpoint("fifo", fifo.state_dict(), digest=""))
    annotated = {1: [AnnotatedSlice(START, mask)]}
    one, other = propagate(fifo, frames[:9], annotated)[1], propagate(shortlong, frames[:9], annotated)[1]
    assert (one.logits - other.logits).abs().max() <= 1e-5


@torch.no_grad()
def test_the_published_sum_fuser_doubles_the_conditioned_features_before_training(fifo, frames, mask):
    """Documented weakness of the published fuser: it doubles what the decoder sees."""
    summed = build(policy="shortlong", fuser="sum")
    load_weights(summed, Checkpoint("fifo", fifo.state_dict(), digest=""))
    bank = MemoryBank()
    features = fifo.encode(frames[:2])
    first, second = features.at(slice(0, 1)), features.at(slice(1, 2))
    bank.conditioning[0] = fifo.remember(first, fifo.condition_on_mask(first, mask[None, None].float()), mask[None, None].float())
    context = ReadContext(1, 1, bank.conditioning, bank.tracked, 2)
    ratio = summed.condition(second, bank, context).std() / fifo.condition(second, bank, context).std()
    assert float(ratio) == pytest.approx(2.0, abs=0.1)


def test_a_new_short_stack_equals_the_long_one():
    model = build(policy="shortlong")
    long, short = model.memory_attention.state_dict(), model.short_memory_attention.state_dict()
    assert all(torch.equal(long[name], short[name]) for name in long)


def test_two_training_steps_make_the_short_stack_differ_from_the_long_one_and_loading_keeps_it(frames, mask, tmp_path):
    """Two, because the gate starts at zero: the first step opens it, the second reaches the stack behind it."""
    model, size = build("nano", policy="shortlong").train(), (3, 1, 1, PX, PX)
    start = {name: tensor.clone() for name, tensor in model.short_memory_attention.state_dict().items()}
    clips = Clips(frames[:3, None], mask.float().expand(size), torch.tensor([0]), torch.tensor([False]), SLICES)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        torch.stack([loss.total for loss in clip_losses(model, clips, torch.device("cpu"))]).mean().backward()
        optimiser.step()
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    again = build("nano", policy="shortlong", seed=1)
    load_weights(again, read_checkpoint(tmp_path / "tuned.safetensors"))
    long, short = again.memory_attention.state_dict(), again.short_memory_attention.state_dict()
    assert all(torch.equal(tensor, short[name]) for name, tensor in model.short_memory_attention.state_dict().items())
    assert any(not torch.equal(start[name], short[name]) for name in short)
    assert any(not torch.equal(long[name], short[name]) for name in short)


def test_tiny_with_both_memories_has_46_million_parameters_in_these_parts():
    model = build(policy="shortlong", fuser="sum")
    counted = {
        "image encoder": parameters(model.image_encoder),
        "mask decoder": parameters(model.sam_mask_decoder),
        "prompt encoder": parameters(model.sam_prompt_encoder),
        "memory encoder": parameters(model.memory_encoder),
        "long attention": parameters(model.memory_attention),
        "short attention": parameters(model.short_memory_attention),
        "fuser": parameters(model.stream_fuser),
        "total": parameters(model),
    }
    assert counted == {
        "image encoder": 27_219_136,
        "mask decoder": 4_215_109,
        "prompt encoder": 6_220,
        "memory encoder": 1_384_608,
        "long attention": 5_922_304,
        "short attention": 5_922_304,
        "fuser": 1_078_272,
        "total": 45_963_074,
    }


def test_the_gated_fuser_adds_one_gate_per_channel_to_the_published_one():
    gated, summed = build(policy="shortlong").stream_fuser, build(policy="shortlong", fuser="sum").stream_fuser
    assert parameters(gated) - parameters(summed) == 256


def test_tiny_with_fifo_has_exactly_the_keys_and_size_of_sam2(fifo):
    assert parameters(fifo) == 38_962_498
    assert set(fifo.state_dict()) == set(stock.SAM2VideoPredictor(**sam2_parts("tiny", PX)).state_dict())


@pytest.mark.parametrize(("size", "millions"), [("small", 46.0), ("base_plus", 80.8), ("large", 224.4)])
def test_the_other_sizes_have_the_parameter_counts_of_sam_2(size, millions):
    assert parameters(build(size, policy="fifo")) / 1e6 == pytest.approx(millions, abs=0.1)


def test_nano_is_at_most_eight_million_parameters_and_made_for_128_to_256_px():
    assert parameters(build("nano")) <= 8_000_000
    assert 128 <= SIZE_OPTIONS["nano"].native_size <= 256


def test_both_stacks_read_the_token_counts_of_the_paper():
    """At 64 px a slice has 16 tokens and a pointer 4, where the paper's 1024 px have 4096 and 4."""
    model, seen = build(policy="shortlong"), {"memory_attention": [], "short_memory_attention": []}
    for name, lengths in seen.items():
        note = partial(lambda lengths, _, __, given: lengths.append(len(given["memory"])), lengths)
        getattr(model, name).register_forward_pre_hook(note, with_kwargs=True)
    propagate(model, torch.rand(8, 3, PX, PX), {1: [AnnotatedSlice(0, torch.ones(PX, PX, dtype=torch.bool))]})
    assert seen["memory_attention"] == [20 * min(i, 7) for i in range(1, 8)]
    assert seen["short_memory_attention"] == [20] * 7


@pytest.mark.parametrize("px", [32, 96, 128, 160, 256])
def test_any_multiple_of_32_is_an_input_size(px):
    model = build("nano", px)
    drawn = torch.zeros(px, px, dtype=torch.bool)
    drawn[: px // 2, : px // 2] = True
    found = propagate(model, torch.rand(3, 3, px, px), {1: [AnnotatedSlice(1, drawn)]})[1]
    assert found.logits.shape == (3, px, px) and model.mask_size == px


@pytest.mark.parametrize("px", [0, -32, 100])
def test_other_input_sizes_are_rejected(px):
    with pytest.raises(ValueError, match="multiple of 32"):
        build("nano", px)
    with pytest.raises(ValueError, match="multiple of 32"):
        set_input_size(build("nano"), px)


def test_after_set_input_size_the_output_is_that_of_a_network_built_for_that_size(frames, mask):
    changed, built = build("nano", 96), build("nano", PX, seed=1)
    built.load_state_dict(changed.state_dict())
    set_input_size(changed, PX)
    assert (changed.input_size, changed.mask_size) == (built.input_size, built.mask_size) == (PX, PX)
    one, other = (propagate(model, frames[:4], {1: [AnnotatedSlice(1, mask)]})[1] for model in (changed, built))
    assert torch.equal(one.logits, other.logits) and torch.equal(one.confidence, other.confidence)


def test_propagation_leaves_no_state_on_the_model(frames, mask):
    model = build("nano", PX)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = propagate(model, frames, {1: [AnnotatedSlice(START, mask)]})[1].logits
    again = propagate(model, frames, {1: [AnnotatedSlice(START, mask)]})[1].logits
    assert torch.equal(first, again)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
@pytest.mark.parametrize("options", [{}, {"object_score_gate": True, "shared_memory": True}])
def test_memory_does_not_grow_with_the_volume(name, options, monkeypatch):
    model, most = build("nano", 32, policy=name, **options, bank_slices=5, bank_confidence=0.0, bank_similarity=-1.0), []
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    prune = SlmSam2.prune
    monkeypatch.setattr(SlmSam2, "prune", lambda self, bank, at: prune(self, bank, at) or most.append(len(bank.tracked)))
    propagate(model, torch.rand(60, 3, 32, 32), {1: [AnnotatedSlice(0, torch.ones(32, 32, dtype=torch.bool))]})
    bound = {"fifo": 17, "shortlong": 17, "selfsort": 6, "shortlong+selfsort": 6}[name]
    near_the_conditioning_slice = 16 if options and bound == 17 else 0
    assert len(most) == 59 and max(most) == bound + near_the_conditioning_slice
