"""NIfTI headers: what they declare is checked before a voxel is read, and masks carry their geometry and nothing else."""

from __future__ import annotations

import gzip
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.volume import LabelVolume, Volume, read_image, read_labels, write_mask

ARRAY = np.arange(9 * 8 * 10, dtype=np.int16).reshape(9, 8, 10)  # (x, y, z)
AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 20], [0, 0, 3, 5], [0, 0, 0, 1]])  # RAS


def nifti(array: np.ndarray = ARRAY, affine: np.ndarray | None = AFFINE, kind: Any = nib.Nifti1Image, **fields: Any) -> bytes:
    image = kind(array, affine)
    if affine is not None:
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
    data = bytearray(image.to_bytes())
    length = image.header.template_dtype.itemsize
    header = np.frombuffer(data, image.header.template_dtype, 1)[0] if image.header.endianness == "<" else None
    assert header is not None
    header = header.copy()
    for name, value in fields.items():
        header[name] = value
    data[:length] = header.tobytes()
    return bytes(data)


def read(folder: Path, data: bytes, name: str = "case.nii.gz", **options: Any) -> Volume:
    path = folder / name
    path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") and not data.startswith(b"\x1f\x8b") else data)
    return read_image([path], case="case", root=folder, **options)


def test_arrays_are_zyx_and_world_coordinates_lps(tmp_path: Path) -> None:
    volume = read(tmp_path, nifti())
    assert volume.voxels.shape == (1, 10, 8, 9)
    assert volume.voxels[0, 4, 3, 2] == ARRAY[2, 3, 4]
    assert volume.grid.spacing_mm == (3, 1.5, 2)
    assert volume.grid.origin_mm == (30, -20, 5)
    assert np.array_equal(volume.grid.direction, np.diag([-1, -1, 1]))
    assert volume.warnings == ()


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "i1", "u2", "u4", "i8", "u8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_scalar_type_of_both_versions_is_read_exactly(tmp_path: Path, dtype: str, kind: Any) -> None:
    array = (ARRAY % 100).astype(dtype)
    image = kind(array, AFFINE, dtype=array.dtype)
    image.to_filename(tmp_path / "a.nii")
    volume = read_image([tmp_path / "a.nii"], case="a", root=tmp_path)
    assert volume.voxels.dtype == np.dtype(dtype)
    assert np.array_equal(volume.voxels[0], array.T)


