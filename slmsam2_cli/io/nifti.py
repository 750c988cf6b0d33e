"""NIfTI-1 and NIfTI-2 single files: the header checked field by field before a voxel is read, and masks with the same geometry.

Libraries silently zero-fill truncated files, repair bad dimensions and drop NaN; therefore the bytes are read and checked here.
nibabel supplies the layout of both headers. Field meanings: nifti1.h and nifti2.h, nifti.nimh.nih.gov.

The geometry is that of the sform if its code is above 0, else of the qform, else of the voxel size alone. Where sform and qform
contradict each other, the sform is used and a warning gives the distance in mm. Without any form code the orientation is unknown:
the axes are then taken as LPS from the origin, as ITK does. NIfTI is RAS, the grid is LPS.
"""

from __future__ import annotations

import gzip
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.gzip_stream import GZIP_MAGIC, ByteStream, DeflateStream, PlainStream, read_body
from slmsam2_cli.io.image import DecodedVolume, Grid, Source, Uncertainty, check_size, check_spacing

_MM_PER_UNIT = {1: 1000.0, 3: 0.001}  # NIfTI unit codes metre and micron; everything else is taken as mm
CONFLICT_VOXELS = 0.1


@dataclass(frozen=True, eq=False)
class NiftiForms:
    """The geometry fields of a NIfTI header, as stored. pixdim: (qfac, x, y, z); rows: (3, 4) sform."""

    pixdim: NDArray[np.float64]
    qform_code: int
    sform_code: int
    quaternion: NDArray[np.float64]
    offset: NDArray[np.float64]
    rows: NDArray[np.float64]
    units: int


Geometry = tuple[Grid, Grid | None, frozenset[Uncertainty], list[str]]


def geometry(forms: NiftiForms, size: tuple[int, int, int]) -> Geometry:
    """Return (grid, grid of a contradicting qform or None, uncertain parts, warnings) for a size (x, y, z).

    Raises: InputError when spacing or affine are invalid.
    """
    shape = size[::-1]
    grid = Grid.from_affine(shape, _ras_affine(forms), ras=True)
    warnings, uncertain = list[str](), set[Uncertainty]()
    if forms.units in _MM_PER_UNIT:
        warnings.append(f"the header's unit of length is {'metre' if forms.units == 1 else 'micron'}; converted to mm")
    if forms.sform_code <= 0 and forms.qform_code <= 0:
        warnings.append("the orientation is unknown (no form codes): the axes are taken to run to the left, back and head")
        uncertain.add("orientation")
    qform_grid, gap = None, 0.0
    if forms.sform_code > 0 and forms.qform_code > 0:
        with suppress(InputError):  # an invalid qform next to a valid sform is ignored
            qform_grid = Grid.from_affine(shape, _ras_affine(replace(forms, sform_code=0)), ras=True)
            corners = np.array([(*corner, 1) for corner in product(*[(0, length - 1) for length in size])], np.float64)
            gap = float(np.max(np.linalg.norm(corners @ (grid.affine() - qform_grid.affine()).T, axis=1)))
    if gap > CONFLICT_VOXELS * min(grid.spacing_mm):
        warnings.append(f"sform and qform disagree by up to {gap:.3g} mm; the sform is used")
        return grid, qform_grid, frozenset(uncertain), warnings
    return grid, None, frozenset(uncertain), warnings


def _ras_affine(forms: NiftiForms) -> NDArray[np.float64]:
    """Return the RAS affine (4, 4) in mm: from the sform, else the qform, else the voxel size with axes that run to L, P and S."""
    scale = np.diag([*[_MM_PER_UNIT.get(forms.units, 1.0)] * 3, 1.0])
    if forms.sform_code > 0:
        return np.asarray(scale @ np.vstack([forms.rows, [0, 0, 0, 1]]), np.float64)
    check_spacing(tuple(forms.pixdim[1:4]))
    if forms.qform_code > 0:
        return np.asarray(scale @ qform_affine(forms), np.float64)
    x, y, z = (float(mm) for mm in forms.pixdim[1:4])
    return np.asarray(scale @ np.diag([-x, -y, z, 1.0]), np.float64)


