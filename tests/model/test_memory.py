"""Which slices a slice looks at: answers that follow from the definitions alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import MemoryScores, ReadContext
from slmsam2_cli.model.memory.registry import build_policy
from slmsam2_cli.model.memory.shortlong import ShortLong
from slmsam2_cli.planning.plan import NetworkPlan

SPATIAL, PER_POINTER = 4096, 4
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images"


def moment(slice_, tracked=(), anchors=(0,), step=1, slices=100, evidence=None):
    return ReadContext(slice_, step, anchors, tracked, slices, evidence or MemoryScores())


def seen(object_score, confidence=1.0):
    """Memory scores of slices by their object score logits, all equally confident."""
    return MemoryScores(dict(object_score), dict.fromkeys(object_score, confidence))


def test_the_first_tracked_slice_sees_the_anchor_in_the_last_row_and_its_pointer():
    (long,) = Fifo().read(moment(1))
    assert long.spatial == ((0, 6),)
    assert long.pointers == ((0, 1),)


def test_the_oldest_of_six_tracked_slices_has_row_five_and_the_newest_row_zero():
    (long,) = Fifo().read(moment(10, tracked=range(1, 10)))
    assert long.spatial == ((0, 6), (4, 5), (5, 4), (6, 3), (7, 2), (8, 1), (9, 0))


def test_a_missing_slice_is_dropped_and_keeps_no_place():
    (long,) = Fifo().read(moment(5, tracked=(2, 4)))
    assert long.spatial == ((0, 6), (2, 2), (4, 0))


def test_backwards_the_same_rows_are_read_from_the_other_side():
    (long,) = Fifo().read(moment(7, tracked=(8, 9), anchors=(10,), step=-1))
    assert long.spatial == ((10, 6), (9, 1), (8, 0))
    assert long.pointers == ((10, 3), (8, 1), (9, 2))


def test_an_anchor_ahead_is_seen_but_its_pointer_is_not():
    (long,) = Fifo().read(moment(5, anchors=(0, 20)))
    assert [s for s, _ in long.spatial] == [0, 20]
    assert long.pointers == ((0, 5),)


def test_pointers_reach_back_fifteen_slices_in_a_long_volume_and_n_minus_one_in_a_short_one():
    (long,) = Fifo().read(moment(40, tracked=range(1, 40)))
    assert [d for _, d in long.pointers[1:]] == list(range(1, 16))
    (short,) = Fifo().read(moment(5, tracked=range(1, 5), slices=4))
    assert [d for _, d in short.pointers[1:]] == [1, 2, 3]


def test_the_short_stream_sees_the_slice_just_passed_in_row_zero():
    long, short = ShortLong().read(moment(5, tracked=range(1, 5)))
    assert short.spatial == ((4, 0),) and short.pointers == ((4, 1),)
    assert long == Fifo().read(moment(5, tracked=range(1, 5)))[0]


def test_the_short_stream_falls_back_to_the_anchor():
    _, short = ShortLong().read(moment(1))
    assert short.spatial == ((0, 0),)


def test_token_counts_of_an_eight_slice_clip_are_those_of_the_paper():
    for i in range(1, 8):
        long, short = ShortLong().read(moment(i, tracked=range(1, i), slices=8))
        assert long.tokens(SPATIAL, PER_POINTER) == 4100 * min(i, 7)
        assert short.tokens(SPATIAL, PER_POINTER) == 4100


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_the_short_stream_may_be_longer_and_reads_the_nearest_row_first_in_time(slices):
    _, short = ShortLong(short=slices).read(moment(9, tracked=range(1, 9)))
    assert short.spatial == tuple((9 - k, k - 1) for k in range(slices, 0, -1))
    assert short.pointers == tuple((9 - k, k) for k in range(1, slices + 1))


def test_certainty_is_zero_for_an_absent_object_and_the_confidence_for_a_surely_present_one():
    told = MemoryScores({1: -3.0, 2: 0.0, 3: 100.0, 4: 1.0}, {1: 1.0, 2: 1.0, 3: 0.75, 4: 0.5})
    assert [told.certainty(s) for s in (1, 2, 3)] == [0.0, 0.0, 0.75]
    assert told.certainty(4) == pytest.approx((2 / (1 + 2.718281828**-1) - 1) / 2)


def test_behind_the_gate_empty_slices_are_not_read_and_the_others_keep_their_rows():
    evidence = seen({0: 10.0, 1: 5.0, 2: -5.0, 3: 5.0, 4: 5.0})
    (long,) = Fifo(object_score_gate=True).read(moment(5, tracked=(1, 2, 3, 4), evidence=evidence))
    assert long.spatial == ((0, 6), (1, 3), (3, 1), (4, 0))
    assert long.pointers == ((0, 5), (4, 1), (3, 2), (1, 4))


def test_the_slice_just_passed_is_read_even_when_it_is_empty_and_so_is_the_anchor():
    evidence = seen({0: -10.0, 1: -5.0, 2: -5.0})
    long, short = ShortLong(Fifo(object_score_gate=True)).read(moment(3, tracked=(1, 2), evidence=evidence))
    assert long.spatial == ((0, 6), (2, 0))
    assert short.spatial == ((2, 0),)


def test_the_gate_lies_at_a_certainty_of_one_in_a_hundred():
    evidence = MemoryScores({0: 10.0, 1: 100.0, 2: 100.0, 3: 100.0}, {0: 1.0, 1: 0.01, 2: 0.011, 3: 0.0})
    (long,) = Fifo(object_score_gate=True).read(moment(4, tracked=(1, 2, 3), evidence=evidence))
    assert [s for s, _ in long.spatial] == [0, 2, 3]


def test_without_the_gate_no_evidence_is_asked_for():
    assert not Fifo().needs_scores and not ShortLong().needs_scores
    assert Fifo(object_score_gate=True).needs_scores and ShortLong(Fifo(object_score_gate=True)).needs_scores


def test_what_no_slice_will_read_is_not_kept():
    assert Fifo().keep(moment(99, tracked=range(100))) == list(range(83, 100))
    assert ShortLong().keep(moment(0, tracked=range(100), step=-1)) == list(range(17))


@pytest.mark.parametrize("policy", [Fifo(), ShortLong(), Fifo(memories=3, pointers=2), ShortLong(short=3)])
@pytest.mark.parametrize("step", [1, -1])
def test_what_is_forgotten_would_never_have_been_read(policy, step):
    path = range(60) if step > 0 else range(59, -1, -1)
    everything, kept = [], []
    for t in path:
        assert policy.read(moment(t, everything, (30,), step)) == policy.read(moment(t, kept, (30,), step))
        everything.append(t)
        kept = list(policy.keep(moment(t, [*kept, t], (30,), step)))
        assert len(kept) <= 17


def test_shared_memory_the_first_slices_of_the_way_back_still_find_what_the_way_out_has_written():
    shared_memory, kept = Fifo(shared_memory=True), []
    for t in range(31, 100):
        kept = shared_memory.keep(moment(t, [*kept, t], anchors=(30,)))
    (long,) = shared_memory.read(moment(29, kept, (30,), step=-1))
    assert long.spatial == ((30, 6), (35, 5), (34, 4), (33, 3), (32, 2), (31, 1))
    assert long.pointers == ((30, 1), *((29 + k, k) for k in range(2, 16)))
    assert len(kept) == 16 + 17


@pytest.mark.parametrize("name", ["fifo", "shortlong", "selfsort", "shortlong+selfsort"])
def test_a_plan_names_its_policy_and_hands_on_its_options(name):
    policy = build_policy(NetworkPlan(policy=name, object_score_gate=True, shared_memory=True), 7, 16)
    assert policy.name == name and policy.needs_scores and policy.shared_memory
    assert not build_policy(NetworkPlan(policy=name), 7, 16).shared_memory


def test_a_plan_writes_only_options_that_somebody_changed():
    assert NetworkPlan(policy="selfsort", bank_read=3).model_dump() == {
        "size": "nano",
        "policy": "selfsort",
        "fuser": "gated",
        "bank_read": 3,
    }
    written = NetworkPlan(shared_memory=True).model_dump_json()
    assert NetworkPlan.model_validate_json(written) == NetworkPlan(shared_memory=True)


def test_the_pictures_in_the_documentation_show_what_the_rules_do(tmp_path):
    script = PICTURES.parents[1] / "benchmarks" / "memory_pictures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {name: (PICTURES / name).read_text() for name in drawn} and len(drawn) == 3
