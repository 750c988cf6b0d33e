"""What is learned from the annotated slices of a folder, and that no volume is judged by what it taught."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.dataset.prompts import Prompts
from slmsam2_cli.dataset.slices import View
from slmsam2_cli.errors import TrainingError
from slmsam2_cli.io.volume import Grid
from slmsam2_cli.model.roi import RoiCrop
from slmsam2_cli.training import annotated_slices
from slmsam2_cli.training.annotated_slices import (
    AnnotatedSampler,
    TrainingVolume,
    _Targets,
    agreed_slices,
    annotated_volume,
    cross_fitting,
    halves_of,
    load_label_unets,
    save_label_unets,
    train_label_unets,
)
from slmsam2_cli.training.label_unet import label_unet_loss

PX = 32
CPU = torch.device("cpu")
PLAN = SimpleNamespace(
    labels={1: "left", 5: "right"},
    channels=("image",),
    ignore=None,
    geometry=SimpleNamespace(slice_axis="SI", in_plane_mm=1.0, through_plane_mm=None, crop_to_nonzero=False, storage_size=PX),
)


def view():
    grid = Grid(shape=(9, PX, PX), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), direction=np.eye(3))
    return View(grid, "SI", ((0, 9), (0, PX), (0, PX)), (9, PX, PX))


def volume(seed=0, annotated=None, ignore=None, witnesses=None):
    """A bright square with label 1 and a grey one with label 5 on noise, annotated on one slice each."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((9, PX, PX), np.uint8)
    labels[2:7, 8:16, 4:12], labels[2:7, 8:16, 18:26] = 1, 5
    frames = (0.2 + 0.3 * (labels == 5) + 0.7 * (labels == 1) + 0.05 * rng.standard_normal(labels.shape))[None].astype(np.float32)
    place = view()
    sparse, stack = np.zeros_like(labels), place.oriented(labels)
    annotated = annotated or {1: (4,), 5: (3,)}
    for value, slices in annotated.items():
        for t in slices:
            place.oriented(sparse)[t][stack[t] == value] = value
    return annotated_volume(place.oriented(frames[0])[None], Prompts(sparse, annotated, (), ignore), place, PLAN, witnesses)


def test_an_annotated_slice_tells_which_labels_were_annotated_on_it():
    third, fourth = volume().slices
    assert third.known == (False, True) and fourth.known == (True, False)
    assert np.unique(third.target).tolist() == [0, 2] and np.unique(fourth.target).tolist() == [0, 1]
    assert int((fourth.target == 1).sum()) == 64 and fourth.slices.shape[:2] == (5, 1)


def test_an_empty_annotated_slice_teaches_that_the_label_is_not_there():
    first, _, _ = volume(annotated={1: (0, 4), 5: (3,)}).slices
    assert first.known == (True, False) and not first.target.any()


def test_a_volume_without_a_drawn_label_teaches_nothing():
    assert volume(annotated={1: (0,), 5: (8,)}) is None


def test_where_a_label_was_not_annotated_it_may_be_or_not():
    logits, nothing = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    unknown = torch.tensor([[False, True]])
    sure = label_unet_loss(logits, nothing, torch.tensor([[False, False]]))
    assert torch.equal(sure, label_unet_loss(logits, nothing))
    # cross-entropy of a probability of 2/3; the Dice term of label 1, of probability 1/3 on 16 pixels, and that of label 2, which is 0
    expected = -math.log(2 / 3) + (1 - 1 / (16 / 3 + 1)) / 2
    assert label_unet_loss(logits, nothing, unknown).item() == pytest.approx(expected, abs=1e-5)
    found = logits.clone()
    found[:, 2] = 9.0  # label 2 everywhere is no mistake, as nobody said that it is not there
    assert label_unet_loss(found, nothing, unknown) < 0.01 < label_unet_loss(found, nothing)


@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=40))
def test_each_volume_is_in_one_half_and_the_halves_are_of_about_the_same_size(cases):
    halves = halves_of(sorted(cases))
    first = sum(half == 0 for half in halves.values())
    assert set(halves) == cases and set(halves.values()) == {0, 1} and abs(2 * first - len(cases)) <= 1
    assert halves == halves_of(sorted(cases, reverse=True))


