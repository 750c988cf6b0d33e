"""MedSAM-2's self-sorting bank: which slices enter, leave and are read. First the rules alone, then in the network."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from slmsam2_cli.inference.propagation import AnnotatedSlice, propagate
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import Checkpoint, load_weights
from slmsam2_cli.model.memory.features import memory_scores, object_stats, similarity
from slmsam2_cli.model.memory.interface import MemoryScores, ReadContext
from slmsam2_cli.model.memory.selfsort import POINTER_DISTANCE, SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLongSelfSort
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan
from slmsam2_cli.training.clips import Clips
from slmsam2_cli.training.trainer import clip_losses

ANNOTATED, PX = 0, 64


def context(slice_, *stored, step=1, at=None):
    """A context with one conditioning slice and stored slices (index, object score, confidence, angle in degrees).

    Objects are points on a circle: similarity is the cosine of the angle between them. The conditioning slice lies at 0 degrees, the
    current slice at `at`.
    """
    angles = {ANNOTATED: 0.0} | {s: angle for s, _, _, angle in stored}
    cosine = {(a, b): torch.tensor(angles[a] - angles[b]).deg2rad().cos().item() for a in angles for b in angles}
    to_query = {s: torch.tensor(angle - at).deg2rad().cos().item() for s, angle in angles.items()} if at is not None else {}
    object_score, confidence = {ANNOTATED: 10.0} | {s: p for s, p, _, _ in stored}, {ANNOTATED: 1.0} | {s: c for s, _, c, _ in stored}
    return ReadContext(slice_, step, (ANNOTATED,), [s for s, *_ in stored], 100, MemoryScores(object_score, confidence, to_query, cosine))


def test_only_slices_with_the_object_of_high_confidence_and_similarity_enter():
    absent, unsure, unlike, just_so, good = (1, -0.1, 1.0, 0), (2, 5.0, 0.49, 0), (3, 5.0, 1.0, 61), (4, 0.1, 0.5, 59.9), (5, 5.0, 0.9, 10)
    assert SelfSort().members(context(6, absent, unsure, unlike, just_so, good)) == [4, 5]


def test_with_the_object_score_gate_a_slice_needs_a_certainty_above_0_01_to_enter():
    barely, well = (1, 0.01, 1.0, 0), (2, 0.1, 1.0, 0)
    assert SelfSort(object_score_gate=True).members(context(3, barely, well)) == [2]
    assert SelfSort().members(context(3, barely, well)) == [1, 2]


def table(*knots):
    """A calibration from confidence to Dice, given as pairs."""
    raw, expected = zip(*knots, strict=True)
    return Calibration(method="isotonic", confidence=raw, dice=expected, slices=99, error_before=0.3, error_after=0.1)


def calibrated(at, calibration):
    """The context with calibrated confidence of its tracked slices."""
    return replace(at, scores=at.scores.calibrated(at.tracked, calibration))


def test_calibration_decides_which_slices_enter():
    sure, unsure = context(2, (1, 50.0, 0.9, 0)), context(2, (1, 50.0, 0.3, 0))
    assert SelfSort().members(sure) == [1] and SelfSort().members(unsure) == []
    assert SelfSort().members(calibrated(sure, table((0.0, 0.0), (0.9, 0.2)))) == []
    assert SelfSort().members(calibrated(unsure, table((0.3, 0.8), (1.0, 1.0)))) == [1]
    assert ShortLongSelfSort().keep(calibrated(context(2, (1, 50.0, 0.9, 0), (2, 50.0, 0.9, 0)), table((0.9, 0.2)))) == [2]


def test_calibration_looks_up_object_score_probability_times_predicted_iou():
    """At a logit of 0 the object is there with probability one half, so 0.8 counts as 0.4; annotated slices are not calibrated."""
    scores = calibrated(context(2, (1, 0.0, 0.8, 0)), table((0.4, 0.1), (0.8, 0.9))).scores
    assert scores.confidence == {ANNOTATED: 1.0, 1: pytest.approx(0.1)}
    assert context(2, (1, -1000.0, 0.8, 0)).scores.calibrated([1], table((0.0, 0.05), (1.0, 1.0))).confidence[1] == 0.05


def test_the_gate_uses_calibrated_confidence():
    """Certainty has to exceed 0.01."""
    at = context(9, (1, 50.0, 0.9, 0), (2, 50.0, 0.005, 0), (8, 50.0, 0.9, 0))
    assert list(at.drop_uncertain().tracked) == [1, 8]
    assert list(calibrated(at, table((0.005, 0.5), (0.9, 0.6))).drop_uncertain().tracked) == [1, 2, 8]
    assert list(calibrated(at, table((0.9, 0.005))).drop_uncertain().tracked) == [8]


def test_the_most_redundant_slice_leaves_a_full_bank():
    """At 0, 10 and 40 degrees the one in the middle is nearest to the others."""
    assert SelfSort(capacity=2).members(context(4, (1, 5.0, 0.9, 0), (2, 5.0, 0.9, 10), (3, 5.0, 0.9, 40))) == [1, 3]


@pytest.mark.parametrize("order", list(permutations([(1, 5.0, 0.9, 0), (2, 5.0, 0.8, 0), (3, 5.0, 0.9, 0)])))
def test_of_equally_redundant_slices_the_least_confident_leaves_in_any_order(order):
    assert sorted(SelfSort(capacity=2).members(context(4, *order))) == [1, 3]


def test_of_equally_redundant_and_confident_slices_the_higher_index_leaves():
    assert SelfSort(capacity=2).members(context(9, *[(s, 5.0, 0.9, 20) for s in (1, 2, 3, 4)])) == [1, 2]


def test_conditioning_slices_are_always_read_and_then_the_most_similar_first():
    slices = [(1, 5.0, 0.9, 50), (2, 5.0, 0.9, 20), (3, 5.0, 0.9, 40), (4, 5.0, 0.9, -50)]
    (read,) = SelfSort(nearest=2).read(context(5, *slices, at=45))
    assert [s for s, _ in read.spatial] == [ANNOTATED, 1, 3]


def test_equally_similar_slices_are_read_by_confidence_and_then_by_index():
    slices = [(1, 5.0, 0.7, 20), (2, 5.0, 0.9, 20), (3, 5.0, 0.7, 20)]
    (read,) = SelfSort().read(context(5, *slices, at=30))
    assert [s for s, _ in read.spatial] == [ANNOTATED, 2, 1, 3]


def test_the_bank_ignores_the_order_of_slices():
    near_in_time = SelfSort().read(context(3, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 30), at=25))[0]
    far_in_time = SelfSort().read(context(99, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 30), at=25, step=-1))[0]
    assert near_in_time == far_in_time
    assert {row for _, row in near_in_time.spatial} == {6}
    assert {distance for _, distance in near_in_time.pointers} == {POINTER_DISTANCE}


def test_deleting_slices_that_left_the_bank_does_not_change_it():
    policy, generator = SelfSort(capacity=4), torch.Generator().manual_seed(0)
    draws = torch.rand(40, 3, generator=generator).tolist()
    stored = [(t + 1, 4 * p - 1, c, 80 * a) for t, (p, c, a) in enumerate(draws)]
    kept = []
    for i, one in enumerate(stored):
        everything = context(one[0], *stored[: i + 1])
        remembered = context(one[0], *kept, one)
        assert policy.members(remembered) == policy.members(everything)
        kept = [s for s in (*kept, one) if s[0] in policy.keep(remembered)]
        assert len(kept) <= 4 + 1


def test_with_a_short_memory_the_previous_slice_is_read_in_row_zero_whatever_its_scores():
    long, short = ShortLongSelfSort().read(context(3, (1, 5.0, 0.9, 20), (2, -9.0, 0.0, 90), at=20))
    assert [s for s, _ in long.spatial] == [ANNOTATED, 1]
    assert short.spatial == ((2, 0),) and short.pointers == ((2, 1),)


def test_without_an_order_of_slices_the_short_memory_reads_the_most_similar_one():
    _, short = ShortLongSelfSort().read(context(3, (1, 5.0, 0.9, 20), (2, 5.0, 0.9, 40), step=0, at=30.1))
    assert short.spatial == ((2, 0),)


def test_with_a_short_memory_the_previous_slice_is_kept():
    assert ShortLongSelfSort().keep(context(2, (1, 5.0, 0.9, 20), (2, -9.0, 0.0, 90))) == [1, 2]
    assert ShortLongSelfSort(min_confidence=1.0, short=2).keep(context(3, *[(s, 5.0, 0.5, 0) for s in (1, 2, 3)])) == [2, 3]


def test_the_vector_of_an_object_is_the_mean_embedding_over_its_mask():
    top, cover = torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 4, 4)
    top[0, 0, 0, 0], top[0, 1, 0, 1], top[0, :, 1] = 3.0, 4.0, 100.0
    cover[..., :2, :] = 1  # the two positions of the upper row: their mean is (1.5, 2)
    stats = object_stats(top, cover, torch.ones(1, 1), torch.tensor([1.5]))
    assert stats.vector.tolist() == [pytest.approx([0.6, 0.8])]
    assert stats.area.tolist() == [2.0] and stats.confidence.tolist() == [1.0]


def test_an_empty_mask_has_similarity_0_to_everything():
    stats = object_stats(torch.rand(1, 8, 2, 2), torch.zeros(1, 1, 8, 8), -torch.ones(1, 1), torch.ones(1))
    scores = memory_scores({0: stats, 1: stats}, 0, torch.rand(1, 8, 2, 2))
    assert set(scores.pairwise_similarity.values()) == {0.0} and set(scores.query_similarity.values()) == {0.0}


def test_similarity_to_a_slice_averages_as_many_positions_as_the_object_covers():
    top = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])[:, :, None]  # cosines with (1, 0): 1, 0, -1
    found = similarity(torch.tensor([[1.0, 0.0]]).expand(4, -1), torch.tensor([0.2, 1.0, 2.0, 9.0]), top)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_scores_are_not_rounded_under_bfloat16_autocast():
    stats = {s: object_stats(torch.rand(1, 64, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1), torch.ones(1)) for s in range(3)}
    top = torch.rand(1, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        halved = memory_scores(stats, 0, top)
    assert halved == memory_scores(stats, 0, top)


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


def test_a_new_gated_short_stream_does_not_change_the_bank_policy(frames):
    alone, both = build("selfsort"), build("shortlong+selfsort")
    load_weights(both, Checkpoint("selfsort", alone.state_dict(), digest=""))
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


def test_a_slice_reads_the_most_similar_slice_of_the_bank_at_any_distance(frames):
    """Slice 9 is a copy of slice 3, which therefore is read before 4 to 8."""
    model, read = build("selfsort", bank_read=1), {}
    rule = SelfSort.read
    frames = frames * torch.linspace(0.1, 1, 12)[:, None, None, None]
    frames[9] = frames[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSort, "read", lambda self, at: read.setdefault(at.slice, rule(self, at)))
        propagate(model, frames, {1: [AnnotatedSlice(0, square())]})
    assert [s for s, _ in read[9][0].spatial] == [0, 3]


@pytest.mark.parametrize(("dice", "reads"), [(0.2, [0]), (0.8, [0, 2, 1])])
def test_the_network_calibrates_confidence_before_the_policy_reads_it(frames, dice, reads):
    """With the same Dice for every slice, either the conditioning slice alone is read, or every tracked slice too."""
    model, read = build("selfsort", bank_confidence=0.5), {}
    model.calibration, rule = table((0.0, dice)), SelfSort.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfSort, "read", lambda self, at: read.setdefault(at.slice, rule(self, at)))
        propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})
    assert sorted(s for s, _ in read[3][0].spatial) == sorted(reads)


@pytest.mark.parametrize("name", ["fifo", "shortlong"])
def test_policies_without_scores_ignore_the_calibration(frames, name):
    model = build(name)
    before = propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})[1]
    model.calibration = table((0.0, 0.2))
    after = propagate(model, frames[:4], {1: [AnnotatedSlice(0, square())]})[1]
    assert torch.equal(before.logits, after.logits) and torch.equal(before.confidence, after.confidence)


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
@pytest.mark.parametrize("gate", [False, True])
def test_objects_of_a_batch_have_the_losses_that_they_have_alone(name, gate):
    """The first and the third of three objects are the same, and read other slices of the bank than the second."""
    model = build(name, object_score_gate=gate, bank_read=2, bank_slices=2)
    frames = torch.rand(6, 1, 3, PX, PX, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(6, 3, 1, PX, PX)
    masks[:, ::2, :, 10:30, 10:30], masks[:, 1, :, 30:60, 20:40] = 1, 1
    window, reverse = torch.tensor([0, 0, 0]), torch.tensor([False, True, False])
    sizes = []
    hook = model.memory_attention.register_forward_pre_hook(lambda _, __, given: sizes.append(given["curr"][0].shape[1]), with_kwargs=True)
    together = clip_losses(model, Clips(frames, masks, window, reverse, 20), torch.device("cpu"))
    hook.remove()
    assert (1 in sizes) == ("selfsort" in name), "only the bank's choice differs between objects"
    first, second = [
        clip_losses(model, Clips(frames, masks[:, i : i + 1], window[i : i + 1], reverse[i : i + 1], 20), torch.device("cpu"))
        for i in (0, 1)
    ]
    for all_three, one, other in zip(together, first, second):
        assert float(all_three.total.detach()) == pytest.approx(float((2 * one.total + other.total).detach()) / 3, rel=1e-4)


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
