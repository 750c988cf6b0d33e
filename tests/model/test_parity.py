"""The policy `fifo` against SAM 2's own code, on the same random weights.

Inference is compared with `SAM2VideoPredictor`: the raw mask logits of every pass, slice by slice, at the decoder's resolution,
before passes are blended. The predictor lets a pass read what the other direction has written, so ours reads shared here.
Both write an annotated mask to memory through the four times smaller mask (`low_resolution_prompts`).
Training is compared with `SAM2Base._track_step` in training mode: the loss of a clip and the gradient of every parameter.
"""

import pytest
import sam2.sam2_video_predictor as stock
import torch
from sam2.modeling.sam2_base import SAM2Base

from slmsam2_cli.device import torch_threads
from slmsam2_cli.inference.propagation import ABSENT, AnnotatedSlice, PropagationOptions, propagate
from slmsam2_cli.model.cpu_ops import optimise_for_cpu
from slmsam2_cli.model.sam2_config import SIZE_OPTIONS, sam2_parts
from slmsam2_cli.model.slmsam2 import SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.losses import slice_loss
from slmsam2_cli.training.trainer import clip_losses

PX, SLICES, TOLERANCE = 64, 14, 1e-4


def build(px=PX, size="tiny", **network):
    """`nano` here has SAM 2's own decoder and carries no mask, so that the stock predictor can be built from the same parts."""
    torch.manual_seed(0)
    return SlmSam2(NetworkPlan(size=size, policy="fifo", **network), px, SIZE_OPTIONS["tiny"]).eval()


def frames_of(slices=SLICES, px=PX):
    return torch.rand(slices, 3, px, px, generator=torch.Generator().manual_seed(1))


def normalise(frames):
    """Subtract the mean and divide by the deviation that the predictor's own loader uses, ImageNet's."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (frames - mean) / deviation


def box(top, left, height, width, px=PX):
    """A rectangle in units of 1/64 of the frame."""
    mask, unit = torch.zeros(px, px, dtype=torch.bool), px // 64
    mask[top * unit : (top + height) * unit, left * unit : (left + width) * unit] = True
    return mask


SQUARE, TALL, FLAT = box(12, 20, 28, 30), box(8, 30, 40, 12), box(30, 10, 14, 44)


class Predictor:
    """SAM2VideoPredictor on frames in memory. A pass gives {(object, slice): raw logits (h, w)} of the slices it tracked."""

    def __init__(self, model, frames, monkeypatch, **flags):
        self.predictor = stock.SAM2VideoPredictor(**sam2_parts(model.network.size, model.input_size), **flags).eval()
        self.predictor.load_state_dict(model.state_dict())
        normalised = normalise(frames)
        monkeypatch.setattr(stock, "load_video_frames", lambda **_: (normalised, model.input_size, model.input_size))
        self.state = self.predictor.init_state("unused")

    def draw(self, slice_, mask, obj=1):
        self.predictor.add_new_mask(self.state, slice_, obj, mask)

    def go(self, start, step):
        passed = [t for t, *_ in self.predictor.propagate_in_video(self.state, start_frame_idx=start, reverse=step < 0)]
        stores = {obj: self.state["output_dict_per_obj"][i] for obj, i in self.state["obj_id_to_idx"].items()}
        found = {(obj, t): store["non_cond_frame_outputs"].get(t) for obj, store in stores.items() for t in passed}
        return {where: output["pred_masks"][0, 0] for where, output in found.items() if output is not None}


def our_passes(model, frames, objects, monkeypatch):
    """{step: {(object, slice): raw logits}} of every pass, as the engine gets them from the network; and the engine's result."""
    raw, track, memories = {1: {}, -1: {}}, SlmSam2.track, []

    def recorded(self, features, bank, context):
        if not any(bank.conditioning is seen for seen in memories):  # one bank per object, objects one after the other
            memories.append(bank.conditioning)
        output = track(self, features, bank, context)
        raw[context.step][list(objects)[len(memories) - 1], context.slice] = output.logits[0, 0]
        return output

    monkeypatch.setattr(SlmSam2, "track", recorded)
    found = propagate(model, frames, objects, options=PropagationOptions(batch=1, low_resolution_prompts=True))
    return raw, found