def qform_affine(forms: NiftiForms) -> NDArray[np.float64]:
    """Compute the RAS affine (4, 4) of the quaternion, in the header's unit of length.

    Raises: InputError when the quaternion is no rotation or not finite.
    """
    b, c, d = forms.quaternion
    rest = 1.0 - float(b * b + c * c + d * d)
    if not np.isfinite(rest) or not np.all(np.isfinite(forms.offset)):
        raise InputError("the affine (qform direction and origin) is not finite", "Export the image again from its source")
    if rest < -1e-3:
        raise InputError("the qform direction is no rotation: its quaternion is longer than 1", "Export the image again from its source")
    quaternion = np.array([np.sqrt(max(rest, 0.0)), b, c, d])
    a, b, c, d = quaternion / np.linalg.norm(quaternion)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * forms.pixdim[1:4] * [1, 1, -1 if forms.pixdim[0] < 0 else 1]
    affine[:3, 3] = forms.offset
    return affine


_MAGIC = {348: b"n+1", 540: b"n+2"}
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REFUSED_TYPES = {32: "complex numbers", 1792: "complex numbers", 2048: "complex numbers", 128: "RGB colours", 2304: "RGBA colours"}
_GEOMETRY = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_ROWS = ("srow_x", "srow_y", "srow_z")
_EXPORT = "Export the file again from its source"


@cache
def _layout(length: int) -> Any:
    """Return the NumPy dtype of a header of 348 (NIfTI-1) or 540 (NIfTI-2) bytes."""
    import nibabel as nib  # slow to import, and not needed to list or name volumes

    return np.dtype(nib.nifti1.header_dtype if length == 348 else nib.nifti2.header_dtype)


@dataclass(frozen=True)
class Header:
    """A checked header. size: (x, y, z); offset: of the voxels in the (decompressed) file."""

    fields: Any
    size: tuple[int, int, int]
    channels: int
    dtype: np.dtype[Any]
    offset: int


def read_nifti(path: Path, ending: str, max_voxels: int) -> DecodedVolume:
    """Read a .nii or .nii.gz file, scaled by scl_slope and scl_inter where the header sets them.

    Raises: InputError when the file is damaged, too large or of an unsupported type.
    """
    with open_regular(path) as file:
        stream = _open_stream(file)
        header = _read_header(stream, max_voxels)
        count = header.size[0] * header.size[1] * header.size[2] * header.channels * header.dtype.itemsize
        raw = read_body(stream, header.offset - header.fields.dtype.itemsize, count, header.offset + count)
    forms, warnings = _mended(_forms(header.fields))
    grid, qform_grid, uncertain, found = geometry(forms, header.size)
    warnings += found
    voxels = raw.view(header.dtype).reshape(header.channels, *header.size[::-1])
    step = abs(float(header.fields["scl_slope"])) if header.dtype.kind in "iu" else 0.0
    source = Source(ending, ending, _geometry_only(header.fields), uncertain, qform_grid, step=step)
    if ending == ".nii.gz" and isinstance(stream, PlainStream):
        warnings.append("not compressed although its name ends in .gz")
    values, scaling = _scaled(voxels, header.fields)
    return DecodedVolume(values, grid, source, (*stream.warnings, *warnings, *scaling))


def _open_stream(file: BinaryIO) -> ByteStream:
    """Choose between plain and compressed data by the first bytes, and reject what is not NIfTI."""
    start = file.read(132)
    file.seek(0)
    if not start:
        raise InputError("an empty file", _EXPORT)
    if start.startswith(GZIP_MAGIC):
        return DeflateStream(file)
    if start[128:132] == b"DICM":
        raise InputError("a DICOM file, not a NIfTI", "Give the folder of the DICOM series, or convert it to NIfTI")
    if not any(int(size).to_bytes(4, order) == start[:4] for size in _MAGIC for order in ("little", "big")):
        raise InputError("not a gzip or NIfTI file", _EXPORT)
    return PlainStream(file)


