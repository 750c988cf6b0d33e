"""Dice from counts, and the box that a mask fills."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slmsam2_cli.dataset.mask_measures import bounding_box, dice


def test_dice_of_half_overlapping_masks_is_one_half() -> None:
    assert dice(5, 10, 10) == 0.5


def test_dice_takes_arrays_and_tensors_element_by_element() -> None:
    assert dice(np.array([0, 3]), np.array([4, 3]), np.array([4, 3])).tolist() == [0.0, 1.0]
    assert dice(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([3.0])).tolist() == [0.5]


@pytest.mark.parametrize("voxels", [[(1, 1, 3)], [(0, 0, 0), (3, 1, 4)], [(2, 0, 4), (1, 1, 1), (3, 1, 2)]])
def test_the_bounding_box_reaches_from_the_first_voxel_to_behind_the_last(voxels: list[tuple[int, int, int]]) -> None:
    mask = np.zeros((4, 2, 5), dtype=bool)
    mask[tuple(zip(*voxels))] = True
    assert bounding_box(mask) == tuple((min(places), max(places) + 1) for places in zip(*voxels))


def test_an_empty_mask_has_no_bounding_box() -> None:
    assert bounding_box(np.zeros((3, 3), dtype=bool)) is None
