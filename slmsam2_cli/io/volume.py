"""Read images and masks of every supported format, and write masks on the grid of their image.

The modules nifti, itk, dicom and raster read one file each. This module chooses the reader by the file's ending, stacks the channels
of a case, checks label values, and turns errors into a CaseError that names case and file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.errors import CaseError, OutputError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.dicom_files import dicom_files, is_dicom, split_series
from slmsam2_cli.io.files import InputError, error_reason, sha256_of
from slmsam2_cli.io.image import ORIGIN_TOLERANCE, DecodedVolume, Grid, Source
from slmsam2_cli.io.nifti import read_nifti, template_for, write_nifti

__all__ = [
    "ENDINGS",
    "MASK_ENDINGS",
    "MAX_VOXELS",
    "SEG_NRRD",
    "Grid",
    "LabelVolume",
    "Source",
    "Volume",
    "image_ending",
    "keep_decoded",
    "mask_ending",
    "place_on",
    "read_image",
    "read_labels",
    "relative",
    "volume_digests",
    "volume_files",
    "write_mask",
]

MAX_VOXELS = 2_000_000_000
MAX_LABEL = 65535
SEG_NRRD = ".seg.nrrd"
PLAUSIBLE_SPACING_MM = 0.01, 100.0
_SAFE_GAP = 0.05  # from a whole number, of a label moved by a header's scale


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: voxels (C, Z, Y, X) as stored (scaled where the header asks for it) on a grid; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LabelVolume:
    """A mask: voxels (Z, Y, X), uint8 or uint16, on a grid; warnings, one line each."""

    voxels: NDArray[Any]
    grid: Grid
    source: Source
    warnings: tuple[str, ...] = ()


def _read_itk(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    from slmsam2_cli.io.itk import read_itk  # SimpleITK is slow to import, and NIfTI does without

    return read_itk(path, ending, max_voxels)


def _read_raster(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    from slmsam2_cli.io.raster import read_raster

    return read_raster(path, ending, max_voxels)


_READERS = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    SEG_NRRD: _read_itk,
    ".nrrd": _read_itk,
    ".mha": _read_itk,
    ".mhd": _read_itk,
    ".png": _read_raster,
    ".jpg": _read_raster,
    ".jpeg": _read_raster,
    ".tif": _read_raster,
    ".tiff": _read_raster,
}
ENDINGS = tuple(_READERS)
MASK_ENDINGS = tuple(ending for ending in ENDINGS if ending not in (".mhd", ".jpg", ".jpeg"))


def image_ending(path: Path) -> str | None:
    """Return the ending in lower case (".nii.gz", ".nrrd", ...) by name; None for unsupported files and DICOM folders."""
    name = path.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending) and len(name) > len(ending)), None)


def mask_ending(like: Volume | LabelVolume) -> str:
    """Return the ending of masks for a volume: its own, but .nii.gz for DICOM, .png for JPEG, .mha for .mhd."""
    return like.source.mask_ending


def _is_dicom_source(path: Path) -> bool:
    """Return whether a path is a folder, one series of a folder, or a DICOM file."""
    return path.is_dir() or image_ending(path) is None and (split_series(path)[1] is not None or is_dicom(path))


def read_image(paths: Sequence[Path], *, case: str, root: Path, max_voxels: int = MAX_VOXELS, channels: int | None = None) -> Volume:
    """Read the image of one case: one file per channel, or one file (or DICOM folder) with all channels.

    root: error messages name files relative to it; channels: the number that the dataset declares, None for any number.

    Raises: CaseError when a file is invalid, or the files do not share one grid.
    """
    parts = [_read(path, case, root, max_voxels, channels if len(paths) == 1 else 1) for path in paths]
    if not parts:
        raise CaseError(case, "", "no image", "Add the image file, or remove the case")
    if channels is not None and len(paths) not in (1, channels):
        raise CaseError(case, "", f"{len(paths)} image files, but dataset.json declares {channels} channels", "Add or remove channel files")
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        if difference := first.grid.difference(part.grid):
            raise CaseError(
                case,
                relative(path, root),
                f"grid differs from the first channel: {difference}",
                "Resample the channels to one grid",
            )
    voxels = first.voxels if len(parts) == 1 else np.concatenate([part.voxels for part in parts])
    warnings = tuple(dict.fromkeys(line for part in parts for line in part.warnings))
    return Volume(voxels, first.grid, first.source, warnings)


def _read(path: Path, case: str, root: Path, max_voxels: int, channels: int | None) -> DecodedVolume:
    """Read one file of an image and check its values and number of channels."""
    with case_errors(case, path, root):
        decoded = decode(path, max_voxels)
        found = len(decoded.voxels)
        if channels is not None and found != channels:
            what = f"{found} channels (4-D or colour), but {channels} {'is' if channels == 1 else 'are'} declared or wanted here"
            raise InputError(what, "Declare the channels in dataset.json, or save one 3-D volume; time series are not supported")
        return replace(decoded, warnings=(*decoded.warnings, *_value_warnings(decoded.voxels)))


def _value_warnings(voxels: NDArray[Any]) -> list[str]:
    """Return warnings about a constant image or an extreme range of values.

    Raises: InputError when a value of voxels (C, Z, Y, X) is not finite.
    """
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        nan = sum(int(np.isnan(slab).sum()) for channel in voxels for slab in channel)
        infinite = sum(int(np.isinf(slab).sum()) for channel in voxels for slab in channel)
        counts = [f"{nan} NaN"] * (nan > 0) + [f"{infinite} infinite (Inf)"] * (infinite > 0)
        what = f"{' and '.join(counts)} of {voxels.size} voxels, all must be finite"
        raise InputError(what, "Replace these values, for example by that of the background")
    if low == high:
        return [f"a constant image: every voxel is {low:g}"]
    return [f"an extreme range of values: {low:g} to {high:g}"] if max(abs(low), abs(high)) > 1e12 else []


def read_labels(path: Path, *, case: str, root: Path, on: Grid | None = None, max_voxels: int = MAX_VOXELS) -> LabelVolume:
    """Read the mask of one case. on: the grid of its image, into which a mask that 3D Slicer cut to its segments is put back.

    Raises: CaseError when the file is invalid or its values are not whole numbers from 0 to 65535.
    """
    with case_errors(case, path, root):
        decoded = decode(path, max_voxels)
        if len(decoded.voxels) != 1:
            raise InputError(f"4-D, one-hot or coloured: {len(decoded.voxels)} channels", "Save a 3-D mask with one value per structure")
        voxels, warnings = _unscaled(decoded.voxels[0], decoded.source.step)
        labels = LabelVolume(_label_values(voxels), decoded.grid, decoded.source, (*decoded.warnings, *warnings))
        return labels if on is None else place_on(labels, on)


def _unscaled(voxels: NDArray[Any], step: float) -> tuple[NDArray[Any], list[str]]:
    """Make whole numbers whole again that a header's scale moved by up to its step, and return warnings; else return them unchanged.

    A program that saves labels as floats into an integer header leaves slope and intercept to its library, which maps 2 to 1.99998.
    """
    if voxels.dtype.kind != "f" or not 0 < step < 1:
        return voxels, []
    nearest = np.rint(voxels)
    gap = float(np.max(np.abs(voxels - nearest)))
    if not 0 < gap <= min(step, max(_SAFE_GAP, 0.6 * step)) or len(np.unique(nearest)) < len(np.unique(voxels)):
        return voxels, []
    return nearest, [f"labels that the header's scl_slope {step:.3g} had moved by up to {gap:.2g} are whole numbers again"]


def place_on(labels: LabelVolume, grid: Grid) -> LabelVolume:
    """Put a mask that 3D Slicer cut to its segments back into the image's grid; other masks are returned as they are."""
    if not labels.source.segments or labels.grid.shape == grid.shape:
        return labels
    if labels.grid.spacing_difference(grid) or labels.grid.direction_difference(grid):
        return labels
    offset = grid.direction.T @ (np.array(labels.grid.origin_mm) - np.array(grid.origin_mm)) / np.array(grid.spacing_mm[::-1])
    start = np.rint(offset)[::-1].astype(int)
    end = start + labels.grid.shape
    if np.max(np.abs(offset - np.rint(offset))) > ORIGIN_TOLERANCE or np.any(start < 0) or np.any(end > grid.shape):
        return labels
    voxels = np.zeros(grid.shape, labels.voxels.dtype)
    voxels[tuple(slice(low, high) for low, high in zip(start, end, strict=True))] = labels.voxels
    return replace(labels, voxels=voxels, grid=grid)


