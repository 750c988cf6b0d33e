"""Memory policies without weights: which slices each policy reads and keeps, by definition."""

import subprocess
import sys
from pathlib import Path

import pytest

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.interface import MemoryScores, ReadContext
from slmsam2_cli.model.memory.registry import POLICIES, build_policy
from slmsam2_cli.model.memory.shortlong import ShortLong
from slmsam2_cli.planning import plan as planning
from slmsam2_cli.planning.plan import NetworkPlan

PICTURES = Path(__file__).resolve().parents[3] / "docs" / "images"


def context(slice_, tracked=(), conditioning=(0,), step=1, slices=100, scores=None):
    return ReadContext(slice_, step, conditioning, tracked, slices, scores or MemoryScores())


def scores_of(object_score, confidence=1.0):
    """Scores of slices by their object score logits, all equally confident."""
    return MemoryScores(dict(object_score), dict.fromkeys(object_score, confidence))


def test_the_first_tracked_slice_reads_the_conditioning_slice_in_the_last_row_and_its_pointer():
    (long,) = Fifo().read(context(1))
    assert long.spatial == ((0, 6),)
    assert long.pointers == ((0, 1),)


def test_the_oldest_of_six_tracked_slices_has_row_five_and_the_newest_row_zero():
    (long,) = Fifo().read(context(10, tracked=range(1, 10)))
    assert long.spatial == ((0, 6), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0))


def test_a_missing_slice_is_left_out_and_the_others_keep_their_rows():
    (long,) = Fifo().read(context(5, tracked=(2, 4)))
    assert long.spatial == ((0, 6), (2, 2), (4, 0))


def test_a_backward_pass_reads_the_same_rows_from_the_other_side():
    (long,) = Fifo().read(context(7, tracked=(8, 9), conditioning=(10,), step=-1))
    assert long.spatial == ((10, 6), (9, 1), (8, 0))
    assert long.pointers == ((10, 3), (8, 1), (9, 2))


def test_of_a_conditioning_slice_ahead_the_memory_is_read_but_not_the_pointer():
    (long,) = Fifo().read(context(5, conditioning=(0, 20)))
    assert [s for s, _ in long.spatial] == [0, 20]
    assert long.pointers == ((0, 5),)


def test_pointers_reach_back_fifteen_slices_in_a_long_volume_and_n_minus_one_in_a_short_one():
    (long,) = Fifo().read(context(40, tracked=range(1, 40)))
    assert [d for _, d in long.pointers[1:]] == list(range(1, 16))
    (short,) = Fifo().read(context(5, tracked=range(1, 5), slices=4))
    assert [d for _, d in short.pointers[1:]] == [1, 2, 3]


def test_the_short_memory_reads_the_previous_slice_in_row_zero():
    long, short = ShortLong().read(context(5, tracked=range(1, 5)))
    assert short.spatial == ((4, 0),) and short.pointers == ((4, 1),)
    assert long == Fifo().read(context(5, tracked=range(1, 5)))[0]


def test_next_to_the_conditioning_slice_the_short_memory_reads_it():
    _, short = ShortLong().read(context(1))
    assert short.spatial == ((0, 0),)


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_a_longer_short_memory_reads_slices_in_order_and_pointers_nearest_first(slices):
    _, short = ShortLong(short=slices).read(context(9, tracked=range(1, 9)))
    assert short.spatial == tuple((9 - k, k - 1) for k in range(slices, 0, -1))
    assert short.pointers == tuple((9 - k, k) for k in range(1, slices + 1))


def test_certainty_is_zero_for_an_absent_object_and_the_confidence_for_a_surely_present_one():
    scores = MemoryScores({1: -3.0, 2: 0.0, 3: 100.0, 4: 1.0}, {1: 1.0, 2: 1.0, 3: 0.75, 4: 0.5})
    assert [scores.certainty(s) for s in (1, 2, 3)] == [0.0, 0.0, 0.75]
    assert scores.certainty(4) == pytest.approx((2 / (1 + 2.718281828**-1) - 1) / 2)


def test_with_the_object_score_gate_empty_slices_are_not_read_and_the_others_keep_their_rows():
    scores = scores_of({0: 10.0, 1: 5.0, 2: -5.0, 3: 5.0, 4: 5.0})
    (long,) = Fifo(object_score_gate=True).read(context(5, tracked=(1, 2, 3, 4), scores=scores))
    assert long.spatial == ((0, 6), (1, 3), (3, 1), (4, 0))
    assert long.pointers == ((0, 5), (4, 1), (3, 2), (1, 4))


