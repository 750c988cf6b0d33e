"""Clips of procedurally generated volumes: properties that hold for every seed, the choice of tracks, the recipe."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from slmsam2_cli.pretraining.anatomy import AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.random_fields import Draw
from slmsam2_cli.pretraining.volumes import MIN_TRACK_PX, ClipShape, VolumesRecipe, choose_tracks, draw_clips, target_areas
from slmsam2_cli.training.clips import Clips

WINDOWS, LENGTH, TRACKS, PX = 24, 8, 96, 64


def drawn(seed: int, windows: int = WINDOWS, length: int = LENGTH, tracks: int = TRACKS, px: int = PX) -> Clips:
    return draw_clips(VolumesRecipe(), torch.Generator().manual_seed(seed), ClipShape(windows, length, tracks, px))


@pytest.fixture(scope="module")
def clips() -> Clips:
    return drawn(0)


def in_stack_order(clips: Clips) -> torch.Tensor:
    """(T, M, px, px): masks from the window's first slice to its last, in whichever direction they are tracked."""
    masks = clips.masks[:, :, 0]
    return torch.where(clips.reverse[None, :, None, None], masks.flip(0), masks)


def test_frames_are_windows_of_rgb_slices(clips: Clips) -> None:
    assert clips.frames.shape == (LENGTH, WINDOWS, 3, PX, PX)


def test_masks_are_tracks_through_windows_that_exist(clips: Clips) -> None:
    assert clips.masks.shape == (LENGTH, len(clips.window), 1, PX, PX)
    assert clips.window.max() < WINDOWS and clips.reverse.dtype == torch.bool


def test_no_more_tracks_are_drawn_than_requested() -> None:
    assert len(drawn(0, windows=4, tracks=3).window) == 3


def test_windows_hold_several_tracks(clips: Clips) -> None:
    assert clips.window.bincount(minlength=WINDOWS).float().mean() > 2


def test_frames_are_numbers_between_0_and_1(clips: Clips) -> None:
    assert clips.frames.isfinite().all() and clips.frames.min() >= 0 and clips.frames.max() <= 1