def test_big_endian_files_are_read_exactly(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    nib.Nifti1Image(ARRAY.astype(">i2"), AFFINE, header).to_filename(tmp_path / "a.nii.gz")
    volume = read_image([tmp_path / "a.nii.gz"], case="a", root=tmp_path)
    assert volume.voxels.dtype.isnative
    assert np.array_equal(volume.voxels[0], ARRAY.T)
    assert volume.grid.spacing_mm == (3, 1.5, 2)


def test_slope_and_intercept_are_applied_and_zero_means_none(tmp_path: Path) -> None:
    assert read(tmp_path, nifti(scl_slope=2, scl_inter=-10)).voxels.max() == 2 * 719 - 10
    assert read(tmp_path, nifti(scl_slope=0, scl_inter=7)).voxels.max() == 719


def test_headers_that_other_readers_open_are_read_with_a_warning(tmp_path: Path) -> None:
    plain = read(tmp_path, nifti(sform_code=0))
    for fields, warning in (
        ({"scl_slope": np.nan, "scl_inter": np.nan}, "the values are not scaled"),
        ({"sform_code": 1, "qform_code": 1, "srow_x": (0,) * 4, "srow_y": (0,) * 4, "srow_z": (0,) * 4}, "the qform is used"),
        ({"sform_code": 0, "pixdim": (1, 2, -1.5, 3, 0, 0, 0, 0)}, "taken as positive"),
    ):
        found = read(tmp_path, nifti(**fields))
        assert any(warning in line for line in found.warnings)
        assert np.array_equal(found.voxels, plain.voxels)
        assert "scl_slope" in fields or found.grid.difference(plain.grid) is None


def test_a_few_zeros_after_the_voxels_are_a_warning_and_anything_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "case.nii"
    path.write_bytes(nifti() + bytes(160))
    found = read_image([path], case="case", root=tmp_path)
    assert found.warnings == ("160 zeros after the voxels are ignored",)
    for tail in (bytes(159) + b"x", bytes(1 << 17)):
        path.write_bytes(nifti() + tail)
        with pytest.raises(CaseError, match="the data are larger than"):
            read_image([path], case="case", root=tmp_path)


@given(
    st.lists(st.integers(0, 119), min_size=4, max_size=4),
    st.sampled_from([np.int16, np.uint8]),
)
def test_whole_numbers_that_nibabel_scaled_into_integers_come_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], kind: type[np.generic]
) -> None:
    labels = np.resize(np.array([0, *values], np.float64), (4, 5, 6))
    image = nib.Nifti1Image(labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_data_dtype(kind)
    path = tmp_path_factory.mktemp("scaled") / "a.nii"
    path.write_bytes(image.to_bytes())
    assert np.array_equal(read_labels(path, case="a", root=path.parent).voxels, labels.T)


def test_labels_are_not_made_whole_where_two_stored_numbers_would_become_one(tmp_path: Path) -> None:
    array = np.resize(np.arange(4, dtype=np.int16), ARRAY.shape)
    path = tmp_path / "a.nii"
    path.write_bytes(nifti(array, scl_slope=0.7))
    with pytest.raises(CaseError, match="a non-integer label"):
        read_labels(path, case="a", root=tmp_path)


def test_the_sform_takes_precedence_over_the_qform_and_that_over_pixdim(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[:3, 3] += [7, 0, 0]
    rows = {"srow_x": shifted[0], "srow_y": shifted[1], "srow_z": shifted[2]}
    both = read(tmp_path, nifti(**rows))
    assert both.grid.origin_mm == (23, -20, 5)
    assert any("sform and qform disagree by up to 7 mm" in line for line in both.warnings)
    qform_only = read(tmp_path, nifti(**rows, sform_code=0))
    assert qform_only.grid.origin_mm == (30, -20, 5)
    assert qform_only.warnings == ()
    neither = read(tmp_path, nifti(**rows, sform_code=0, qform_code=0))
    assert neither.grid.origin_mm == (0, 0, 0)
    assert neither.grid.spacing_mm == (3, 1.5, 2)
    assert any("orientation" in line for line in neither.warnings)


def test_a_length_in_metres_becomes_millimetres(tmp_path: Path) -> None:
    metres = np.diag([0.001, 0.001, 0.001, 1]) @ AFFINE
    volume = read(tmp_path, nifti(affine=metres, xyzt_units=1))
    assert volume.grid.spacing_mm == pytest.approx((3, 1.5, 2))
    assert volume.grid.origin_mm == pytest.approx((30, -20, 5))
    assert any("metre" in line for line in volume.warnings)


def test_trailing_axes_of_one_are_dropped_and_a_fourth_axis_holds_channels(tmp_path: Path) -> None:
    assert read(tmp_path, nifti(ARRAY[..., None, None]), channels=1).voxels.shape == (1, 10, 8, 9)
    two = read(tmp_path, nifti(np.stack([ARRAY, -ARRAY], 3)), channels=2)
    assert two.voxels.shape == (2, 10, 8, 9)
    assert two.voxels[1, 4, 3, 2] == -ARRAY[2, 3, 4]
    with pytest.raises(CaseError, match="3 channels"):
        read(tmp_path, nifti(np.stack([ARRAY] * 3, 3)), channels=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)}, "too large"),
        ({"dim": (3, 900, 900, 900, 1, 1, 1, 1)}, "truncated or damaged: the header declares 1458000000 bytes"),
        ({"dim": (3, -9, 8, 10, 1, 1, 1, 1)}, "dimension"),
        ({"dim": (3, 9, 0, 10, 1, 1, 1, 1)}, "dimension"),
        ({"dim": (9, 9, 8, 10, 1, 1, 1, 1)}, "dimensions is 9"),
        ({"dim": (2, 9, 80, 1, 1, 1, 1, 1)}, "2-D"),
        ({"datatype": 999}, "unsupported data type"),
        ({"datatype": 32}, "complex"),
        ({"datatype": 128}, "RGB"),
        ({"scl_slope": np.nan}, "scl_slope"),
        ({"scl_inter": np.inf}, "scl_inter"),
        ({"vox_offset": np.nan}, "vox_offset"),
        ({"vox_offset": 1e30}, "vox_offset"),
        ({"vox_offset": 100}, "vox_offset"),
        ({"pixdim": (1, 0, 1, 1, 0, 0, 0, 0), "sform_code": 0}, "spacing"),
        ({"pixdim": (1, 1, 1, np.nan, 0, 0, 0, 0), "sform_code": 0}, "not finite"),
        ({"quatern_b": np.nan, "sform_code": 0}, "not finite"),
        ({"quatern_b": 3, "sform_code": 0}, "no rotation"),
        ({"srow_x": (np.nan, 0, 0, 0)}, "not finite"),
        ({"srow_x": (0, 0, 0, 0)}, "singular"),
        ({"srow_x": (2, 0.3, 0, 0)}, "sheared by 11 degrees"),
        ({"magic": b"ni1"}, "pair"),
        ({"magic": b"xxx"}, "not a NIfTI"),
        ({"sizeof_hdr": 7}, "not a NIfTI"),
    ],
)
def test_invalid_headers_are_rejected_and_the_field_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError, match=f"^case case: case.nii.gz: .*{message}"):
        read(tmp_path, nifti(**fields))


