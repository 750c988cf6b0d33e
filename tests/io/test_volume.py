"""Volumes of every format: the same voxels at the same place, coming in and going out."""

from __future__ import annotations

import locale
import os
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from slmsam2_cli.errors import CaseError, OutputError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.image import Source
from slmsam2_cli.io.volume import (
    Grid,
    LabelVolume,
    Volume,
    image_ending,
    keep_decoded,
    mask_ending,
    read_image,
    read_labels,
    volume_files,
    write_mask,
)

SHARED = Path(__file__).parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared volumes are not beside the repository")
VOXELS = np.arange(4 * 9 * 10, dtype=np.int16).reshape(4, 9, 10)  # (z, y, x)
ORIENTATIONS = [np.eye(3)[:, list(order)] * signs for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)]
VOLUME_ENDINGS = [".nii.gz", ".nii", ".nrrd", ".mha"]


def grid(direction: np.ndarray | None = None, **changes: object) -> Grid:
    values = {"shape": (4, 9, 10), "spacing_mm": (3.0, 1.5, 0.8), "origin_mm": (-31.5, 12.25, 700.125)} | changes
    return Grid(**values, direction=np.eye(3) if direction is None else direction)  # type: ignore[arg-type]


def itk_file(path: Path, voxels: np.ndarray = VOXELS, where: Grid | None = None, compressed: bool = False) -> Path:
    where = where or grid()
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(where.spacing_mm[::-1])
    image.SetOrigin(where.origin_mm)
    image.SetDirection(where.direction.ravel().tolist())
    sitk.WriteImage(image, str(path), compressed)
    return path


def read(path: Path, **options: int) -> Volume:
    return read_image([path], case="case", root=path.parent, **options)


def volume(where: Grid) -> Volume:
    return Volume(np.zeros((1, *where.shape), np.float32), where, Source(".nii.gz", ".nii.gz"))


# ---- grids


def test_there_are_48_orientations() -> None:
    assert len({tuple(direction.ravel()) for direction in ORIENTATIONS}) == 48


@pytest.mark.parametrize("ending", VOLUME_ENDINGS)
def test_every_orientation_comes_back_from_a_mask(tmp_path: Path, ending: str) -> None:
    labels = (VOXELS % 3).astype(np.uint8)
    for number, direction in enumerate(ORIENTATIONS):
        path = tmp_path / f"{number}{ending}"
        write_mask(path, labels, volume(grid(direction)))
        found = read_labels(path, case="c", root=tmp_path)
        assert found.grid.difference(grid(direction)) is None
        assert np.array_equal(found.voxels, labels)
        image = sitk.ReadImage(str(path))
        assert np.allclose(image.GetDirection(), direction.ravel(), atol=1e-5)
        assert np.allclose(image.GetOrigin(), grid().origin_mm, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 0.1),
    st.sampled_from([1.0, -1.0]),
    st.tuples(*[st.floats(0.05, 20)] * 3),
    st.tuples(*[st.floats(-1000, 1000)] * 3),
    st.sampled_from(VOLUME_ENDINGS),
)
def test_oblique_grids_come_back_from_a_mask(
    tmp_path: Path,
    quaternion: list[float],
    hand: float,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    ending: str,
) -> None:
    a, b, c, d = np.array(quaternion) / np.linalg.norm(quaternion)
    turn = np.array(
        [
            [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
        ]
    )
    where = grid(turn * [1, 1, hand], spacing_mm=spacing, origin_mm=origin)
    write_mask(tmp_path / f"m{ending}", np.ones(where.shape, np.uint8), volume(where))
    assert where.difference(read_labels(tmp_path / f"m{ending}", case="c", root=tmp_path).grid) is None


def test_the_difference_of_two_grids_is_named() -> None:
    turned = np.diag([-1.0, 1, 1])
    assert grid().difference(grid()) is None
    assert str(grid().difference(grid(shape=(4, 9, 11)))).startswith("shape (4, 9, 10) but (4, 9, 11)")
    assert str(grid().difference(grid(spacing_mm=(6.0, 1.5, 0.8)))).startswith("spacing (3, 1.5, 0.8) but (6, 1.5, 0.8) mm")
    assert "direction (1, 0, 0)" in str(grid().difference(grid(turned)))
    assert str(grid().difference(grid(origin_mm=(-31.5, 12.25, 708)))).startswith(
        "origin (-31.5, 12.25, 700.125) but (-31.5, 12.25, 708) mm"
    )


def test_rounding_of_another_program_is_no_difference() -> None:
    assert grid().difference(grid(spacing_mm=(3.0029, 1.4986, 0.8))) is None
    assert grid().difference(grid(origin_mm=(-31.507, 12.264, 700.15))) is None  # 0.8, 0.9 and 0.8 % of a voxel
    assert grid().difference(grid(origin_mm=(-31.51, 12.25, 700.125))) is not None  # 1.25 %


def test_the_affine_maps_voxel_indices_to_millimetres() -> None:
    where = grid(np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]))
    assert np.allclose(where.affine() @ [2, 0, 0, 1], [-31.5, 12.25 + 2 * 0.8, 700.125, 1])
    assert where.difference(Grid.from_affine(where.shape, where.affine())) is None


