"""MedSAM-2's bank: who is admitted, who leaves, who is read. Numbers alone, then the network around them."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from slmsam2_cli.inference.propagation import AnnotatedSlice, propagate
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.memory.features import memory_scores, object_stats, similarity
from slmsam2_cli.model.memory.policy import MemoryScores, ReadContext, gated
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE, SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLongSelfSort
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.trainer import clip_losses

ANCHOR, PX = 0, 64


def moment(slice_, *stored, step=1, at=None):
    """A moment with one anchor and stored slices (index, object score, confidence, angle in degrees); `at`: the current slice's angle.

    Objects are points on a circle: similarity is the cosine of the angle between them, and the anchor lies at 0 degrees.
    """
    angles = {ANCHOR: 0.0} | {s: angle for s, _, _, angle in stored}
    cosine = {(a, b): torch.tensor(angles[a] - angles[b]).deg2rad().cos().item() for a in angles for b in angles}
    here = {s: torch.tensor(angle - at).deg2rad().cos().item() for s, angle in angles.items()} if at is not None else {}
    object_score, confidence = {ANCHOR: 10.0} | {s: p for s, p, _, _ in stored}, {ANCHOR: 1.0} | {s: c for s, _, c, _ in stored}
    return ReadContext(slice_, step, (ANCHOR,), [s for s, *_ in stored], 100, MemoryScores(object_score, confidence, here, cosine))


def test_only_the_present_the_confident_and_the_similar_are_admitted():
    absent, unsure, unlike, just_so, good = (1, -0.1, 1.0, 0), (2, 5.0, 0.49, 0), (3, 5.0, 1.0, 61), (4, 0.1, 0.5, 59.9), (5, 5.0, 0.9, 10)
    assert SelfSort().members(moment(6, absent, unsure, unlike, just_so, good)) == [4, 5]


def test_behind_the_gate_a_slice_has_to_be_certain_too():
    barely, well = (1, 0.01, 1.0, 0), (2, 0.1, 1.0, 0)
    assert SelfSort(object_score_gate=True).members(moment(3, barely, well)) == [2]
    assert SelfSort().members(moment(3, barely, well)) == [1, 2]


def table(*knots):
    """A calibration that says the second number of each pair where the model says the first."""
    said, true = zip(*knots, strict=True)
    return Calibration(method="isotonic", confidence=said, dice=true, slices=99, error_before=0.3, error_after=0.1)


def calibrated(at, calibration):
    """The moment with the table's word for its tracked slices."""
    return replace(at, evidence=at.evidence.calibrated(at.tracked, calibration.of))


def test_a_slice_that_the_table_trusts_less_is_not_admitted_and_one_that_it_trusts_more_is():
    sure, unsure = moment(2, (1, 50.0, 0.9, 0)), moment(2, (1, 50.0, 0.3, 0))
    assert SelfSort().members(sure) == [1] and SelfSort().members(unsure) == []
    assert SelfSort().members(calibrated(sure, table((0.0, 0.0), (0.9, 0.2)))) == []
    assert SelfSort().members(calibrated(unsure, table((0.3, 0.8), (1.0, 1.0)))) == [1]
    assert ShortLongSelfSort().keep(calibrated(moment(2, (1, 50.0, 0.9, 0), (2, 50.0, 0.9, 0)), table((0.9, 0.2)))) == [2]


def test_the_table_is_asked_about_object_score_times_predicted_iou():
    """At a logit of 0 the object is there with probability one half, so 0.8 counts as 0.4; the anchor is the next annotated slice."""
    told = calibrated(moment(2, (1, 0.0, 0.8, 0)), table((0.4, 0.1), (0.8, 0.9))).evidence
    assert told.confidence == {ANCHOR: 1.0, 1: pytest.approx(0.1)}
    assert moment(2, (1, -1000.0, 0.8, 0)).evidence.calibrated([1], table((0.0, 0.05), (1.0, 1.0)).of).confidence[1] == 0.05


