"""Which channels meet in a colour before anything was learned."""

import pytest

from slmsam2_cli.planning.plan import MOST_CHANNELS, groups


@pytest.mark.parametrize(
    ("channels", "together"),
    [(4, [[0, 1], [2], [3]]), (5, [[0, 1], [2, 3], [4]]), (6, [[0, 1], [2, 3], [4, 5]]), (7, [[0, 1, 2], [3, 4], [5, 6]])],
)
def test_neighbours_share_a_colour_and_the_first_colours_take_one_more(channels, together):
    assert [list(group) for group in groups(channels)] == together


@pytest.mark.parametrize("channels", range(4, MOST_CHANNELS + 1))
def test_every_channel_is_in_exactly_one_group(channels):
    assert [index for group in groups(channels) for index in group] == list(range(channels))
