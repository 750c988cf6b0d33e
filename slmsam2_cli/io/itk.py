"""NRRD, MetaImage (.mha, .mhd) through SimpleITK, after their text headers and the size of their data were checked here.

SimpleITK zero-fills truncated data and repairs impossible spacings; what it would repair is refused before it opens the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import SimpleITK
from numpy.typing import NDArray

from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.gzip_stream import GZIP, ZLIB_OR_GZIP, DeflateStream, PlainStream, expect_end, skip
from slmsam2_cli.io.image import DecodedVolume, Grid, Segment, Source, check_size, check_spacing

sitk: Any = SimpleITK  # untyped
_MAX_HEADER = 1 << 20
_EXPORT = "Export the file again from its source"
_MAX_NAME, _MAX_VALUE, _NO_COLOUR = 80, 65535, (0.5, 0.5, 0.5)
_META_BYTES = {
    "CHAR": 1,
    "UCHAR": 1,
    "SHORT": 2,
    "USHORT": 2,
    "INT": 4,
    "UINT": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "LONG_LONG": 8,
    "ULONG_LONG": 8,
}
_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t", "double"), 8),
}


@dataclass(frozen=True)
class _Layout:
    """Where the voxels are: how many values of how many bytes, and how they are packed ("raw", "gzip", "zlib").

    segments: the labels that 3D Slicer describes, each with its layer.
    """

    sizes: tuple[int, ...]
    bytes_per_value: int
    packing: str
    data: Path
    segments: tuple[tuple[Segment, int], ...] = ()


def read_itk(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    """Read a .nrrd, .mha or .mhd file.

    Raises: InputError when header or data are damaged, too large or unsupported.
    """
    with open_regular(path) as file:
        layout = _nrrd_layout(file, path) if ending.endswith(".nrrd") else _meta_layout(file, path)
        total = int(np.prod(layout.sizes, dtype=object))
        check_size(layout.sizes, 1, max_voxels)
        if layout.data == path:
            warnings = _check_data(file, layout, total * layout.bytes_per_value)
        else:
            with open_regular(layout.data) as data:
                warnings = _check_data(data, layout, total * layout.bytes_per_value)
    image = decode(path)
    voxels, grid = from_image(image)
    voxels, segments = _merged(voxels, layout.segments)
    return DecodedVolume(voxels, grid, Source(ending, ".mha" if ending == ".mhd" else ending, segments=segments), tuple(warnings))


def _merged(voxels: NDArray[Any], described: Sequence[tuple[Segment, int]]) -> tuple[NDArray[Any], tuple[Segment, ...]]:
    """Merge the layers (C, Z, Y, X) in which 3D Slicer keeps segments that overlap, or did; returns one channel and the segments.

    Where two layers use the same value, the segments are numbered from 1 in their order.

    Raises: InputError when a voxel belongs to two segments.
    """
    segments = tuple(segment for segment, _ in described)
    if len(voxels) == 1 or not segments:
        return voxels, segments
    if len({segment.value for segment in segments}) < len(segments):
        segments = tuple(replace(segment, value=number) for number, segment in enumerate(segments, 1))
    labels = np.zeros((1, *voxels.shape[1:]), np.uint16)
    for segment, (stored, layer) in zip(segments, described, strict=True):
        if layer >= len(voxels):
            raise InputError(f"the header puts segment {segment.name} into layer {layer} of {len(voxels)}", _EXPORT)
        inside = voxels[layer] == stored.value
        if twice := int(np.count_nonzero(labels[0][inside])):
            what = f"{twice} voxels belong to two segments, because segments of 3D Slicer may overlap (layers); one of them: {segment.name}"
            raise InputError(what, "In Slicer's Segment Editor, use Masking with 'Overwrite other segments', or export as labelmap")
        labels[0][inside] = segment.value
    if unknown := int(np.count_nonzero(voxels)) - int(np.count_nonzero(labels)):
        what = f"{unknown} voxels in the layers of 3D Slicer belong to no segment that the header describes"
        raise InputError(what, "In Slicer, export the segmentation as a labelmap")
    return labels, segments


def decode(path: Path) -> Any:
    """Read a checked file with SimpleITK.

    Raises: InputError, without the path that SimpleITK's message holds, when it cannot be decoded.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK would print paths and header texts
    try:
        return sitk.ReadImage(str(path))
    except (RuntimeError, UnicodeError) as error:
        reason = "a direction that is singular" if "determinant" in str(error) else "data that cannot be decoded"
        raise InputError(f"corrupt: {reason}", _EXPORT) from None