def test_a_small_shear_is_accepted(tmp_path: Path) -> None:
    volume = read(tmp_path, nifti(srow_x=(2, 0.001, 0, -30)))
    assert np.allclose(volume.grid.direction.T @ volume.grid.direction, np.eye(3), atol=1e-12)


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    raw = nifti()
    packed = gzip.compress(raw)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in the checksum
    for data, message in [
        (b"", "empty"),
        (raw[:1000], "truncated"),
        (raw + b"more", "larger than"),
        (packed[:-6], "truncated"),
        (packed[: len(packed) // 2], "truncated"),
        (bytes(flipped), "corrupt"),
        (gzip.compress(raw + b"more"), "larger than"),
        (gzip.compress(raw[:352]), "truncated|no voxels"),
        (gzip.compress(b""), "header is truncated"),
        (b"hello", "not a gzip or NIfTI"),
    ]:
        (tmp_path / "a.nii.gz").write_bytes(data)
        with pytest.raises(CaseError, match=message):
            read_image([tmp_path / "a.nii.gz"], case="a", root=tmp_path)


def test_several_gzip_members_are_one_file_and_trailing_bytes_a_warning(tmp_path: Path) -> None:
    raw = nifti()
    parts = gzip.compress(raw[:500]) + gzip.compress(raw[500:])
    for data, warned in [(parts, False), (parts + bytes(1000), False), (parts + b"\0garbage", True)]:
        volume = read(tmp_path, data)
        assert np.array_equal(volume.voxels[0], ARRAY.T)
        assert any("trailing" in line for line in volume.warnings) == warned


def test_a_decompression_bomb_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    zeros = bytes(1 << 22)
    bomb = packer.compress(nifti()) + b"".join(packer.compress(zeros) for _ in range(100)) + packer.flush()
    (tmp_path / "a.nii.gz").write_bytes(bomb)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(CaseError, match="larger than"):
        read_image([tmp_path / "a.nii.gz"], case="a", root=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert time.perf_counter() - began < 1


def test_more_voxels_than_allowed_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="Crop or downsample it"):
        read(tmp_path, nifti(), max_voxels=719)
    assert read(tmp_path, nifti(), max_voxels=720).voxels.size == 720


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=3), st.sampled_from([".nii", ".nii.gz"]))
def test_flipped_header_bytes_give_a_volume_or_a_case_error(tmp_path: Path, flips: list[tuple[int, int]], ending: str) -> None:
    data = bytearray(nifti())
    for position, byte in flips:
        data[position] = byte
    try:
        volume = read(tmp_path, bytes(data), "a" + ending)
    except CaseError:
        return
    assert np.all(np.isfinite(volume.voxels))
    assert np.all(np.isfinite(volume.grid.affine()))
    assert min(volume.grid.spacing_mm) > 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_of_a_compressed_file_never_give_other_voxels(tmp_path: Path, data: st.DataObject) -> None:
    packed = bytearray(gzip.compress(nifti(), mtime=0))
    position = data.draw(st.integers(10, len(packed) - 1))
    packed[position] ^= data.draw(st.integers(1, 255))
    try:
        volume = read(tmp_path, bytes(packed))
    except CaseError:
        return
    assert np.array_equal(volume.voxels[0], ARRAY.T)


# ---- masks


