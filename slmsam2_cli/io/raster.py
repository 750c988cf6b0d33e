"""Read PNG, JPEG and TIFF as volumes of one slice (a TIFF of several pages as a stack), with one channel per colour.

These formats have no patient geometry: pixels count as 1 mm, from the origin. An alpha channel is dropped.
Masks of JPEG images are written as PNG, because JPEG compression changes values.
"""

from __future__ import annotations

import warnings as python_warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.image import DecodedVolume, Grid, Source, check_size

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}
_MASK_ENDING = {".jpg": ".png", ".jpeg": ".png"}
_MAX_PAGES = 65535
_EXPORT = "Export the image again from its source"


def read_raster(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    """Read one picture, or the pages of a TIFF.

    Raises: InputError when it is damaged, too large, or has pages of different shapes.
    """
    Image.MAX_IMAGE_PIXELS = None  # max_voxels is the limit, checked before anything is decoded
    with open_regular(path) as file:
        pages = _pages(file, _FORMATS[ending], max_voxels)
    voxels = np.stack(pages, axis=1)
    grid = Grid((voxels.shape[1], voxels.shape[2], voxels.shape[3]), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    source = Source(ending, _MASK_ENDING.get(ending, ending), uncertain=frozenset({"orientation", "spacing"}))
    return DecodedVolume(voxels, grid, source, ("the format has no spacing and no orientation: pixels count as 1 mm",))


def _pages(file: BinaryIO, form: str, max_voxels: int) -> list[NDArray[Any]]:
    """Read the pages (C, Y, X), all of one shape and type."""
    if not file.read(1):
        raise InputError("an empty file", _EXPORT)
    file.seek(0)
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            with Image.open(file, formats=[form]) as picture:
                return _decoded(picture, max_voxels)
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
