"""Open and digest input files safely: regular files only, without blocking.

A FIFO blocks the reader that opens it, a directory opens without error, a link may lead nowhere or in a circle.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from slmsam2_cli.errors import SlmSam2Error

CHUNK = 1 << 20
IGNORED_NAMES = frozenset({".ds_store", "thumbs.db", "desktop.ini", "__macosx"})
_CAUSES = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "circular link",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ENOSPC: "no space left on the device",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would exceed the maximum size",
    errno.EDQUOT: "disk quota exceeded",
    errno.EMFILE: "too many open files",
}


class InputError(SlmSam2Error):
    """A file that cannot be used: `what` is wrong, and the `remedy`. Callers add the case."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}. {remedy}")


def error_reason(error: OSError) -> str:
    """Return the reason of an operating system error, without its path."""
    return _CAUSES.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without blocking.

    Raises: InputError when it cannot be opened or is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise InputError("the name holds a NUL character", "Rename the file") from None
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError("broken link: target not found", "Restore the file the link points to, or remove the link") from None
        raise InputError("not found", "Restore the file, or remove the case") from None
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise InputError("not a regular file", "Replace the pipe, socket or device by a file") from None
        raise InputError(f"cannot be opened: {error_reason(error)}", "Check the file's permissions") from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise InputError("a directory, not a file", "Put the image file itself here")
    raise InputError("not a regular file", "Replace the pipe, socket or device by a file")


def sha256_of(path: Path) -> str:
    """Compute the hexadecimal SHA-256 of a regular file, or of the names and digests of all files in a folder.

    Raises: InputError or OSError when a file cannot be read.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file_path in sorted(p for p in path.iterdir() if not is_ignored_name(p.name) and not p.is_dir()):
            digest.update(f"{os.fsencode(file_path.name).hex()} {sha256_of(file_path)}\n".encode())
        return digest.hexdigest()
    with open_regular(path) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def is_ignored_name(name: str) -> bool:
    """Return whether a folder entry is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in IGNORED_NAMES
