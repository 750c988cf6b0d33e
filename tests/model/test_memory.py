"""Which slices a slice looks at: answers that follow from the definitions alone."""

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.policy import Moment
from slmsam2_cli.model.memory.shortlong import ShortLong

SPATIAL, PER_POINTER = 4096, 4


def moment(slice_, tracked=(), anchors=(0,), step=1, slices=100):
    return Moment(slice_, step, anchors, tracked, slices)


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
