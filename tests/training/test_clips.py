"""Clips: their annotated slices, directions, strides, ends and crops."""

import numpy as np
import pytest
import torch
from stacks import case, whole

from slmsam2_cli.errors import DatasetError
from slmsam2_cli.training.clips import ClipSampler

PX = 32


def slice_numbers(clips, track):
    return [round(float(clips.frames.flatten(0, 1)[clips.feature_index(t)][track, 0, 0, 0]) * 100) for t in range(len(clips.masks))]


def draws(sampler, count=60, windows=2, length=8, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.draw(rng, windows, length, 8) for _ in range(count)]


def test_every_track_starts_on_an_annotated_slice():
    for clips in draws(ClipSampler([case()], [1], whole(PX))):
        assert (clips.masks[0].flatten(1).sum(dim=1) > 0).all()


def test_tracks_run_both_ways_over_every_slice_or_every_second_or_third():
    steps = set()
    for clips in draws(ClipSampler([case(slices=40, held=range(10, 30))], [1], whole(PX))):
        for track in range(len(clips.window)):
            (step,) = set(np.diff(slice_numbers(clips, track)).tolist())
            assert (step < 0) == bool(clips.reverse[track])
            steps.add(step)
    assert steps == {1, 2, 3, -1, -2, -3}


def test_of_a_volume_of_few_slices_every_slice_is_used():
    for clips in draws(ClipSampler([case(slices=15)], [1], whole(PX))):
        assert {abs(step) for track in range(len(clips.window)) for step in np.diff(slice_numbers(clips, track)).tolist()} == {1}


def test_a_volume_of_many_slices_is_not_drawn_more_often_than_one_of_few():
    many, few = case(slices=30, held=range(10, 20), name="many"), [case(slices=10, held=range(3, 8), name=f"few{i}") for i in range(4)]
    sampler, rng = ClipSampler([many, *few], [1], whole(PX)), np.random.default_rng(0)
    shown = [sampler.cases_of(sampler.choose_windows(rng, 1, 4)) for _ in range(500)]
    assert 0.14 < np.mean([ids == ("many",) for ids in shown]) < 0.26


def test_seven_tenths_of_the_clips_use_every_slice():
    sampler = ClipSampler([case(slices=60, held=range(15, 45))], [1], whole(PX))
    steps = [abs(np.diff(slice_numbers(clips, 0))[0]) for clips in draws(sampler, 300, windows=1)]
    assert 0.6 < np.mean(np.array(steps) == 1) < 0.8


def test_the_number_of_tracks_per_window_is_limited():
    made = case(held=range(20))
    for value, row in ((2, 0), (3, 13), (4, 16)):
        made.labels[:, row : row + 3, 16:24] = value
    sampler = ClipSampler([made], [1, 2, 3, 4], whole(PX))
    for _, clips in zip(range(20), draws(sampler)):
        assert len(clips.window) == 8 * 2
    rng = np.random.default_rng(0)
    assert all(torch.bincount(sampler.draw(rng, 3, 4, 2).window).tolist() == [2, 2, 2] for _ in range(20))


def test_masks_belong_to_the_slices_of_their_track():
    for clips in draws(ClipSampler([case()], [1], whole(PX)), count=20):
        for track in range(len(clips.window)):
            present = clips.masks[:, track].flatten(1).sum(dim=1) > 0
            assert present.tolist() == [6 <= number < 14 for number in slice_numbers(clips, track)]


def test_at_least_half_of_the_windows_hold_an_end_of_the_structure():
    ends = [
        bool((clips.masks.flatten(2).sum(dim=2) == 0).any())
        for clips in draws(ClipSampler([case(slices=60, held=range(15, 45))], [1], whole(PX)), 200, windows=1)
    ]
    assert np.mean(ends) >= 0.5


def test_a_volume_shorter_than_the_clip_shortens_it():
    (clips,) = draws(ClipSampler([case(slices=3, held=range(3))], [1], whole(PX)), count=1)
    assert len(clips.masks) == 3 and clips.slices == 3


