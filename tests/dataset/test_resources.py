"""How large a case is, by its files' headers alone."""

from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.dataset.phantom import nifti_bytes
from slmsam2_cli.dataset.resources import ASSUMED_COMPRESSION, bytes_on_disk, bytes_to_read, free_bytes

VOXELS = 4 * 10 * 12
INT16 = nifti_bytes(np.zeros((4, 10, 12), np.float32), (1.0, 1.0, 1.0))
UINT8 = nifti_bytes(np.zeros((4, 10, 12), np.uint8), (1.0, 1.0, 1.0))


def case(folder, image, label=None, ending=".nii.gz"):
    (folder / f"image{ending}").write_bytes(image)
    if label is not None:
        (folder / f"label{ending}").write_bytes(label)
    return Case("c", (folder / f"image{ending}",), None if label is None else folder / f"label{ending}")


def test_the_memory_of_a_case_is_twice_its_stored_voxels(tmp_path):
    assert bytes_to_read(case(tmp_path, INT16, UINT8)) == 2 * (2 * VOXELS) + 2 * VOXELS


def test_whole_numbers_that_the_header_scales_become_floats(tmp_path):
    header = bytearray(gzip.decompress(INT16))
    struct.pack_into("<2f", header, 112, 0.5, 3)
    assert bytes_to_read(case(tmp_path, bytes(header), ending=".nii")) == (2 + 4) * VOXELS


def test_both_byte_orders_and_both_versions_of_nifti_are_understood(tmp_path):
    voxels = np.zeros((12, 10, 4), np.int16)
    nibabel.Nifti1Image(voxels, np.eye(4), nibabel.Nifti1Header(endianness=">"), dtype=np.int16).to_filename(tmp_path / "big.nii.gz")
    nibabel.Nifti2Image(voxels, np.eye(4)).to_filename(tmp_path / "two.nii")
    assert [bytes_to_read(Case("c", (tmp_path / name,), None)) for name in ("big.nii.gz", "two.nii")] == [4 * VOXELS, 4 * VOXELS]


def test_a_file_with_an_unknown_header_is_estimated_as_compressed(tmp_path):
    assert bytes_to_read(case(tmp_path, b"x" * 1000, ending=".nrrd")) == 2 * ASSUMED_COMPRESSION * 1000
    assert bytes_to_read(case(tmp_path, b"x", ending=".nii.gz")) == 2 * ASSUMED_COMPRESSION


def test_a_dicom_folder_is_estimated_from_all_its_slices(tmp_path):
    (tmp_path / "one.dcm").write_bytes(b"x" * 30)
    (tmp_path / "two.dcm").write_bytes(b"x" * 70)
    assert bytes_on_disk(Case("c", (tmp_path,), None)) == 100


def test_a_missing_file_needs_no_memory(tmp_path):
    absent = Case("c", (tmp_path / "absent.nii.gz",), tmp_path / "none.nii.gz")
    assert (bytes_on_disk(absent), bytes_to_read(absent)) == (0, 0)


def test_some_memory_is_free():
    assert free_bytes() > 1 << 24
