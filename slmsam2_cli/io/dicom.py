"""Read one DICOM series as a volume, through pydicom and its decoders. No text of a header is copied into anything or printed.

Every slice is placed by its position and scaled by its own slope, intercept or table, also inside a multi-frame file. What cannot be
placed on one regular grid is refused: missing or doubled positions, gantry tilt, several series, mosaics. Objects that hold no image,
such as reports, are left out with a warning. Masks of a series are written as .nii.gz.
"""

from __future__ import annotations

import logging
import os
import re
import warnings as python_warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import config, uid
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut

from slmsam2_cli.io.dicom_files import dicom_files, files_in, misnamed_files, series_path, split_series
from slmsam2_cli.io.dicom_pixels import decode_pixels
from slmsam2_cli.io.files import InputError
from slmsam2_cli.io.image import (
    DICOM_SERIES,
    DIRECTION_TOLERANCE,
    SHEAR_TOLERANCE,
    DecodedVolume,
    Grid,
    Source,
    Uncertainty,
    check_size,
    check_spacing,
)

ALL_SERIES = "all"
_UNEVEN_ERROR, _UNEVEN_WARNING = 0.05, 1e-3  # of the distance between slices
_EXPORT = "Export the series again from its source"
_MODALITY = re.compile(r"[A-Z]{2,16}")
_NUMBER = re.compile(r"-?\d{1,12}(\.0*)?")
_CONVERT = "Convert them to a volume with known geometry (NIfTI, NRRD)"
_NO_IMAGE = {  # hold pixels, but of other images' regions or doses
    uid.SegmentationStorage,
    uid.RTDoseStorage,
    uid.SurfaceSegmentationStorage,
    "1.2.840.10008.5.1.4.1.1.66.7",  # label map segmentation
}
_SAME_MM = 1e-4
_RLE_RATIO = 64  # run-length encoding never shrinks further than this
_MAX_LENGTH_ERROR = 1e-2
_FLOAT32_BITS = 24  # whole numbers of so many bits are exact in float32
_TABLE_RANGE = 0, 65535


@dataclass(frozen=True, eq=False)
class _Scale:
    """How stored numbers become values: stored * slope + intercept; table: the header holds a lookup table instead."""

    slope: float = 1.0
    intercept: float = 0.0
    table: bool = False

    def is_whole(self) -> bool:
        return self.slope == int(self.slope) and self.intercept == int(self.intercept)


@dataclass(frozen=True, eq=False)
class _Frame:
    """One picture of a series: its place in a file, its geometry in LPS mm, and the scale of its numbers.

    size: (rows, columns, colours). across: unit vectors (2, 3) along a row and down a column; position: of the first pixel (3,); None
    where the header has none. spacing: mm between columns and between rows; height: mm to the next slice, as declared.
    low, high: the stored numbers that its bits can hold.
    """

    path: Path
    index: int
    size: tuple[int, int, int]
    position: NDArray[np.float64] | None
    across: NDArray[np.float64] | None
    spacing: tuple[float, float] | None
    height: float | None
    scale: _Scale
    low: int
    high: int
    is_float: bool

    def is_placed(self) -> bool:
        """Return whether the header states where the frame lies in the patient."""
        return self.position is not None and self.across is not None and self.spacing is not None

    def same_plane(self, other: _Frame) -> bool:
        """Return whether both have the same size, spacing and direction."""
        if self.size != other.size or (self.across is None) != (other.across is None) or (self.spacing is None) != (other.spacing is None):
            return False
        if self.spacing is not None and other.spacing is not None and not np.allclose(self.spacing, other.spacing, rtol=1e-3):
            return False
        if self.across is None or other.across is None:
            return True
        return float(np.max(np.abs(self.across - other.across))) <= DIRECTION_TOLERANCE


@dataclass(frozen=True, eq=False)
class Series:
    """One series of a folder: the name by which it is chosen, its modality, its files in order of their paths, and the frames of each.

    frames: of each file, or the error that its header gives; it counts when the series is read.
    """

    name: str
    modality: str
    files: tuple[Path, ...]
    frames: tuple[list[_Frame] | InputError, ...]


