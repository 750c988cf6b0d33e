"""Training data of the label U-Net: slices and crops as at inference, with their labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stacks import case

from slmsam2_cli.model.roi import RoiCrop
from slmsam2_cli.training.label_unet import SliceSampler, label_unet_loss, new_label_unet

PX = 64


def made(**changes):
    return case(slices=10, held=range(2, 8), size=(PX, PX), **changes)


def draw(sampler, px=48, count=32, seed=0):
    return sampler.draw(np.random.default_rng(seed), torch.Generator().manual_seed(seed), px, count)


def test_five_adjacent_slices_are_drawn_with_the_labels_of_the_middle_one():
    slices, truth = draw(SliceSampler([made(value=3)], [1, 3], PX))
    assert slices.shape == (32, 5, 48, 48) and truth.shape == (32, 48, 48)
    assert set(truth.unique().tolist()) == {-1, 0, 2}  # 3 is the second label; corners from beyond the crop are ignored


def test_nine_tenths_of_the_slices_hold_a_label():
    _, truth = draw(SliceSampler([made()], [1], PX), count=200)
    share = (truth > 0).flatten(1).any(1).float().mean().item()
    assert 0.8 < share < 0.98  # three quarters, and six tenths of the others


def test_ignored_pixels_have_no_loss():
    one = made()
    one.labels[:, :, 8:] = 9
    _, truth = draw(SliceSampler([one], [1], PX, ignore=9))
    valid = (truth >= 0).float().mean((0, 1))
    assert valid[:12].mean() > 0.7 and valid[36:].max() < 0.05  # the right half of the crop is ignored
    logits = torch.zeros(32, 2, 48, 48)
    changed = logits.clone()
    changed[:, 1][truth == -1] = 50.0
    assert torch.equal(label_unet_loss(logits, truth), label_unet_loss(changed, truth))


def test_a_case_without_a_label_is_not_used():
    one, empty = made(), made(name="b")
    empty.labels[:] = 0
    assert [source.case.id for source in SliceSampler([one, empty], [1], PX).sources] == ["a"]


def test_the_crop_is_twice_the_middle_slices_bounding_box():
    (source,) = SliceSampler([made()], [1], PX).sources
    assert source.roi == RoiCrop(0, 0, 16)  # 8 pixels wide at (4, 4)


def test_large_crops_are_reduced_and_get_a_narrower_network():
    small, large = made(), made()
    large.labels[4, :, :] = 1
    few, many = SliceSampler([small], [1], PX), SliceSampler([large], [1], PX)
    many.sources = [replace(source, roi=RoiCrop(0, 0, 300)) for source in many.sources]
    assert (few.input_size, many.input_size) == (48, 128)
    assert new_label_unet(few, 1, 0).logits.in_channels == 2 * new_label_unet(many, 1, 0).logits.in_channels


def test_the_loss_is_zero_for_correct_labels_and_large_for_wrong_ones():
    truth = torch.zeros(2, 8, 8, dtype=torch.long)
    truth[:, 2:6] = 1
    right = torch.stack([torch.where(truth == 0, 20.0, -20.0), torch.where(truth == 1, 20.0, -20.0)], 1)
    assert label_unet_loss(right, truth).item() == pytest.approx(0, abs=1e-4)
    assert label_unet_loss(-right, truth).item() > 10


def test_twelve_steps_reduce_the_loss_of_a_visible_label_by_two_fifths():
    one = made()
    one.frames = np.where(one.labels[None] == 1, 0.9, 0.2).astype(np.float16)
    sampler = SliceSampler([one], [1], PX)
    label_unet, rng, torch_rng = new_label_unet(sampler, 1, 0), np.random.default_rng(0), torch.Generator().manual_seed(0)
    optimiser, losses = torch.optim.AdamW(label_unet.parameters(), lr=2e-3), []
    for _ in range(12):
        loss = label_unet_loss(*[f(x) for f, x in zip((label_unet, lambda t: t), sampler.draw(rng, torch_rng, sampler.input_size, 4))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


def test_a_label_is_one_piece_if_it_is_connected_in_every_volume():
    one, two = made(), made(name="b")
    assert SliceSampler([one], [1], PX).one_piece == [True]
    two.labels[3, 40:44, 40:44] = 1  # 16 of 400 voxels lie apart
    assert SliceSampler([one, two], [1], PX).one_piece == [False]
    assert new_label_unet(SliceSampler([one], [1], PX), 1, 0).one_piece_labels == [1]


def test_an_absent_label_or_one_in_volumes_with_ignored_pixels_is_not_called_one_piece():
    one, partly = made(), made(name="b")
    partly.labels[:, 30:, 30:] = 9
    assert SliceSampler([one], [1, 2], PX, ignore=9).one_piece == [True, False]
    assert SliceSampler([partly], [1], PX, ignore=9).one_piece == [False]