def mask_like(tmp_path: Path, data: bytes, labels: np.ndarray | None = None) -> Path:
    volume = read(tmp_path, data)
    write_mask(tmp_path / "mask.nii.gz", np.zeros(volume.grid.shape, np.uint8) if labels is None else labels, volume)
    return tmp_path / "mask.nii.gz"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_keeps_both_forms_their_codes_and_the_units_bit_by_bit(tmp_path: Path, kind: Any) -> None:
    image = kind(ARRAY, AFFINE)
    turned = AFFINE.copy()
    turned[:3, :3] = [[0, 1.5, 0], [-2, 0, 0], [0, 0, 3]]
    image.set_qform(turned @ np.diag([1, 1, -1, 1]), 2)
    image.set_sform(AFFINE, 4)
    image.header.set_xyzt_units("mm", "sec")
    source = image.to_bytes()
    mask = nib.load(mask_like(tmp_path, source))
    want = kind.from_bytes(source).header
    for name in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"):
        assert np.array_equal(mask.header[name], want[name]), name
    assert np.array_equal(mask.header["pixdim"][:4], want["pixdim"][:4])
    assert mask.header.get_xyzt_units()[0] == "mm"
    assert mask.header["sizeof_hdr"] == want["sizeof_hdr"]


def test_no_text_of_the_source_reaches_a_mask(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ARRAY, AFFINE)
    texts = {"descrip": b"DOE^JANE", "aux_file": b"DOE_AUX", "intent_name": b"DOE_INTENT", "db_name": b"DOE_DB", "data_type": b"DOE"}
    for name, text in texts.items():
        image.header[name] = text
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE in an extension"))
    source = image.to_bytes()
    assert source.count(b"DOE") == 6
    assert b"DOE" not in gzip.decompress(mask_like(tmp_path, source).read_bytes())


def test_the_bytes_of_a_mask_depend_only_on_its_content(tmp_path: Path) -> None:
    first = mask_like(tmp_path, nifti()).read_bytes()
    assert mask_like(tmp_path, nifti()).read_bytes() == first
    assert first[4:8] == bytes(4)  # no time in the gzip header
    assert first[3] == 0  # no name either


def test_a_mask_is_read_alike_by_itk_and_nibabel(tmp_path: Path) -> None:
    labels = np.zeros((10, 8, 9), np.uint16)
    labels[2, 3, 4] = 1000
    path = mask_like(tmp_path, nifti(), labels)
    assert nib.load(path).dataobj[4, 3, 2] == 1000
    image = sitk.ReadImage(str(path))
    assert image.GetPixel(4, 3, 2) == 1000
    assert image.GetPixelIDTypeAsString() == "16-bit unsigned integer"
    assert image.GetSpacing() == (2, 1.5, 3)


def test_a_mask_of_a_file_without_form_codes_has_none_either(tmp_path: Path) -> None:
    mask = nib.load(mask_like(tmp_path, nifti(sform_code=0, qform_code=0)))
    assert (mask.header["qform_code"], mask.header["sform_code"]) == (0, 0)


def test_labels_are_whole_numbers_up_to_65535(tmp_path: Path) -> None:
    def labels(array: np.ndarray, **fields: Any) -> LabelVolume:
        (tmp_path / "l.nii").write_bytes(nifti(array, **fields))
        return read_labels(tmp_path / "l.nii", case="case", root=tmp_path)

    assert labels((ARRAY > 5).astype(np.float32)).voxels.dtype == np.uint8
    assert labels((ARRAY > 5).astype(np.int32) * 300).voxels.dtype == np.uint16
    for array, message in [
        ((ARRAY > 5) * np.float32(0.5), "non-integer label: 0.5"),
        ((ARRAY > 5) * np.float32(np.nan), "NaN"),
        (np.where(ARRAY > 5, np.float32(np.inf), np.float32(0)), "inf"),
        ((ARRAY > 5) * np.int16(-1), "negative label: -1"),
        ((ARRAY > 5) * np.int32(70000), "70000"),
        (np.stack([ARRAY % 2, ARRAY % 3], 3), "one-hot"),
    ]:
        with pytest.raises(CaseError, match=message):
            labels(np.ascontiguousarray(array))
    with pytest.raises(CaseError, match="non-integer label: 0.5"):
        labels((ARRAY > 5).astype(np.uint8), scl_slope=0.5)


def test_the_sizes_of_both_headers_are_those_of_the_standard() -> None:
    assert struct.unpack_from("<i", nifti())[0] == 348
    assert struct.unpack_from("<i", nifti(kind=nib.Nifti2Image))[0] == 540