def read_dicom(path: Path, max_voxels: int) -> DecodedVolume:
    """Read the series of a folder; of several, the one that the path names (FOLDER/#NAME).

    Raises: InputError when there is not exactly one complete series on one regular grid, or a file is damaged.
    """
    folder, wanted = split_series(path)
    with quiet():
        series, warnings = _find_series(folder)
        frames = _frames_in(_choose(series, wanted))
        check_size((frames[0].size[1], frames[0].size[0], len(frames)), frames[0].size[2], max_voxels)
        ordered, grid, found, uncertain = _arrange(frames)
        voxels, doubts = _decode(ordered)
    places = tuple((frame.path, frame.index) for frame in ordered)
    return DecodedVolume(voxels, grid, Source(DICOM_SERIES, ".nii.gz", uncertain=uncertain, frames=places), (*warnings, *found, *doubts))


def list_series(folder: Path) -> tuple[Series, ...]:
    """List the series of images below a folder, by name.

    Raises: InputError when a file is damaged.
    """
    with quiet():
        return _find_series(folder)[0]


def path_of(series: Series, folder: Path, others: Sequence[Series]) -> Path:
    """Return the path of a series: the folder that holds all its files and none of another series, else FOLDER/#NAME."""
    place = Path(os.path.commonpath([file.parent for file in series.files]))
    alone = not any(file.is_relative_to(place) for other in others if other is not series for file in other.files)
    return place if alone else series_path(folder, series.name)