@pytest.mark.parametrize(("slices", "held"), [(10, range(3, 7)), (8, range(2, 6)), (3, [1]), (2, [1]), (40, range(20, 22)), (60, [5, 50])])
def test_every_window_holds_a_track_however_small_the_structure_and_far_from_the_ends(slices, held):
    for clips in draws(ClipSampler([case(slices=slices, held=held)], [1], whole(PX))):
        assert set(clips.window.tolist()) == {0, 1}
        assert len(clips.masks) >= 2 and (clips.masks[0].flatten(1).sum(dim=1) > 0).all()


def test_the_same_seed_draws_the_same_clips():
    one, other = (draws(ClipSampler([case()], [1], whole(PX)), 5, seed=7) for _ in range(2))
    assert all(torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks) for a, b in zip(one, other))


def test_volumes_of_one_slice_are_an_error():
    with pytest.raises(DatasetError, match="at least two slices"):
        ClipSampler([case(slices=1, held=[0])], [1], whole(PX))


IGNORED = 9


def partly_annotated():
    """Slices 6 to 13 hold the label; slices 10 to 19 are ignored."""
    made = case()
    made.labels[10:] = IGNORED
    return made


def test_slices_with_ignored_pixels_are_invalid_and_never_the_annotated_slice():
    for clips in draws(ClipSampler([partly_annotated()], [1], whole(PX), IGNORED), count=30):
        for track in range(len(clips.window)):
            numbers = slice_numbers(clips, track)
            valid = clips.valid[:, track, 0, :24, :32].flatten(1).amin(dim=1)
            assert valid.tolist() == [float(number < 10) for number in numbers]
            assert numbers[0] < 10


def test_without_an_ignore_label_there_is_no_validity_mask():
    (clips,) = draws(ClipSampler([case()], [1], whole(PX)), count=1)
    assert clips.valid is None


def cropping_sampler(slices=12, held=range(3, 9)):
    """A structure of 8 x 8 px in slices of 64 px, seen at 32 px in crops of 16."""
    made = case(slices=slices, held=held, size=(64, 64))
    return ClipSampler([made], [1], whole(PX, roi_scale=2.0, storage_size=64))


def test_with_a_roi_scale_a_clip_is_a_crop_around_the_structure():
    for clips in draws(cropping_sampler(), count=20):
        assert clips.frames.shape[-2:] == (PX, PX)
        for track in range(len(clips.window)):
            mask = clips.masks[0, track, 0]
            rows, columns = (torch.nonzero(mask.any(dim=axis))[:, 0] for axis in (1, 0))
            assert (rows[0], rows[-1], columns[0], columns[-1]) == (8, 23, 8, 23)  # 8 of 16 px, twice as large


def test_with_a_roi_scale_all_slices_of_a_window_have_the_same_crop():
    made = case(slices=12, held=range(12), size=(64, 64))
    made.labels[6:, 4:12, 4:12], made.labels[6:, 10:18, 4:12] = 0, 1  # the structure moves down by six pixels
    sampler = ClipSampler([made], [1], whole(PX, roi_scale=2.0, storage_size=64))
    tops = set()
    for clips in draws(sampler, count=40):
        for track in range(len(clips.window)):
            firsts = [int(torch.nonzero(mask[0].any(dim=1))[0]) for mask in clips.masks[:, track] if mask.any()]
            tops |= set(np.diff(firsts).tolist())
    assert tops == {0, 12, -12}  # by six of 16 px, which are 12 of 32, forwards and backwards


def test_the_outer_slices_of_a_window_have_their_adjacent_slices():
    one = case(slices=15)
    geometry = whole(PX).model_copy(update={"adjacent_slices": True})
    for clips in draws(ClipSampler([one], [1], geometry), count=30, length=4):
        here, before, after = ((clips.frames[:, :, colour, 0, 0] * 100).round() for colour in range(3))
        assert torch.equal(before, (here - 1).clamp(min=0)) and torch.equal(after, (here + 1).clamp(max=14))