def from_image(image: Any) -> tuple[NDArray[Any], Grid]:
    """Return the voxels (C, Z, Y, X) and grid of a 3-D image, or of a 4-D image whose last axis holds channels.

    Raises: InputError for other dimensions, complex numbers and invalid geometry.
    """
    dimension = image.GetDimension()
    if dimension not in (3, 4):
        raise InputError(f"{dimension}-D, but must be 3-D", "Save it as a volume of one slice, or as PNG")
    if "complex" in image.GetPixelIDTypeAsString():
        raise InputError("unsupported data type: complex numbers", "Convert the voxels to an integer or float type")
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    voxels = array.reshape(-1, *array.shape[-3:])
    affine = np.eye(4)
    spacing = image.GetSpacing()[:3]
    check_spacing(spacing)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3] * spacing
    affine[:3, 3] = image.GetOrigin()[:3]
    shape = (int(voxels.shape[1]), int(voxels.shape[2]), int(voxels.shape[3]))
    return np.ascontiguousarray(voxels), Grid.from_affine(shape, affine)


def _check_data(file: BinaryIO, layout: _Layout, count: int) -> list[str]:
    """Read the voxel data to their end, check their number and return warnings.

    Raises: InputError when there are fewer or more bytes than declared.
    """
    stream = PlainStream(file) if layout.packing == "raw" else DeflateStream(file, GZIP if layout.packing == "gzip" else ZLIB_OR_GZIP)
    if stream.capacity < count:
        what = f"truncated: the header declares {count} bytes of voxels, too large for the {stream.capacity} the file can hold"
        raise InputError(what, "Copy or download the file again")
    if layout.packing == "raw":
        file.seek(count, 1)
    else:
        skip(stream, count, f"last of {count} bytes of voxels")
    expect_end(stream, count)
    return stream.warnings


def _lines(file: BinaryIO) -> list[str]:
    """Read header lines up to an empty line or the name of the data file; the file position is then at the data."""
    lines: list[str] = []
    while file.tell() < _MAX_HEADER:
        line = file.readline(1 << 16)
        text = line.decode("utf-8", "replace").strip()
        if not line or not text:
            return lines
        lines.append(text)
        if text.lower().startswith("elementdatafile"):
            return lines
    raise InputError("the header has no end", _EXPORT)