def test_masks_are_0_or_1(clips: Clips) -> None:
    assert set(clips.masks.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("length", [1, 3])
def test_every_track_begins_on_a_slice_with_its_structure(length: int) -> None:
    assert drawn(1, length=length).masks[0].flatten(1).any(dim=1).all()


def test_the_same_seed_draws_the_same_clips(clips: Clips) -> None:
    again = drawn(0)
    assert torch.equal(again.frames, clips.frames) and torch.equal(again.masks, clips.masks)
    assert torch.equal(again.window, clips.window) and torch.equal(again.reverse, clips.reverse) and again.slices == clips.slices


def test_another_seed_draws_other_clips(clips: Clips) -> None:
    assert not torch.equal(drawn(2).frames, clips.frames)


def test_a_generator_draws_other_clips_the_second_time() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = (draw_clips(VolumesRecipe(), rng, ClipShape(2, 2, 8, 32)) for _ in range(2))
    assert not torch.equal(first.frames, second.frames)


def test_a_pixel_belongs_to_one_structure_of_its_window(clips: Clips) -> None:
    masks = in_stack_order(clips)
    for window in range(WINDOWS):
        here = masks[:, clips.window == window]
        distinct = torch.unique(here.flatten(2).transpose(0, 1).flatten(1), dim=0)  # a structure may be tracked in both directions
        assert distinct.sum(dim=0).max() <= 1


def test_a_third_of_all_tracked_slices_are_beyond_the_structure(clips: Clips) -> None:
    absent = ~clips.masks.flatten(2).any(dim=2)
    assert 0.3 < absent.float().mean() < 0.6


def test_half_of_the_tracks_run_backwards(clips: Clips) -> None:
    assert 0.35 < clips.reverse.float().mean() < 0.65


def test_the_volume_is_at_least_as_long_as_the_clip() -> None:
    assert min(drawn(seed, windows=1, length=12, px=32).slices for seed in range(10)) >= 12


def first_structures(recipe: AnatomyRecipe, windows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(W,) each: first and last slice, of 16, that the first structure of a window may reach."""
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(windows, 1)
    drawn = draw_anatomy(recipe, Draw(torch.Generator().manual_seed(3)), 16, whole).structures
    return drawn.centre_slice[:, 0] - drawn.half_length[:, 0], drawn.centre_slice[:, 0] + drawn.half_length[:, 0]


def test_in_windows_of_thick_slices_the_first_structure_does_not_end_in_the_clip() -> None:
    recipe = AnatomyRecipe(
        thick_slices=1.0, half_length=(8.0, 45.0), thickness_factor=(1.0, 1.0), length_factor=(40.0, 40.0), ends_in_clip=1.0
    )
    begin, end = first_structures(recipe)
    # half lengths of 320 and more, centred within 0.85 of one: more than 48 slices from either end
    assert (begin < 0).all() and (end > 15).all()


def test_without_thick_slices_it_ends_in_the_clip_if_ends_in_clip_is_1() -> None:
    begin, end = first_structures(AnatomyRecipe(half_length=(8.0, 45.0), static=0.0, ends_in_clip=1.0))
    assert (((begin > 0) & (begin < 15)) | ((end > 0) & (end < 15))).all()


def test_thick_slices_differ_more_from_each_other() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(256, 1)
    rate = {
        share: draw_anatomy(
            AnatomyRecipe(thick_slices=share, thickness_factor=(4.0, 4.0)), Draw(torch.Generator().manual_seed(3)), 16, whole
        ).rate.median()
        for share in (0.0, 1.0)
    }
    assert rate[1.0] > 2 * rate[0.0]


def test_pixels_are_counted_by_slice_window_and_target() -> None:
    targets = torch.full((2, 1, 4, 4), 3, dtype=torch.uint8)
    targets[1, 0, 0, :3] = 1
    assert target_areas(targets, 3).tolist() == [[[0, 0, 0]], [[0, 3, 0]]]


def test_tracks_begin_on_slices_with_enough_pixels_of_the_structure() -> None:
    area = torch.zeros(4, 1, 3, dtype=torch.long)
    area[0, 0, 0], area[-1, 0, 1], area[0, 0, 2] = MIN_TRACK_PX, 50, MIN_TRACK_PX - 1
    tracks = choose_tracks(Draw(torch.Generator().manual_seed(0)), area, torch.ones(1, 3), 10)
    assert sorted(zip(tracks.target.tolist(), tracks.reverse.tolist())) == [(0, False), (1, True)]


def test_tracks_are_distributed_evenly_over_the_windows() -> None:
    tracks = choose_tracks(Draw(torch.Generator().manual_seed(0)), torch.full((2, 5, 4), 99), torch.ones(5, 4), 10)
    assert tracks.window.bincount().tolist() == [2] * 5


def test_targets_of_greater_weight_are_tracked_more_often() -> None:
    weight = torch.tensor([[9.0, 1.0]]).repeat(400, 1)
    tracks = choose_tracks(Draw(torch.Generator().manual_seed(0)), torch.full((1, 400, 2), 99), weight, 400)
    assert (tracks.target == 0).float().mean() > 0.8


def test_a_recipe_written_as_json_is_read_unchanged() -> None:
    recipe = VolumesRecipe(air=0.1)
    assert VolumesRecipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    "wrong", ['{"airs": 0.5}', '{"air": 1.5}', '{"coarse_deformation": [0.2, 0.1]}', '{"scanner": {"noise": [0.0, 0.1]}}']
)
def test_a_recipe_rejects_unknown_keys_and_invalid_values(wrong: str) -> None:
    with pytest.raises(ValidationError):
        VolumesRecipe.model_validate_json(wrong)