# ---- formats


@pytest.mark.parametrize("ending", [*VOLUME_ENDINGS, ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_format_gives_the_same_volume(tmp_path: Path, ending: str, compressed: bool) -> None:
    found = read(itk_file(tmp_path / f"a{ending}", compressed=compressed), channels=1)
    assert np.array_equal(found.voxels[0], VOXELS)
    assert found.grid.difference(grid()) is None
    assert found.warnings == ()


@pytest.mark.parametrize("ending", [*VOLUME_ENDINGS, ".mhd"])
def test_masks_of_every_format_are_reproducible(tmp_path: Path, ending: str) -> None:
    like = read(itk_file(tmp_path / f"a{ending}"))
    path = tmp_path / f"mask{mask_ending(like)}"
    write_mask(path, VOXELS % 7, like)
    first = path.read_bytes()
    write_mask(path, VOXELS % 7, like)
    assert path.read_bytes() == first


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".nii.gz"])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_volumes_are_rejected_in_every_format(tmp_path: Path, ending: str, compressed: bool) -> None:
    path = itk_file(tmp_path / f"a{ending}", compressed=compressed)
    whole = path.read_bytes()
    for share in (0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CaseError, match="truncated|corrupt|header"):
            read(path)
    path.write_bytes(b"")
    with pytest.raises(CaseError, match="empty"):
        read(path)


@pytest.mark.parametrize(
    ("ending", "old", "new", "message"),
    [
        (".mha", b"ElementSpacing = 0.8", b"ElementSpacing = nan", "not finite"),
        (".mha", b"ElementSpacing = 0.8", b"ElementSpacing = -0.8", "not above 0"),
        (".mha", b"DimSize = 10", b"DimSize = 99", "truncated"),
        (".mha", b"DimSize = 10", b"DimSize = 1x", "whole numbers"),
        (".mha", b"TransformMatrix = 1", b"TransformMatrix = 0", "singular"),
        (".nrrd", b"sizes: 10", b"sizes: 99", "truncated"),
        (".nrrd", b"space origin: (-31.5", b"space origin: (nan  ", "not finite"),
        (".nrrd", b"encoding: raw", b"encoding: hex", "unsupported"),
        (".nrrd", b"NRRD000", b"NRRX000", "not an NRRD"),
    ],
)
def test_files_that_itk_would_repair_silently_are_rejected(tmp_path: Path, ending: str, old: bytes, new: bytes, message: str) -> None:
    path = itk_file(tmp_path / f"a{ending}")
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(CaseError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.raw", "LIST", "b%03d.raw"])
def test_a_header_that_names_a_file_in_another_folder_is_rejected(tmp_path: Path, name: str) -> None:
    path = itk_file(tmp_path / "a.mhd")
    path.write_bytes(path.read_bytes().replace(b"a.raw", name.encode()))
    with pytest.raises(CaseError, match="outside"):
        read(path)


def test_all_files_of_a_volume_are_listed(tmp_path: Path) -> None:
    assert volume_files(itk_file(tmp_path / "a.mhd")) == (tmp_path / "a.mhd", tmp_path / "a.raw")
    assert volume_files(itk_file(tmp_path / "a.mha")) == (tmp_path / "a.mha",)


def test_colours_of_a_picture_are_channels_of_one_slice(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (20, 30, 4)).astype(np.uint8)
    Image.fromarray(colours[..., :3]).save(tmp_path / "rgb.png")
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "grey.png")
    for name in ("rgb.png", "rgba.png"):
        found = read(tmp_path / name, channels=3)
        assert np.array_equal(found.voxels[:, 0], colours[..., :3].transpose(2, 0, 1))
    assert read(tmp_path / "grey.png").voxels.shape == (1, 1, 20, 30)
    with pytest.raises(CaseError, match="3 channels"):
        read(tmp_path / "rgb.png", channels=1)