def test_volumes_are_drawn_equally_often_however_many_slices_they_have():
    many = volume(annotated={1: (2, 3, 4, 5, 6), 5: ()})
    few = volume(annotated={1: (), 5: (3,)})
    sampler, rng = AnnotatedSampler([many, few], (1, 5), PX), np.random.default_rng(0)
    known = [sampler.draw_one(rng, 48)[2] for _ in range(200)]
    assert 70 < sum(one == (False, True) for one in known) < 130


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(annotated_slices, "STEPS_FROM_RANDOM", 60)
    monkeypatch.setattr(annotated_slices, "LABEL_UNET_BATCH", 4)


def whole(one, part):
    """A part of a slice as the whole slice, 0 beyond it."""
    (top, left), (height, width) = one.corner, part.shape[-2:]
    found = torch.zeros(*part.shape[:-2], PX, PX)
    found[..., top : top + height, left : left + width] = torch.from_numpy(part.astype(np.float32))
    return found


def fit(volumes):
    return train_label_unets(cross_fitting(volumes, halves_of(sorted(volumes)), PLAN, (None, None), None, CPU), "learning", lambda: False)


def test_each_network_finds_the_structures_in_the_volumes_of_its_half(few_steps, monkeypatch):
    monkeypatch.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)  # in this process, with these settings
    volumes = {f"case {seed}": volume(seed) for seed in range(4)}
    networks = fit(volumes)
    for case, half in halves_of(sorted(volumes)).items():
        one = volumes[case]
        slices = one.roi.crop(whole(one.slices[1], one.slices[1].slices), networks[half].input_size).flatten(0, 1)[None]
        with torch.inference_mode():
            found = one.roi.paste((networks[half](slices).argmax(1) == 1).float()[0], PX, 0.0) > 0.5
        truth = whole(one.slices[1], one.slices[1].target) == 1
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8


def test_a_network_does_not_depend_on_the_volumes_of_its_own_half(few_steps, monkeypatch):
    monkeypatch.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)
    monkeypatch.setattr(annotated_slices, "STEPS_FROM_RANDOM", 2)
    volumes = {f"case {seed}": volume(seed) for seed in range(4)}
    halves = halves_of(sorted(volumes))
    changed = {case: volume(seed + 100 * halves[case]) for seed, case in enumerate(sorted(volumes))}  # those of half 1
    before, after = fit(volumes), fit(changed)
    assert all(torch.equal(a, b) for a, b in zip(before[1].state_dict().values(), after[1].state_dict().values(), strict=True))
    assert not torch.equal(before[0].logits.weight, after[0].logits.weight)