def volume_files(path: Path) -> tuple[Path, ...]:
    """List the files of a volume: the slices of a DICOM folder or of one series in it, header and data of a .mhd, else the file itself.

    Raises: InputError when the header of a .mhd is invalid, or a DICOM file that is needed to tell series apart.
    """
    if _is_dicom_source(path):
        if split_series(path)[1] is None:
            return tuple(dicom_files(path))
        from slmsam2_cli.io.dicom import series_files

        return series_files(path)
    if image_ending(path) != ".mhd":
        return (path,)
    from slmsam2_cli.io.itk import meta_files

    return meta_files(path)


def volume_digests(path: Path) -> tuple[str, ...]:
    """Compute the SHA-256 of every file of a volume, in the order of `volume_files`.

    Raises: InputError or OSError when one cannot be read.
    """
    return tuple(sha256_of(file) for file in volume_files(path))


class DecodedVolumes:
    """Decoded volumes of one run, by path, size and time of change of their files: at most `max_bytes`, each handed out once when full."""

    def __init__(self, max_bytes: int) -> None:
        self.free_bytes, self.full = max_bytes, False
        self.kept: dict[tuple[Path, int, int, int], DecodedVolume] = {}

    def decode(self, path: Path, max_voxels: int) -> DecodedVolume:
        """Return the volume of a file, decoded earlier if the file is unchanged."""
        try:
            states = [file.stat() for file in volume_files(path)]
        except OSError:  # such as a broken link, of which the reader says more
            return _decode(path, max_voxels)
        key = (path.resolve(), sum(one.st_size for one in states), max((one.st_mtime_ns for one in states), default=0), max_voxels)
        if key in self.kept:
            return self.kept.pop(key) if self.full else self.kept[key]
        volume = _decode(path, max_voxels)
        if not self.full and volume.voxels.nbytes <= self.free_bytes:
            volume.voxels.setflags(write=False)  # it is handed out more than once
            self.kept[key] = volume
            self.free_bytes -= volume.voxels.nbytes
        return volume