@pytest.mark.parametrize("form", [".png", ".jpg", ".tif"])
def test_truncated_pictures_are_rejected(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a{form}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50)).astype(np.uint8)).save(path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"no picture"):
        path.write_bytes(broken)
        with pytest.raises(CaseError, match="truncated|corrupt|empty"):
            read(path)


def test_masks_of_pictures_are_png_or_tiff(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8) + np.arange(30, dtype=np.uint8)).save(tmp_path / "a.jpg")
    like = read(tmp_path / "a.jpg")
    labels = np.arange(600).reshape(1, 20, 30)
    write_mask(tmp_path / f"m{mask_ending(like)}", labels, like)
    assert mask_ending(like) == ".png"
    assert np.array_equal(read_labels(tmp_path / "m.png", case="c", root=tmp_path).voxels, labels)
    stack = LabelVolume(np.zeros((4, 9, 10), np.uint8), grid(), like.source)
    write_mask(tmp_path / "m.tif", VOXELS, stack)
    assert np.array_equal(read_labels(tmp_path / "m.tif", case="c", root=tmp_path).voxels, VOXELS)
    with pytest.raises(OutputError, match="4 slices"):
        write_mask(tmp_path / "n.png", VOXELS, stack)


def dicom_series(folder: Path, positions: list[tuple[float, float, float]], uids: tuple[str, ...] = ("1.2.3",)) -> Path:
    folder.mkdir()
    before = locale.setlocale(locale.LC_ALL)  # GDCM's writer sets it to "C" for the whole process
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, position in enumerate(positions):
        image = sitk.GetImageFromArray(VOXELS[number : number + 1])
        image.SetSpacing((0.8, 1.5, 3.0))
        tags = {
            "0008|0060": "MR",
            "0010|0010": "DOE^JANE",
            "0020|000e": uids[number % len(uids)],
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(99 - number),
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)
    return folder


def test_a_dicom_folder_is_one_volume_sorted_by_position(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "series", [(5.0, 6.0, 3.0 * z) for z in range(4)])
    found = read(folder)
    assert np.array_equal(found.voxels[0], VOXELS)
    assert found.grid.difference(grid(origin_mm=(5.0, 6.0, 0.0))) is None
    assert mask_ending(found) == ".nii.gz"
    write_mask(tmp_path / "m.nii", VOXELS % 2, found)
    assert found.grid.difference(read_labels(tmp_path / "m.nii", case="c", root=tmp_path).grid) is None
    assert b"DOE" not in (tmp_path / "m.nii").read_bytes()
    assert len(volume_files(folder)) == 4


@pytest.mark.parametrize(
    ("positions", "uids", "message"),
    [
        ([(0, 0, 0), (0, 0, 3), (0, 0, 9), (0, 0, 12)], ("1.2",), "missing"),
        ([(0, 0, 0), (0, 0, 3), (0, 0, 3), (0, 0, 6)], ("1.2",), "same position"),
        ([(0, 0, 0), (0, 1, 3), (0, 2, 6), (0, 3, 9)], ("1.2",), "slant .* 18 degrees"),
        ([(0, 0, 0), (0, 0, 3), (0, 0, 6), (0, 0, 9)], ("1.2", "1.3"), "2 DICOM series"),
    ],
)
def test_a_dicom_series_that_is_no_volume_is_rejected(
    tmp_path: Path, positions: list[tuple[float, float, float]], uids: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CaseError, match=f"case case: series: .*{message}"):
        read(dicom_series(tmp_path / "series", positions, uids))