def test_networks_are_read_back_for_what_they_learned_from_and_for_nothing_else(few_steps, monkeypatch, tmp_path):
    monkeypatch.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)
    monkeypatch.setattr(annotated_slices, "STEPS_FROM_RANDOM", 1)
    networks, file = fit({f"case {seed}": volume(seed) for seed in range(2)}), tmp_path / "together.safetensors"
    save_label_unets(file, networks, "these slices")
    again = load_label_unets(file, "these slices")
    for one, other in zip(networks, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert load_label_unets(file, "other slices") is None
    file.write_bytes(file.read_bytes()[:100])
    assert load_label_unets(file, "these slices") is None and load_label_unets(tmp_path / "absent", "these slices") is None


def test_a_loss_that_is_not_finite_is_one_line_that_names_the_way_out(few_steps, monkeypatch):
    monkeypatch.setattr(annotated_slices, "run_side_by_side", lambda *rest, **again: False)
    broken = volume()
    for one in broken.slices:
        one.slices.fill(float("nan"))
    with pytest.raises(TrainingError, match="Predict without --together"):
        fit({"a": broken, "b": broken})


def masks(*widths):
    """(T, 1, 40): on each slice the first pixels of a row."""
    return np.stack([np.arange(40)[None] < width for width in widths])


def test_agreement_is_followed_outwards_and_ends_at_the_first_slice_on_which_the_masks_differ():
    one = masks(10, 10, 10, 10, 10, 10, 10)
    other = masks(10, 4, 10, 10, 9, 10, 0)  # Dice .57 on slice 1, so slice 0 is not reached; on slice 6 nothing is found
    assert agreed_slices(one, other, [3]) == [2, 4, 5]


def test_slices_that_are_annotated_are_not_added_and_end_the_way():
    everywhere = masks(10, 10, 10, 10, 10)
    assert agreed_slices(everywhere, everywhere, [1, 3]) == [0, 2, 4]


def test_slices_on_which_both_find_nothing_are_not_learned_as_empty():
    nothing = masks(10, 0, 0)
    assert agreed_slices(nothing, nothing, [0]) == []


class Agreeing:
    """Two witnesses: both find label 1 on slices 3 and 5, but one of them a row more; neither finds label 5 anywhere."""

    def masks(self, frames, objects, plan):
        smaller, larger = (np.zeros((9, PX, PX), bool) for _ in range(2))
        smaller[3:6, 8:16, 4:12], larger[3:6, 8:17, 4:12] = True, True
        return {1: (smaller, larger), 5: (np.zeros_like(smaller), np.zeros_like(smaller))}


def test_pixels_on_which_the_witnesses_differ_are_ignored_and_what_is_annotated_stays():
    third, fourth, fifth = volume(witnesses=Agreeing()).slices
    assert fourth.known == (True, False) and -1 not in fourth.target
    for one, known in ((third, (True, True)), (fifth, (True, False))):  # label 5 was annotated on slice 3
        assert one.known == known
        assert int((one.target == 1).sum()) == 64 and int((one.target == -1).sum()) == 8
    assert int((third.target == 2).sum()) == 64


class Overlapping(Agreeing):
    """Both find label 1 on slice 3 where label 5 was annotated, and label 5 on slice 4 where label 1 was."""

    def masks(self, frames, objects, plan):
        one, five = (np.zeros((9, PX, PX), bool) for _ in range(2))
        one[3, 8:16, 10:22], five[4, 8:16, 8:26] = True, True
        return {1: (one, one), 5: (five, five)}


def test_what_the_witnesses_find_never_replaces_what_was_annotated():
    third, fourth = volume(witnesses=Overlapping()).slices
    assert third.known == fourth.known == (True, True)
    assert int((third.target == 2).sum()) == 64 and int((third.target == 1).sum()) == 8 * 8  # 4 of 12 columns were annotated as label 5
    assert int((fourth.target == 1).sum()) == 64 and int((fourth.target == 2).sum()) == 8 * 14  # columns 12 to 25


def test_partly_annotated_slices_are_left_as_they_were_annotated():
    place, sparse = view(), np.full((9, PX, PX), 9, np.uint8)
    sparse[4, 8:16, 4:12], sparse[4, 8:16, 18:26], sparse[3, :, :16] = 1, 5, 0  # slice 3: no label on the left, nothing said of the right
    prompts = Prompts(sparse, {1: (3, 4), 5: (3, 4)}, (3, 4), ignore=9)
    third, _, _ = annotated_volume(np.zeros((1, 9, PX, PX), np.float32), prompts, place, PLAN, Agreeing()).slices
    seen = whole(third, third.target)
    assert (seen[8:16, 4:12] == 0).all() and (seen[8:16, 20:24] == -1).all()


@given(st.integers(0, 24), st.integers(0, 24), st.integers(8, 32), st.integers(0, 1000))
def test_a_drawn_crop_never_reaches_beyond_what_is_kept_of_a_slice(row, column, edge, seed):
    edge = min(edge, PX - row, PX - column)
    roi = RoiCrop(row, column, edge)
    targets = _Targets((PX, PX), 1)
    targets.annotate(0, 1, np.ones((PX, PX), bool))
    (one,) = targets.slices(np.ones((1, 1, PX, PX), np.float32), {}, roi)
    drawn = AnnotatedSampler([TrainingVolume((one,), roi)], (1,), PX).draw_one(np.random.default_rng(seed), 16)
    assert (drawn[1] == 1).all() and torch.allclose(drawn[0], torch.ones(5, 16, 16), atol=1e-3)