def _read_header(stream: ByteStream, max_voxels: int) -> Header:
    """Read the header and check everything that the voxels depend on."""
    fields = _fields(stream)
    size, channels = _dimensions(fields)
    check_size(size, channels, max_voxels)
    lowest = int(fields.dtype.itemsize) + 4
    offset = float(fields["vox_offset"]) or float(lowest)
    if not (lowest <= offset < 2**53 and offset == int(offset)):
        raise InputError(f"the NIfTI header is damaged: vox_offset is {offset:g}", _EXPORT)
    return Header(fields, size, channels, _dtype(fields), int(offset))


def _fields(stream: ByteStream) -> Any:
    """Read the header as a NumPy record in the byte order of the file."""
    block = _header_bytes(stream, 348, b"")
    length, order = next(
        ((n, o) for n in _MAGIC for o in "<>" if np.frombuffer(block, f"{o}i4", 1)[0] == n),
        (0, ""),
    )
    if not length:
        if block[128:132] == b"DICM":
            raise InputError("a DICOM file, not a NIfTI", "Give the folder of the DICOM series, or convert it to NIfTI")
        raise InputError("not a NIfTI file (its header does not say 348 or 540)", _EXPORT)
    block = _header_bytes(stream, length, block)
    fields = np.frombuffer(block, _layout(length).newbyteorder(order), 1)[0]
    magic = bytes(fields["magic"])[:3]
    if magic in (b"ni1", b"ni2"):
        raise InputError("the header of a NIfTI pair (.hdr/.img)", "Convert the pair to a single .nii.gz file")
    if magic != _MAGIC[length]:
        raise InputError(f"not a NIfTI file of version 1 or 2: its magic is {magic!r}", "Convert it to .nii.gz")
    return fields


def _header_bytes(stream: ByteStream, length: int, block: bytes) -> bytes:
    """Extend the first bytes of a header to `length` bytes."""
    while len(block) < length:
        more = stream.read(length - len(block))
        if not more:
            raise InputError(f"the header is truncated: {len(block)} of {length} bytes", _EXPORT)
        block += more
    return block


def _dimensions(fields: Any) -> tuple[tuple[int, int, int], int]:
    """Return ((x, y, z), channels): trailing axes of length one are dropped, a fourth (or fifth) axis holds channels."""
    dim = [int(length) for length in fields["dim"]]
    if not 1 <= dim[0] <= 7:
        raise InputError(f"the number of dimensions is {dim[0]}, not 3 or 4", _EXPORT)
    axes = dim[1 : dim[0] + 1]
    if any(length < 1 for length in axes):
        raise InputError(f"a dimension is zero or negative: {tuple(axes)}", _EXPORT)
    while len(axes) > 3 and axes[-1] == 1:
        axes.pop()
    if len(axes) < 3:
        raise InputError(f"{len(axes)}-D, but must be 3-D: {tuple(axes)}", "Save it as a volume of one slice (x, y, 1), or as PNG")
    if len(axes) == 5 and axes[3] == 1:
        del axes[3]
    if len(axes) > 4:
        raise InputError(f"{len(axes)}-D, but must be 3-D or 4-D (channels): {tuple(axes)}", "Save one 3-D file per channel")
    return (axes[0], axes[1], axes[2]), axes[3] if len(axes) == 4 else 1


def _dtype(fields: Any) -> np.dtype[Any]:
    """Return the type of the voxels in the file's byte order."""
    code = int(fields["datatype"])
    if code not in _TYPES:
        kind = _REFUSED_TYPES.get(code, f"code {code}")
        raise InputError(f"unsupported data type: {kind}", "Convert the voxels to an integer or float type, one value per voxel")
    return np.dtype(_TYPES[code]).newbyteorder(fields.dtype["datatype"].byteorder)


def _mended(forms: NiftiForms) -> tuple[NiftiForms, list[str]]:
    """Return the forms as other readers take them, and warnings: an sform of zeros beside a qform is no sform, lengths are positive."""
    warnings = list[str]()
    if forms.sform_code > 0 and forms.qform_code > 0 and not np.any(forms.rows[:, :3]):
        warnings.append("the sform is all zeros; the qform is used")
        forms = replace(forms, sform_code=0)
    if forms.sform_code <= 0 and np.any(forms.pixdim[1:4] < 0):
        sizes = ", ".join(f"{mm:g}" for mm in forms.pixdim[1:4])
        warnings.append(f"a negative spacing in the header, ({sizes}) mm (x, y, z), is taken as positive")
        forms = replace(forms, pixdim=np.array([forms.pixdim[0], *np.abs(forms.pixdim[1:4])]))
    return forms, warnings


