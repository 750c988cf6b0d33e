"""Volumes become stacks of slices and come back exactly, however they were stored."""

from __future__ import annotations

from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.dataset.slices import View, interpolation_matrix, nearest_indices, nonzero_box, orient, oriented_size, slice_axis_of
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import Source, Volume

STORAGE = list(product(permutations(range(3)), product((False, True), repeat=3)))  # the 48 ways to store one volume
AXES = st.sampled_from(["SI", "AP", "LR"])


def geometry(axis="SI", in_plane_mm=1.0, through_plane_mm=None, storage_size=256, crop=False):
    return SimpleNamespace(
        slice_axis=axis, in_plane_mm=in_plane_mm, through_plane_mm=through_plane_mm, storage_size=storage_size, crop_to_nonzero=crop
    )


def volume(voxels, spacing=(1.0, 1.0, 1.0), direction=None):
    grid = Grid(voxels.shape[-3:], spacing, (0.0, 0.0, 0.0), np.eye(3) if direction is None else direction)
    return Volume(voxels if voxels.ndim == 4 else voxels[None], grid, Source(".nii.gz", ".nii.gz"))


def stored(array, spacing, direction, order, flips):
    """The same patient saved with other array axes: the array, its spacing and its direction."""
    turned = np.flip(array.transpose(order), [axis for axis in range(3) if flips[axis]])
    rows = direction[:, ::-1].T[list(order)] * np.where(flips, -1, 1)[:, None]
    return turned, tuple(spacing[a] for a in order), np.ascontiguousarray(rows[::-1].T)


