"""Synthetic phantoms: their labels, intensities, spacing and files."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import LABELS, phantom_volume, write_phantom_dataset
from slmsam2_cli.io.volume import read_image, read_labels

MODALITIES = pytest.mark.parametrize("modality", ["MR", "CT"])


def case(index, modality="MR"):
    return phantom_volume(np.random.default_rng([7, index]), modality=modality)


@MODALITIES
def test_every_label_is_present_and_differs_in_intensity_from_the_body(modality):
    for index in range(4):
        image, labels, _ = case(index, modality)
        body = image[(labels == 0) & (image > image.min())]
        for value in LABELS:
            assert (labels == value).sum() > 100
            assert abs(np.median(image[labels == value]) - np.median(body)) > image[labels == value].std()


def test_structures_end_inside_the_volume():
    _, labels, _ = case(0)
    first_slice, last_slice = ({int(v) for v in np.unique(labels[z])} for z in (0, -1))
    assert 1 not in first_slice | last_slice
    assert 2 in first_slice and 2 not in last_slice
    assert 3 not in first_slice


def test_outside_the_body_mr_is_exactly_zero_and_ct_is_air():
    assert case(0, "MR")[0][:, 0, 0].tolist() == [0] * 24
    assert case(0, "CT")[0][:, 0, 0] == pytest.approx(-1000, abs=120)


def test_cases_differ_between_seeds_and_repeat_with_the_same_seed():
    assert not np.array_equal(case(0)[1], case(1)[1])
    assert np.array_equal(case(0)[0], case(0)[0])


def test_slices_are_thicker_than_pixels():
    spacing = case(0)[2]
    assert spacing[0] > 2 * spacing[1] == 2 * spacing[2]


def test_a_case_takes_well_under_a_second():
    start = time.process_time()
    case(0)
    assert time.process_time() - start < 1


@MODALITIES
def test_the_data_set_is_read_without_problems_or_warnings(tmp_path, modality):
    write_phantom_dataset(tmp_path, cases=2, test_cases=1, modality=modality, shape=(6, 24, 24))
    data = read_dataset(tmp_path)
    assert data.labels == LABELS
    assert data.channels == ({"MR": "MRI", "CT": "CT"}[modality],)
    assert (len(data.training), len(data.test), data.problems, data.warnings) == (2, 1, (), ())
    first = data.training[0]
    image = read_image(first.images, case=first.id, root=tmp_path)
    labels = read_labels(first.label, case=first.id, root=tmp_path)
    assert image.grid.difference(labels.grid) is None
    assert np.array_equal(image.grid.direction, np.eye(3))
    assert image.warnings == labels.warnings == ()


def test_more_cases_leave_the_first_ones_unchanged(tmp_path):
    write_phantom_dataset(tmp_path / "few", cases=1, test_cases=0, shape=(5, 16, 16))
    write_phantom_dataset(tmp_path / "many", cases=3, test_cases=1, shape=(5, 16, 16))
    few, many = (folder / "imagesTr" / "phantom_000.nii.gz" for folder in (tmp_path / "few", tmp_path / "many"))
    assert few.read_bytes() == many.read_bytes()


def test_dataset_json_has_the_layout_of_the_decathlon(tmp_path):
    write_phantom_dataset(tmp_path, cases=1, test_cases=1, shape=(4, 16, 16))
    value = json.loads((tmp_path / "dataset.json").read_text())
    assert value["modality"] == {"0": "MRI"}
    assert value["training"] == [{"image": "./imagesTr/phantom_000.nii.gz", "label": "./labelsTr/phantom_000.nii.gz"}]
    assert value["test"] == ["./imagesTs/phantom_001.nii.gz"]


def test_a_single_slice_is_possible():
    image, labels, _ = phantom_volume(np.random.default_rng(0), shape=(1, 32, 32))
    assert image.shape == labels.shape == (1, 32, 32)
    assert np.isfinite(image).all()