def test_a_damaged_dicom_slice_is_rejected(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "series", [(0, 0, 3.0 * z) for z in range(4)])
    whole = (folder / "2.dcm").read_bytes()
    for data in (whole[:-40], whole[:140], b""):
        (folder / "2.dcm").write_bytes(data)
        with pytest.raises(CaseError, match=r"2\.dcm|corrupt"):
            read(folder)


def test_a_pipe_in_a_dicom_folder_is_not_opened(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "series", [(0, 0, 3.0 * z) for z in range(4)])
    os.mkfifo(folder / "pipe")
    assert read(folder).grid.shape == (4, 9, 10)


# ---- cases


def test_one_file_per_channel_makes_one_volume(tmp_path: Path) -> None:
    paths = [itk_file(tmp_path / "c_0000.nii.gz"), itk_file(tmp_path / "c_0001.nrrd", VOXELS.astype(np.float32) / 2)]
    found = read_image(paths, case="c", root=tmp_path, channels=2)
    assert found.voxels.shape == (2, 4, 9, 10)
    assert np.array_equal(found.voxels[1], VOXELS / 2)


def test_channels_on_different_grids_are_rejected(tmp_path: Path) -> None:
    paths = [itk_file(tmp_path / "c_0000.nii.gz"), itk_file(tmp_path / "c_0001.nii.gz", where=grid(spacing_mm=(3.0, 1.5, 0.9)))]
    with pytest.raises(CaseError, match=r"c_0001.nii.gz: grid differs from the first channel: spacing"):
        read_image(paths, case="c", root=tmp_path)


def test_another_number_of_channels_than_declared_is_rejected(tmp_path: Path) -> None:
    path = itk_file(tmp_path / "c.nii.gz")
    with pytest.raises(CaseError, match="1 channels .* 2 are declared"):
        read(path, channels=2)
    with pytest.raises(CaseError, match="2 image files, but dataset.json declares 3"):
        read_image([path, path], case="c", root=tmp_path, channels=3)
    with pytest.raises(CaseError, match="no image"):
        read_image([], case="c", root=tmp_path)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "1 NaN of 360 voxels"), (np.inf, r"1 infinite \(Inf\)"), (-np.inf, r"1 infinite \(Inf\)")]
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_values_that_are_not_finite_are_counted(tmp_path: Path, value: float, message: str, ending: str) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = value
    with pytest.raises(CaseError, match=message):
        read(itk_file(tmp_path / f"a{ending}", voxels))


def test_constant_tiny_and_implausibly_spaced_images_are_read_with_a_warning(tmp_path: Path) -> None:
    extreme = VOXELS.astype(np.float32)
    extreme[0, 0, 0] = 3e38
    tiny = grid(shape=(1, 1, 1))
    small = grid(spacing_mm=(0.003, 0.0008, 0.0008))
    for voxels, where, word in [
        (VOXELS * 0, grid(), "constant"),
        (extreme, grid(), "extreme range"),
        (VOXELS[:1, :1, :1], tiny, "small"),
        (VOXELS, small, "spacing"),
    ]:
        found = read(itk_file(tmp_path / "a.nii.gz", voxels, where))
        assert any(word in line for line in found.warnings), word


def test_folders_pipes_and_broken_links_are_rejected_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "d.nii.gz").mkdir()
    os.mkfifo(tmp_path / "p.nii.gz")
    os.symlink("gone.nii.gz", tmp_path / "l.nii.gz")
    os.symlink("o.nii.gz", tmp_path / "o.nii.gz")
    for name, message in [("d", "directory"), ("p", "regular file"), ("l", "link"), ("o", "link"), ("x", "not found")]:
        with pytest.raises(CaseError, match=f"case case: {name}.nii.gz: .*{message}"):
            read(tmp_path / f"{name}.nii.gz")
    with pytest.raises(CaseError, match="NUL"):
        read_image([Path("a\0b.nii.gz")], case="case", root=tmp_path)


def test_messages_name_no_folder_above_the_root(tmp_path: Path) -> None:
    with pytest.raises(CaseError) as caught:
        read_image([tmp_path / "sub" / "a.nii.gz"], case="c", root=tmp_path)
    assert str(tmp_path) not in str(caught.value)
    assert "sub/a.nii.gz" in str(caught.value)


