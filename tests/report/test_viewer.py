"""Volumes for the viewer: every voxel that is kept stays where it was in the patient, and nothing of a source header is in them."""

from __future__ import annotations

import base64
import gzip

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.cases import block, opened

from slmsam2_cli.report.viewer import Part, viewing_order, volumes

OBLIQUE = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0]])


def loaded(text):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def where(case, index):
    """RAS mm of a voxel (z, y, x) of the whole."""
    return (np.diag([-1, -1, 1, 1]) @ case.grid.affine() @ [*index[::-1], 1])[:3]


def test_a_small_case_is_whole_and_says_nothing_about_it():
    image = np.arange(8 * 20 * 24, dtype=np.float32).reshape(8, 20, 24)
    case = opened(block(), block(value=3), image, direction=OBLIQUE, origin=(5, -7, 11))
    found = volumes(case)
    assert (found.axis, found.first, found.step, found.note) == (2, 0, 1, "")
    mask, truth = loaded(found.prediction), loaded(found.truth)
    assert np.array_equal(np.asarray(mask.dataobj).T, block()) and np.array_equal(np.asarray(truth.dataobj).T, block(value=3))
    assert mask.affine @ [3, 2, 1, 1] == pytest.approx([*where(case, (1, 2, 3)), 1], abs=1e-4)
    assert nibabel.aff2axcodes(mask.affine) == nibabel.aff2axcodes(np.diag([-1, -1, 1, 1]) @ case.grid.affine())


def test_grey_values_can_be_read_off():
    image = np.linspace(100, 900, 8 * 20 * 24, dtype=np.float32).reshape(8, 20, 24)
    shown = loaded(volumes(opened(block(), image=image)).image)
    low, high = float(shown.header["cal_min"]), float(shown.header["cal_max"])
    assert shown.get_data_dtype() == np.uint8 and (low, high) == pytest.approx((104, 896))
    assert np.abs(shown.get_fdata().T - image.clip(low, high)).max() <= (high - low) / 255


def test_a_header_holds_no_text_and_the_same_case_gives_the_same_bytes():
    case = opened(block())
    header = loaded(volumes(case).prediction).header
    assert all(not bytes(header[key]).strip(b"\0") for key in ("descrip", "aux_file", "intent_name", "db_name"))
    assert volumes(case) == volumes(opened(block()))


def test_without_a_prediction_there_is_nothing_to_turn_around():
    assert volumes(opened(None, block())) is None


def test_many_labels_keep_their_values():
    mask = block().astype(np.uint16) * 300
    assert np.asarray(loaded(volumes(opened(mask)).prediction).dataobj).max() == 300


def test_a_large_case_is_cut_to_its_structures_and_a_margin():
    case = opened(block((8, 200, 200), y=(90, 110), x=(90, 110)))
    found = volumes(case, most=8 * 70 * 70)
    mask = loaded(found.prediction)
    assert mask.shape == (60, 60, 8) and found.note == "cut to the structures and a margin" and found.step == 1
    assert np.count_nonzero(mask.dataobj) == np.count_nonzero(case.prediction)


def test_what_is_still_too_large_is_thinned_in_the_plane_and_keeps_its_slices():
    found = volumes(opened(np.ones((8, 100, 100), np.uint8)), most=8 * 50 * 50)
    assert loaded(found.prediction).shape == (50, 50, 8)
    assert (found.axis, found.first, found.step, found.note) == (2, 0, 1, "every second voxel where fine")


def test_slices_go_only_when_the_plane_cannot_give_more():
    part = Part.of((100, 16, 16), None, (1, 1, 1), 0, 100)
    assert part.step[0] > 1 and part.step[1:] == (8, 8) and np.prod(part.count) <= 100


cases = st.tuples(*[st.integers(1, 30)] * 3, st.integers(0, 2), st.integers(1, 2000), st.integers(0, 10**6))


@settings(deadline=None, max_examples=60)
@given(cases)
def test_cutting_and_thinning_keep_every_voxel_in_its_place(drawn):
    z, y, x, axis, most, seed = drawn
    rng = np.random.default_rng(seed)
    mask = np.zeros((z, y, x), np.uint8)
    mask[tuple(rng.integers(0, n) for n in (z, y, x))] = 1
    case = opened(mask, axis=axis, spacing=rng.uniform(0.3, 9, 3), origin=rng.uniform(-99, 99, 3), direction=OBLIQUE)
    part = Part.of(mask.shape, case.box, case.grid.spacing_mm, axis, most)
    assert np.prod(part.count) <= most and part.cut(mask).shape == part.count
    kept = tuple(int(rng.integers(0, n)) for n in part.count)
    whole = tuple(f + s * i for f, s, i in zip(part.first, part.step, kept))
    assert part.affine(case.grid) @ [*kept[::-1], 1] == pytest.approx([*where(case, whole), 1], abs=1e-6)
    found = volumes(case, most)
    shown = loaded(found.prediction)
    assert shown.shape == part.count[::-1] and np.allclose(shown.affine, part.affine(case.grid), atol=1e-3)
    k = kept[axis]
    assert (found.axis, found.first + found.step * k) == (2 - axis, whole[axis])


def test_a_single_huge_slice_is_thinned_without_end_to_the_step():
    assert np.prod(Part.of((1, 30000, 30000), None, (1, 1, 1), 0, 4_000_000).count) <= 4_000_000


def test_an_edge_longer_than_a_nifti_can_hold_is_thinned():
    assert loaded(volumes(opened(np.ones((1, 2, 40000), np.uint8))).prediction).shape == (20000, 2, 1)


def test_the_worst_the_middle_and_the_best_case_come_first_and_every_case_once():
    assert list(viewing_order(["a", "b", "c", "d", "e"])) == ["a", "c", "e", "b", "d"]
    assert list(viewing_order(["a"])) == ["a"] and list(viewing_order([])) == []
