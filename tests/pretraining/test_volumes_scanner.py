"""From labels to grey values: what looks alike, what a scanner leaves alone, and who is followed."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from slmsam2_cli.pretraining.appearance import (
    CT,
    MR,
    PET,
    PIXELS,
    AppearanceRecipe,
    Looks,
    ScannerRecipe,
    Scanners,
    draw_appearance,
    draw_scanners,
    filled,
    scanned,
)
from slmsam2_cli.pretraining.random_fields import Draw
from slmsam2_cli.pretraining.volumes import SMALLEST_PX, VolumesRecipe, areas, choose

PERFECT = ScannerRecipe(
    noise=(1e-9, 1e-8), bias=(1e-9, 1e-8), unsteady=0.0, thick=0.0, streaks=0.0, ghosts=0.0, pixels=(0.0, 0.0, 1.0, 0.0, 0.0)
)


def draw() -> Draw:
    return Draw(torch.Generator().manual_seed(0))


def scanner(kind: int, pixels: float = 0.5) -> Scanners:
    return Scanners(torch.tensor([kind]), torch.tensor([PIXELS.index(pixels)]))


def test_labels_without_texture_have_their_grey_value() -> None:
    grey, none = torch.tensor([[0.0, 0.3, 0.8]]), torch.zeros(1, 3)
    labels = torch.tensor([0, 1, 2, 1], dtype=torch.uint8).view(1, 1, 2, 2)
    assert torch.equal(filled(draw(), Looks(grey, none, none, none), labels)[0, 0], torch.tensor([[0.0, 0.3], [0.8, 0.3]]))


def test_labels_that_are_alike_differ_by_the_jitter_alone() -> None:
    recipe = AppearanceRecipe(jitter=(0.01, 0.01))
    alike = torch.arange(8).repeat(500, 1)
    alike[:, 7] = 5
    looks = draw_appearance(recipe, draw(), torch.full((500,), MR), alike, tissues=3, first=4)
    assert float((looks.grey[:, 7] - looks.grey[:, 5]).std()) == pytest.approx(0.01 * 2**0.5, rel=0.15)
    assert float((looks.grey[:, 6] - looks.grey[:, 5]).std()) > 0.1
    assert torch.equal(looks.coarse[:, 7], looks.coarse[:, 5])


def test_air_is_black_and_has_no_texture() -> None:
    looks = draw_appearance(AppearanceRecipe(), draw(), torch.full((9,), CT), torch.arange(8).repeat(9, 1), tissues=3, first=4)
    assert not torch.stack([looks.grey[:, 0], looks.coarse[:, 0], looks.fine[:, 0], looks.lines[:, 0]]).any()


def test_a_perfect_ct_shows_what_is_there_and_cuts_bone_to_1() -> None:
    image = torch.full((3, 1, 32, 32), 0.4)
    image[..., 16:] = 1.7
    shown = scanned(PERFECT, draw(), scanner(CT), image)
    assert shown[0, 0, 8, 4] == pytest.approx(0.4, abs=1e-4) and shown[0, 0, 8, 28] == 1


def test_a_perfect_mr_is_stretched_between_its_percentiles() -> None:
    image = torch.linspace(0.2, 0.3, 32).expand(3, 1, 32, 32).clone()
    shown = scanned(PERFECT, draw(), scanner(MR), image)
    assert shown.min() == 0 and shown.max() > 0.4


def test_an_edge_is_blurred_over_the_scanners_own_pixels() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[..., 16:] = 1.0
    sharp, coarse = (scanned(PERFECT, draw(), scanner(CT, pixels), image.clone()) for pixels in (0.5, 0.25))
    between = [((shown[0, 0, 8] > 0.02) & (shown[0, 0, 8] < 0.98)).sum() for shown in (sharp, coarse)]
    assert 0 < between[0] < between[1] <= 4


def test_pet_has_large_pixels() -> None:
    drawn = draw_scanners(ScannerRecipe(), draw(), 500)
    assert max(PIXELS[int(i)] for i in drawn.pixels[drawn.kind == PET]) < 0.5


def test_pixels_are_counted_by_slice_window_and_target() -> None:
    targets = torch.full((2, 1, 4, 4), 3, dtype=torch.uint8)
    targets[1, 0, 0, :3] = 1
    assert areas(targets, 3).tolist() == [[[0, 0, 0]], [[0, 3, 0]]]


def test_tracks_begin_where_enough_of_the_structure_is_seen() -> None:
    area = torch.zeros(4, 1, 3, dtype=torch.long)
    area[0, 0, 0], area[-1, 0, 1], area[0, 0, 2] = SMALLEST_PX, 50, SMALLEST_PX - 1
    tracks = choose(draw(), area, torch.ones(1, 3), 10)
    assert sorted(zip(tracks.target.tolist(), tracks.reverse.tolist())) == [(0, False), (1, True)]


def test_tracks_are_spread_evenly_over_the_windows() -> None:
    tracks = choose(draw(), torch.full((2, 5, 4), 99), torch.ones(5, 4), 10)
    assert tracks.window.bincount().tolist() == [2] * 5


def test_heavier_targets_are_followed_more_often() -> None:
    weight = torch.tensor([[9.0, 1.0]]).repeat(400, 1)
    tracks = choose(draw(), torch.full((1, 400, 2), 99), weight, 400)
    assert (tracks.target == 0).float().mean() > 0.8


def test_a_recipe_comes_back_from_json_as_it_was() -> None:
    recipe = VolumesRecipe(air=0.1)
    assert VolumesRecipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("wrong", ['{"airs": 0.5}', '{"air": 1.5}', '{"warp": [0.2, 0.1]}', '{"scanner": {"noise": [0.0, 0.1]}}'])
def test_a_recipe_refuses_what_it_does_not_know_or_cannot_be(wrong: str) -> None:
    with pytest.raises(ValidationError):
        VolumesRecipe.model_validate_json(wrong)
