"""Block matching of shifted images, and foreground likelihood by histograms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.model.block_matching import foreground_likelihood, warp_to_slice

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
def test_a_mask_is_warped_by_the_shift_of_its_slice_to_within_two_pixels(down, across, seed):
    image = pattern(seed)
    found = warp_to_slice(window(image, down, across), window(image), block())
    assert (centre(found) - centre(block(24 + down, 24 + across))).abs().max() <= 2  # matched in steps of 4 px


def test_a_mask_stays_in_place_on_an_identical_slice():
    image = window(pattern())
    assert overlap((warp_to_slice(image, image, block()) > 0.5).float(), block()) == 1.0


def test_a_mask_stays_in_place_on_constant_intensities():
    flat = torch.full((1, 1, PX, PX), 0.5)
    assert overlap((warp_to_slice(flat, flat, block()) > 0.5).float(), block()) == 1.0


def one_displacement_at_a_time(here, before):
    """Warp the slices `before` (B, 1, 32, 32) to `here` by the definition: one cost per displacement, then their softmax."""
    one, around = F.avg_pool2d(here, 2), F.pad(F.avg_pool2d(before, 2), (3, 3, 3, 3), mode="replicate")
    costs, steps = [], [(y, x) for y in range(-3, 4) for x in range(-3, 4)]
    for y, x in steps:
        shifted = around[..., 3 + y : 19 + y, 3 + x : 19 + x]
        costs.append(F.avg_pool2d(F.avg_pool2d((shifted - one) ** 2, 2), 3, 1, 1, count_include_pad=False))
    scale = costs[24].mean((1, 2, 3), keepdim=True)  # of the displacement by nothing
    weight = torch.stack([-60 * cost / scale - 0.6 * (y * y + x * x) for cost, (y, x) in zip(costs, steps)]).softmax(0)
    flow = [sum(weight[i] * steps[i][axis] for i in range(49)) for axis in (0, 1)]
    flow = torch.cat([F.avg_pool2d(part, 3, 1, 1, count_include_pad=False) for part in flow], dim=1)
    down, across = (2 * F.interpolate(flow, scale_factor=4.0, mode="bilinear", align_corners=False)).unbind(1)
    place = (torch.arange(32) * 2 + 1) / 32 - 1
    grid = torch.stack([place[None, None, :] + across / 16, place[None, :, None] + down / 16], dim=-1)
    return F.grid_sample(before, grid, mode="bilinear", padding_mode="border", align_corners=False)


@pytest.mark.parametrize("batch", [1, 3])
def test_matching_all_displacements_at_once_gives_the_result_of_one_at_a_time(batch):
    here, before = torch.rand(2, batch, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(warp_to_slice(here, before, before), one_displacement_at_a_time(here, before), atol=1e-5)
    assert not torch.allclose(warp_to_slice(here, before, before), before, atol=0.1)


def test_every_slice_of_a_batch_is_warped_independently():
    image, other = pattern(0), pattern(1)
    here, before = torch.cat([window(image, 4), window(other)]), torch.cat([window(image), window(other)])
    found = (warp_to_slice(here, before, block(batch=2)) > 0.5).float()
    assert (centre(found[:1]) - centre(block(28))).abs().max() <= 2 and overlap(found[1:], block()) == 1.0


def test_intensities_of_the_inside_are_likely_foreground_and_those_of_the_outside_are_not():
    known = torch.where(block() > 0, 0.8, 0.2)
    here = torch.where(block(8, 8) > 0, 0.8, 0.2)
    found = foreground_likelihood(here, known, block())
    assert found[..., 10:22, 10:22].min() > 0.95 and found[..., 40:, 40:].max() < 0.05


def test_intensities_as_frequent_inside_as_outside_have_likelihood_one_half():
    image = window(pattern()).clamp(0, 1)
    half = torch.zeros(1, 1, PX, PX)
    half[..., ::2, :] = 1  # every second row, so both sides have the same intensities
    assert (foreground_likelihood(image, image, half) - 0.5).abs().mean() < 0.1


def test_an_intensity_without_observations_has_likelihood_one_half():
    known = torch.where(block() > 0, 0.5, 0.1)
    assert float(foreground_likelihood(torch.full((1, 1, PX, PX), 0.95), known, block()).mean()) == pytest.approx(0.5, abs=0.01)


def test_several_known_slices_share_one_histogram():
    bright, dark = (torch.where(block() > 0, inside, 0.5) for inside in (0.9, 0.1))
    both, masks = torch.cat([bright, dark], dim=2), torch.cat([block(), block()], dim=2)
    for value in (0.9, 0.1):
        assert float(foreground_likelihood(torch.full((1, 1, PX, PX), value), both, masks).mean()) > 0.95


def test_an_empty_mask_makes_no_intensity_likely_foreground():
    image = window(pattern()).clamp(0, 1)
    assert float(foreground_likelihood(image, image, torch.zeros(1, 1, PX, PX)).max()) <= 0.5
