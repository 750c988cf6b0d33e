"""Read PNG, JPEG and TIFF as volumes of one slice (a TIFF of several pages as a stack), with one channel per colour.

These formats have no patient geometry: pixels count as 1 mm, from the origin. An alpha channel is dropped. Of a TIFF, the spacing and
the scale of values that ImageJ writes into its description are used, and the spacing of OME-TIFF; stacks of channels or time points are
refused, for their pages are no slices.
Masks of JPEG images are written as PNG, because JPEG compression changes values.
"""

from __future__ import annotations

import re
import warnings as python_warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.image import DecodedVolume, Grid, Source, Uncertainty, check_size

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_MASK_ENDING = {".jpg": ".png", ".jpeg": ".png"}
_MAX_PAGES = 65535
_DESCRIPTION, _RESOLUTIONS = 270, (282, 283)  # tags of TIFF; pixels per unit along x and y
_MM_PER_UNIT = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "um": 1e-3, "micron": 1e-3, "microns": 1e-3, "nm": 1e-6}
_STRAIGHT, _NO_SCALE = "0", ("20", "21")  # kinds of scale ("cf") in ImageJ's descriptions
_EXPORT = "Export the image again from its source"


def read_raster(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    """Read one picture, or the pages of a TIFF.

    Raises: InputError when it is damaged, too large, or has pages of different shapes.
    """
    Image.MAX_IMAGE_PIXELS = None  # max_voxels is the limit, checked before anything is decoded
    with open_regular(path) as file:
        pages, described = _pages(file, _FORMATS[ending], max_voxels)
    voxels = described.scaled(np.stack(pages, axis=1))
    shape = voxels.shape[1], voxels.shape[2], voxels.shape[3]
    spacing = described.spacing_mm if described.spacing_mm is not None and min(described.spacing_mm) > 0 else None
    if spacing is None:
        uncertain, warning = frozenset[Uncertainty]({"orientation", "spacing"}), "no spacing and no orientation: pixels count as 1 mm"
    else:
        uncertain, warning = frozenset[Uncertainty]({"orientation"}), "no orientation; the spacing is that of the file's description"
    grid = Grid(shape, spacing or (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    source = Source(ending, _MASK_ENDING.get(ending, ending), uncertain=uncertain)
    return DecodedVolume(voxels, grid, source, (f"the format has {warning}",))


@dataclass(frozen=True)
class _Description:
    """What a TIFF says of its pixels: spacing in mm (z, y, x), None where it does not; value = intercept + slope * stored number."""

    spacing_mm: tuple[float, float, float] | None = None
    slope: float = 1.0
    intercept: float = 0.0

    def scaled(self, voxels: NDArray[Any]) -> NDArray[Any]:
        if (self.slope, self.intercept) == (1.0, 0.0):
            return voxels
        values = voxels.astype(np.float64) * self.slope + self.intercept
        whole = self.slope == int(self.slope) and self.intercept == int(self.intercept) and voxels.dtype.kind in "iu"
        ends = np.iinfo(np.int32)
        return values.astype(np.int32 if whole and ends.min <= values.min() <= values.max() <= ends.max else np.float32)


def _describe(picture: Image.Image) -> _Description:
    """Read the description that ImageJ or an OME-TIFF writer put into a TIFF.

    Raises: InputError for stacks whose pages are no slices, and values on a scale that is no straight line.
    """
    tags = getattr(picture, "tag_v2", {})
    text, count = str(tags.get(_DESCRIPTION, "")), getattr(picture, "n_frames", 1)
    if text.startswith("ImageJ="):
        fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        for name in ("channels", "frames"):
            _reject_hyperstack(name, fields.get(name, "1"))
        if (images := fields.get("images", "1")).isdigit() and int(images) != count:
            raise InputError(f"ImageJ's description says {images} slices, and the file holds {count} pages", "Save it as NRRD or NIfTI")
        if fields.get("cf", _STRAIGHT) not in (_STRAIGHT, *_NO_SCALE):
            raise InputError("values on a scale of ImageJ's that is no straight line", "Save calibrated values as 32-bit")
        has_scale = fields.get("cf") == _STRAIGHT
        slope, intercept = (_number(fields.get(name)) if has_scale else None for name in ("c1", "c0"))
        if has_scale and (slope is None or intercept is None):
            raise InputError("values on a scale of ImageJ's whose numbers cannot be read", "Save calibrated values as 32-bit")
        unit = _MM_PER_UNIT.get(fields.get("unit", "").strip().lower().replace("\\u00b5", "u"))
        across = [_number(tags.get(tag)) or 1.0 for tag in _RESOLUTIONS]
        spacing = None
        if unit is not None:
            spacing = (_number(fields.get("spacing")) or 1 / across[0]) * unit, unit / across[1], unit / across[0]
        return _Description(spacing, 1.0 if slope is None else slope, intercept or 0.0)
    if "<OME" in text:
        found = dict(re.findall(r'\b(Size[CT]|PhysicalSize[XYZ](?:Unit)?)="([^"]{1,40})"', text))
        if found.get("SizeC") != str(len(picture.getbands())):
            _reject_hyperstack("channels", found.get("SizeC", "1"))
        _reject_hyperstack("frames", found.get("SizeT", "1"))
        lengths = []
        for axis in "ZYX":
            unit = _MM_PER_UNIT.get(found.get(f"PhysicalSize{axis}Unit", "um").lower().replace("\u00b5", "u"))
            lengths.append((_number(found.get(f"PhysicalSize{axis}")) or 0.0) * (unit or 0.0))
        z, y, x = lengths
        return _Description((z if "PhysicalSizeZ" in found else x, y, x))
    return _Description()


def _reject_hyperstack(name: str, count: str) -> None:
    if count.isdigit() and int(count) > 1:
        raise InputError(f"a stack of {count} {name}, whose pages are no slices", f"Save each of the {name} as a file of its own")


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if np.isfinite(number) else None


def _pages(file: BinaryIO, form: str, max_voxels: int) -> tuple[list[NDArray[Any]], _Description]:
    """Read the pages (C, Y, X), all of one shape and type, and the description of a TIFF."""
    if not file.read(1):
        raise InputError("an empty file", _EXPORT)
    file.seek(0)
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            with Image.open(file, formats=[form]) as picture:
                return _decoded(picture, max_voxels), _describe(picture) if form == "TIFF" else _Description()
    except InputError:
        raise
    except MemoryError:
        raise InputError("too large for this machine's memory", "Use a machine with more memory") from None
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise OSError, SyntaxError, struct.error, ... on damaged files
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise InputError(f"{reason}, or not a {form} picture", _EXPORT) from None


def _decoded(picture: Image.Image, max_voxels: int) -> list[NDArray[Any]]:
    count = getattr(picture, "n_frames", 1)
    if count > _MAX_PAGES:
        raise InputError(f"too large: {count} pages", "Split the stack")
    pages: list[NDArray[Any]] = []
    for page in ImageSequence.Iterator(picture):
        check_size((page.width, page.height, count), len(page.getbands()), max_voxels)
        pages.append(_channels(page))
        if pages[-1].shape != pages[0].shape or pages[-1].dtype != pages[0].dtype:
            raise InputError("the pages of the stack differ in shape or type", "Save pages of one shape")
        if picture.format != "TIFF":
            break
    return pages


def _channels(page: Image.Image) -> NDArray[Any]:
    """Return the values of a page (C, Y, X); for a palette picture its indices, because masks are stored that way."""
    array = np.array(page)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.ndim == 2:
        return array[None]
    colours = array.shape[-1] - ("A" in page.getbands())
    return np.ascontiguousarray(np.moveaxis(array[..., :colours], -1, 0))


def write_raster(path: Path, labels: NDArray[Any]) -> None:
    """Write labels (Z, Y, X) uint8 or uint16 as PNG (one slice) or TIFF.

    Raises: ValueError when the format cannot hold them.
    """
    pages = [Image.fromarray(np.ascontiguousarray(page)) for page in labels]
    if path.suffix == ".png" and len(pages) == 1:
        pages[0].save(path, "PNG")
    elif path.suffix in (".tif", ".tiff"):
        pages[0].save(path, "TIFF", compression="tiff_deflate", save_all=True, append_images=pages[1:])
    else:
        raise ValueError(f"{len(pages)} slices do not fit a {path.suffix} picture")