def test_the_gate_goes_by_the_table_too():
    """Certainty has to exceed 0.01."""
    at = moment(9, (1, 50.0, 0.9, 0), (2, 50.0, 0.005, 0), (8, 50.0, 0.9, 0))
    assert list(gated(at).tracked) == [1, 8]
    assert list(gated(calibrated(at, table((0.005, 0.5), (0.9, 0.6)))).tracked) == [1, 2, 8]
    assert list(gated(calibrated(at, table((0.9, 0.005)))).tracked) == [8]


def test_the_least_different_of_too_many_leaves():
    """At 0, 10 and 40 degrees the one in the middle is nearest to the others."""
    assert SelfSort(capacity=2).members(moment(4, (1, 5.0, 0.9, 0), (2, 5.0, 0.9, 10), (3, 5.0, 0.9, 40))) == [1, 3]


@pytest.mark.parametrize("order", list(permutations([(1, 5.0, 0.9, 0), (2, 5.0, 0.8, 0), (3, 5.0, 0.9, 0)])))
def test_among_equals_the_least_confident_leaves_whatever_the_order(order):
    assert sorted(SelfSort(capacity=2).members(moment(4, *order))) == [1, 3]


def test_among_equals_of_equal_confidence_the_higher_index_leaves():
    assert SelfSort(capacity=2).members(moment(9, *[(s, 5.0, 0.9, 20) for s in (1, 2, 3, 4)])) == [1, 2]


def test_the_anchor_is_read_however_unlike_and_then_the_most_similar_first():
    slices = [(1, 5.0, 0.9, 50), (2, 5.0, 0.9, 20), (3, 5.0, 0.9, 40), (4, 5.0, 0.9, -50)]
    (stream,) = SelfSort(nearest=2).read(moment(5, *slices, at=45))
    assert [s for s, _ in stream.spatial] == [ANCHOR, 1, 3]


def test_equally_similar_slices_are_read_by_confidence_and_then_by_index():
    slices = [(1, 5.0, 0.7, 20), (2, 5.0, 0.9, 20), (3, 5.0, 0.7, 20)]
    (stream,) = SelfSort().read(moment(5, *slices, at=30))
    assert [s for s, _ in stream.spatial] == [ANCHOR, 2, 1, 3]


def test_time_plays_no_role_in_the_bank():
    near_in_time = SelfSort().read(moment(3, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 30), at=25))[0]
    far_in_time = SelfSort().read(moment(99, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 30), at=25, step=-1))[0]
    assert near_in_time == far_in_time
    assert {row for _, row in near_in_time.spatial} == {6}
    assert {distance for _, distance in near_in_time.pointers} == {POINTER_DISTANCE}


def test_what_has_left_the_bank_may_be_forgotten_without_changing_it():
    policy, generator = SelfSort(capacity=4), torch.Generator().manual_seed(0)
    draws = torch.rand(40, 3, generator=generator).tolist()
    stored = [(t + 1, 4 * p - 1, c, 80 * a) for t, (p, c, a) in enumerate(draws)]
    kept = []
    for i, one in enumerate(stored):
        everything = moment(one[0], *stored[: i + 1])
        remembered = moment(one[0], *kept, one)
        assert policy.members(remembered) == policy.members(everything)
        kept = [s for s in (*kept, one) if s[0] in policy.keep(remembered)]
        assert len(kept) <= 4 + 1


def test_with_a_short_stream_the_slice_just_passed_is_read_in_row_zero_however_bad_it_is():
    long, short = ShortLongSelfSort().read(moment(3, (1, 5.0, 0.9, 20), (2, -9.0, 0.0, 90), at=20))
    assert [s for s, _ in long.spatial] == [ANCHOR, 1]
    assert short.spatial == ((2, 0),) and short.pointers == ((2, 1),)


def test_where_slices_have_no_order_the_short_stream_sees_the_most_similar_one():
    _, short = ShortLongSelfSort().read(moment(3, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 40), step=0, at=30.1))
    assert short.spatial == ((2, 0),)


