"""Read exactly as many bytes as a header declares, compressed or not, in bounded memory.

gzip is read to its end with the checksum; reading stops at the first byte more than declared, so that a
decompression bomb costs nothing. Bytes after the compressed data are a warning.
"""

from __future__ import annotations

import os
import zlib
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.io.files import InputError

CHUNK = 1 << 18
MAX_PADDING = 1 << 16  # bytes
DEFLATE_RATIO = 1032  # deflate never shrinks further than this
GZIP_MAGIC = b"\x1f\x8b"
GZIP, ZLIB_OR_GZIP = 31, 47  # zlib's window bits


class ByteStream(Protocol):
    """A sequential source of bytes; `capacity` is an upper bound of their number, known without reading them."""

    capacity: int
    warnings: list[str]

    def read(self, most: int) -> bytes:
        """Read up to `most` bytes; b"" only at the end.

        Raises: InputError when the data are damaged.
        """
        ...


class PlainStream:
    """The bytes of an uncompressed file from its current position."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.warnings = file, list[str]()
        self.capacity = os.fstat(file.fileno()).st_size - file.tell()

    def read(self, most: int) -> bytes:
        return self.file.read(min(most, CHUNK))


class DeflateStream:
    """The decompressed bytes of gzip members (or one zlib stream), with their checksums verified."""

    def __init__(self, file: BinaryIO, window_bits: int = GZIP) -> None:
        self.file, self.warnings, self.pending, self.ended = file, list[str](), b"", False
        self.window_bits = window_bits
        self.inflate = zlib.decompressobj(window_bits)
        self.capacity = (os.fstat(file.fileno()).st_size - file.tell()) * DEFLATE_RATIO

    def read(self, most: int) -> bytes:
        while not self.ended and (not self.inflate.eof or self._next_member()):
            data = self.pending or self.file.read(CHUNK)
            try:
                out = self.inflate.decompress(data, min(most, CHUNK))
            except zlib.error as error:
                reason = str(error).rpartition(": ")[2]
                raise InputError(f"the compressed data are corrupt (CRC or structure: {reason})", _FETCH_AGAIN) from None
            self.pending = self.inflate.unconsumed_tail
            if out:
                return out
            if not data and not self.inflate.eof:
                raise InputError("truncated: the compressed data end too early", _FETCH_AGAIN)
        return b""

    def _next_member(self) -> bool:
        """Start the next gzip member and return True; at the end return False, with a warning about trailing bytes other than zeros."""
        rest = self.inflate.unused_data
        while not rest.lstrip(b"\0"):
            rest = self.file.read(CHUNK)
            if not rest:
                self.ended = True
                return False
        rest = rest.lstrip(b"\0") + self.file.read(1)
        if self.window_bits == GZIP and rest.startswith(GZIP_MAGIC):
            self.inflate, self.pending = zlib.decompressobj(GZIP), rest
            return True
        self.warnings.append("trailing bytes after the compressed data are ignored")
        self.ended = True
        return False


_FETCH_AGAIN = "Copy or download the file again"


def read_exactly(stream: ByteStream, count: int, what: str) -> NDArray[np.uint8]:
    """Read exactly `count` bytes as an array (count,); memory is used only as data arrive.

    Raises: InputError when there are fewer bytes, or memory is too small.
    """
    if count > stream.capacity:
        found = f"too large for the {stream.capacity} bytes the file can hold"
        raise InputError(f"truncated or damaged: the header declares {count} bytes of {what}, {found}", _FETCH_AGAIN)
    try:
        buffer = np.empty(count, np.uint8)
    except MemoryError:
        raise InputError(f"too large for this machine's memory: {count} bytes of {what}", "Use a machine with more memory") from None
    done = 0
    while done < count:
        block = stream.read(count - done)
        if not block:
            raise InputError(f"truncated: expected {count} bytes of {what}, found {done or 'no ' + what}", _FETCH_AGAIN)
        buffer[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return buffer


def read_body(stream: ByteStream, offset: int, count: int, declared: int) -> NDArray[np.uint8]:
    """Skip `offset` bytes and read the voxels (count,) bytes at the end of the data of `declared` bytes.

    Raises: InputError when there are fewer or more bytes.
    """
    skip(stream, offset, "voxels")
    voxels = read_exactly(stream, count, "voxels")
    expect_end(stream, declared)
    return voxels


def skip(stream: ByteStream, count: int, what: str) -> None:
    """Skip `count` bytes.

    Raises: InputError when the data end before.
    """
    while count > 0:
        block = stream.read(min(count, CHUNK))
        if not block:
            raise InputError(f"truncated: the file ends before the {what}", _FETCH_AGAIN)
        count -= len(block)


def expect_end(stream: ByteStream, declared: int) -> None:
    """Check that the data end here; up to MAX_PADDING zeros that follow are a warning.

    Raises: InputError when more data follow than the header declares.
    """
    found = 0
    while (block := stream.read(MAX_PADDING)) and not block.strip(b"\0") and found + len(block) <= MAX_PADDING:
        found += len(block)
    if found and not block:
        stream.warnings.append(f"{found} zeros after the voxels are ignored")
    if block:
        what = f"the data are larger than the {declared} bytes the header declares (trailing data, or a corrupt header)"
        raise InputError(what, "Export the file again from its source")
