"""Augmentation: the same for all slices of a clip and their masks, and without effect on global generators."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.training.augment import augment
from slmsam2_cli.training.clips import Clips

PX, SLICES = 48, 4


def clip(rows=slice(12, 36), columns=slice(12, 30), colours=3, tracks=2, valid=None):
    """A bright box on dark ground that is also the mask of every track, on all slices."""
    frames, masks = torch.full((SLICES, 1, colours, PX, PX), 0.2), torch.zeros(SLICES, tracks, 1, PX, PX)
    frames[..., rows, columns], masks[..., rows, columns] = 0.8, 1
    return Clips(frames, masks, torch.zeros(tracks, dtype=torch.long), torch.tensor([False, True] * (tracks // 2)), SLICES, valid)


def drawn(seed, **changes):
    return augment(clip(**changes), np.random.default_rng(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_shapes_stay_masks_stay_binary_and_grey_values_within_0_and_1(seed):
    changed = drawn(seed)
    assert changed.frames.shape == (SLICES, 1, 3, PX, PX) and changed.masks.shape[2:] == (1, PX, PX)
    assert set(changed.masks.unique().tolist()) <= {0.0, 1.0}
    assert changed.frames.min() >= 0 and changed.frames.max() <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_all_slices_and_tracks_of_a_window_are_moved_in_the_same_way(seed):
    masks = drawn(seed).masks
    assert torch.equal(masks, masks[:1, :1].expand_as(masks))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_a_mask_moves_with_the_structure_that_it_marks(seed):
    changed = drawn(seed)
    inside = changed.masks[0, 0, 0] > 0
    grey = changed.frames[0, 0, 0]
    assert grey[inside].median() > grey[~inside].median()
    bright = grey > (grey[inside].median() + grey[~inside].median()) / 2
    assert (bright & inside).sum() * 2 / (bright.sum() + inside.sum()) > 0.8


def test_a_grey_slice_in_three_channels_stays_grey():
    for seed in range(20):
        frames = drawn(seed).frames
        assert torch.equal(frames, frames[:, :, :1].expand_as(frames))


def test_equal_intensities_on_different_slices_stay_equal():
    """Without noise and blur: each slice has another brightness beside the box, which must not change what the box becomes."""
    made = clip()
    for t in range(SLICES):
        made.frames[t, ..., :, 36:] = t / SLICES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slmsam2_cli.training.augment._sharpness_transforms", lambda: lambda data: {"data": data})
        for seed in range(20):
            changed = augment(made, np.random.default_rng(seed))
            boxes = [changed.frames[t, 0, 0][changed.masks[t, 0, 0] > 0].median() for t in range(SLICES)]
            assert max(boxes) - min(boxes) < 1e-5


def test_different_channels_are_moved_in_the_same_way_and_stay_different():
    made = clip()
    made.frames[:, :, 1] *= 0.5
    changed = augment(made, np.random.default_rng(1))
    inside = changed.masks[:, :1, 0] > 0
    assert (changed.frames[:, :, 0][inside].median() - changed.frames[:, :, 1][inside].median()) > 0.15  # .8 and .4 before


def test_over_many_draws_area_and_side_vary_as_scaling_and_mirroring_allow():
    """The mask lies left of the middle; its area varies between 1 / 1.35^2 and 1 / 0.75^2, cut at the frame."""
    made = [drawn(seed, columns=slice(8, 20)) for seed in range(200)]
    masks = [one.masks[0, 0, 0] for one in made]
    areas = np.array([float(mask.sum()) for mask in masks]) / (24 * 12)
    assert 0.45 < areas.min() < 0.7 and 1.4 < areas.max() < 2.0
    columns = np.array([float(torch.nonzero(mask)[:, 1].float().mean()) for mask in masks])
    assert 0.35 < np.mean(columns < PX / 2) < 0.65  # mirrored half of the time


def test_the_result_depends_on_the_generator_alone_and_global_generators_are_unchanged():
    np.random.seed(1)
    random.seed(1)
    first = drawn(7)
    after = np.random.random(), random.random()
    np.random.seed(1)
    random.seed(1)
    assert after == (np.random.random(), random.random())
    second = drawn(7)
    assert torch.equal(first.frames, second.frames) and torch.equal(first.masks, second.masks)
    assert not torch.equal(first.frames, drawn(8).frames)


def test_a_track_whose_annotated_slice_became_empty_is_dropped_but_never_the_last_one():
    made = clip()
    made.masks[:, 1] = 0
    made.masks[:, 1, 0, :3, :3] = 1
    kept = [augment(made, np.random.default_rng(seed)) for seed in range(60)]
    assert all(one.masks[0].flatten(1).any(dim=1).all() for one in kept)
    assert all(one.masks.shape[1] == len(one.window) == len(one.reverse) for one in kept)
    assert {len(one.window) for one in kept} == {1, 2}
    for seed in range(60):
        lone = drawn(seed, rows=slice(0, 3), columns=slice(0, 3))
        assert len(lone.window) == 2 and lone.masks[0].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("seed", range(10))
def test_ignored_pixels_move_with_the_slices_and_pixels_from_beyond_them_are_valid(seed):
    valid = torch.ones(SLICES, 2, 1, PX, PX)
    valid[..., 12:36, 12:30] = 0  # the box is ignored
    changed = drawn(seed, valid=valid)
    assert torch.equal(changed.valid, 1 - changed.masks)