def test_with_a_short_stream_the_slice_just_passed_stays_stored():
    assert ShortLongSelfSort().keep(moment(2, (1, 5.0, 0.9, 20), (2, -9.0, 0.0, 90))) == [1, 2]
    assert ShortLongSelfSort(SelfSort(min_confidence=1.0), short=2).keep(moment(3, *[(s, 5.0, 0.5, 0) for s in (1, 2, 3)])) == [2, 3]


def test_an_objects_vector_is_the_mean_of_the_embedding_over_its_mask():
    top, cover = torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 4, 4)
    top[0, 0, 0, 0], top[0, 1, 0, 1], top[0, :, 1] = 3.0, 4.0, 100.0
    cover[..., :2, :] = 1  # the two positions of the upper row: their mean is (1.5, 2)
    traces = object_stats(top, cover, torch.ones(1, 1), torch.tensor([1.5]))
    assert traces.vector.tolist() == [pytest.approx([0.6, 0.8])]
    assert traces.area.tolist() == [2.0] and traces.confidence.tolist() == [1.0]


def test_an_object_that_is_not_there_is_similar_to_nothing():
    traces = object_stats(torch.rand(1, 8, 2, 2), torch.zeros(1, 1, 8, 8), -torch.ones(1, 1), torch.ones(1))
    told = memory_scores({0: traces, 1: traces}, 0, torch.rand(1, 8, 2, 2))
    assert set(told.alike.values()) == {0.0} and set(told.here.values()) == {0.0}


def test_similarity_to_a_slice_is_that_of_as_many_positions_as_the_object_covers():
    top = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])[:, :, None]  # cosines with (1, 0): 1, 0, -1
    found = similarity(torch.tensor([[1.0, 0.0]]).expand(4, -1), torch.tensor([0.2, 1.0, 2.0, 9.0]), top)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_evidence_is_not_rounded_where_the_network_computes_in_half_precision():
    traces = {s: object_stats(torch.rand(1, 64, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1), torch.ones(1)) for s in range(3)}
    top = torch.rand(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        halved = memory_scores(traces, 0, top)
    assert halved == memory_scores(traces, 0, top)


def build(name, px=PX, **options):
    torch.manual_seed(0)
    lenient = {"bank_confidence": 0.0, "bank_similarity": -1.0}
    model = SlmSam2(NetworkPlan(size="nano", policy=name, **lenient | options), px).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return model


def square(low=16, high=40):
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


@pytest.fixture(scope="module")
def frames():
    return torch.rand(12, 3, PX, PX, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bank", "stock"), [("selfsort", "fifo"), ("shortlong+selfsort", "shortlong")])
def test_the_bank_has_no_weights(bank, stock):
    assert {n: t.shape for n, t in build(bank).state_dict().items()} == {n: t.shape for n, t in build(stock).state_dict().items()}


def test_a_fresh_gated_short_stream_leaves_the_bank_alone(frames):
    alone, both = build("selfsort"), build("shortlong+selfsort")
    both.load_state_dict(both.state_dict() | alone.state_dict())
    both.copy_long_to_short()
    anchors = {1: [AnnotatedSlice(4, square())]}
    one, other = propagate(alone, frames, anchors)[1], propagate(both, frames, anchors)[1]
    assert (one.logits - other.logits).abs().max() <= 1e-5


def test_the_policies_differ_on_the_same_weights(frames):
    weights = build("fifo").state_dict()
    found = {}
    for name in ("fifo", "selfsort"):
        model = build(name)
        model.load_state_dict(weights)
        found[name] = propagate(model, frames, {1: [AnnotatedSlice(0, square())]})[1].logits
    assert torch.equal(found["fifo"][0], found["selfsort"][0])
    assert not torch.allclose(found["fifo"][2:], found["selfsort"][2:], atol=1e-4)


def test_a_slice_reads_the_bank_by_likeness_wherever_it_lies(frames):
    """Slice 9 is a copy of slice 3, which therefore is read before 4 to 8."""
    model, read = build("selfsort", bank_read=1), {}
    rule = SelfSort.long
    frames = frames * torch.linspace(0.1, 1, 12)[:, None, None, None]
    frames[9] = frames[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSort, "long", lambda self, at: read.setdefault(at.slice, rule(self, at)))
        propagate(model, frames, {1: [AnnotatedSlice(0, square())]})
    assert [s for s, _ in read[9].spatial] == [0, 3]


@pytest.mark.parametrize(("says", "reads"), [(0.2, [0]), (0.8, [0, 2, 1])])
def test_the_network_sends_confidence_through_its_table_before_the_bank_sees_it(frames, says, reads):
    """A table that says the same of every slice: either nothing but the anchor is read, or all that was tracked."""
    model, read = build("selfsort", bank_confidence=0.5), {}
    model.calibration, rule = table((0.0, says)), SelfSort.long
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSort, "long", lambda self, at: read.setdefault(at.slice, rule(self, at)))
        propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})
    assert sorted(s for s, _ in read[3].spatial) == sorted(reads)


