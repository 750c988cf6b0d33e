"""Find the DICOM files of a folder and read them as one volume through SimpleITK. Only geometry tags are read; no tag is copied.

Files are recognised by the "DICM" magic bytes. A folder must hold one series of evenly spaced slices on one grid.
Masks of a series are written as .nii.gz.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from slmsam2_cli.io.files import InputError, dicom_files, is_ignored_name
from slmsam2_cli.io.image import DIRECTION_TOLERANCE, SHEAR_TOLERANCE, DecodedVolume, Source, check_size
from slmsam2_cli.io.itk import decode, from_image

sitk: Any = SimpleITK  # untyped
SERIES = "DICOM series"
_UNEVEN_ERROR, _UNEVEN_WARNING = 0.05, 1e-3  # of the distance between slices
_UID, _BITS = "0020|000e", "0028|0100"
_SYNTAX, _UNCOMPRESSED = "0002|0010", ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_EXPORT = "Export the series again from its source"


@dataclass(frozen=True, eq=False)
class _Slice:
    path: Path
    series: str
    size: tuple[int, int, int]
    channels: int
    spacing: NDArray[np.float64]
    direction: NDArray[np.float64]
    origin: NDArray[np.float64]

    def same_plane(self, other: _Slice) -> bool:
        """Return whether both slices share size, spacing and direction."""
        return (
            (self.size, self.channels) == (other.size, other.channels)
            and np.allclose(self.spacing[:2], other.spacing[:2], rtol=1e-3)
            and float(np.max(np.abs(self.direction - other.direction))) <= DIRECTION_TOLERANCE
        )


def read_dicom(folder: Path, max_voxels: int) -> DecodedVolume:
    """Read the series in a folder.

    Raises: InputError when the folder does not hold exactly one complete series on one grid.
    """
    files = dicom_files(folder)
    if not files:
        raise InputError("a directory without DICOM slices, not a file", "Put the image file itself here")
    damaged = [path.name for path in folder.glob("*.[dD][cC][mM]") if not is_ignored_name(path.name) and path not in files]
    if damaged:
        raise InputError(f"{len(damaged)} .dcm files are not DICOM, the first is {damaged[0]}", _EXPORT)
    slices = [_information(path) for path in files]
    _check_series(slices)
    check_size((*slices[0].size[:2], sum(one.size[2] for one in slices)), slices[0].channels, max_voxels)
    if len(slices) == 1:
        image, warnings = decode(slices[0].path), list[str]()
    else:
        slices, warnings = _in_order(slices)
        image = _read(slices)
    voxels, grid = from_image(image)
    return DecodedVolume(voxels, grid, Source(SERIES, ".nii.gz"), tuple(warnings))


def _information(path: Path) -> _Slice:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # it would print tags
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except (RuntimeError, UnicodeError):
        raise InputError(f"{path.name} is a corrupt DICOM file", _EXPORT) from None
    size = (*reader.GetSize(), 1)[:3]
    _check_length(reader, path, int(np.prod(size)) * reader.GetNumberOfComponents())
    direction = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
    return _Slice(
        path,
        _tag(reader, _UID),
        size,
        reader.GetNumberOfComponents(),
        np.array(reader.GetSpacing()[:3]),
        direction,
        np.array(reader.GetOrigin()[:3]),
    )


def _tag(reader: Any, key: str) -> str:
    return str(reader.GetMetaData(key)).strip().strip("\0") if reader.HasMetaDataKey(key) else ""


def _check_length(reader: Any, path: Path, values: int) -> None:
    """Reject a truncated slice, which GDCM may fill with zeros."""
    bits = _tag(reader, _BITS)
    if _tag(reader, _SYNTAX) in ("", *_UNCOMPRESSED) and bits.isdigit() and path.stat().st_size < values * int(bits) // 8:
        raise InputError(f"{path.name} is truncated: its header declares {values * int(bits) // 8} bytes of pixels", _EXPORT)


def _check_series(slices: list[_Slice]) -> None:
    series = {one.series for one in slices}
    if len(series) > 1:
        raise InputError(f"{len(series)} DICOM series in one folder", "Put each series into a folder of its own")
    first = slices[0]
    odd = next((one for one in slices if not one.same_plane(first)), None)
    if odd is not None:
        raise InputError(
            f"{odd.path.name} and {first.path.name} differ in size, spacing or direction", "Remove what is not part of the volume"
        )
    if len(slices) > 1 and first.size[2] > 1:
        raise InputError("several multi-frame DICOM files in one folder", "Put each into a folder of its own")


def _in_order(slices: list[_Slice]) -> tuple[list[_Slice], list[str]]:
    """Sort slices along their normal; reject missing and duplicate ones, and return a warning when the spacing is uneven.

    Gantry tilt is rejected too, because SimpleITK would ignore the shear silently.
    """
    normal = slices[0].direction[:, 2]
    ordered = sorted(slices, key=lambda one: (float(one.origin @ normal), one.path.name))
    gaps = np.diff([float(one.origin @ normal) for one in ordered])
    usual = float(np.median(gaps))
    if usual <= 0 or float(np.min(gaps)) <= 0:
        raise InputError("two DICOM slices at the same position", "Remove the slices that do not belong to the volume")
    way = ordered[-1].origin - ordered[0].origin
    height = float(way @ normal)
    slant = float(np.linalg.norm(way - height * normal)) / height
    if slant > SHEAR_TOLERANCE:
        what = f"the DICOM slices are stacked at a slant (gantry tilt) of {np.degrees(np.arctan(slant)):.2g} degrees: sheared"
        raise InputError(what, "Resample the series to a rectangular grid")
    worst = float(np.max(np.abs(gaps - usual)))
    if worst > _UNEVEN_ERROR * usual:
        what = f"the DICOM slices are not evenly spaced: {usual:.3g} mm apart, but once {usual + worst:.3g} or less; slices are missing"
        raise InputError(what, _EXPORT)
    uneven = f"the DICOM slices are unevenly spaced by up to {worst:.2g} mm"
    return ordered, [uneven] if worst > _UNEVEN_WARNING * usual else []


def _read(slices: list[_Slice]) -> Any:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(one.path) for one in slices])
    try:
        return reader.Execute()
    except RuntimeError:
        raise InputError("corrupt DICOM pixels", _EXPORT) from None
