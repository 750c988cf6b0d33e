"""Random numbers and smooth fields: their ranges, shares and variances."""

from __future__ import annotations

import torch

from slmsam2_cli.pretraining.random_fields import Draw, smooth_field


def draw(seed: int = 0) -> Draw:
    return Draw(torch.Generator().manual_seed(seed))


def test_uniform_numbers_stay_in_their_range() -> None:
    values = draw().uniform((2.0, 3.0), 1000)
    assert values.min() >= 2 and values.max() <= 3


def test_every_doubling_is_equally_likely() -> None:
    values = draw().log_uniform((1.0, 4.0), 4000)
    assert values.min() >= 1 and values.max() <= 4
    assert abs((values < 2).float().mean() - 0.5) < 0.03


def test_indices_are_drawn_in_proportion_to_their_shares() -> None:
    counts = draw().categorical([1.0, 0.0, 3.0], 4000).bincount(minlength=3)
    assert counts[1] == 0 and abs(counts[2] / 4000 - 0.75) < 0.03


def test_a_generator_on_the_device_is_used_directly() -> None:
    rng = torch.Generator()
    assert Draw.on(torch.device("cpu"), rng).rng is rng


def test_a_field_has_unit_variance_everywhere() -> None:
    field = smooth_field(draw(), 2, torch.full((300,), 0.5), 1, 4, 16)
    assert field.shape == (2, 300, 1, 16, 16)
    assert (field.std(dim=1) - 1).abs().max() < 0.25


def test_a_field_of_rate_0_is_the_same_on_all_slices() -> None:
    field = smooth_field(draw(), 3, torch.zeros(2), 1, 4, 16)
    assert torch.equal(field[0], field[2])


def test_adjacent_pixels_of_a_coarse_field_hardly_differ() -> None:
    field = smooth_field(draw(), 1, torch.zeros(50), 1, 3, 64)
    assert field.diff(dim=-1).std() < 0.1
