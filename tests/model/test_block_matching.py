"""What is known without learning: where a pattern has moved to, and which grey values go with the inside."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.model.block_matching import foreground_likelihood, moved

PX = 64


def pattern(seed=0, batch=1):
    """Noise that is smooth over a few pixels, as tissue is, with room to be shifted in."""
    noise = torch.rand(batch, 1, PX // 4 + 8, PX // 4 + 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, scale_factor=4.0, mode="bicubic", align_corners=False)


def window(image, down=0, across=0):
    return image[..., 16 - down : 16 - down + PX, 16 - across : 16 - across + PX]


def block(top=24, left=24, edge=16, batch=1):
    mask = torch.zeros(batch, 1, PX, PX)
    mask[..., top : top + edge, left : left + edge] = 1
    return mask


def overlap(one, other):
    return float((one * other).sum() / torch.maximum(one, other).sum())


def centre(mask):
    """(row, column) of a mask's middle."""
    return (mask[0, 0] > 0.5).nonzero().float().mean(dim=0)


@settings(max_examples=25)
@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 100))
def test_a_mask_goes_where_its_slice_has_moved_to_within_half_of_the_places_that_are_matched(down, across, seed):
    image = pattern(seed)
    found = moved(window(image, down, across), window(image), block())
    assert (centre(found) - centre(block(24 + down, 24 + across))).abs().max() <= 2  # a place is 4 px


def test_a_mask_stays_on_a_slice_that_is_the_same():
    image = window(pattern())
    assert overlap((moved(image, image, block()) > 0.5).float(), block()) == 1.0


def test_a_mask_stays_where_there_is_nothing_to_go_by():
    flat = torch.full((1, 1, PX, PX), 0.5)
    assert overlap((moved(flat, flat, block()) > 0.5).float(), block()) == 1.0


@pytest.mark.parametrize("batch", [1, 3])
def test_displacements_are_matched_as_if_one_by_one_bit_by_bit(batch, monkeypatch):
    here, before = torch.rand(2, batch, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(
        "slmsam2_cli.model.block_matching._averaged", lambda planes: seen.append(planes.clone()) or F.avg_pool2d(planes, 3, 1, 1)
    )
    moved(here, before, before)
    one, around = F.avg_pool2d(here, 2), F.pad(F.avg_pool2d(before, 2), (3, 3, 3, 3), mode="replicate")
    apart = [F.avg_pool2d((around[..., y : y + 16, x : x + 16] - one) ** 2, 2) for y in range(7) for x in range(7)]
    assert torch.equal(seen[0], torch.cat(apart, dim=1)) and seen[0].is_contiguous()


def test_every_slice_moves_by_itself():
    image, other = pattern(0), pattern(1)
    here, before = torch.cat([window(image, 4), window(other)]), torch.cat([window(image), window(other)])
    found = (moved(here, before, block(batch=2)) > 0.5).float()
    assert (centre(found[:1]) - centre(block(28))).abs().max() <= 2 and overlap(found[1:], block()) == 1.0


def test_grey_values_of_the_inside_are_likely_and_those_of_the_outside_are_not():
    known = torch.where(block() > 0, 0.8, 0.2)
    here = torch.where(block(8, 8) > 0, 0.8, 0.2)
    found = foreground_likelihood(here, known, block())
    assert found[..., 10:22, 10:22].min() > 0.95 and found[..., 40:, 40:].max() < 0.05


def test_what_is_inside_as_often_as_outside_is_neither():
    image = window(pattern()).clamp(0, 1)
    half = torch.zeros(1, 1, PX, PX)
    half[..., ::2, :] = 1  # every second row, so both sides see the same grey values
    assert (foreground_likelihood(image, image, half) - 0.5).abs().mean() < 0.1


def test_a_grey_value_that_was_never_seen_says_nothing():
    known = torch.where(block() > 0, 0.5, 0.1)
    assert float(foreground_likelihood(torch.full((1, 1, PX, PX), 0.95), known, block()).mean()) == pytest.approx(0.5, abs=0.01)


def test_several_known_slices_are_taken_together():
    bright, dark = (torch.where(block() > 0, inside, 0.5) for inside in (0.9, 0.1))
    both, masks = torch.cat([bright, dark], dim=2), torch.cat([block(), block()], dim=2)
    for value in (0.9, 0.1):
        assert float(foreground_likelihood(torch.full((1, 1, PX, PX), value), both, masks).mean()) > 0.95


def test_a_mask_that_covers_nothing_makes_nothing_likely():
    image = window(pattern()).clamp(0, 1)
    assert float(foreground_likelihood(image, image, torch.zeros(1, 1, PX, PX)).max()) <= 0.5
