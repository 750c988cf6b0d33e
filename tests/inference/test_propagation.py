"""What propagation promises whatever the weights say."""

from dataclasses import replace

import pytest
import torch

from slmsam2_cli.inference.end_taper import SHARE, EndTaper
from slmsam2_cli.inference.propagation import ABSENT, AnnotatedSlice, PropagationOptions, full_resolution, propagate
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX = 64


@pytest.fixture(scope="module")
def model():
    """Random weights that believe every object to be present, so that masks differ from nothing."""
    torch.manual_seed(0)
    built = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    torch.nn.init.constant_(built.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return built


POLICIES = ("fifo", "shortlong", "selfsort", "shortlong+selfsort")


def built(policy, **options):
    """As `model`, with another memory policy; the bank takes whatever is present."""
    torch.manual_seed(0)
    other = SlmSam2(NetworkPlan(size="nano", policy=policy, bank_confidence=0.0, bank_similarity=-1.0, **options), PX).eval()
    torch.nn.init.constant_(other.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return other


def stack(slices, seed=0):
    return torch.rand(slices, 3, PX, PX, generator=torch.Generator().manual_seed(seed))


def square(low=16, high=40):
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


EMPTY = torch.zeros(PX, PX, dtype=torch.bool)
FILLED = ~EMPTY


def test_an_annotated_slice_keeps_its_mask_with_confidence_1(model):
    found = propagate(model, stack(5), {1: [AnnotatedSlice(2, square())]})[1]
    shown = full_resolution(found.logits[2][None], PX, PX, PX)[0] > 0
    assert (shown & square()).sum() / (shown | square()).sum() > 0.9
    assert found.confidence[2] == 1


def test_a_volume_of_one_slice_returns_its_annotation(model):
    found = propagate(model, stack(1), {1: [AnnotatedSlice(0, square())]})[1]
    assert found.logits.shape == (1, PX, PX) and found.confidence.tolist() == [1.0]


def test_nothing_is_found_beyond_an_end_mark(model):
    found = propagate(model, stack(9), {1: [AnnotatedSlice(2, EMPTY), AnnotatedSlice(4, square()), AnnotatedSlice(6, EMPTY)]})[1]
    assert (found.logits[[0, 1, 2, 6, 7, 8]] == ABSENT).all()
    assert (found.logits[[3, 5]] > ABSENT).any()
    assert found.confidence[2] == found.confidence[6] == 1


def test_end_marks_alone_give_an_empty_result(model):
    found = propagate(model, stack(3), {1: [AnnotatedSlice(1, EMPTY)]})[1]
    assert (found.logits == ABSENT).all()


def test_every_slice_between_two_annotated_ones_is_visited_by_both_passes(model):
    visited = []
    propagate(model, stack(10), {1: [AnnotatedSlice(3, square()), AnnotatedSlice(7, square())]}, advance=visited.append)
    assert sum(visited) == 3 + 2 * 3 + 2  # below the first, between them twice, above the last


ONE_BY_ONE = PropagationOptions(batch=1)  # each pass alone, with slices numbered as in the stack


@pytest.fixture
def one_sided(model, monkeypatch):
    """A model that says 4 (confidence 0.8 * 0.5) on its way up and 8 (0.4 * 0.5) on its way down, whatever it sees."""
    track = SlmSam2.track

    def says(self, features, bank, moment):
        output, up = track(self, features, bank, moment), moment.step > 0
        filled = torch.full_like(output.logits, 4.0 if up else 8.0)
        return replace(output, logits=filled, chosen=filled, iou=torch.tensor([[0.8 if up else 0.4]]), object_score=torch.zeros(1, 1))

    monkeypatch.setattr(SlmSam2, "track", says)
    return model


def test_between_two_annotated_slices_passes_are_blended_by_distance(one_sided):
    found = propagate(one_sided, stack(9), {1: [AnnotatedSlice(2, square()), AnnotatedSlice(6, square())]}, ONE_BY_ONE)[1]
    assert [float(found.logits[t].mean()) for t in (3, 4, 5)] == pytest.approx([4 * 3 / 4 + 8 / 4, 6, 4 / 4 + 8 * 3 / 4])
    assert [float(found.logits[t].mean()) for t in (0, 1, 7, 8)] == pytest.approx([8, 8, 4, 4])
    assert found.confidence.tolist() == pytest.approx([0.2, 0.2, 1, 0.35, 0.3, 0.25, 1, 0.4, 0.4])


def test_passes_with_equal_masks_have_disagreement_0_and_other_slices_nan(one_sided):
    found = propagate(one_sided, stack(9), {1: [AnnotatedSlice(2, square()), AnnotatedSlice(6, square())]}, ONE_BY_ONE)[1]
    assert found.disagreement[3:6].tolist() == [0, 0, 0]
    assert found.disagreement[[0, 1, 2, 6, 7, 8]].isnan().all()


def test_disagreement_is_1_minus_dice_of_both_passes(one_sided, monkeypatch):
    said = SlmSam2.track

    def halves(self, features, bank, moment):
        """Up: the left half of the frame; down: its lower half on slice 3, everything on slice 4, nothing on slice 5."""
        output = said(self, features, bank, moment)
        filled, middle = torch.full_like(output.logits, -4.0), output.logits.shape[-1] // 2
        if moment.step > 0:
            filled[..., :middle] = 4.0
        elif moment.slice != 5:
            filled[..., middle if moment.slice == 3 else 0 :, :] = 4.0
        return replace(output, logits=filled)

    monkeypatch.setattr(SlmSam2, "track", halves)
    found = propagate(one_sided, stack(9), {1: [AnnotatedSlice(2, square()), AnnotatedSlice(6, square())]}, ONE_BY_ONE)[1]
    assert found.disagreement[3:6].tolist() == pytest.approx([1 - 2 / 4, 1 - 2 / 3, 1])


def test_two_empty_masks_have_disagreement_0(one_sided, monkeypatch):
    said = SlmSam2.track

    def nothing(*arguments):
        output = said(*arguments)
        return replace(output, logits=torch.full_like(output.logits, -4.0))

    monkeypatch.setattr(SlmSam2, "track", nothing)
    found = propagate(one_sided, stack(5), {1: [AnnotatedSlice(0, square()), AnnotatedSlice(4, square())]}, ONE_BY_ONE)[1]
    assert found.disagreement[1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "anchors", [[AnnotatedSlice(4, square())], [AnnotatedSlice(1, EMPTY), AnnotatedSlice(4, square()), AnnotatedSlice(7, EMPTY)]]
)
def test_slices_of_a_single_pass_have_no_disagreement(model, anchors):
    assert propagate(model, stack(9), {1: anchors})[1].disagreement.isnan().all()


def test_towards_an_end_mark_only_the_pass_from_the_object_counts(one_sided):
    found = propagate(one_sided, stack(9), {1: [AnnotatedSlice(2, square()), AnnotatedSlice(6, EMPTY)]}, ONE_BY_ONE)[1]
    tapered = [float((4 + SHARE * (EndTaper(square(), 2, 6, one_sided.mask_size).logits(t, FILLED) - 4)).mean()) for t in (3, 4, 5)]
    assert [float(found.logits[t].mean()) for t in (1, 3, 4, 5)] == pytest.approx([8, *tapered], rel=1e-4)
    assert found.confidence[7:].tolist() == [0, 0]


def test_the_backward_pass_does_not_depend_on_the_slices_ahead(model):
    """Passes are independent: slices after the anchor do not change those before it."""
    frames, other = stack(7), stack(7)
    other[4:] = stack(3, seed=9)
    one = propagate(model, frames, {1: [AnnotatedSlice(3, square())]})[1].logits
    two = propagate(model, other, {1: [AnnotatedSlice(3, square())]})[1].logits
    assert torch.equal(one[:3], two[:3]) and not torch.equal(one[4:], two[4:])


def test_a_mirrored_stack_gives_the_mirrored_result(model):
    frames = stack(7)
    one = propagate(model, frames, {1: [AnnotatedSlice(2, square())]})[1].logits
    mirrored = propagate(model, frames.flip(0), {1: [AnnotatedSlice(4, square())]})[1].logits
    assert (one - mirrored.flip(0)).abs().max() <= 1e-4


def test_objects_do_not_affect_each_other(model):
    """One by one, not by a bit; in a batch, by rounding alone."""
    frames, objects = stack(5), {1: [AnnotatedSlice(2, square())], 2: [AnnotatedSlice(1, square(4, 12))]}
    for options, tolerance in ((ONE_BY_ONE, 0), (PropagationOptions(), 1e-5)):
        alone = propagate(model, frames, {1: objects[1]}, options)[1].logits
        together = propagate(model, frames, objects, options)
        assert (alone - together[1].logits).abs().max() <= tolerance
        assert set(together) == {1, 2}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("roi_scale", [None, 2.0])
def test_passes_side_by_side_give_the_result_of_passes_one_by_one(policy, roi_scale):
    """Three objects with one, two and three annotated slices, an end mark among them: passes of different lengths and memories."""
    objects = {
        1: [AnnotatedSlice(4, square())],
        2: [AnnotatedSlice(2, square(4, 30)), AnnotatedSlice(7, square(8, 34))],
        5: [AnnotatedSlice(0, square(10, 50)), AnnotatedSlice(5, square(20, 50)), AnnotatedSlice(8, EMPTY)],
    }
    model = built(policy)
    one_by_one, side_by_side = (
        propagate(model, stack(11), objects, PropagationOptions(batch=batch, roi_scale=roi_scale, max_empty_slices=3)) for batch in (1, 4)
    )
    for label in objects:
        assert one_by_one[label].roi == side_by_side[label].roi
        assert (one_by_one[label].logits - side_by_side[label].logits).abs().max() <= 1e-4
        assert (one_by_one[label].confidence - side_by_side[label].confidence).abs().max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"shared_memory": True}])
