"""Decode the pixels of one DICOM file, after what its compressed data say of themselves was compared with its header.

Decoders take the size from the header. Where that contradicts the data, some return scrambled rows and one ends the process, so the size
is read from the data first. pydicom decodes RLE, pyjpegls JPEG-LS, OpenJPEG JPEG 2000, Pillow JPEG, and GDCM lossless JPEG.
"""

from __future__ import annotations

import re
import struct
import warnings as python_warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames

from slmsam2_cli.io.files import InputError

_EXPORT = "Export the series again from its source"
_PLUGINS = {
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.RLELossless: "pydicom",
}
_JPEG_2000 = {uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K}
_SIZE_OF_JPEG_2000 = b"\xff\x4f\xff\x51"  # start of codestream, then its size
_SIZES_OF_JPEG = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # markers of frame headers; 0xF7: of JPEG-LS
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers that stand alone
_RLE_WARNING = re.compile(r"(\d+) vs\. (\d+) bytes expected")


def decode_pixels(file: Dataset, path: Path) -> tuple[NDArray[Any], str]:
    """Decode the stored numbers of a file, those of colours as RGB, and return a warning, or an empty text.

    Raises: InputError when there are none, they cannot be decoded, or they contradict the header.
    """
    if not any(name in file for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InputError(f"{path.name} holds no pixels, or is truncated", _EXPORT)
    syntax, rows, columns = file.file_meta.TransferSyntaxUID, int(file.Rows), int(file.Columns)
    damaged = f"{path.name} is damaged: its header declares {rows} x {columns} pixels, its compressed data hold"
    try:
        if syntax in _PLUGINS:
            file.pixel_array_options(decoding_plugin=_PLUGINS[syntax])
            if syntax != uid.RLELossless:
                for data in generate_frames(file.PixelData, number_of_frames=int(file.get("NumberOfFrames") or 1)):
                    found = _size_of(data, syntax in _JPEG_2000)
                    if found not in (None, (rows, columns)):
                        raise InputError(f"{damaged} {found[0]} x {found[1]}" if found else damaged, _EXPORT)
        with python_warnings.catch_warnings(record=True) as caught:
            python_warnings.simplefilter("always")
            pixels: NDArray[Any] = file.pixel_array
    except (RuntimeError, NotImplementedError):
        what = f"{path.name} cannot be decoded: damaged, or compressed in a form without a decoder ({syntax.name})"
        raise InputError(what, _EXPORT) from None
    except ValueError:
        raise InputError(f"{path.name} is truncated, or its header contradicts its pixels", _EXPORT) from None
    for numbers in (_RLE_WARNING.search(str(one.message)) for one in caught):
        if numbers is not None and int(numbers[1]) - int(numbers[2]) >= columns:  # more than padding
            raise InputError(f"{damaged} more", _EXPORT)
    frames, colours = int(file.get("NumberOfFrames") or 1), int(file.get("SamplesPerPixel") or 1)
    if pixels.size != frames * rows * columns * colours:
        raise InputError(f"{path.name} holds more pictures than its header declares", _EXPORT)
    if syntax.is_encapsulated or pixels.dtype.kind not in "iu" or colours > 1 or int(file.BitsAllocated) == int(file.BitsStored):
        return pixels, ""
    dtype = pixels.dtype.newbyteorder("<")
    stored = np.frombuffer(file.PixelData, dtype.newbyteorder(">") if syntax == uid.ExplicitVRBigEndian else dtype, pixels.size)
    ignored = int(file.BitsAllocated) > 1 and not np.array_equal(stored, pixels.ravel())
    return pixels, f"bits above the stored ones are set, as in {path.name}, and ignored" if ignored else ""


def _size_of(data: bytes, is_jpeg_2000: bool) -> tuple[int, int] | None:
    """Read the size (rows, columns) that a compressed picture states of itself; None where it states none."""
    try:
        if is_jpeg_2000:
            at = data.index(_SIZE_OF_JPEG_2000) + len(_SIZE_OF_JPEG_2000) + 4
            right, bottom, left, top = struct.unpack_from(">4I", data, at)
            return bottom - top, right - left
        at = 2
        while data[at] == 0xFF:
            marker = data[at + 1]
            if marker in _SIZES_OF_JPEG:
                rows, columns = struct.unpack_from(">2H", data, at + 5)
                return rows, columns
            at += 1 if marker == 0xFF else 2 + (0 if marker in _WITHOUT_LENGTH else struct.unpack_from(">H", data, at + 2)[0])
    except (ValueError, IndexError, struct.error):
        return None
    return None
