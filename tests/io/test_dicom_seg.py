"""DICOM segmentations: an independent reader finds every labelled voxel where it was, and nothing of the patient is in them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import dicom_writer as writer
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.sr.coding import Code

from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.errors import OutputError
from slmsam2_cli.io.dicom_seg import LabelCodes, codes_for, encode_segmentation, read_codes
from slmsam2_cli.io.files import InputError
from slmsam2_cli.io.image import Grid, Segment
from slmsam2_cli.io.volume import read_image

PHANTOM = phantom_volume(np.random.default_rng(24), (8, 44, 36), "CT")
VOXELS = np.round(PHANTOM[0]).astype(np.int16)
LABELS = np.where(PHANTOM[1] == 3, 7, PHANTOM[1]).astype(np.uint8)
SEGMENTS = [Segment(1, "liver", (0.8, 0.2, 0.1)), Segment(2, "vessel", (0.1, 0.2, 0.9)), Segment(7, "nodule", (0.2, 0.9, 0.1))]
DCMQI = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent))
SHAPE = VOXELS.shape
GRIDS = {
    "axial": writer.oriented_grid((1, 0, 0), (0, 1, 0), SHAPE),
    "axial, read from the other side": writer.oriented_grid((-1, 0, 0), (0, 1, 0), SHAPE),
    "coronal": writer.oriented_grid((1, 0, 0), (0, 0, -1), SHAPE),
    "sagittal": writer.oriented_grid((0, 1, 0), (0, 0, -1), SHAPE),
    "oblique": writer.oriented_grid((0.9, 0.3, 0.1), (-0.3, 0.9, 0.0), SHAPE),
    "feet up": writer.oriented_grid((0, -1, 0), (1, 0, 0), SHAPE),
}


def series(folder: Path, grid: Grid, several_files: bool) -> Path:
    if several_files:
        return writer.write_series(folder / "s", VOXELS, grid)
    return writer.save(writer.enhanced(VOXELS, grid, order=[3, 0, 7, 5, 1, 4, 2, 6]), folder / "m" / "m")


def frames_of(path: Path) -> tuple[tuple[Path, int], ...]:
    return read_image([path], case="c", root=path.parent).source.frames


def write_to(path: Path, frames: tuple[tuple[Path, int], ...], known: dict[int, LabelCodes] | None = None) -> None:
    path.write_bytes(encode_segmentation(LABELS, frames, SEGMENTS, known or {}))


def by_tags(path: Path, grid: Grid) -> np.ndarray:
    """Read an object through its tags alone: each frame's position, its segment and its bits; voxels hold the segment's number."""
    item = pydicom.dcmread(path)
    shared = item.SharedFunctionalGroupsSequence[0]
    found = np.zeros(grid.shape, np.uint8)
    frames = np.unpackbits(np.frombuffer(item.PixelData, np.uint8), bitorder="little")
    size = item.Rows * item.Columns
    for number, frame in enumerate(item.PerFrameFunctionalGroupsSequence):
        orientation = (shared if "PlaneOrientationSequence" in shared else frame).PlaneOrientationSequence[0].ImageOrientationPatient
        assert np.allclose(np.reshape(orientation, (2, 3)), grid.direction[:, :2].T, atol=1e-6)
        place = np.linalg.solve(grid.affine(), [*frame.PlanePositionSequence[0].ImagePositionPatient, 1])
        assert np.allclose(place, np.rint(place), atol=1e-4)
        inside = frames[number * size : (number + 1) * size].reshape(item.Rows, item.Columns).astype(bool)
        found[round(place[2])][inside] = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return found


@pytest.mark.parametrize("several_files", [True, False], ids=["a file a slice", "multi-frame"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_labelled_voxel_is_found_where_it_was(tmp_path: Path, name: str, several_files: bool) -> None:
    grid, path = GRIDS[name], tmp_path / "seg.dcm"
    write_to(path, frames_of(series(tmp_path, grid, several_files)))
    assert np.array_equal(by_tags(path, grid), np.where(LABELS == 7, 3, LABELS))


@pytest.mark.skipif(DCMQI is None, reason="dcmqi is not installed on this platform")
@pytest.mark.parametrize("several_files", [True, False], ids=["a file a slice", "multi-frame"])
@pytest.mark.parametrize("name", GRIDS)
def test_dcmqi_reads_the_same_labels_on_the_same_grid(tmp_path: Path, name: str, several_files: bool) -> None:
    grid, path = GRIDS[name], tmp_path / "seg.dcm"
    write_to(path, frames_of(series(tmp_path, grid, several_files)))
    command = [str(DCMQI), "--inputDICOM", path, "--outputDirectory", tmp_path, "--outputType", "nrrd", "--mergeSegments"]
    subprocess.run(command, check=True, capture_output=True)
    image = sitk.ReadImage(str(tmp_path / "1.nrrd"))
    assert np.allclose(np.reshape(image.GetDirection(), (3, 3)), grid.direction, atol=1e-6)
    assert np.allclose(image.GetSpacing(), grid.spacing_mm[::-1], atol=1e-6)
    start = np.linalg.solve(grid.affine(), [*image.GetOrigin(), 1])  # slices without any label are not in the object
    first, found = round(start[2]), sitk.GetArrayFromImage(image)
    assert np.allclose(start, [0, 0, first, 1], atol=1e-4)
    whole = np.zeros(grid.shape, np.uint8)
    whole[first : first + len(found)] = found
    assert np.array_equal(whole, np.where(LABELS == 7, 3, LABELS))
    described = json.loads((tmp_path / "meta.json").read_text())["segmentAttributes"][0][0]
    assert described["SegmentLabel"] == "liver"
    assert described["SegmentedPropertyTypeCodeSequence"] == {
        "CodeMeaning": "Liver",
        "CodeValue": "10200004",
        "CodingSchemeDesignator": "SCT",
    }


def test_the_object_refers_to_its_images_and_names_no_patient(tmp_path: Path) -> None:
    folder, path = series(tmp_path, GRIDS["axial"], True), tmp_path / "seg.dcm"
    write_to(path, frames_of(folder))
    item = pydicom.dcmread(path)
    (referenced,) = item.ReferencedSeriesSequence
    assert item.StudyInstanceUID == f"{writer.ROOT}7" and item.FrameOfReferenceUID == f"{writer.ROOT}9"
    assert {one.ReferencedSOPInstanceUID for one in referenced.ReferencedInstanceSequence} == {f"{writer.ROOT}1.{z + 1}" for z in range(8)}
    assert (item.PatientName, item.PatientID, item.StudyDate) == ("", "", "")
    assert writer.PATIENT.encode() not in path.read_bytes() and b"12345" not in path.read_bytes()


def test_labels_get_the_codes_of_a_json_file_as_dcmqi_writes_it(tmp_path: Path) -> None:
    code = {"CodeValue": "4147007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Mass"}
    entry = {"labelID": 7, "SegmentedPropertyCategoryCodeSequence": code, "SegmentedPropertyTypeCodeSequence": code}
    (tmp_path / "codes.json").write_text(json.dumps({"segmentAttributes": [[entry]]}))
    path = tmp_path / "seg.dcm"
    write_to(path, frames_of(series(tmp_path, GRIDS["axial"], True)), read_codes(tmp_path / "codes.json"))
    kinds = [one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for one in pydicom.dcmread(path).SegmentSequence]
    assert kinds == ["Liver", "Vessel", "Mass"] or kinds == ["Liver", "Tissue", "Mass"]


def test_structures_are_known_by_their_names() -> None:
    assert codes_for("liver").type == Code("10200004", "SCT", "Liver")
    assert codes_for("nodule").category.meaning == "Morphologically Abnormal Structure"
    for name in ("label 3", "left", "catheter", "normal", "dir", "肝"):  # known to DICOM, some of them, and no structures
        assert codes_for(name).type.meaning == "Tissue"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("StudyInstanceUID", None, "a slice of the series states no StudyInstanceUID"),
        ("SOPInstanceUID", "1.2.3", "two slices of the series have the same SOPInstanceUID"),
        ("FrameOfReferenceUID", "differ", "the slices of the series differ in FrameOfReferenceUID"),
    ],
)
def test_a_series_to_which_nothing_can_refer_is_refused_with_the_field(
    tmp_path: Path, name: str, value: str | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for z in range(len(VOXELS)):
        item = writer.slice_of(VOXELS, GRIDS["axial"], z)
        if value is None:
            delattr(item, name)
        else:
            setattr(item, name, f"1.2.{z}" if value == "differ" else value)
        writer.save(item, tmp_path / "s" / f"{z}")
    with pytest.raises(InputError, match=message):
        encode_segmentation(LABELS, frames_of(tmp_path / "s"), SEGMENTS, {})
    assert capfd.readouterr() == ("", "")


def test_headers_without_thickness_or_modality_are_enough(tmp_path: Path) -> None:
    grid, path = GRIDS["oblique"], tmp_path / "seg.dcm"
    for z in range(len(VOXELS)):
        item = writer.slice_of(VOXELS, grid, z)
        del item.SliceThickness, item.Modality, item.FrameOfReferenceUID
        writer.save(item, tmp_path / "s" / f"{z}")
    write_to(path, frames_of(tmp_path / "s"))
    assert np.array_equal(by_tags(path, grid), np.where(LABELS == 7, 3, LABELS))
    (measures,) = pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == 4


def test_names_of_labels_keep_their_letters(tmp_path: Path) -> None:
    names = ["肝", "a\\b\n c", "x" * 99]
    segments = [Segment(one.value, name, one.colour) for one, name in zip(SEGMENTS, names, strict=True)]
    frames = frames_of(series(tmp_path, GRIDS["axial"], True))
    (tmp_path / "seg.dcm").write_bytes(encode_segmentation(LABELS, frames, segments, {}))
    found = [one.SegmentLabel for one in pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence]
    assert found == ["肝", "a/b c", "x" * 64]


@pytest.mark.parametrize("text", ["{}", "[]", '{"segmentAttributes": [[{"labelID": 1}]]}', '{"segmentAttributes": [[{"labelID": "x"}]]}'])
def test_a_file_without_codes_is_refused_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "codes.json").write_text(text)
    with pytest.raises(OutputError, match="codes.json: not codes of labels as dcmqi writes them"):
        read_codes(tmp_path / "codes.json")