def test_the_gate_never_drops_the_previous_slice_or_a_conditioning_slice():
    scores = scores_of({0: -10.0, 1: -5.0, 2: -5.0})
    long, short = ShortLong(object_score_gate=True).read(context(3, tracked=(1, 2), scores=scores))
    assert long.spatial == ((0, 6), (2, 0))
    assert short.spatial == ((2, 0),)


def test_the_gate_drops_slices_of_certainty_0_01_and_less():
    scores = MemoryScores({0: 10.0, 1: 100.0, 2: 100.0, 3: 100.0}, {0: 1.0, 1: 0.01, 2: 0.011, 3: 0.0})
    (long,) = Fifo(object_score_gate=True).read(context(4, tracked=(1, 2, 3), scores=scores))
    assert [s for s, _ in long.spatial] == [0, 2, 3]


def test_fifo_and_shortlong_need_scores_only_with_the_gate():
    assert not Fifo().needs_scores and not ShortLong().needs_scores
    assert Fifo(object_score_gate=True).needs_scores and ShortLong(object_score_gate=True).needs_scores


def test_slices_out_of_reach_are_not_kept():
    assert Fifo().keep(context(99, tracked=range(100))) == list(range(83, 100))
    assert ShortLong().keep(context(0, tracked=range(100), step=-1)) == list(range(17))


@pytest.mark.parametrize("policy", [Fifo(), ShortLong(), Fifo(memories=3, pointers=2), ShortLong(short=3)])
@pytest.mark.parametrize("step", [1, -1])
def test_slices_that_are_not_kept_would_never_have_been_read(policy, step):
    path = range(60) if step > 0 else range(59, -1, -1)
    everything, kept = [], []
    for t in path:
        assert policy.read(context(t, everything, (30,), step)) == policy.read(context(t, kept, (30,), step))
        everything.append(t)
        kept = list(policy.keep(context(t, [*kept, t], (30,), step)))
        assert len(kept) <= 17


def test_with_shared_memory_the_backward_pass_reads_slices_of_the_forward_pass():
    shared_memory, kept = Fifo(shared_memory=True), []
    for t in range(31, 100):
        kept = shared_memory.keep(context(t, [*kept, t], conditioning=(30,)))
    (long,) = shared_memory.read(context(29, kept, (30,), step=-1))
    assert long.spatial == ((30, 6), (35, 5), (34, 4), (33, 3), (32, 2), (31, 1))
    assert long.pointers == ((30, 1), *((29 + k, k) for k in range(2, 16)))
    assert len(kept) == 16 + 17


def test_an_unknown_policy_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown memory policy 'longshort'. Known policies: fifo, shortlong, selfsort, shortlong\+selfsort"
    ):
        build_policy(NetworkPlan.model_construct(policy="longshort"), 7, 16)


def test_the_policies_of_a_plan_are_those_of_the_registry_with_the_same_streams():
    planned = {name: (streams.has_short_stream, streams.has_bank) for name, streams in planning.POLICY_STREAMS.items()}
    assert {name: (policy.has_short_stream, policy.has_bank) for name, policy in POLICIES.items()} == planned


@pytest.mark.parametrize("name", list(POLICIES))
def test_build_policy_builds_the_named_policy_with_the_plans_settings(name):
    policy = build_policy(NetworkPlan(policy=name, object_score_gate=True, shared_memory=True), 7, 16)
    assert policy.name == name and policy.needs_scores and policy.shared_memory
    assert not build_policy(NetworkPlan(policy=name), 7, 16).shared_memory


def test_a_network_plan_writes_only_the_settings_that_differ_from_their_default():
    assert NetworkPlan(policy="selfsort", bank_read=3).model_dump() == {
        "size": "nano",
        "policy": "selfsort",
        "fuser": "gated",
        "bank_read": 3,
    }
    written = NetworkPlan(shared_memory=True).model_dump_json()
    assert NetworkPlan.model_validate_json(written) == NetworkPlan(shared_memory=True)


def test_the_figures_in_the_documentation_are_up_to_date(tmp_path):
    script = PICTURES.parents[1] / "benchmarks" / "memory_pictures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {name: (PICTURES / name).read_text() for name in drawn} and len(drawn) == 3