def assert_equal(ours, theirs, at_least_seen):
    assert sorted(ours) == sorted(theirs)
    assert sum(bool(logits.max() > ABSENT) for logits in theirs.values()) >= at_least_seen, "nothing but absence would be compared"
    assert max((ours[where] - theirs[where]).abs().max() for where in theirs) <= TOLERANCE


@pytest.mark.parametrize("start", [0, 5, SLICES - 1])
def test_passes_from_one_conditioning_slice_in_both_directions_have_the_predictors_logits(start, monkeypatch):
    model, frames = build(shared_memory=True), frames_of()
    predictor = Predictor(model, frames, monkeypatch)
    predictor.draw(start, SQUARE)
    up, down = predictor.go(start, 1), predictor.go(start, -1)
    ours, _ = our_passes(model, frames, {1: [AnnotatedSlice(start, SQUARE)]}, monkeypatch)
    assert len(up) == SLICES - 1 - start and len(down) == start
    assert_equal(ours[1] | ours[-1], up | down, at_least_seen=6)


def test_without_shared_memory_the_first_pass_is_the_predictors_and_the_second_is_not(monkeypatch):
    """Slices behind the conditioning slice were written by the other pass; the predictor reads them, we only with shared memory."""
    model, frames = build(), frames_of()
    predictor = Predictor(model, frames, monkeypatch)
    predictor.draw(5, SQUARE)
    up, down = predictor.go(5, 1), predictor.go(5, -1)
    ours, _ = our_passes(model, frames, {1: [AnnotatedSlice(5, SQUARE)]}, monkeypatch)
    assert_equal(ours[1], up, at_least_seen=4)
    assert max((ours[-1][where] - down[where]).abs().max() for where in down) > 100 * TOLERANCE


def test_passes_through_three_conditioning_slices_have_the_predictors_logits_and_are_blended(monkeypatch):
    """Forward from the first through all conditioning slices, then backward from the last: two passes between two of them."""
    model, frames, drawn = build(shared_memory=True), frames_of(), {2: SQUARE, 6: TALL, 10: FLAT}
    predictor = Predictor(model, frames, monkeypatch)
    for slice_, mask in drawn.items():
        predictor.draw(slice_, mask)
    up, down = predictor.go(2, 1), predictor.go(10, -1)
    ours, found = our_passes(model, frames, {1: [AnnotatedSlice(s, mask) for s, mask in drawn.items()]}, monkeypatch)
    assert_equal(ours[1], up, at_least_seen=4)
    assert_equal(ours[-1], down, at_least_seen=4)
    for t in (3, 4, 5, 7, 8, 9):
        share = (t % 4 - 2) % 4 / 4  # of the way from one conditioning slice to the next
        blend = (1 - share) * up[1, t].clamp(-10, 10) + share * down[1, t].clamp(-10, 10)
        assert (found[1].logits[t] - blend).abs().max() <= TOLERANCE
    assert all((found[1].logits[t] - up[1, t].clamp(min=ABSENT)).abs().max() <= TOLERANCE for t in (11, 12, 13))
    assert all((found[1].logits[t] - down[1, t].clamp(min=ABSENT)).abs().max() <= TOLERANCE for t in (0, 1))


def test_a_corrected_slice_is_one_more_conditioning_slice(monkeypatch):
    """The predictor needs its flag for that: without it, propagating again overwrites the correction."""
    model, frames = build(shared_memory=True), frames_of()
    predictor = Predictor(model, frames, monkeypatch, add_all_frames_to_correct_as_cond=True)
    predictor.draw(3, SQUARE)
    before = predictor.go(3, 1)
    predictor.draw(8, TALL)
    up, down = predictor.go(3, 1), predictor.go(8, -1)
    ours, _ = our_passes(model, frames, {1: [AnnotatedSlice(3, SQUARE), AnnotatedSlice(8, TALL)]}, monkeypatch)
    assert (1, 8) in before and (1, 8) not in up
    assert_equal(ours[1], up, at_least_seen=4)
    assert_equal(ours[-1], down, at_least_seen=4)


def test_without_its_flag_the_predictor_loses_a_correction(monkeypatch):
    model, frames = build(), frames_of()
    predictor = Predictor(model, frames, monkeypatch)
    predictor.draw(3, SQUARE)
    before = predictor.go(3, 1)
    predictor.draw(8, TALL)
    assert torch.equal(predictor.go(3, 1)[1, 8], before[1, 8])