@pytest.mark.parametrize("name", ["fifo", "shortlong"])
def test_policies_that_weigh_nothing_are_blind_to_the_table(frames, name):
    model = build(name)
    before = propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})[1]
    model.calibration = table((0.0, 0.2))
    after = propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})[1]
    assert torch.equal(before.logits, after.logits) and torch.equal(before.confidence, after.confidence)


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
@pytest.mark.parametrize("gate", [False, True])
def test_objects_tracked_together_learn_what_they_would_learn_alone(name, gate):
    """Objects of one clip may read different slices; batching must not mix them up."""
    model = build(name, object_score_gate=gate, bank_read=2, bank_slices=2)
    frames = torch.rand(6, 1, 3, PX, PX, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(6, 2, 1, PX, PX)
    masks[:, 0, :, 10:30, 10:30], masks[:, 1, :, 30:60, 20:40] = 1, 1
    window, reverse = torch.tensor([0, 0]), torch.tensor([False, True])
    together, sizes = [], []
    condition = SlmSam2._fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlmSam2, "_fused", lambda self, f, *rest: sizes.append(len(f.top)) or condition(self, f, *rest))
        together = clip_losses(model, Clips(frames, masks, window, reverse, 20), torch.device("cpu"))
    assert (1 in sizes) == ("selfsort" in name), "only the bank's choice differs between these two"
    alone = [
        clip_losses(model, Clips(frames, masks[:, i : i + 1], window[i : i + 1], reverse[i : i + 1], 20), torch.device("cpu"))
        for i in (0, 1)
    ]
    for both, first, second in zip(together, *alone):
        assert float(both.total.detach()) == pytest.approx(float((first.total + second.total).detach()) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
def test_every_policy_sends_gradients_to_memory(name):
    model = build(name).train()
    masks = torch.zeros(4, 1, 1, PX, PX)
    masks[..., 10:30, 10:30] = 1
    clips = Clips(torch.rand(4, 1, 3, PX, PX), masks, torch.tensor([0]), torch.tensor([False]), 20)
    torch.stack([loss.total for loss in clip_losses(model, clips, torch.device("cpu"))]).mean().backward()
    parts = [model.memory_attention, model.memory_encoder, *([model.stream_fuser] if model.network.has_short_stream else [])]
    assert all(any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters()) for part in parts)


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_volume_of_one_slice_and_one_of_two_work_under_every_policy(name, shared_memory, frames):
    model = build(name, shared_memory=shared_memory, object_score_gate=True)
    alone = propagate(model, frames[:1], {1: [AnnotatedSlice(0, square())]})[1]
    pair = propagate(model, frames[:2], {1: [AnnotatedSlice(1, square())]})[1]
    assert alone.confidence.tolist() == [1.0] and pair.confidence[1] == 1
    assert torch.isfinite(pair.logits).all()


def test_writing_a_slice_again_makes_it_the_newest():
    bank = MemoryBank(tracked={1: "old", 2: "two"})
    bank.write(1, "new")
    assert bank.tracked == {2: "two", 1: "new"} and list(bank.tracked) == [2, 1]