_decoded: DecodedVolumes | None = None


@contextmanager
def keep_decoded(max_bytes: int) -> Iterator[DecodedVolumes]:
    """Keep volumes that are decoded inside the block, up to max_bytes, until `full` is set; later reads get them without decoding."""
    global _decoded
    _decoded = DecodedVolumes(max_bytes)
    try:
        yield _decoded
    finally:
        _decoded = None


def decode(path: Path, max_voxels: int = MAX_VOXELS) -> DecodedVolume:
    """Read one file or DICOM folder of any supported format, or return it from keep_decoded.

    Raises: InputError or OSError when it cannot be read.
    """
    return _decode(path, max_voxels) if _decoded is None else _decoded.decode(path, max_voxels)


def _decode(path: Path, max_voxels: int) -> DecodedVolume:
    """Read a file or DICOM folder by its ending; add warnings about an implausible spacing and a very small volume."""
    ending = image_ending(path)
    if _is_dicom_source(path):
        from slmsam2_cli.io.dicom import read_dicom

        volume = read_dicom(path, max_voxels)
    elif ending is None:
        raise InputError("unsupported file type", f"Supported: {', '.join(ENDINGS)}")
    else:
        volume = _READERS[ending](path, ending, max_voxels)
    grid, source, warnings = volume.grid, volume.source, list(volume.warnings)
    if _READERS.get(ending or "") is _read_raster and "spacing" in source.uncertain:  # states none
        return volume
    low, high = PLAUSIBLE_SPACING_MM
    if min(grid.spacing_mm) < low or max(grid.spacing_mm) > high:
        spacing = ", ".join(f"{mm:.6g}" for mm in grid.spacing_mm)
        warnings.append(f"the spacing ({spacing}) mm (z, y, x) is implausible; another unit than mm?")
        source = replace(source, uncertain=source.uncertain | {"spacing"})
    if sorted(grid.shape)[1] < 8:
        warnings.append(f"a very small volume: {grid.shape} voxels (z, y, x)")
    return replace(volume, source=source, warnings=tuple(warnings))