def test_several_objects_have_the_predictors_logits(monkeypatch):
    model, frames, drawn = build(shared_memory=True), frames_of(), {1: SQUARE, 2: TALL, 3: FLAT}
    predictor = Predictor(model, frames, monkeypatch)
    for obj, mask in drawn.items():
        predictor.draw(5, mask, obj)
    up, down = predictor.go(5, 1), predictor.go(5, -1)
    ours, _ = our_passes(model, frames, {obj: [AnnotatedSlice(5, mask)] for obj, mask in drawn.items()}, monkeypatch)
    assert_equal(ours[1] | ours[-1], up | down, at_least_seen=18)


@pytest.mark.parametrize(("size", "px", "slices"), [("tiny", 256, 5), ("nano", 512, 3)])
def test_other_input_sizes_have_the_predictors_logits(size, px, slices, monkeypatch):
    model, frames, mask = build(px, size, shared_memory=True), frames_of(slices, px), box(12, 20, 28, 30, px)
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    predictor = Predictor(model, frames, monkeypatch)
    predictor.draw(1, mask)
    up, down = predictor.go(1, 1), predictor.go(1, -1)
    ours, _ = our_passes(model, frames, {1: [AnnotatedSlice(1, mask)]}, monkeypatch)
    assert_equal(ours[1] | ours[-1], up | down, at_least_seen=slices - 1)


def test_layers_optimised_for_a_cpu_have_the_predictors_logits(monkeypatch):
    model, frames = build(shared_memory=True), frames_of()
    predictor = Predictor(model, frames, monkeypatch)
    predictor.draw(5, SQUARE)
    up, down = predictor.go(5, 1), predictor.go(5, -1)
    optimise_for_cpu(model)
    ours, _ = our_passes(model, frames, {1: [AnnotatedSlice(5, SQUARE)]}, monkeypatch)
    assert_equal(ours[1] | ours[-1], up | down, at_least_seen=6)


def without_dropout(model):
    """In training mode; dropout would draw other numbers in each implementation."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    return model


def stock_losses(base, model, frames, masks):
    """Our loss on the outputs of SAM2Base, which tracks M objects through T slices. frames (T, 3, px, px), masks (T, M, 1, px, px)."""
    slices, objects = masks.shape[:2]
    encoded = base.forward_image(normalise(frames))
    _, features, positions, sizes = base._prepare_backbone_features(encoded)
    outputs, losses = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}, []
    for t in range(slices):
        here = [[f[:, t : t + 1].expand(-1, objects, -1) for f in levels] for levels in (features, positions)]
        step = (t, t == 0, *here, sizes, None, masks[0] if t == 0 else None, outputs, slices, False, None)
        current, (candidates, _, iou, low, high, pointer, object_score), *_ = base._track_step(*step)
        base._encode_memory_in_output(here[0], sizes, None, True, high, object_score, current)
        outputs["non_cond_frame_outputs" if t else "cond_frame_outputs"][t] = current | {"obj_ptr": pointer}
        if t:
            losses.append(slice_loss(SliceOutput(candidates, iou, iou.argmax(1), object_score, low, low, pointer), masks[t]))
    return losses


def test_in_training_the_loss_of_a_clip_and_every_gradient_are_those_of_sam2(monkeypatch):
    model = without_dropout(build())
    base = without_dropout(SAM2Base(**sam2_parts("tiny", PX)))
    base.load_state_dict(model.state_dict())
    frames, masks = frames_of(5), torch.zeros(5, 2, 1, PX, PX)
    masks[:, 0], masks[:4, 1] = SQUARE, TALL  # the second object ends before the last slice
    clips = Clips(frames[:, None], masks, torch.tensor([0, 0]), torch.tensor([False, False]), slices=5)
    with torch_threads(1):  # several add in another order, here and there
        ours, theirs = [
            torch.stack([loss.total for loss in losses]).mean()
            for losses in (clip_losses(model, clips, torch.device("cpu")), stock_losses(base, model, frames, masks))
        ]
        ours.backward()
        theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in base.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) and len(found) > 300
    scale = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert torch.stack([(found[name] - wanted[name]).norm() for name in wanted]).norm() <= 1e-5 * scale
    assert all((found[name] - wanted[name]).norm() <= 1e-5 * max(wanted[name].norm(), 1e-4 * scale) for name in wanted)
