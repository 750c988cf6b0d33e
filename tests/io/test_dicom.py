"""DICOM: every voxel has the value and the place that the headers state, or the series is refused with the true reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import dicom_writer as writer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from slmsam2_cli.dataset.dataset import read_image_folder
from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.dicom import list_series
from slmsam2_cli.io.dicom_files import dicom_files, is_dicom, series_path
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import Volume, read_image, volume_files

VOXELS = np.round(phantom_volume(np.random.default_rng(24), (6, 44, 36), "CT")[0]).astype(np.int16)
GRIDS = {
    "axial": writer.oriented_grid((1, 0, 0), (0, 1, 0)),
    "axial, read from the other side": writer.oriented_grid((-1, 0, 0), (0, 1, 0)),
    "coronal": writer.oriented_grid((1, 0, 0), (0, 0, -1)),
    "sagittal": writer.oriented_grid((0, 1, 0), (0, 0, -1)),
    "oblique": writer.oriented_grid((0.9, 0.3, 0.1), (-0.3, 0.9, 0.0)),
    "feet up": writer.oriented_grid((0, -1, 0), (1, 0, 0)),
}
AXIAL = GRIDS["axial"]


def read(path: Path) -> Volume:
    return read_image([path], case="c", root=path.parent)


def assert_is(found: Volume, voxels: np.ndarray, grid: Grid) -> None:
    assert found.grid.difference(grid) is None
    assert np.array_equal(found.voxels[0], voxels)


@pytest.mark.parametrize("syntax", [*writer.PLAIN, *writer.COMPRESSED], ids=lambda syntax: syntax.name)
@pytest.mark.parametrize("name", GRIDS)
def test_a_series_and_a_multi_frame_file_have_the_voxels_and_the_grid_of_the_volume(tmp_path: Path, name: str, syntax: str) -> None:
    assert_is(read(writer.write_series(tmp_path / "s", VOXELS, GRIDS[name], syntax)), VOXELS, GRIDS[name])
    frames = writer.enhanced(VOXELS, GRIDS[name], order=[3, 0, 5, 1, 4, 2])
    assert_is(read(writer.save(frames, tmp_path / "m" / "m", syntax)), VOXELS, GRIDS[name])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(-2000, 2000)), min_size=6, max_size=6),
    st.permutations(range(6)),
)
def test_each_frame_has_its_own_place_and_scale_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, scales: list[tuple[int, int]], order: list[int]
) -> None:
    path = writer.save(writer.enhanced(VOXELS, AXIAL, order, scales), tmp_path_factory.mktemp("d") / "m.dcm")
    expected = np.stack([VOXELS[z].astype(np.int64) * slope + intercept for z, (slope, intercept) in enumerate(scales)])
    assert_is(read(path), expected, AXIAL)
    shutil.rmtree(path.parent)


def test_slices_are_scaled_by_their_own_slope_and_sign(tmp_path: Path) -> None:
    unsigned = VOXELS.astype(np.int64) + 2000
    for z in range(6):
        item = writer.slice_of(unsigned.astype(np.uint16) if z % 2 else VOXELS, AXIAL, z)
        item.RescaleSlope, item.RescaleIntercept = [(1, 0), (0.125, -7)][z % 2]
        writer.save(item, tmp_path / "s" / f"{z}")
    expected = np.stack([unsigned[z] / 8 - 7 if z % 2 else VOXELS[z] for z in range(6)])
    assert_is(read(tmp_path / "s"), expected, AXIAL)


def test_bits_above_the_stored_ones_are_ignored(tmp_path: Path) -> None:
    item = writer.header(np.array([[0x7001, 0x0FFF]], np.uint16))
    item.BitsStored, item.HighBit = 12, 11
    found = read(writer.save(item, tmp_path / "x"))
    assert found.voxels[0].tolist() == [[[1, 0xFFF]]]
    assert "bits above the stored ones are set, as in x, and ignored" in found.warnings
    item.PixelRepresentation = 1
    assert read(writer.save(item, tmp_path / "x")).voxels[0].tolist() == [[[1, -1]]]


def test_what_a_picture_does_not_state_is_assumed_with_a_warning(tmp_path: Path) -> None:
    found = read(writer.save(writer.header(VOXELS[0]), tmp_path / "x"))
    assert found.grid.spacing_mm == (1, 1, 1)
    assert found.source.uncertain == {"spacing", "orientation"}
    assert len(found.warnings) == 2


def tilted(grid: Grid, z: int) -> list[float]:
    return [writer.position_of(grid, z)[0], grid.origin_mm[1] + 1.5 * z, writer.position_of(grid, z)[2]]


@pytest.mark.parametrize("several_files", [True, False])
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 1, 2, 4, 5], "slices are missing"),
        ([0, 1, 2, 2, 3], "two DICOM slices at the same position: .* and "),
        ([0, 1, 2, 0, 1, 2], "two DICOM slices at the same position: .* and "),
        ("tilt", "slant .gantry tilt. of 21 degrees"),
        ("sideways", "shifted sideways by up to 3 mm"),
    ],
)
def test_a_stack_that_no_grid_holds_is_refused_in_the_same_words(
    tmp_path: Path, places: list[int] | str, message: str, several_files: bool
) -> None:
    where = [writer.position_of(AXIAL, z) for z in (range(6) if isinstance(places, str) else places)]
    if places == "tilt":
        where = [tilted(AXIAL, z) for z in range(6)]
    if places == "sideways":
        where[2] = [where[2][0] + 3, *where[2][1:]]
    voxels = np.resize(VOXELS, (len(where), 44, 36))
    if several_files:
        for number, position in enumerate(where):
            item = writer.slice_of(voxels, AXIAL, number)
            item.ImagePositionPatient = position
            writer.save(item, tmp_path / "s" / f"{number}.dcm")
    else:
        item = writer.enhanced(voxels, AXIAL)
        for frame, position in zip(item.PerFrameFunctionalGroupsSequence, where, strict=True):
            frame.PlanePositionSequence[0].ImagePositionPatient = position
        writer.save(item, tmp_path / "s" / "m.dcm")
    with pytest.raises(CaseError, match=message):
        read(tmp_path / "s")


def test_pictures_whose_numbers_are_no_voxels_in_place_are_refused(tmp_path: Path) -> None:
    mosaic, palette, shifted = writer.header(VOXELS[0]), writer.header(VOXELS[0]), writer.header(VOXELS[0])
    mosaic.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    palette.PhotometricInterpretation = "PALETTE COLOR"
    shifted.BitsStored, shifted.HighBit = 12, 15
    for item, message in ((mosaic, "mosaic"), (palette, "table of colours"), (shifted, "another bit")):
        with pytest.raises(CaseError, match=message):
            read(writer.save(item, tmp_path / "x"))


def test_frames_without_positions_are_not_stacked(tmp_path: Path) -> None:
    item = writer.header(VOXELS)
    item.NumberOfFrames, item.ImagePositionPatient, item.ImageOrientationPatient, item.PixelSpacing = (
        6,
        [0, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1],
    )
    with pytest.raises(CaseError, match="x states no position for each of its 6 pictures"):
        read(writer.save(item, tmp_path / "x"))


def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    for syntax in writer.COMPRESSED:
        folder = writer.write_series(tmp_path / syntax.keyword, VOXELS, AXIAL, syntax)
        path = dicom_files(folder)[2]
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(CaseError, match=f"{path.name} (holds no pixels|is truncated|cannot be decoded)"):
            read(folder)


@pytest.mark.parametrize("value", ["a\\b\\c", "1\\2", "nan\\0\\0", ""])
def test_a_position_that_is_no_position_is_refused_without_quoting_it(tmp_path: Path, value: str) -> None:
    folder = writer.write_series(tmp_path / "s", VOXELS, AXIAL)
    path = dicom_files(folder)[0]
    content = path.read_bytes()
    at = content.index(b"\x20\x00\x32\x00DS")
    length = int.from_bytes(content[at + 6 : at + 8], "little")
    path.write_bytes(content[: at + 8] + value.encode().ljust(length) + content[at + 8 + length :])
    with pytest.raises(CaseError, match=r"ImagePositionPatient is not 3 finite numbers|corrupt|states no position"):
        read(folder)


@pytest.mark.parametrize("syntax", writer.COMPRESSED, ids=lambda syntax: syntax.name)
@pytest.mark.parametrize(("rows", "columns"), [(20, 36), (80, 36), (44, 18), (40000, 40000), (36, 44)])
def test_compressed_data_of_another_size_than_the_header_says_are_refused(tmp_path: Path, syntax: str, rows: int, columns: int) -> None:
    item = writer.slice_of(VOXELS, AXIAL, 0)
    item.compress(syntax, generate_instance_uid=False)
    item.Rows, item.Columns = rows, columns
    item.save_as(tmp_path / "x", enforce_file_format=True)
    if syntax == writer.COMPRESSED[0] and rows * columns == VOXELS[0].size:
        pytest.skip("run-length codes hold a number of values, and no size")
    with pytest.raises(CaseError, match="x (is damaged|is truncated|cannot be decoded)"):
        read(tmp_path / "x")


def test_an_intercept_without_a_slope_is_applied(tmp_path: Path) -> None:
    item = writer.slice_of(VOXELS, AXIAL, 0)
    item.RescaleIntercept = -1024
    assert np.array_equal(read(writer.save(item, tmp_path / "x")).voxels[0], VOXELS[:1].astype(int) - 1024)


def test_more_pictures_than_the_header_declares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="x holds more pictures than its header declares"):
        read(writer.save(writer.header(VOXELS), tmp_path / "x"))


def test_a_huge_number_of_frames_is_refused_at_once(tmp_path: Path) -> None:
    item = writer.header(VOXELS[0])
    item.compress(writer.COMPRESSED[1], generate_instance_uid=False)
    item.NumberOfFrames = 2_000_000_000
    item.save_as(tmp_path / "x", enforce_file_format=True)
    with pytest.raises(CaseError, match="no position for each of its 2000000000 pictures"):
        read(tmp_path / "x")


def test_a_modality_table_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "US", [10, 200, 3000, 40000]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    item = writer.header(np.array([[0, 1], [2, 3]], np.uint16))
    item.ModalityLUTSequence = [table]
    assert read(writer.save(item, tmp_path / "x")).voxels[0].tolist() == [[[10, 200], [3000, 40000]]]


# ---- folders


def test_masks_links_and_empty_files_in_a_folder_of_slices(tmp_path: Path) -> None:
    writer.write_series(tmp_path / "elsewhere", VOXELS, AXIAL)
    folder = tmp_path / "images" / "p"
    folder.mkdir(parents=True)
    (folder / "series").symlink_to(tmp_path / "elsewhere")
    (folder / "series" / "loop").symlink_to(folder)
    (folder / "notes.txt").symlink_to(tmp_path / "gone")
    (folder / "empty").touch()
    (tmp_path / "images" / "masks" / ".slmsam2").mkdir(parents=True)
    shutil.copy(dicom_files(tmp_path / "elsewhere")[0], tmp_path / "images" / "masks" / "p.dcm")
    (case,), problems = read_image_folder(tmp_path / "images")
    found = read(case.images[0])
    assert (case.id, problems) == ("p", ())
    assert_is(found, VOXELS, AXIAL)
    assert found.warnings == ("an empty file is left out: empty",)


def test_objects_without_an_image_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = writer.write_series(tmp_path / "s", VOXELS, AXIAL)
    for number, kind in enumerate((BasicTextSRStorage, MediaStorageDirectoryStorage)):
        item = writer.header(VOXELS[0], instance=90 + number, sop_class=kind)
        del item.Rows, item.Columns, item.PixelData
        writer.save(item, folder / f"a{number}")
    found = read(folder)
    assert_is(found, VOXELS, AXIAL)
    assert found.warnings == ("left out, because they hold no image: a0 (Basic Text SR) and 1 more DICOM files",)


def test_files_without_ending_or_preamble_in_nested_folders_are_one_case(tmp_path: Path) -> None:
    for z in range(6):
        path = tmp_path / "images" / "PATIENT" / "STUDY" / "SERIES" / f"I{z}"
        path.parent.mkdir(parents=True, exist_ok=True)
        item = writer.slice_of(VOXELS, AXIAL, z)
        del item.file_meta
        item.save_as(path, implicit_vr=bool(z % 2), little_endian=True, enforce_file_format=False)
        assert is_dicom(path)
    (case,), problems = read_image_folder(tmp_path / "images")
    assert (case.id, problems) == ("PATIENT", ())
    assert_is(read(case.images[0]), VOXELS, AXIAL)


@pytest.fixture
def two_series(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "p"
    writer.write_series(folder, VOXELS, AXIAL, series=3)
    writer.write_series(folder, -VOXELS, GRIDS["coronal"], ImplicitVRLittleEndian, series=12)
    return folder


def test_several_series_in_a_folder_are_refused_with_their_list(two_series: Path) -> None:
    with pytest.raises(CaseError, match=r"2 DICOM series in one folder: 3 \(MR, 6 files\), 12 \(MR, 6 files\)\. Choose with --series"):
        read(two_series)


def test_a_series_is_chosen_by_its_number(two_series: Path) -> None:
    (case,), problems = read_image_folder(two_series.parent, "12")
    assert (case.id, problems) == ("p", ())
    assert_is(read(case.images[0]), -VOXELS, GRIDS["coronal"])
    assert len(volume_files(case.images[0])) == 6
    with pytest.raises(CaseError, match="no DICOM series 4; there are 3"):
        read(read_image_folder(two_series.parent, "4")[0][0].images[0])


def test_all_series_of_a_folder_are_cases_of_their_own(two_series: Path) -> None:
    writer.write_series(two_series.parent / "q", VOXELS, AXIAL)
    cases, _ = read_image_folder(two_series.parent, "all")
    assert [case.id for case in cases] == ["p#12", "p#3", "q"]
    assert_is(read(cases[1].images[0]), VOXELS, AXIAL)


def test_a_series_without_number_or_modality_has_a_name_all_the_same(tmp_path: Path) -> None:
    for number, modality in enumerate([None, "Doe^Jane"]):
        for z in range(6):
            item = writer.slice_of(VOXELS, AXIAL, z, series=number + 1)
            item.SeriesNumber, item.Modality = None, modality
            writer.save(item, tmp_path / f"{number}{z}")
    assert [(one.name, one.modality) for one in list_series(tmp_path)] == [("0-1", "unknown"), ("0-2", "unknown")]


def test_series_of_the_same_number_are_told_apart(tmp_path: Path) -> None:
    for place in range(2):
        for z in range(6):
            item = writer.slice_of(VOXELS + place, AXIAL, z)
            item.SeriesInstanceUID += f".{place}"
            writer.save(item, tmp_path / f"{place}{z}")
    assert [one.name for one in list_series(tmp_path)] == ["1-1", "1-2"]
    assert_is(read(series_path(tmp_path, "1-2")), VOXELS + 1, AXIAL)


def test_one_dicom_file_is_a_case(tmp_path: Path) -> None:
    path = writer.save(writer.enhanced(VOXELS, AXIAL), tmp_path / "scan.dcm", ExplicitVRLittleEndian)
    (case,), _ = read_image_folder(path)
    assert_is(read(case.images[0]), VOXELS, AXIAL)


def test_no_text_of_a_header_reaches_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = writer.write_series(tmp_path / "s", VOXELS, AXIAL)
    for path in dicom_files(folder):
        content = path.read_bytes().replace(b"US\x02\x00\x2c\x00", b"US\x02\x00\x00\x00")  # 44 rows become 0
        path.write_bytes(content)
    with pytest.raises(CaseError) as error:
        read(folder)
    assert "Secret" not in str(error.value) + "".join(capfd.readouterr())