def test_processes_that_share_the_passes_change_no_bit(options):
    model, visited = built("shortlong", **options), {1: [], 3: []}
    objects = {label: [AnnotatedSlice(label, square(label, 30 + label))] for label in range(1, 7)}
    found = {
        processes: propagate(model, stack(9), objects, PropagationOptions(batch=3, processes=processes), visited[processes].append)
        for processes in visited
    }
    for label in objects:
        assert torch.equal(found[1][label].logits, found[3][label].logits)
        assert torch.equal(found[1][label].confidence, found[3][label].confidence)
    assert sum(visited[1]) == sum(visited[3]) == 6 * 8


def test_results_do_not_depend_on_the_size_of_the_feature_cache(model):
    from slmsam2_cli.inference.propagation import FeatureCache

    frames = stack(6)
    with torch.inference_mode():
        roomy, tight = FeatureCache(model, frames), FeatureCache(model, frames, batch=2, keep_bytes=1)
        for t in (0, 5, 1, 4):
            assert (roomy[t].top - tight[t].top).abs().max() <= 1e-4
    assert len(tight.kept) <= 2


def test_a_distant_pass_that_lost_the_object_does_not_outvote_the_near_one(one_sided, monkeypatch):
    said = SlmSam2.track

    def lost_going_down(self, features, bank, moment):
        output = said(self, features, bank, moment)
        return output if moment.step > 0 else replace(output, logits=torch.full_like(output.logits, -1024.0))

    monkeypatch.setattr(SlmSam2, "track", lost_going_down)
    found = propagate(one_sided, stack(9), {1: [AnnotatedSlice(2, square()), AnnotatedSlice(6, square())]}, ONE_BY_ONE)[1]
    assert [float(found.logits[t].mean()) for t in (3, 4, 5)] == pytest.approx([(3 * 4 - 10) / 4, (4 - 10) / 2, (4 - 3 * 10) / 4])
    assert float(found.logits[0].mean()) == ABSENT