def series_files(path: Path) -> tuple[Path, ...]:
    """List the DICOM files of a folder, or of the series that a path names.

    Raises: InputError when a file is damaged or there is no such series.
    """
    folder, wanted = split_series(path)
    return tuple(dicom_files(folder)) if wanted is None else _choose(list_series(folder), wanted).files


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom and highdicom, whose warnings may quote a header."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with config.disable_value_validation(), python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def own_errors(path: Path) -> Iterator[None]:
    """Replace the errors of pydicom, whose messages may quote a header."""
    try:
        yield
    except (InputError, OSError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - pydicom raises errors of every kind for damaged files
        raise InputError(f"{path.name} is a corrupt DICOM file", _EXPORT) from None


def _find_series(folder: Path) -> tuple[tuple[Series, ...], list[str]]:
    """Group the images below a folder by series; warnings name what is left out. The last folder is not read again while it is the same."""
    states = []
    for file in files_in(folder) if folder.is_dir() else [folder]:
        with suppress(OSError):  # a broken link
            state = file.stat()
            states.append((file, state.st_size, state.st_mtime_ns))
    return _series_of(folder, tuple(states))


@lru_cache(maxsize=1)
def _series_of(folder: Path, state: tuple[tuple[Path, int, int], ...]) -> tuple[tuple[Series, ...], list[str]]:
    """Group the images below a folder, or one file, by series. state: files, sizes and times of change."""
    files = dicom_files(folder)
    if not files:
        raise InputError("a directory without DICOM slices, not a file", "Put the image file itself here")
    if misnamed := misnamed_files(folder, files):
        more = f" and {len(misnamed) - 1} more" if len(misnamed) > 1 else ""
        raise InputError(f"not DICOM, or not readable: {misnamed[0].name}{more}", _EXPORT)
    groups: dict[str, list[tuple[Path, str, str, list[_Frame] | InputError]]] = {}
    without: list[tuple[Path, str]] = []
    for file in files:
        with own_errors(file):
            header = _read(file, _HEADER)
            if not _holds_image(header, file):
                without.append((file, _kind_name(_kind_of(header))))
                continue
            groups.setdefault(str(header.get("SeriesInstanceUID")), []).append(
                (file, str(header.get("SeriesNumber")), str(header.get("Modality")), _frames_or_error(header, file))
            )
    if not groups:
        raise InputError(f"DICOM without an image: {without[0][0].name} ({without[0][1]})", "Put the images themselves here")
    warnings = [f"an empty file is left out: {file.name}" for file, size, _ in state if not size]
    if without:
        more = f" and {len(without) - 1} more DICOM files" if len(without) > 1 else ""
        warnings.append(f"left out, because they hold no image: {without[0][0].name} ({without[0][1]}){more}")
    return _named([groups[key] for key in sorted(groups)]), warnings


def _frames_or_error(header: Dataset, path: Path) -> list[_Frame] | InputError:
    """Return the frames that a header describes, or what is wrong with it."""
    try:
        with own_errors(path):
            return _frames(header, path)
    except InputError as error:
        return error


def _frames_in(series: Series) -> list[_Frame]:
    """Return the frames of a series.

    Raises: InputError when a header is invalid, or they do not belong to one volume.
    """
    frames = list[_Frame]()
    for found in series.frames:
        if isinstance(found, InputError):
            raise found
        frames += found
    _check_frames(frames, len(series.files))
    return frames


def _holds_image(header: Dataset, path: Path) -> bool:
    """Return whether a header is that of an image, and not of a report, a plan, a dose or regions in other images.

    Raises: InputError when it says neither, or an image has no size: the file was cut short.
    """
    kind, has_size = _kind_of(header), header.get("Rows") is not None and header.get("Columns") is not None
    if kind in _NO_IMAGE:
        return False
    if not has_size and (not kind or "Image" in _kind_name(kind)):
        raise InputError(f"{path.name} holds no pixels, or is truncated", _EXPORT)
    return has_size


def _kind_of(header: Dataset) -> str:
    """Return the unique identifier of the kind of object; empty where the file does not say it."""
    return str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")


def _kind_name(kind: str) -> str:
    """Name a kind of object by the standard's table."""
    name = uid.UID(kind).name
    return "private kind" if name == kind else name.removesuffix(" Storage")


def _named(groups: list[list[tuple[Path, str, str, list[_Frame] | InputError]]]) -> tuple[Series, ...]:
    """Name series by their number, without one 0, and those that share a number by number-1, number-2, ..."""
    numbers = [next((str(abs(round(float(number)))) for _, number, _, _ in group if _NUMBER.fullmatch(number)), "0") for group in groups]
    found = []
    for place, (group, number) in enumerate(zip(groups, numbers, strict=True)):
        files, _, modalities, frames = zip(*group, strict=True)
        name = number if numbers.count(number) == 1 else f"{number}-{numbers[: place + 1].count(number)}"
        modality = modalities[0] if _MODALITY.fullmatch(modalities[0]) else "unknown"
        found.append(Series(name, modality, files, frames))
    return tuple(sorted(found, key=lambda one: [int(part) for part in one.name.split("-")]))


def _choose(series: Sequence[Series], wanted: str | None) -> Series:
    if wanted is None and len(series) == 1:
        return series[0]
    for one in series:
        if one.name == wanted:
            return one
    listed = ", ".join(f"{one.name} ({one.modality}, {len(one.files)} files)" for one in series)
    what = f"{len(series)} DICOM series in one folder: {listed}" if wanted is None else f"no DICOM series {wanted}; there are {listed}"
    raise InputError(what, "Choose with --series NUMBER, or --series all; or put each series into a folder of its own")


def _read(path: Path, tags: list[str] | None = None) -> Dataset:
    """Read a file; tags: read these fields of its header alone."""
    return _with_syntax(pydicom.dcmread(path, force=True, stop_before_pixels=tags is not None, specific_tags=tags))


def _with_syntax(header: Dataset) -> Dataset:
    """State the transfer syntax in which a file without file information was read."""
    if not hasattr(header, "file_meta"):
        header.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in header.file_meta:
        implicit, little = header.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return header


def _numbers(header: Any, name: str, count: int) -> NDArray[np.float64] | None:
    """Return the numbers of a header field; None where it is absent or empty.

    Raises: InputError when it holds anything else than `count` finite numbers.
    """
    value = header.get(name) if header is not None else None
    if value is None or value == "":
        return None
    try:
        numbers = np.array([float(one) for one in (value if isinstance(value, Sequence) and not isinstance(value, str) else [value])])
    except (TypeError, ValueError):
        numbers = np.array([])
    if numbers.shape != (count,) or not np.all(np.isfinite(numbers)):
        raise InputError(f"a DICOM header whose {name} is not {count} finite number{'s' * (count > 1)}", _EXPORT)
    return numbers


_HEADER = [
    *("SeriesInstanceUID", "SeriesNumber", "Modality"),
    *("SOPClassUID", "SOPInstanceUID", "ImageType", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("PixelSpacing", "ImagerPixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("ImagePositionPatient", "ImageOrientationPatient", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


def _frames(header: Dataset, path: Path) -> list[_Frame]:
    """Read the frames that the header of a file describes: one, or as many as it declares.

    Raises: InputError when the file is cut short, or not an image of numbers.
    """
    count, colours = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    size = int(header.Rows), int(header.Columns), colours
    check_size((size[1], size[0], count), colours, 1 << 62)
    _check_kind(header, path)
    _check_length(header, path, count * size[0] * size[1] * colours)
    shared = _first(header, "SharedFunctionalGroupsSequence")
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if groups and len(groups) != count:
        raise InputError(f"{path.name} declares {count} frames and describes {len(groups)}", _EXPORT)
    if count > 1 and not groups:
        raise InputError(f"{path.name} states no position for each of its {count} pictures, so they cannot be stacked", _CONVERT)
    stored = int(header.get("BitsStored") or 0)
    low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if stored and header.get("PixelRepresentation") else (0, (1 << stored) - 1)
    frames = []
    for index in range(count):
        places = [groups[index]] if groups else []
        places += [place for place in (shared, header if count == 1 or groups else None) if place is not None]
        scale = _scale([*places, header])
        limits = _TABLE_RANGE if scale.table else (low, high)
        frames.append(_Frame(path, index, size, *_geometry(places), scale, *limits, not stored))
    return frames


def _check_kind(header: Dataset, path: Path) -> None:
    """Reject pictures whose numbers are no values of voxels in place."""
    if "MOSAIC" in [str(word).upper() for word in header.get("ImageType") or []]:
        raise InputError(f"{path.name} is a mosaic: its slices are tiles of one picture", "Convert the series with dcm2niix")
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise InputError(f"{path.name} is a palette picture: its numbers are places in a table of colours", "Export it in grey values")
    if header.get("BitsStored") and header.get("HighBit") is not None and int(header.HighBit) != int(header.BitsStored) - 1:
        raise InputError(f"{path.name} stores its numbers from another bit than the lowest", _EXPORT)


def _check_length(header: Dataset, path: Path, values: int) -> None:
    """Reject a file too short for the numbers that it declares, before memory is taken for them."""
    size, needed = path.stat().st_size, values * int(header.get("BitsAllocated") or 0) // 8
    if header.file_meta.TransferSyntaxUID == uid.RLELossless and size * _RLE_RATIO < needed:
        raise InputError(f"{path.name} is truncated: its header declares {needed} bytes of pixels", _EXPORT)
    if header.file_meta.TransferSyntaxUID in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian):
        needed = needed * 2 // 3 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else needed
        if size < needed:
            raise InputError(f"{path.name} is truncated: its header declares {needed} bytes of pixels", _EXPORT)


def _first(header: Any, name: str) -> Any:
    """Return the first item of a sequence, None where it is absent or empty."""
    items = header.get(name)
    return items[0] if items else None


def _scale(places: Sequence[Any]) -> _Scale:
    """Return the scale that the first place states: a frame's own, that of all frames, or the file's. The last place is the file."""
    for place in [*(_first(place, "PixelValueTransformationSequence") for place in places), places[-1]]:
        slope, intercept = (None if place is None else _numbers(place, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
        if slope is not None and slope[0] == 0:
            raise InputError("a DICOM header whose RescaleSlope is 0", _EXPORT)
        if slope is not None or intercept is not None:
            return _Scale(1.0 if slope is None else float(slope[0]), 0.0 if intercept is None else float(intercept[0]))
    return _Scale(table=_first(places[-1], "ModalityLUTSequence") is not None)


def _geometry(
    places: Sequence[Any],
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None, tuple[float, float] | None, float | None]:
    """Return position, directions, spacing and height of a frame, as in _Frame. places: as in _scale."""

    def field(sequence: str, name: str, count: int) -> NDArray[np.float64] | None:
        for place in places:
            for owner in (_first(place, sequence), place):
                if owner is not None and (found := _numbers(owner, name, count)) is not None:
                    return found
        return None

    position = field("PlanePositionSequence", "ImagePositionPatient", 3)
    directions = field("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    across = None if directions is None else directions.reshape(2, 3)
    if across is not None:
        lengths = np.linalg.norm(across, axis=1, keepdims=True)
        if np.any(np.abs(lengths - 1) > _MAX_LENGTH_ERROR) or abs(float(across[0] @ across[1])) > SHEAR_TOLERANCE:
            raise InputError("a DICOM header whose ImageOrientationPatient is not two unit vectors at a right angle", _EXPORT)
        across = across / lengths
    spacing = field("PixelMeasuresSequence", "PixelSpacing", 2)
    spacing = field("PixelMeasuresSequence", "ImagerPixelSpacing", 2) if spacing is None else spacing  # of an X-ray, on its detector
    if spacing is not None:
        check_spacing((float(spacing[1]), float(spacing[0])))
    heights = [field("PixelMeasuresSequence", name, 1) for name in ("SpacingBetweenSlices", "SliceThickness")]
    height = next((abs(float(one[0])) for one in heights if one is not None and one[0]), None)
    return position, across, None if spacing is None else (float(spacing[1]), float(spacing[0])), height


def _check_frames(frames: list[_Frame], files: int) -> None:
    """Check that frames belong to one volume."""
    first = frames[0]
    odd = next((one for one in frames if not one.same_plane(first)), None)
    if odd is not None:
        what = f"{_name(odd, frames)} and {_name(first, frames)} differ in size, spacing or direction"
        raise InputError(what, "Remove what is not part of the volume")
    if 1 < files < len(frames):
        raise InputError("several multi-frame DICOM files in one series", "Put each into a folder of its own")
    if len(frames) > 1 and (unplaced := [one for one in frames if not one.is_placed()]):
        one = unplaced[0]
        named = (("position", one.position), ("direction", one.across), ("pixel spacing", one.spacing))
        missing = " and ".join(f"no {name}" for name, value in named if value is None)
        raise InputError(f"{_name(one, frames)} states {missing}, so {len(frames)} pictures cannot be stacked", _CONVERT)


def _name(frame: _Frame, frames: Sequence[_Frame]) -> str:
    """Name a frame in messages: its file, and its number where the file has several."""
    return f"frame {frame.index + 1} of {frame.path.name}" if sum(one.path == frame.path for one in frames) > 1 else frame.path.name


def _arrange(frames: list[_Frame]) -> tuple[list[_Frame], Grid, list[str], frozenset[Uncertainty]]:
    """Sort frames along their normal and make their grid.

    Raises: InputError for missing and doubled positions, and for gantry tilt, which a grid cannot hold.
    """
    first = frames[0]
    if len(frames) == 1:
        return frames, *_single(first)
    across = np.asarray(first.across)
    normal = np.cross(*across)
    ordered = sorted(frames, key=lambda one: (float(np.asarray(one.position) @ normal), one.path.name, one.index))
    positions = np.array([one.position for one in ordered])
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if usual <= _SAME_MM or float(np.min(gaps)) <= _SAME_MM:
        place = int(np.argmin(gaps))
        what = f"two DICOM slices at the same position: {_name(ordered[place], frames)} and {_name(ordered[place + 1], frames)}"
        raise InputError(what, "Remove the slices that do not belong to the volume; for echoes or time points, export each by itself")
    way = positions[-1] - positions[0]
    height = float(heights[-1] - heights[0])
    slant = float(np.linalg.norm(way - height * normal)) / height
    if slant > SHEAR_TOLERANCE:
        what = f"the DICOM slices are stacked at a slant (gantry tilt) of {np.degrees(np.arctan(slant)):.2g} degrees: sheared"
        raise InputError(what, "Resample the series to a rectangular grid")
    worst = float(np.max(np.abs(gaps - usual)))
    if worst > _UNEVEN_ERROR * usual:
        what = f"the DICOM slices are not evenly spaced: {usual:.3g} mm apart, but once {usual + worst:.3g} or less; slices are missing"
        raise InputError(what, _EXPORT)
    aside = positions - positions[0] - np.outer(heights - heights[0], normal)
    if (shift := float(np.max(np.abs(aside)))) > _UNEVEN_ERROR * usual:
        raise InputError(f"the DICOM slices are shifted sideways by up to {shift:.3g} mm", "Resample the series to a rectangular grid")
    x, y = first.spacing or (1.0, 1.0)
    grid = _grid(first, len(frames), positions[0], across, (x, y, height / (len(frames) - 1)))
    warnings = [f"the DICOM slices are unevenly spaced by up to {worst:.2g} mm"] if worst > _UNEVEN_WARNING * usual else []
    return ordered, grid, warnings, frozenset()


def _single(frame: _Frame) -> tuple[Grid, list[str], frozenset[Uncertainty]]:
    """Make the grid of one slice; what its header does not state is assumed, with a warning."""
    warnings, uncertain = list[str](), set[Uncertainty]()
    if frame.spacing is None:
        warnings.append("the DICOM header states no pixel spacing: pixels count as 1 mm")
        uncertain.add("spacing")
    if frame.position is None or frame.across is None:
        warnings.append("the DICOM header states no position in the patient: the orientation is unknown")
        uncertain.add("orientation")
    position = np.zeros(3) if frame.position is None else frame.position
    across = np.eye(3)[:2] if frame.across is None else frame.across
    spacing = (*(frame.spacing or (1.0, 1.0)), frame.height or 1.0)
    return _grid(frame, 1, position, across, spacing), warnings, frozenset(uncertain)


def _grid(frame: _Frame, count: int, origin: NDArray[np.float64], across: NDArray[np.float64], spacing: tuple[float, float, float]) -> Grid:
    """Make the grid of `count` slices like a frame; origin: of the lowest, LPS mm; spacing: (x, y, z) mm."""
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([*across, np.cross(*across)]) * spacing
    affine[:3, 3] = origin
    return Grid.from_affine((count, *frame.size[:2]), affine)


def _decode(frames: Sequence[_Frame]) -> tuple[NDArray[Any], list[str]]:
    """Decode frames into voxels (C, Z, Y, X), in order, each with its own scale; returns warnings, too. One file is in memory at a time."""
    warnings = set[str]()
    rows, columns, colours = frames[0].size
    voxels = np.empty((colours, len(frames), rows, columns), _type_for(frames))
    places: dict[Path, list[tuple[int, _Frame]]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append((place, frame))
    for path, wanted in places.items():
        with own_errors(path):
            file = _read(path)
            pixels, warning = decode_pixels(file, path)
            warnings |= {warning} - {""}
            pixels = pixels.reshape(-1, rows, columns, colours)
            for place, frame in wanted:
                limits = (int(pixels[frame.index].min()), int(pixels[frame.index].max())) if pixels.dtype.kind in "iu" else (0, 0)
                if not frame.is_float and not frame.scale.table and not frame.low <= limits[0] <= limits[1] <= frame.high:
                    raise InputError(f"{path.name} holds numbers beyond the bits that its header declares", _EXPORT)
                values = _scaled(pixels[frame.index], frame.scale, file)
                voxels[:, place] = np.moveaxis(values, -1, 0)
    int16 = np.iinfo(np.int16)  # of CT, whose bits could hold more
    if voxels.dtype.itemsize > int16.bits // 8 and voxels.dtype.kind == "i" and voxels.min() >= int16.min and voxels.max() <= int16.max:
        voxels = voxels.astype(np.int16)
    return voxels, sorted(warnings)


def _scaled(pixels: NDArray[Any], scale: _Scale, file: Dataset) -> NDArray[Any]:
    """Return the values of stored numbers."""
    if scale.table:
        return np.asarray(apply_modality_lut(pixels, file))
    if scale.slope == 1 and scale.intercept == 0:
        return pixels
    if scale.is_whole() and pixels.dtype.kind in "iu":
        return np.asarray(pixels.astype(np.int64) * int(scale.slope) + int(scale.intercept))
    return np.asarray(pixels.astype(np.float64) * scale.slope + scale.intercept)


def _type_for(frames: Sequence[_Frame]) -> np.dtype[Any]:
    """Return the smallest type that holds what the frames' bits and scales can make."""
    if any(frame.is_float or not frame.scale.is_whole() for frame in frames):
        wide = any(frame.is_float or frame.high - frame.low >= 1 << _FLOAT32_BITS for frame in frames)
        return np.dtype(np.float64 if wide else np.float32)
    ends = [end * frame.scale.slope + frame.scale.intercept for frame in frames for end in (frame.low, frame.high)]
    for kind in (np.uint8, np.int16, np.uint16, np.int32):
        if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.int64)