def turned(angle, axis):
    """A rotation matrix about one of the x, y, z axes."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    a, b = [i for i in range(3) if i != axis]
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


def logits_of(stack, values):
    return lambda t: np.stack([np.where(stack[t] == value, 5.0, -5.0) for value in values]).astype(np.float32)


def test_an_lps_volume_is_already_oriented():
    assert orient(np.eye(3)).order == (0, 1, 2)
    assert orient(np.eye(3)).flipped == (False, False, False)


def test_a_ras_volume_is_turned_in_plane():
    assert orient(np.diag([-1.0, -1.0, 1.0])).flipped == (False, True, True)


def test_the_slice_axis_goes_in_front_and_the_others_keep_their_order():
    assert orient(np.eye(3), "LR").order == (2, 0, 1)


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4])
@pytest.mark.parametrize(("order", "flips"), STORAGE)
def test_every_storage_order_is_oriented_to_the_same_array(order, flips, angle):
    patient = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    direction = turned(angle, 0) @ turned(0.2 if angle else 0.0, 2)
    reference = orient(direction, "AP").apply(patient)
    array, _, other = stored(patient, (3.0, 2.0, 1.0), direction, order, flips)
    assert np.array_equal(orient(other, "AP").apply(array), reference)


@settings(deadline=None, max_examples=60)
@given(how=st.sampled_from(STORAGE), axis=AXES, crop=st.booleans(), seed=st.integers(0, 99), tilt=st.floats(-0.7, 0.7))
def test_the_stack_does_not_depend_on_how_the_volume_was_stored(how, axis, crop, seed, tilt):
    rng = np.random.default_rng(seed)
    patient = rng.random((5, 9, 7)) * (rng.random((5, 9, 7)) > 0.9)
    spacing, direction = (3.0, 0.7, 1.3), turned(tilt, seed % 3)
    plan = geometry(axis, in_plane_mm=0.8, through_plane_mm=2.0, crop=crop)
    first, second = volume(patient, spacing, direction), volume(*stored(patient, spacing, direction, *how))
    one, two = View.fit(first, plan), View.fit(second, plan)
    assert one.stack_shape == two.stack_shape
    assert np.array_equal(one.frames(first.voxels), two.frames(second.voxels))
    assert np.array_equal(one.labels(first.voxels[0]), two.labels(second.voxels[0]))


@settings(deadline=None, max_examples=60)
@given(how=st.sampled_from(STORAGE), axis=AXES, shape=st.tuples(*[st.integers(1, 7)] * 3), seed=st.integers(0, 99))
def test_labels_come_back_exactly_at_native_resolution(how, axis, shape, seed):
    labels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    saved, spacing, direction = stored(labels, (1.0, 1.0, 1.0), np.eye(3), *how)
    image = volume(saved, spacing, direction)
    view = View.fit(image, geometry(axis))
    stack = view.labels(saved)
    assert np.array_equal(view.restore(logits_of(stack, [1, 2, 3]), [1, 2, 3]), saved)


@settings(deadline=None, max_examples=40)
@given(axis=AXES, edge=st.floats(0.25, 0.6), through=st.sampled_from([None, 0.7, 1.0]), seed=st.integers(0, 99))
def test_a_ball_survives_finer_slices_with_hardly_a_voxel_lost(axis, edge, through, seed):
    centre = np.random.default_rng(seed).uniform(6, 10, 3)
    ball = (sum((c - m) ** 2 for c, m in zip(np.indices((16, 17, 18)), centre, strict=True)) < 25).astype(np.uint8)
    view = View.fit(volume(ball), geometry(axis, in_plane_mm=edge, through_plane_mm=through))
    back = view.restore(logits_of(view.labels(ball), [1]), [1])
    assert 2 * (back & ball).sum() / (back.sum() + ball.sum()) > 0.95


def test_slices_go_from_foot_to_head_in_the_stack_and_back_to_the_file():
    labels = np.zeros((4, 2, 2), np.uint8)
    labels[0] = 1  # the file's first slice is the head: its z axis points down
    view = View.fit(volume(labels, direction=np.diag([1.0, 1.0, -1.0])), geometry())
    assert np.flatnonzero(view.slices_with(labels, view.axis)).tolist() == [3]
    assert view.file_index(3) == 0


def test_the_crop_keeps_voxels_that_are_not_zero_in_any_channel():
    stack = np.zeros((2, 4, 5, 6))
    stack[0, 1, 2, 3] = 1
    stack[1, 2, 4, 0] = -1
    assert nonzero_box(stack) == ((1, 3), (2, 5), (0, 4))


def test_a_volume_of_zeros_is_not_cropped():
    assert nonzero_box(np.zeros((1, 2, 3, 4))) == ((0, 2), (0, 3), (0, 4))


def test_nothing_is_labelled_outside_the_crop():
    voxels = np.zeros((3, 8, 8))
    voxels[1, 2:5, 3:7] = 1
    view = View.fit(volume(voxels), geometry(crop=True))
    full = view.restore(lambda t: np.ones((1, 3, 4), np.float32), [7])
    assert np.array_equal(full, np.where(voxels > 0, 7, 0))


def test_a_slice_outside_the_crop_is_shown_by_the_nearest_one():
    voxels = np.zeros((6, 4, 4))
    voxels[2:4] = 1
    view = View.fit(volume(voxels), geometry(crop=True))
    assert [view.to_stack(t) for t in range(6)] == [0, 0, 0, 1, 1, 1]


def test_pixels_get_the_planned_size():
    view = View.fit(volume(np.ones((3, 10, 20)), spacing=(5.0, 2.0, 1.0)), geometry(in_plane_mm=0.5))
    assert view.stack_shape == (3, 40, 40)
    assert view.scale == 1


def test_a_slice_larger_than_the_frame_is_shrunk_as_a_whole():
    view = View.fit(volume(np.ones((3, 100, 50))), geometry(in_plane_mm=1.0, storage_size=64))
    assert view.stack_shape == (3, 64, 32)
    assert view.scale == pytest.approx(0.64)


def test_a_thin_slice_keeps_one_pixel():
    view = View.fit(volume(np.ones((2, 30, 30)), spacing=(1.0, 0.01, 1.0)), geometry())
    assert view.stack_shape == (2, 1, 30)


@pytest.mark.parametrize(("shape", "axis"), [((1, 5, 6), "SI"), ((5, 1, 6), "AP"), ((5, 6, 1), "LR")])
def test_a_single_slice_is_cut_along_its_own_axis(shape, axis):
    for planned in ("SI", "AP", "LR"):
        grid = Grid(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
        assert slice_axis_of(grid, planned) == axis
        assert View.fit(volume(np.ones(shape)), geometry(planned)).stack_shape == (1, 5, 6)


def test_shrinking_averages_and_growing_interpolates():
    assert interpolation_matrix(4, 2).toarray() == pytest.approx(np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / np.array([[7], [7]]))
    assert interpolation_matrix(2, 4).toarray() == pytest.approx(np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]))
    assert np.array_equal(interpolation_matrix(5, 5).toarray(), np.eye(5))


@given(size_in=st.integers(1, 40), size_out=st.integers(1, 40))
def test_a_constant_image_stays_constant(size_in, size_out):
    assert interpolation_matrix(size_in, size_out) @ np.full(size_in, 3.0) == pytest.approx(np.full(size_out, 3.0), rel=1e-6)


def test_nearest_takes_the_pixel_under_the_centre():
    assert nearest_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_indices(6, 3).tolist() == [1, 3, 5]


def test_a_ramp_keeps_its_values_at_the_same_places():
    ramp = np.broadcast_to(np.arange(8.0), (2, 8, 8))
    frames = View.fit(volume(np.array(ramp)), geometry(in_plane_mm=0.5)).frames(ramp[None])
    assert frames.shape == (1, 2, 16, 16)
    assert frames[0, 0, 5, 4:8] == pytest.approx([1.75, 2.25, 2.75, 3.25])


def test_slices_are_interpolated_if_the_plan_sets_a_through_plane_spacing():
    voxels = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 3, 3)).copy()
    view = View.fit(volume(voxels, spacing=(2.0, 1.0, 1.0)), geometry(through_plane_mm=1.0))
    assert view.frames(voxels[None])[0, :, 1, 1] == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_the_largest_logit_wins_and_none_above_zero_means_background():
    view = View.fit(volume(np.ones((1, 1, 3))), geometry())
    logits = np.array([[[1.0, -1.0, 2.0]], [[3.0, -2.0, 2.0]]], np.float32)
    assert view.restore(lambda t: logits, [4, 300])[0, 0].tolist() == [300, 0, 4]


def test_large_label_values_need_16_bits():
    view = View.fit(volume(np.ones((1, 2, 2))), geometry())
    assert view.restore(lambda t: np.ones((1, 2, 2), np.float32), [255]).dtype == np.uint8
    assert view.restore(lambda t: np.ones((1, 2, 2), np.float32), [256]).dtype == np.uint16


def test_each_stack_slice_is_computed_once():
    view, asked = View.fit(volume(np.ones((6, 2, 2))), geometry(through_plane_mm=2.0)), []
    view.restore(lambda t: (asked.append(t), np.ones((1, 2, 2), np.float32))[1], [1])
    assert asked == [0, 1, 2]


def test_a_view_survives_json():
    view = View.fit(volume(np.ones((3, 4, 5)), (2.0, 0.5, 0.5), turned(0.1, 1)), geometry("LR", crop=True))
    again = View.from_json(view.to_json())
    assert again.to_json() == view.to_json()
    assert again.grid.difference(view.grid) is None


def test_sizes_are_returned_in_anatomical_order():
    grid = Grid((4, 5, 6), (1.0, 2.0, 3.0), (0.0, 0.0, 0.0), np.eye(3)[:, [2, 0, 1]])  # array x runs to S, y to L, z to P
    assert oriented_size(grid) == ((6, 4, 5), (3.0, 1.0, 2.0))