def _field(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise InputError(f"the header has no '{name}'", _EXPORT)
    return fields[name]


def _integers(text: str) -> tuple[int, ...]:
    """Parse the 1 to 16 whole numbers of a header field.

    Raises: InputError when it holds anything else.
    """
    words = text.split()
    if not 1 <= len(words) <= 16 or not all(re.fullmatch(r"-?\d{1,18}", word) for word in words):
        raise InputError(f"the header's dimensions are not whole numbers: {text[:60]}", _EXPORT)
    return tuple(int(word) for word in words)


def _check_numbers(fields: dict[str, str], spacing: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Reject what SimpleITK would repair silently: spacings of 0 or below, and values that are not finite."""
    for name in (*spacing, *others):
        words = re.findall(r"[^\s(),]+", fields.get(name, ""))
        values = [_number(word) for word in words if word.lower() != "none"]
        if not np.all(np.isfinite(values)):
            raise InputError(f"the header's '{name}' is not finite (spacing, direction or origin)", _EXPORT)
        if name in spacing and values:
            check_spacing(values)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def _nrrd_layout(file: BinaryIO, path: Path) -> _Layout:
    lines = _lines(file)
    if not lines or not re.fullmatch(r"NRRD000\d", lines[0]):
        raise InputError("an empty file" if not lines else "not an NRRD file", _EXPORT)
    pairs = (line.split(": ", 1) for line in lines[1:] if ": " in line and not line.startswith("#") and ":=" not in line)
    fields = {name.strip().lower(): value.strip() for name, value in pairs}
    if {"data file", "datafile"} & set(fields):
        raise InputError("the voxels are in another file (detached header)", "Save header and voxels in one .nrrd file")
    if any(int(fields.get(name, "0") or 0) for name in ("byte skip", "byteskip", "line skip", "lineskip") if fields.get(name) != "0"):
        raise InputError("unsupported: the header skips bytes or lines", _EXPORT)
    _check_numbers(fields, (), ("spacings", "space directions", "space origin"))
    sizes, encoding = _integers(_field(fields, "sizes")), _field(fields, "encoding").lower()
    packing = {"raw": "raw", "gz": "gzip", "gzip": "gzip"}.get(encoding)
    width = _NRRD_BYTES.get(_field(fields, "type").lower())
    if packing is None or width is None or _integers(_field(fields, "dimension")) != (len(sizes),):
        raise InputError(f"unsupported: type {fields['type']}, dimension {fields['dimension']}, encoding {encoding}", _EXPORT)
    return _Layout(sizes, width, packing, path, _segments(lines))


def _segments(lines: Sequence[str]) -> tuple[tuple[Segment, int], ...]:
    """Read the labels that 3D Slicer describes in a NRRD header (Segment0_Name:=liver), each with its layer; empty where there are none."""
    fields = dict(line.split(":=", 1) for line in lines if line.startswith("Segment") and ":=" in line)
    found = []
    for number in range(sum(name.endswith("_ID") for name in fields)):
        value, layer = (fields.get(f"Segment{number}_{name}", "").strip() for name in ("LabelValue", "Layer"))
        if not re.fullmatch(r"\d{1,5}", value) or int(value) > _MAX_VALUE or not re.fullmatch(r"\d{0,4}", layer):
            what = f"the header describes segment {number} without a whole number up to {_MAX_VALUE} as its value, or without its layer"
            raise InputError(what, _EXPORT)
        text = fields.get(f"Segment{number}_Name", "").replace("\\n", " ").replace("\\\\", "\\")  # as NRRD escapes them
        name = " ".join(text.split())[:_MAX_NAME]
        words = [_number(word) for word in fields.get(f"Segment{number}_Color", "").split()]
        colour = tuple(words) if len(words) == 3 and all(0 <= word <= 1 for word in words) else _NO_COLOUR
        found.append((Segment(int(value), name or f"label {value}", (colour[0], colour[1], colour[2])), int(layer or "0")))
    return tuple(found)


def _meta_layout(file: BinaryIO, path: Path) -> _Layout:
    """Read a MetaImage header; the voxels are in the header file itself, or in one file of the same folder."""
    pairs = [line.split("=", 1) for line in _lines(file) if "=" in line]
    fields = {name.strip(): value.strip() for name, value in pairs}
    if not fields or "ObjectType" not in fields and "NDims" not in fields:
        raise InputError("an empty file" if file.tell() == 0 else "not a MetaImage file", _EXPORT)
    _check_numbers(
        fields, ("ElementSpacing", "ElementSize"), ("TransformMatrix", "Rotation", "Orientation", "Offset", "Position", "Origin")
    )
    sizes = (*_integers(fields.get("ElementNumberOfChannels", "1")), *_integers(_field(fields, "DimSize")))
    width = _META_BYTES.get(_field(fields, "ElementType").removeprefix("MET_"))
    if width is None or fields.get("BinaryData", "True").lower() != "true" or fields.get("HeaderSize", "0") != "0":
        raise InputError(f"unsupported: {fields['ElementType']}, or text data, or a second header", _EXPORT)
    packing = "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw"
    name = _field(fields, "ElementDataFile")
    if name.startswith("LIST") or "%" in name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
            "the voxels must be in one file next to the header; lists and files outside its folder are rejected", "Save it as .mha"
        )
    return _Layout(sizes, width, packing, path if name == "LOCAL" else path.with_name(name))


def meta_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a MetaImage: the header, and the data file if it is separate.

    Raises: InputError when the header is invalid.
    """
    with open_regular(path) as file:
        data = _meta_layout(file, path).data
    return (path,) if data == path else (path, data)


def write_itk(path: Path, labels: NDArray[Any], grid: Grid, segments: Sequence[Segment] = ()) -> None:
    """Write labels (Z, Y, X) as compressed .nrrd or .mha. segments: described in the header, as 3D Slicer reads them from .seg.nrrd.

    Raises: ValueError when SimpleITK fails.
    """
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction.ravel().tolist())
    for name, text in _described(segments, labels.shape).items():
        image.SetMetaData(name, text)
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError:
        raise ValueError("SimpleITK could not write it") from None


def _described(segments: Sequence[Segment], shape: tuple[int, ...]) -> dict[str, str]:
    """Describe segments in the header fields of 3D Slicer: https://slicer.readthedocs.io, segmentation storage node."""
    extent = " ".join(f"0 {length - 1}" for length in shape[::-1])
    fields = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, segment in enumerate(segments):
        fields |= {
            f"Segment{number}_ID": f"Segment_{segment.value}",
            f"Segment{number}_Name": " ".join(segment.name.split()),
            f"Segment{number}_NameAutoGenerated": "0",
            f"Segment{number}_Color": " ".join(f"{part:.6g}" for part in segment.colour),
            f"Segment{number}_ColorAutoGenerated": "0",
            f"Segment{number}_LabelValue": str(segment.value),
            f"Segment{number}_Layer": "0",
            f"Segment{number}_Extent": extent,
            f"Segment{number}_Tags": "",
        }
    return fields if segments else {}