@pytest.mark.parametrize("batch", [1, 8])
def test_the_batch_option_sets_how_many_slices_are_encoded_at_a_time(model, monkeypatch, batch):
    encode, sizes = SlmSam2.encode, []
    monkeypatch.setattr(SlmSam2, "encode", lambda self, frames: sizes.append(len(frames)) or encode(self, frames))
    propagate(model, stack(3), {1: [AnnotatedSlice(1, square())]}, options=PropagationOptions(batch=batch))
    assert max(sizes) == min(batch, 3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, {"object_score_gate": True, "shared_memory": True}])
def test_every_policy_keeps_annotated_slices_and_end_marks(policy, options):
    anchors = [AnnotatedSlice(1, EMPTY), AnnotatedSlice(3, square()), AnnotatedSlice(6, square(8, 30)), AnnotatedSlice(8, EMPTY)]
    found = propagate(built(policy, **options), stack(10), {1: anchors})[1]
    for anchor in anchors:
        assert ((found.logits[anchor.slice] > 0) == anchor.mask).all() and found.confidence[anchor.slice] == 1
    assert (found.logits[[0, 9]] == ABSENT).all()
    assert all((found.logits[t] > ABSENT).any() for t in (2, 4, 5, 7))
    assert not found.disagreement[[4, 5]].isnan().any()