@contextmanager
def case_errors(case: str, path: Path, root: Path) -> Iterator[None]:
    """Convert errors with a file inside the block to a CaseError that names case and file."""
    try:
        yield
    except InputError as error:
        raise CaseError(case, relative(path, root), error.what, error.remedy) from None
    except OSError as error:
        raise CaseError(case, relative(path, root), f"cannot be read: {error_reason(error)}", "Restore the file") from None
    except MemoryError:
        raise CaseError(case, relative(path, root), "too large for this machine's memory", "Use a machine with more memory") from None


def relative(path: Path, root: Path) -> str:
    """Format a path for messages: relative to the root, else the name alone."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name


def _label_values(voxels: NDArray[Any]) -> NDArray[Any]:
    """Convert voxels (Z, Y, X) to uint8 or uint16; an array that is uint8 already is returned as it is.

    Raises: InputError when a value is no whole number from 0 to 65535; names the first such value.
    """
    if voxels.dtype == np.uint8:
        return voxels
    if voxels.dtype.kind == "f":
        for z, plane in enumerate(voxels):
            invalid = (plane != np.trunc(plane)) | ~np.isfinite(plane)
            if np.any(invalid):
                value = plane[invalid][0]
                what = f"a non-integer label: {'NaN' if np.isnan(value) else f'{value:g}'} (first seen in slice {z})"
                raise InputError(what, "Save the mask as whole numbers: without interpolation, and in NIfTI without a scale (scl_slope)")
    low, high = voxels.min(), voxels.max()
    if low < 0:
        raise InputError(f"a negative label: {low:g}", "Use 0 for background and positive whole numbers for structures")
    if high > MAX_LABEL:
        raise InputError(f"the label {int(high)} is above {MAX_LABEL}", "Renumber the labels")
    return voxels.astype(np.uint8 if high < 256 else np.uint16, copy=False)


def write_mask(path: Path, labels: NDArray[Any], like: Volume | LabelVolume) -> str:
    """Write labels (Z, Y, X), whole numbers, on the grid of `like` and verify the file; uint8 below 256, else uint16.

    The ending of `path` sets the format. NIfTI keeps qform, sform, codes and units of a NIfTI source, and no text. Returns the file's
    SHA-256.

    Raises: OutputError when the labels do not fit the grid or the file cannot be written and read back.
    """
    ending = image_ending(path)
    if ending is None or labels.shape != like.grid.shape:
        raise OutputError(f"{path}: could not be written: {labels.shape} voxels for {like.grid.shape}, ending {ending}")
    try:
        values = _label_values(labels.astype(np.uint8) if labels.dtype == bool else labels)
    except InputError as error:
        raise OutputError(f"{path}: could not be written: {error.what}") from None

    def verify(temporary: Path) -> None:
        found = read_labels(temporary, case="", root=path.parent)
        difference = None if ending in _WITHOUT_GEOMETRY else like.grid.difference(found.grid)
        if difference or found.voxels.dtype != values.dtype or not np.array_equal(found.voxels, values):
            raise ValueError(f"the file differs from what was written ({difference or 'voxels'})")

    with atomic.replacing(path, verify) as temporary:
        _write(temporary, ending, values, like)
    try:
        (digest,) = volume_digests(path)
    except (InputError, OSError) as error:
        raise OutputError(f"{path}: could not be read back: {error}") from None
    return digest


_WITHOUT_GEOMETRY = frozenset({".png", ".tif", ".tiff"})


def _write(path: Path, ending: str, values: NDArray[Any], like: Volume | LabelVolume) -> None:
    if ending in (".nii", ".nii.gz"):
        with atomic.create(path) as file:
            write_nifti(file, values, like.source.template or template_for(like.grid), compressed=ending == ".nii.gz")
    elif ending in (SEG_NRRD, ".nrrd", ".mha"):
        from slmsam2_cli.io.itk import write_itk

        write_itk(path, values, like.grid, like.source.segments if ending == SEG_NRRD else ())
    elif ending in _WITHOUT_GEOMETRY:
        from slmsam2_cli.io.raster import write_raster

        write_raster(path, values)
    else:
        raise ValueError(f"masks are not written as {ending}")
