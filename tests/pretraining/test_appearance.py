"""From labels to intensities: shared appearances and scanner effects."""

from __future__ import annotations

import pytest
import torch

from slmsam2_cli.pretraining.appearance import (
    CT,
    MR,
    PET,
    RESOLUTIONS,
    Appearance,
    AppearanceRecipe,
    ScannerRecipe,
    Scanners,
    draw_appearance,
    draw_scanners,
    render_labels,
    scan,
)
from slmsam2_cli.pretraining.random_fields import Draw

PERFECT = ScannerRecipe(
    noise=(1e-9, 1e-8),
    bias_field=(1e-9, 1e-8),
    slice_gain=0.0,
    slice_overlap=0.0,
    streaks=0.0,
    ghosts=0.0,
    resolutions=(0.0, 0.0, 1.0, 0.0, 0.0),
)


def draw() -> Draw:
    return Draw(torch.Generator().manual_seed(0))


def scanner(modality: int, resolution: float = 0.5) -> Scanners:
    return Scanners(torch.tensor([modality]), torch.tensor([RESOLUTIONS.index(resolution)]))


def test_labels_without_texture_have_their_intensity() -> None:
    intensity, none = torch.tensor([[0.0, 0.3, 0.8]]), torch.zeros(1, 3)
    labels = torch.tensor([0, 1, 2, 1], dtype=torch.uint8).view(1, 1, 2, 2)
    assert torch.equal(render_labels(draw(), Appearance(intensity, none, none, none), labels)[0, 0], torch.tensor([[0.0, 0.3], [0.8, 0.3]]))


def test_labels_that_share_an_appearance_differ_by_the_jitter_alone() -> None:
    recipe = AppearanceRecipe(jitter=(0.01, 0.01))
    shared = torch.arange(8).repeat(500, 1)
    shared[:, 7] = 5
    appearance = draw_appearance(recipe, draw(), torch.full((500,), MR), shared, tissues=3, first=4)
    assert float((appearance.intensity[:, 7] - appearance.intensity[:, 5]).std()) == pytest.approx(0.01 * 2**0.5, rel=0.15)
    assert float((appearance.intensity[:, 6] - appearance.intensity[:, 5]).std()) > 0.1
    assert torch.equal(appearance.coarse[:, 7], appearance.coarse[:, 5])


def test_air_is_black_and_has_no_texture() -> None:
    appearance = draw_appearance(AppearanceRecipe(), draw(), torch.full((9,), CT), torch.arange(8).repeat(9, 1), tissues=3, first=4)
    assert not torch.stack([appearance.intensity[:, 0], appearance.coarse[:, 0], appearance.fine[:, 0], appearance.lines[:, 0]]).any()


def test_a_perfect_ct_keeps_intensities_and_clips_bone_to_1() -> None:
    image = torch.full((3, 1, 32, 32), 0.4)
    image[..., 16:] = 1.7
    shown = scan(PERFECT, draw(), scanner(CT), image)
    assert shown[0, 0, 8, 4] == pytest.approx(0.4, abs=1e-4) and shown[0, 0, 8, 28] == 1


def test_a_perfect_mr_is_scaled_between_its_percentiles() -> None:
    image = torch.linspace(0.2, 0.3, 32).expand(3, 1, 32, 32).clone()
    shown = scan(PERFECT, draw(), scanner(MR), image)
    assert shown.min() == 0 and shown.max() > 0.4


def test_an_edge_is_blurred_over_the_scanners_own_pixels() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[..., 16:] = 1.0
    sharp, coarse = (scan(PERFECT, draw(), scanner(CT, resolution), image.clone()) for resolution in (0.5, 0.25))
    between = [((shown[0, 0, 8] > 0.02) & (shown[0, 0, 8] < 0.98)).sum() for shown in (sharp, coarse)]
    assert 0 < between[0] < between[1] <= 4


def test_pet_has_large_pixels() -> None:
    drawn = draw_scanners(ScannerRecipe(), draw(), 500)
    assert max(RESOLUTIONS[int(i)] for i in drawn.resolution[drawn.modality == PET]) < 0.5
