"""How large a case is, on disk and in memory while it is read, and how much memory is free. Estimates: nothing but headers is looked at."""

from __future__ import annotations

import math
import os
import struct
from contextlib import suppress
from pathlib import Path

from slmsam2_cli.dataset.dataset_json import Case
from slmsam2_cli.io.files import InputError, open_regular
from slmsam2_cli.io.gzip_stream import GZIP_MAGIC, DeflateStream, PlainStream, read_exactly

ASSUMED_COMPRESSION = 4  # how many times its size on disk a file is taken to be, once unpacked, where the header is not understood
DEFAULT_FREE_BYTES = 1 << 32  # bytes
_NIFTI_1, _NIFTI_2 = 348, 540  # bytes of a header
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def bytes_on_disk(case: Case) -> int:
    """Image and mask together. What is not there counts nothing: reading it will tell."""
    return sum(map(_size, _paths(case)))


def bytes_to_read(case: Case) -> int:
    """The most that image and mask take while they are read: as stored, and once more scaled, put together or turned about."""
    return sum(_unpacked(path) for path in _paths(case))


def free_bytes() -> int:
    """Memory that new processes may take, as far as the system tells."""
    free = [DEFAULT_FREE_BYTES]
    with suppress(OSError, ValueError, AttributeError):
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))]
    with suppress(OSError, ValueError, KeyError):  # a container may have less than the machine
        limit, used = (int((_CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        free += [limit - used + int(told["inactive_file"])]  # files read before, which give way
    return max(0, min(free))


def _paths(case: Case) -> tuple[Path, ...]:
    return (*case.images, *([case.label] if case.label else []))


def _size(path: Path) -> int:
    """Of a file, or of all files in a folder of slices."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path)) if path.is_dir() else path.stat().st_size
    except (OSError, ValueError):
        return 0


def _unpacked(path: Path) -> int:
    try:
        with open_regular(path) as file:
            magic = file.read(len(GZIP_MAGIC))
            file.seek(0)
            stream = DeflateStream(file) if magic == GZIP_MAGIC else PlainStream(file)
            declared = _declared(read_exactly(stream, _NIFTI_1, "header").tobytes())
    except (InputError, OSError):
        declared = None
    return 2 * ASSUMED_COMPRESSION * _size(path) if declared is None else declared


def _declared(header: bytes) -> int | None:
    """By the first 348 bytes of a NIfTI file: of its voxels as stored, and as read. None when it is none."""
    for order in "<>":
        (length,) = struct.unpack_from(f"{order}i", header)
        if length not in (_NIFTI_1, _NIFTI_2):
            continue
        size, bits, scale = ("8h", 40), ("h", 72), ("2f", 112)
        if length == _NIFTI_2:
            size, bits, scale = ("8q", 16), ("h", 14), ("2d", 176)
        axes, (stored,), factors = (struct.unpack_from(f"{order}{form}", header, at) for form, at in (size, bits, scale))
        voxels = math.prod(max(1, length) for length in axes[1 : 1 + max(0, axes[0])])
        scaled = stored if factors[0] == 0 or factors == (1, 0) else max(32, 2 * stored)
        return int(voxels * (stored + scaled) // 8)
    return None
