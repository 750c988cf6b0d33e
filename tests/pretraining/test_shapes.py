"""Shapes of known size and position: discs, balls, halves and walls."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from slmsam2_cli.pretraining.anatomy import STRUCTURES, AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.random_fields import Draw
from slmsam2_cli.pretraining.shapes import (
    Primitives,
    Tiles,
    cross_sections,
    cut_tiles,
    inside_of,
    join_tiles,
    paint,
    paint_around,
    pixel_centres,
)

PX, SLICES, FIRST = 64, 9, 10
BALL = {
    "x": 0.5,
    "y": 0.5,
    "long_radius": 0.25,
    "short_radius": 0.25,
    "bluntness": 2.0,
    "cut_offset": 100.0,
    "reference_slice": 4.0,
    "centre_slice": 4.0,
    "half_length": 3.0,
}


def primitive(**values: float) -> Primitives:
    """One window with one primitive: a ball in the middle of image and stack, with the given fields changed."""
    return Primitives(**{field.name: torch.tensor([[(BALL | values).get(field.name, 0.0)]]) for field in fields(Primitives)})


def empty(windows: int = 1) -> Tiles:
    coordinates = pixel_centres(PX, torch.device("cpu")).expand(SLICES, windows, 2, PX, PX)
    return cut_tiles(coordinates, torch.zeros(SLICES, windows, PX, PX, dtype=torch.uint8))


def painted(**values: float) -> Tensor:
    """(T, px, px): labels, 0 outside."""
    tiles, body = empty(), primitive(**values)
    paint(body, cross_sections(body, SLICES), 0, tiles, FIRST)
    return join_tiles(tiles.labels, SLICES, 1)[:, 0]


def areas(labels: Tensor, *counted: int) -> Tensor:
    """(T,): pixels of the given labels."""
    return torch.isin(labels, torch.tensor(counted, dtype=labels.dtype)).flatten(1).sum(1)


def test_joined_tiles_are_the_labels_that_were_cut() -> None:
    labels = torch.randint(0, 30, (SLICES, 2, PX, PX), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    coordinates = pixel_centres(PX, torch.device("cpu")).expand(SLICES, 2, 2, PX, PX)
    assert torch.equal(join_tiles(cut_tiles(coordinates, labels).labels, SLICES, 2), labels)


def test_a_tile_keeps_the_coordinates_of_its_pixels() -> None:
    tiles = empty()
    x = (tiles.coordinates[:, 0] * 255).to(torch.uint8)
    assert torch.equal(join_tiles(x, SLICES, 1)[0, 0], (pixel_centres(PX, torch.device("cpu"))[0] * 255).to(torch.uint8))


def test_a_ball_is_a_disc_of_its_radius_in_the_middle() -> None:
    assert float(areas(painted(), FIRST)[4]) == pytest.approx(math.pi * (0.25 * PX) ** 2, rel=0.02)


def test_a_ball_of_half_length_3_covers_5_slices() -> None:
    assert (areas(painted(), FIRST) > 0).tolist() == [False, False, True, True, True, True, True, False, False]


def test_a_leaning_structure_moves_by_its_drift() -> None:
    leaning, upright = painted(half_length=50.0, drift_x=2 / PX), painted(half_length=50.0)
    assert torch.equal(leaning[6], painted(half_length=50.0, x=0.5 + 4 / PX)[6]) and not torch.equal(leaning[6], upright[6])


def test_an_ellipse_covers_less_than_its_box_and_a_rectangle_all_of_it() -> None:
    wide = {"long_radius": 0.4, "short_radius": 0.1}
    assert float(areas(painted(**wide), FIRST)[4]) == pytest.approx(math.pi / 4 * 0.8 * 0.2 * PX**2, rel=0.04)
    assert float(areas(painted(**wide, squareness=1.0), FIRST)[4]) == pytest.approx(0.8 * 0.2 * PX**2, rel=0.06)


def test_a_quarter_turn_swaps_width_and_height() -> None:
    wide = {"long_radius": 0.4, "short_radius": 0.1}
    assert torch.equal(painted(**wide, angle=math.pi / 2)[4], painted(**wide)[4].T)


def test_two_halves_are_equal_and_make_the_whole() -> None:
    labels = painted(cut_offset=0.0, cut_long=1.0)
    assert torch.equal(areas(labels, FIRST), areas(labels, FIRST + 1))
    assert torch.equal(areas(labels, FIRST, FIRST + 1), areas(painted(), FIRST))


def test_a_tilted_cut_divides_the_slices_between_the_labels() -> None:
    labels = painted(cut_offset=0.0, cut_tilt=1.0)
    assert areas(labels, FIRST + 1).nonzero().min() > areas(labels, FIRST).nonzero().max()


def test_a_wall_surrounds_the_inside_and_closes_at_both_ends() -> None:
    labels = painted(wall=0.4, cut_offset=0.0)
    inside, wall = areas(labels, FIRST), areas(labels, FIRST + 1)
    assert (inside > 0).tolist() == [t in (3, 4, 5) for t in range(SLICES)]
    assert (wall > 0).tolist() == [2 <= t <= 6 for t in range(SLICES)]
    assert float(inside[4]) == pytest.approx(math.pi * (0.6 * 0.25 * PX) ** 2, rel=0.04)


def test_outside_the_body_is_air_and_its_wall_is_fat() -> None:
    tiles, body = empty(), primitive(half_length=1000.0, wall=0.2, cut_offset=0.0)
    paint_around(body, cross_sections(body, SLICES), tiles, torch.tensor([True]), 7, 8)
    labels = join_tiles(tiles.labels, SLICES, 1)[:, 0]
    assert labels[4, 32, 32] == 0 and labels[4, 0, 0] == 7 and labels[4, 32, 32 + 15] == 8


def drawn(windows: int) -> tuple[Primitives, Primitives]:
    """Structures and bodies drawn by the default recipe."""
    view = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(windows, 1)
    anatomy = draw_anatomy(AnatomyRecipe(), Draw(torch.Generator().manual_seed(0)), SLICES, view)
    return anatomy.structures, anatomy.body


def test_no_structure_reaches_beyond_the_tiles_that_are_computed() -> None:
    structures, _ = drawn(6)
    sections, everything = cross_sections(structures, SLICES), torch.arange(len(empty(6).coordinates))
    for k in range(STRUCTURES):
        tiles, whole = empty(6), empty(6)
        paint(structures, sections, k, tiles, FIRST)
        inside, second = inside_of(structures, sections, k, whole, everything)
        assert torch.equal(tiles.labels, torch.where(inside, FIRST + second.to(torch.uint8), 0))


def test_tiles_decided_by_their_centre_equal_tiles_computed_per_pixel() -> None:
    _, body = drawn(12)
    sections, tiles, whole = cross_sections(body, SLICES), empty(12), empty(12)
    paint_around(body, sections, tiles, torch.ones(12, dtype=torch.bool), 7, 8)
    inside, second = inside_of(body, sections, 0, whole, torch.arange(len(whole.coordinates)))
    assert torch.equal(tiles.labels, torch.where(inside, 8 * second.to(torch.uint8), 7))
