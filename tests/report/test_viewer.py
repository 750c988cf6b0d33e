"""Volumes for the viewer: kept voxels keep their position in the patient, and headers hold nothing of the source files."""

from __future__ import annotations

import base64
import gzip

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.cases import block, loaded_case

from slmsam2_cli.report.viewer import Subset, make_volumes, viewing_order

OBLIQUE = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])


def decode(text):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def where(case, index):
    """Return the position in RAS mm of a voxel (z, y, x) of the whole volume."""
    return (np.diag([-1, -1, 1, 1]) @ case.grid.affine() @ [*index[::-1], 1])[:3]


def test_a_small_case_is_kept_whole_without_a_note():
    image = np.arange(8 * 20 * 24, dtype=np.float32).reshape(8, 20, 24)
    case = loaded_case(block(), block(value=3), image, direction=OBLIQUE, origin=(5, -7, 11))
    found = make_volumes(case)
    assert (found.axis, found.first, found.step, found.note) == (2, 0, 1, "")
    mask, truth = decode(found.prediction), decode(found.reference)
    assert np.array_equal(np.asarray(mask.dataobj).T, block()) and np.array_equal(np.asarray(truth.dataobj).T, block(value=3))
    assert mask.affine @ [3, 2, 1, 1] == pytest.approx([*where(case, (1, 2, 3)), 1], abs=1e-4)
    assert nibabel.aff2axcodes(mask.affine) == nibabel.aff2axcodes(np.diag([-1, -1, 1, 1]) @ case.grid.affine())


def test_the_viewer_can_show_original_intensities():
    image = np.linspace(100, 900, 8 * 20 * 24, dtype=np.float32).reshape(8, 20, 24)
    shown = decode(make_volumes(loaded_case(block(), image=image)).image)
    low, high = float(shown.header["cal_min"]), float(shown.header["cal_max"])
    assert shown.get_data_dtype() == np.uint8 and (low, high) == pytest.approx((104, 896))
    assert np.abs(shown.get_fdata().T - image.clip(low, high)).max() <= (high - low) / 255


def test_a_header_holds_no_text_and_the_same_case_gives_the_same_bytes():
    case = loaded_case(block())
    header = decode(make_volumes(case).prediction).header
    assert all(not bytes(header[key]).strip(b"\0") for key in ("descrip", "aux_file", "intent_name", "db_name"))
    assert make_volumes(case) == make_volumes(loaded_case(block()))


def test_without_a_prediction_there_are_no_volumes():
    assert make_volumes(loaded_case(None, block())) is None


def test_label_values_above_255_are_kept():
    mask = block().astype(np.uint16) * 300
    assert np.asarray(decode(make_volumes(loaded_case(mask)).prediction).dataobj).max() == 300


def test_a_large_case_is_cropped_to_its_structures_and_a_margin():
    case = loaded_case(block((8, 200, 200), y=(90, 110), x=(90, 110)))
    found = make_volumes(case, most=8 * 70 * 70)
    mask = decode(found.prediction)
    assert mask.shape == (60, 60, 8) and found.note == "cropped to the structures and a margin" and found.step == 1
    assert np.count_nonzero(mask.dataobj) == np.count_nonzero(case.prediction)


def test_a_case_too_large_after_cropping_is_subsampled_within_slices():
    found = make_volumes(loaded_case(np.ones((8, 100, 100), np.uint8)), most=8 * 50 * 50)
    assert decode(found.prediction).shape == (50, 50, 8)
    assert (found.axis, found.first, found.step, found.note) == (2, 0, 1, "every 2nd voxel along axes of fine resolution")


def test_slices_are_left_out_only_when_subsampling_within_them_is_not_enough():
    subset = Subset.of((100, 16, 16), None, (1, 1, 1), 0, 100)
    assert subset.step[0] > 1 and subset.step[1:] == (8, 8) and np.prod(subset.count) <= 100


cases = st.tuples(*[st.integers(1, 30)] * 3, st.integers(0, 2), st.integers(1, 2000), st.integers(0, 10**6))


@settings(deadline=None, max_examples=60)
@given(cases)
def test_cropping_and_subsampling_keep_the_position_of_every_voxel(drawn):
    z, y, x, axis, most, seed = drawn
    rng = np.random.default_rng(seed)
    mask = np.zeros((z, y, x), np.uint8)
    mask[tuple(rng.integers(0, n) for n in (z, y, x))] = 1
    case = loaded_case(mask, axis=axis, spacing=rng.uniform(0.3, 9, 3), origin=rng.uniform(-99, 99, 3), direction=OBLIQUE)
    subset = Subset.of(mask.shape, case.box, case.grid.spacing_mm, axis, most)
    assert np.prod(subset.count) <= most and subset.crop(mask).shape == subset.count
    kept = tuple(int(rng.integers(0, n)) for n in subset.count)
    whole = tuple(f + s * i for f, s, i in zip(subset.first, subset.step, kept))
    assert subset.affine(case.grid) @ [*kept[::-1], 1] == pytest.approx([*where(case, whole), 1], abs=1e-6)
    found = make_volumes(case, most)
    shown = decode(found.prediction)
    assert shown.shape == subset.count[::-1] and np.allclose(shown.affine, subset.affine(case.grid), atol=1e-3)
    k = kept[axis]
    assert (found.axis, found.first + found.step * k) == (2 - axis, whole[axis])


def test_a_single_huge_slice_is_subsampled_without_limit():
    assert np.prod(Subset.of((1, 30000, 30000), None, (1, 1, 1), 0, 4_000_000).count) <= 4_000_000


def test_an_edge_longer_than_a_nifti_allows_is_subsampled():
    assert decode(make_volumes(loaded_case(np.ones((1, 2, 40000), np.uint8))).prediction).shape == (20000, 2, 1)


def test_worst_median_and_best_case_are_drawn_first():
    assert list(viewing_order(["a", "b", "c", "d", "e"])) == ["a", "c", "e", "b", "d"]
    assert list(viewing_order(["a"])) == ["a"] and list(viewing_order([])) == []