@pytest.mark.parametrize("size", ["tiny", "small", "base_plus", "large"])
def test_every_policy_runs_on_every_size(size):
    """One network with both stacks; each policy reads its memories in its own way, so no two find the same masks."""
    torch.manual_seed(0)
    network = NetworkPlan(size=size, bank_confidence=0.0, bank_similarity=-1.0)
    model = SlmSam2(network, PX).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    torch.nn.init.constant_(model.stream_fuser.gate, 0.5)
    found = []
    for policy in POLICIES:
        model.policy = build_policy(network.model_copy(update={"policy": policy}), model.num_maskmem, model.max_obj_ptrs_in_encoder)
        found.append(propagate(model, stack(4), {1: [AnnotatedSlice(0, square())]})[1].logits)
    assert all(torch.isfinite(logits).all() and (logits[1:] > ABSENT).any() for logits in found)
    assert all(torch.equal(one, two) == (one is two) for one in found for two in found)


@pytest.mark.parametrize("policy", POLICIES)
def test_passes_are_independent_unless_they_share_memory(policy):
    """Slices after the anchor change those before it only where the way back reads what the way out has written."""
    frames, other = stack(7), stack(7)
    other[4:] = stack(3, seed=9)
    for shared_memory in (False, True):
        model = built(policy, shared_memory=shared_memory)
        one, two = (propagate(model, given, {1: [AnnotatedSlice(3, square())]})[1].logits for given in (frames, other))
        assert torch.equal(one[:3], two[:3]) == (not shared_memory)


def test_with_shared_memory_all_forward_passes_come_before_the_backward_ones(monkeypatch):
    went, track = [], SlmSam2.track
    monkeypatch.setattr(SlmSam2, "track", lambda self, f, bank, at: went.append((at.slice, at.step)) or track(self, f, bank, at))
    propagate(built("fifo", shared_memory=True), stack(7), {1: [AnnotatedSlice(1, square()), AnnotatedSlice(4, square())]})
    assert went == [(2, 1), (3, 1), (5, 1), (6, 1), (3, -1), (2, -1), (0, -1)]


def test_every_object_has_its_own_memory(monkeypatch):
    stores, track = {}, SlmSam2.track

    def noted(self, features, bank, moment):
        stores.setdefault(id(bank.conditioning), (bank, []))[1].append(moment.slice)
        return track(self, features, bank, moment)

    monkeypatch.setattr(SlmSam2, "track", noted)
    propagate(built("selfsort", shared_memory=True), stack(5), {1: [AnnotatedSlice(2, square())], 2: [AnnotatedSlice(4, square(4, 12))]})
    assert [(list(bank.conditioning), seen) for bank, seen in stores.values()] == [([2], [3, 4, 1, 0]), ([4], [3, 2, 1, 0])]


FOCUS = 2.0