def test_the_ending_of_a_file_name_sets_the_format() -> None:
    known = {"a.nii.gz": ".nii.gz", "A.NII.GZ": ".nii.gz", "a.b.nii": ".nii", "a.PNG": ".png", "a.txt": None, "a": None, ".nii.gz": None}
    assert {name: image_ending(Path("x") / name) for name in known} == known


# ---- writing


def test_masks_of_the_wrong_shape_or_with_impossible_values_are_not_written(tmp_path: Path) -> None:
    like = volume(grid())
    for labels in (np.zeros((4, 9, 11), int), VOXELS - 1, VOXELS.astype(int) + 65535, VOXELS + 0.5):
        with pytest.raises(OutputError, match=r"m\.nii\.gz: could not be written"):
            write_mask(tmp_path / "m.nii.gz", labels, like)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("highest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_masks_are_as_small_as_their_values_allow(tmp_path: Path, highest: int, dtype: type) -> None:
    labels = np.zeros((4, 9, 10), np.int64)
    labels[0, 0, 0] = highest
    write_mask(tmp_path / "m.nii.gz", labels, volume(grid()))
    assert read_labels(tmp_path / "m.nii.gz", case="c", root=tmp_path).voxels.dtype == dtype
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m.nii.gz"))).dtype == dtype


@pytest.mark.parametrize("ending", [*VOLUME_ENDINGS, ".tif"])
def test_a_fault_while_writing_leaves_the_earlier_mask(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"m{ending}"
    write_mask(path, VOXELS % 2, volume(grid()))
    before = path.read_bytes()
    for step in range(1, 7):
        with pytest.raises(OutputError), atomic.fail_at(step):
            write_mask(path, VOXELS % 3, volume(grid()))
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]


def test_a_name_of_235_letters_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 235 + ".nii.gz")
    write_mask(path, VOXELS % 2, volume(grid()))
    assert os.listdir(tmp_path) == [path.name]


@needs_shared
def test_real_volumes_are_read_as_itk_reads_them() -> None:
    for path in sorted((SHARED / "data").glob("S*/imagesTr/*.nii.gz"))[::6]:
        found, image = read_image([path], case="c", root=SHARED), sitk.ReadImage(str(path))
        assert np.array_equal(found.voxels[0], sitk.GetArrayFromImage(image))
        assert np.allclose(found.grid.spacing_mm[::-1], image.GetSpacing(), rtol=1e-6)
        assert np.allclose(found.grid.origin_mm, image.GetOrigin(), atol=1e-4)
        assert np.allclose(found.grid.direction.ravel(), image.GetDirection(), atol=1e-5)


@needs_shared
def test_a_real_dicom_series_is_read() -> None:
    found = read_image([SHARED / "data" / "bad_fixtures" / "dicom_series_HCrop_unlabelled"], case="c", root=SHARED)
    assert found.grid.shape == (32, 51, 35)
    assert found.grid.spacing_mm == (1, 1, 1)


# ---- decoded volumes kept for one run


def test_a_missing_file_has_the_same_message_while_volumes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.nii").symlink_to(tmp_path / "gone")
    with keep_decoded(1000), pytest.raises(CaseError, match="broken link: target not found"):
        read(tmp_path / "a.nii")


def test_a_kept_volume_is_handed_out_again_and_once_more_when_full(tmp_path: Path) -> None:
    path = itk_file(tmp_path / "a.nii")
    with keep_decoded(VOXELS.nbytes) as decoded:
        first = read(path).voxels
        decoded.full = True
        assert read(path).voxels is first and not first.flags.writeable
        assert read(path).voxels is not first
    assert np.array_equal(first, read(path).voxels)


def test_a_file_that_changed_is_decoded_again(tmp_path: Path) -> None:
    path = itk_file(tmp_path / "a.nii")
    with keep_decoded(1 << 20):
        read(path)
        itk_file(path, VOXELS + np.int16(1))
        os.utime(path, ns=(0, 1))
        assert np.array_equal(read(path).voxels[0], VOXELS + 1)


def test_no_more_bytes_are_kept_than_allowed(tmp_path: Path) -> None:
    one, two = itk_file(tmp_path / "a.nii"), itk_file(tmp_path / "b.nii")
    with keep_decoded(VOXELS.nbytes + 1) as decoded:
        read(one), read(two)
        assert len(decoded.kept) == 1 and decoded.free_bytes == 1