def _scaled(voxels: NDArray[Any], fields: Any) -> tuple[NDArray[Any], list[str]]:
    """Convert voxels to native byte order and apply slope * voxels + inter, unless the slope is 0 (NIfTI's "not set"). Adds warnings.

    Where both are NaN, as nibabel marks "not set", nothing is scaled.
    """
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if np.isnan(slope) and np.isnan(inter):
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False), ["scl_slope and scl_inter are NaN: the values are not scaled"]
    if not np.isfinite(slope) or (slope != 0 and not np.isfinite(inter)):
        raise InputError(f"scl_slope {slope:g} or scl_inter {inter:g} is not finite: the scale of the values is unknown", _EXPORT)
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if slope == 0 or (slope == 1 and inter == 0):
        return voxels, []
    wide = np.float64 if voxels.dtype.itemsize > 4 or voxels.dtype in (np.int32, np.uint32) else np.float32
    scaled: Any = voxels.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled *= wide(slope)
        scaled += wide(inter)
    return np.asarray(scaled), []


def _forms(fields: Any) -> NiftiForms:
    """Extract the geometry fields of a header."""
    return NiftiForms(
        pixdim=np.array(fields["pixdim"][:4], np.float64),
        qform_code=int(fields["qform_code"]),
        sform_code=int(fields["sform_code"]),
        quaternion=np.array([fields[name] for name in ("quatern_b", "quatern_c", "quatern_d")], np.float64),
        offset=np.array([fields[name] for name in ("qoffset_x", "qoffset_y", "qoffset_z")], np.float64),
        rows=np.array([fields[name] for name in _ROWS], np.float64),
        units=int(fields["xyzt_units"]) & 7,
    )


def _geometry_only(fields: Any) -> bytes:
    """Return a blank little-endian header with the geometry fields alone; no text of the source is copied."""
    length = fields.dtype.itemsize
    blank = np.zeros((), _layout(length).newbyteorder("<"))
    blank["pixdim"][:4] = fields["pixdim"][:4]
    for name in (*_GEOMETRY, *_ROWS):
        blank[name] = fields[name]
    blank["xyzt_units"] = int(fields["xyzt_units"]) & 7
    return blank.tobytes()


def template_for(grid: Grid) -> bytes:
    """Return the geometry header of a grid that was not read from NIfTI: equal sform and qform, mm, code 1 (scanner)."""
    import nibabel

    header: Any = (nibabel.Nifti1Header if max(grid.shape) < 2**15 else nibabel.Nifti2Header)()  # type: ignore[no-untyped-call]
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine()
    header.set_data_shape(grid.shape[::-1])
    header.set_qform(ras, 1)
    header.set_sform(ras, 1)
    header.set_xyzt_units("mm")
    return _geometry_only(np.frombuffer(header.binaryblock, header.structarr.dtype, 1)[0])


def write_nifti(file: BinaryIO, labels: NDArray[Any], template: bytes, compressed: bool) -> None:
    """Write labels (Z, Y, X) uint8 or uint16 with the geometry of `template`; the bytes depend on nothing else."""
    layout = _layout(len(template)).newbyteorder("<")
    fields = np.frombuffer(bytearray(template), layout, 1)[0]
    fields["sizeof_hdr"], fields["magic"] = len(template), _MAGIC[len(template)]
    fields["dim"] = [3, *labels.shape[::-1], 1, 1, 1, 1]
    fields["datatype"], fields["bitpix"] = (2, 8) if labels.dtype == np.uint8 else (512, 16)
    fields["vox_offset"], fields["scl_slope"] = len(template) + 4, 1
    if len(template) == 348:
        fields["regular"] = b"r"
    else:
        fields["eol_check"] = (13, 10, 26, 10)
    data = np.ascontiguousarray(labels, labels.dtype.newbyteorder("<"))
    if not compressed:
        file.write(fields.tobytes() + bytes(4))
        file.write(data.data)
        return
    with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        packed.write(fields.tobytes() + bytes(4))
        packed.write(data.data)
