"""Write volumes as DICOM through pydicom, as scanners do: a file a slice, or one enhanced multi-frame file."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
)

from slmsam2_cli.io.image import Grid

ROOT = "1.2.826.0.1.3680043.8.498."
PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
COMPRESSED = (RLELossless, JPEGLSLossless, JPEG2000Lossless)
PATIENT = "Secret^Name"


def oriented_grid(rows: tuple[float, float, float], columns: tuple[float, float, float], shape: tuple[int, int, int] = (6, 44, 36)) -> Grid:
    """Make a grid (spacing 4 x 1.5 x 0.75 mm) whose rows and columns point along these LPS directions, with slices along their normal."""
    across = np.array([rows, columns], float) / np.linalg.norm([rows, columns], axis=1, keepdims=True)
    return Grid(shape, (4.0, 1.5, 0.75), (-30.5, 12.25, -71.0), np.column_stack([*across, np.cross(*across)]))


def header(pixels: NDArray[Any], series: int = 1, instance: int = 1, sop_class: str = MRImageStorage) -> Dataset:
    """Make an object with the pixels (Y, X) or (Z, Y, X), 16 bits, and a patient's name; it has no geometry yet."""
    meta, item = FileMetaDataset(), Dataset()
    meta.MediaStorageSOPClassUID = item.SOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = f"{ROOT}{series}.{instance}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.file_meta = meta
    item.PatientName, item.PatientID, item.Modality = PATIENT, "12345", "MR"
    item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = f"{ROOT}7", f"{ROOT}8.{series}", f"{ROOT}9"
    item.SeriesNumber, item.InstanceNumber, item.StudyID, item.StudyDate, item.StudyTime = series, instance, "1", "20260101", "120000"
    item.PatientBirthDate, item.PatientSex, item.AccessionNumber, item.ReferringPhysicianName = "", "O", "", ""
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.Rows, item.Columns = pixels.shape[-2:]
    item.BitsAllocated = item.BitsStored = 8 * pixels.itemsize
    item.HighBit, item.PixelRepresentation = item.BitsStored - 1, int(pixels.dtype.kind == "i")
    item.PixelData = np.ascontiguousarray(pixels).tobytes()
    return item


def slice_of(voxels: NDArray[Any], grid: Grid, z: int, series: int = 1) -> Dataset:
    """Make the object of one slice."""
    item = header(voxels[z], series, z + 1)
    item.PixelSpacing, item.SliceThickness = list(grid.spacing_mm[:0:-1][::-1]), grid.spacing_mm[0]
    item.ImageOrientationPatient, item.ImagePositionPatient = _directions(grid), position_of(grid, z)
    return item


def position_of(grid: Grid, z: int) -> list[float]:
    """Return the LPS position in mm of the first voxel of a slice."""
    return [float(f"{value:.10g}") for value in (grid.affine() @ [0, 0, z, 1])[:3]]


def _directions(grid: Grid) -> list[float]:
    return [float(f"{value:.12f}") for value in grid.direction[:, :2].T.ravel()]


def enhanced(
    voxels: NDArray[Any], grid: Grid, order: Items[int] | None = None, scales: Items[tuple[float, float]] | None = None
) -> Dataset:
    """Make one multi-frame object. order: the slice that each frame holds; scales: slope and intercept of each slice."""
    order = range(len(voxels)) if order is None else order
    item = header(voxels[list(order)], sop_class=EnhancedMRImageStorage)
    item.NumberOfFrames = len(order)
    measures, directions = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(grid.spacing_mm[1:]), grid.spacing_mm[0]
    directions.ImageOrientationPatient = _directions(grid)
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([directions])
    frames = []
    for z in order:
        frame, place, scale = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = position_of(grid, z)
        slope, scale.RescaleIntercept = scales[z] if scales else (1, 0)
        scale.RescaleSlope, scale.RescaleType = slope, "US"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([place]), Sequence([scale])
        frames.append(frame)
    item.SharedFunctionalGroupsSequence, item.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(frames)
    return item


def save(item: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write an object in a transfer syntax."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax in COMPRESSED:
        item.compress(syntax, generate_instance_uid=False)
    else:
        item.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            item.PixelData = np.frombuffer(item.PixelData, f"<u{item.BitsAllocated // 8}").byteswap().tobytes()
    item.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, voxels: NDArray[Any], grid: Grid, syntax: str = ExplicitVRLittleEndian, series: int = 1) -> Path:
    """Write a file a slice, named so that the order of names is not that of positions."""
    for z in range(len(voxels)):
        save(slice_of(voxels, grid, z, series), folder / f"{(7 * z) % len(voxels):03d}-{series}-{z}.dcm", syntax)
    return folder