def large_square(low=40, high=64, px=128):
    mask = torch.zeros(px, px, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def large_stack(slices=5, px=128):
    return torch.rand(slices, 3, px, px, generator=torch.Generator().manual_seed(0))


def test_with_roi_scale_the_network_sees_a_crop_around_the_annotation(model):
    found = propagate(model, large_stack(), {1: [AnnotatedSlice(2, large_square())]}, options=PropagationOptions(roi_scale=FOCUS))[1]
    assert found.roi is not None and found.logits.shape == (5, PX, PX)
    shown = found.plane(2, 128, 128, 128) > 0
    assert (shown & large_square()).sum() / (shown | large_square()).sum() > 0.9


def test_pixels_outside_the_roi_do_not_affect_the_result(one_sided_nothing):
    stack = large_stack()
    before = propagate(one_sided_nothing, stack, {1: [AnnotatedSlice(2, large_square())]}, options=PropagationOptions(roi_scale=FOCUS))[1]
    stack[:, :, :20] = 0.0
    after = propagate(one_sided_nothing, stack, {1: [AnnotatedSlice(2, large_square())]}, options=PropagationOptions(roi_scale=FOCUS))[1]
    assert (before.roi.row, before.roi.edge) == (28, 48)
    assert torch.equal(before.logits, after.logits)


@pytest.fixture
def one_sided_nothing(model, monkeypatch):
    """A model whose masks never reach the edge of what it sees."""
    track = SlmSam2.track

    def says(self, features, bank, moment):
        output = track(self, features, bank, moment)
        return replace(output, logits=output.logits.clamp(max=-1.0))

    monkeypatch.setattr(SlmSam2, "track", says)
    return model


def test_a_mask_at_the_border_of_its_roi_is_propagated_again_in_a_larger_one(one_sided):
    """This model fills whatever it sees."""
    visited = []
    found = propagate(
        one_sided,
        large_stack(),
        {1: [AnnotatedSlice(2, large_square())]},
        advance=visited.append,
        options=PropagationOptions(batch=1, roi_scale=FOCUS),
    )[1]
    assert found.roi.edge == 128  # 48, then 96, then all
    assert sum(visited) == 4  # tracking again is no progress


def test_slices_of_the_size_of_the_roi_give_the_same_result_as_whole_slices(one_sided_nothing):
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[2:60, 2:60] = True
    seen, whole = (
        propagate(one_sided_nothing, stack(4), {1: [AnnotatedSlice(1, mask)]}, options=PropagationOptions(roi_scale=f))[1]
        for f in (FOCUS, None)
    )
    assert torch.equal(seen.logits, whole.logits)


@pytest.fixture
def vanishing(model, monkeypatch):
    """A model that sees its object on slices 3 to 5 and on slice 12, nowhere else; and the slices that it was asked about."""
    track, asked = SlmSam2.track, []

    def says(self, features, bank, moment):
        asked.append(moment.slice)
        output = track(self, features, bank, moment)
        logits = torch.full_like(output.logits, 5.0 if moment.slice in (3, 4, 5, 12) else -5.0)
        return replace(output, logits=logits, chosen=logits)

    monkeypatch.setattr(SlmSam2, "track", says)
    return model, asked


def test_a_pass_ends_after_max_empty_slices_without_the_object(vanishing):
    model, asked = vanishing
    visited = []
    found = propagate(
        model,
        stack(20),
        {1: [AnnotatedSlice(4, square())]},
        advance=visited.append,
        options=PropagationOptions(batch=1, max_empty_slices=3),
    )[1]
    assert asked == [5, 6, 7, 8, 3, 2, 1, 0]
    assert sum(visited) == 19  # what is left out is done with
    assert (found.logits[[9, 12, 19]] == ABSENT).all() and not found.confidence[9:].any()


def test_a_gap_shorter_than_the_max_empty_slices_is_crossed(vanishing):
    model, asked = vanishing
    found = propagate(model, stack(20), {1: [AnnotatedSlice(4, square())]}, options=PropagationOptions(batch=1, max_empty_slices=7))[1]
    assert (found.logits[12] > 0).all() and max(asked) == 19


def test_max_empty_slices_does_not_end_a_pass_towards_an_annotated_slice(vanishing):
    model, asked = vanishing
    propagate(
        model,
        stack(20),
        {1: [AnnotatedSlice(4, square()), AnnotatedSlice(16, square())]},
        options=PropagationOptions(batch=1, max_empty_slices=2),
    )
    assert set(range(5, 16)) <= set(asked) and asked.count(10) == 2


def test_without_max_empty_slices_every_slice_is_visited(vanishing):
    model, asked = vanishing
    propagate(model, stack(20), {1: [AnnotatedSlice(4, square())]}, ONE_BY_ONE)
    assert sorted(asked) == [t for t in range(20) if t != 4]
