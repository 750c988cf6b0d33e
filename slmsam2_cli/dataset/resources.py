"""Estimate the size of a case on disk and in memory while it is read, and the free memory. Only headers are read."""

from __future__ import annotations

import math
import os
import struct
from contextlib import suppress
from pathlib import Path

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.gzip_stream import GZIP_MAGIC, DeflateStream, PlainStream, read_exactly
from slmsam2_cli.io.volume import volume_files

ASSUMED_COMPRESSION = 4  # size in memory divided by size on disk, for files whose header is not understood
DEFAULT_FREE_BYTES = 1 << 32  # where the system does not report its memory
_NIFTI_1, _NIFTI_2 = 348, 540  # bytes of a header
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def bytes_on_disk(case: Case) -> int:
    """Return the size of image and mask on disk in bytes; a missing file counts as 0 and is reported when it is read."""
    return sum(map(_size, (*case.images, *([case.label] if case.label else []))))


def bytes_to_read(case: Case) -> int:
    """Estimate the peak memory in bytes while image and mask are read: as stored, plus one scaled, stacked or transposed copy."""
    total = 0
    for path in (*case.images, *([case.label] if case.label else [])):
        declared = _declared_by(path)
        total += 2 * ASSUMED_COMPRESSION * _size(path) if declared is None else math.prod(declared[0]) * declared[1] // 8
    return total


def shape_of(path: Path) -> tuple[int, ...]:
    """Return the lengths of a volume's axes; of formats other than NIfTI, those of a cube of so many bytes, a guess."""
    declared = _declared_by(path)
    return declared[0] if declared is not None else (math.ceil((ASSUMED_COMPRESSION * _size(path)) ** (1 / 3)),) * 3


def _declared_by(path: Path) -> tuple[tuple[int, ...], int] | None:
    """Read shape and bits per voxel from the header of a file as `_declared` does; None for another format or an unreadable file."""
    with suppress(InputError, OSError), open_regular(path) as file:
        magic = file.read(len(GZIP_MAGIC))
        file.seek(0)
        stream = DeflateStream(file) if magic == GZIP_MAGIC else PlainStream(file)
        return _declared(read_exactly(stream, _NIFTI_1, "header").tobytes())
    return None


def free_bytes() -> int:
    """Return the memory in bytes that new processes may use: free memory of the machine and of the container, whichever is less."""
    free = [DEFAULT_FREE_BYTES]
    with suppress(OSError, ValueError, AttributeError):
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))]
    with suppress(OSError, ValueError, KeyError):  # a container may have less than the machine
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        free += [limit - used + int(stat["inactive_file"])]  # file cache that can be freed
    return max(0, min(free))


def _size(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a DICOM folder; 0 when it cannot be read."""
    try:
        return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else volume_files(path)) if file.is_file())
    except (InputError, OSError, ValueError):
        return 0


def _declared(header: bytes) -> tuple[tuple[int, ...], int] | None:
    """Return shape and bits per voxel, as stored plus as scaled, from the first 348 bytes of a NIfTI file; None for another format."""
    for order in "<>":
        (length,) = struct.unpack_from(f"{order}i", header)
        if length not in (_NIFTI_1, _NIFTI_2):
            continue
        size, bits, scale = ("8h", 40), ("h", 72), ("2f", 112)
        if length == _NIFTI_2:
            size, bits, scale = ("8q", 16), ("h", 14), ("2d", 176)
        axes, (stored,), factors = (struct.unpack_from(f"{order}{form}", header, at) for form, at in (size, bits, scale))
        shape = tuple(max(1, length) for length in axes[1 : 1 + max(0, axes[0])])
        scaled = stored if factors[0] == 0 or factors == (1, 0) else max(32, 2 * stored)
        return shape, stored + scaled
    return None
