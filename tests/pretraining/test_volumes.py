"""What every clip of procedurally generated volumes promises, whatever was drawn."""

from __future__ import annotations

import pytest
import torch

from slmsam2_cli.pretraining.anatomy import AnatomyRecipe, draw_anatomy
from slmsam2_cli.pretraining.random_fields import Draw
from slmsam2_cli.pretraining.volumes import VolumesRecipe, draw_clips
from slmsam2_cli.training.clips import Clips

WINDOWS, LENGTH, TRACKS, PX = 24, 8, 96, 64


def drawn(seed: int, windows: int = WINDOWS, length: int = LENGTH, tracks: int = TRACKS, px: int = PX) -> Clips:
    return draw_clips(VolumesRecipe(), torch.Generator().manual_seed(seed), windows, length, tracks, px)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return drawn(0)


def in_stack_order(clips: Clips) -> torch.Tensor:
    """(T, M, px, px): masks from the window's first slice to its last, whichever way they are tracked."""
    masks = clips.masks[:, :, 0]
    return torch.where(clips.reverse[None, :, None, None], masks.flip(0), masks)


def test_frames_are_windows_of_rgb_slices(clips: Clips) -> None:
    assert clips.frames.shape == (LENGTH, WINDOWS, 3, PX, PX)


def test_masks_are_tracks_through_windows_that_exist(clips: Clips) -> None:
    assert clips.masks.shape == (LENGTH, len(clips.window), 1, PX, PX)
    assert clips.window.max() < WINDOWS and clips.reverse.dtype == torch.bool


def test_no_more_tracks_are_drawn_than_asked_for() -> None:
    assert len(drawn(0, windows=4, tracks=3).window) == 3


def test_windows_hold_several_tracks(clips: Clips) -> None:
    assert clips.window.bincount(minlength=WINDOWS).float().mean() > 2


def test_frames_are_numbers_between_0_and_1(clips: Clips) -> None:
    assert clips.frames.isfinite().all() and clips.frames.min() >= 0 and clips.frames.max() <= 1


def test_masks_are_0_or_1(clips: Clips) -> None:
    assert set(clips.masks.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("length", [1, 3])
def test_every_track_begins_on_a_slice_that_holds_it(length: int) -> None:
    assert drawn(1, length=length).masks[0].flatten(1).any(dim=1).all()


def test_the_same_seed_draws_the_same_clips(clips: Clips) -> None:
    again = drawn(0)
    assert torch.equal(again.frames, clips.frames) and torch.equal(again.masks, clips.masks)
    assert torch.equal(again.window, clips.window) and torch.equal(again.reverse, clips.reverse) and again.slices == clips.slices


def test_another_seed_draws_other_clips(clips: Clips) -> None:
    assert not torch.equal(drawn(2).frames, clips.frames)


def test_a_generator_goes_on_where_it_was() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = (draw_clips(VolumesRecipe(), rng, 2, 2, 8, 32) for _ in range(2))
    assert not torch.equal(first.frames, second.frames)


def test_a_pixel_belongs_to_one_structure_of_its_window(clips: Clips) -> None:
    masks = in_stack_order(clips)
    for window in range(WINDOWS):
        here = masks[:, clips.window == window]
        distinct = torch.unique(here.flatten(2).transpose(0, 1).flatten(1), dim=0)  # a structure may be tracked both ways
        assert distinct.sum(dim=0).max() <= 1


def test_a_third_of_all_tracked_slices_are_beyond_the_structure(clips: Clips) -> None:
    absent = ~clips.masks.flatten(2).any(dim=2)
    assert 0.3 < absent.float().mean() < 0.6


def test_tracks_run_both_ways(clips: Clips) -> None:
    assert 0.35 < clips.reverse.float().mean() < 0.65


def test_the_imaginary_volume_is_at_least_as_long_as_the_clip() -> None:
    assert min(drawn(seed, windows=1, length=12, px=32).slices for seed in range(10)) >= 12


def first_structures(recipe: AnatomyRecipe, windows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(W,) each: first and last slice, of 16, that the first structure of a window may reach."""
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(windows, 1)
    drawn = draw_anatomy(recipe, Draw(torch.Generator().manual_seed(3)), 16, whole).structures
    return drawn.middle[:, 0] - drawn.half[:, 0], drawn.middle[:, 0] + drawn.half[:, 0]


def test_where_thick_slices_are_asked_for_the_first_structure_ends_in_hardly_any_clip() -> None:
    recipe = AnatomyRecipe(through=1.0, half_length=(8.0, 45.0), thicker=(1.0, 1.0), further=(40.0, 40.0), ends=1.0)
    begin, end = first_structures(recipe)
    # half lengths of 320 and more, met within 0.85 of one: more than 48 slices from either end
    assert (begin < 0).all() and (end > 15).all()


def test_without_them_it_ends_where_ends_are_asked_for() -> None:
    begin, end = first_structures(AnatomyRecipe(half_length=(8.0, 45.0), still=0.0, ends=1.0))
    assert (((begin > 0) & (begin < 15)) | ((end > 0) & (end < 15))).all()


def test_thick_slices_differ_more_from_each_other() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(256, 1)
    pace = {
        through: draw_anatomy(
            AnatomyRecipe(through=through, thicker=(4.0, 4.0)), Draw(torch.Generator().manual_seed(3)), 16, whole
        ).pace.median()
        for through in (0.0, 1.0)
    }
    assert pace[1.0] > 2 * pace[0.0]
