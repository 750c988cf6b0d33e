"""Write files atomically, so that a final name never holds a partial file, and lock folders against a second writer.

Every file is written under a temporary name in the same folder, synced, verified and renamed. All files of the package are written
through `write_atomically`; no other module opens a file for writing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.errors import LockError, OutputError, SlmSam2Error
from slmsam2_cli.io import strict_json
from slmsam2_cli.io.files import InputError, error_reason, is_ignored_name, open_regular

CHUNK = 1 << 20
_PREFIX = ".slmsam2-tmp-"
_ENDING = re.compile(r"(\.nii|\.tar)?\.[A-Za-z0-9]{1,16}\Z")


class JsonError(SlmSam2Error):
    """A JSON file that cannot be read or trusted; names file and line or key."""


class ArrayError(SlmSam2Error):
    """A .npy file that cannot be read or is not whole."""


class _FaultInjection:
    """Counts the steps of writing and makes one of them fail, for tests of what a fault leaves behind."""

    step = 0
    fail_at = 0

    def count_step(self) -> bool:
        """Count one step; True when it is the one to fail."""
        if not self.fail_at:
            return False
        self.step += 1
        return self.step == self.fail_at


_faults = _FaultInjection()


@contextmanager
def fail_at(step: int) -> Iterator[None]:
    """Make the step-th writing step inside the block fail (create, write, short write, sync, verify, rename, sync of the folder)."""
    _faults.step, _faults.fail_at = 0, step
    try:
        yield
    finally:
        _faults.fail_at = 0


def _may_fail() -> None:
    if _faults.count_step():
        raise OSError(errno.EIO, "injected fault")


def write_atomically(path: Path, write: Callable[[Path], None], verify: Callable[[Path], None] | None = None) -> None:
    """Let `write` fill a temporary file, `verify` read it back, then give it its name.

    The temporary carries the ending of `path`. `verify` raises any SlmSam2Error, ValueError or OSError when the
    file is not what was written. OutputError names path and cause; the temporary is gone and an earlier file intact.
    """
    temporary = path.with_name(_temporary_name(path.name))
    try:
        _fill(temporary, write)
        if verify is not None:
            _may_fail()
            verify(temporary)
        _may_fail()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error_reason(error)}") from error
    except SlmSam2Error as error:
        raise OutputError(f"{path}: could not be written whole: {error}") from error
    except (ValueError, EOFError) as error:
        raise OutputError(f"{path}: could not be written whole: {error}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _temporary_name(name: str) -> str:
    """Short whatever the length of `name`, hidden, with the same ending, so that libraries choose the same format."""
    ending = _ENDING.search(name)
    return f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}{ending[0] if ending else ''}"


def _fill(temporary: Path, write: Callable[[Path], None]) -> None:
    _may_fail()
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _may_fail()
    write(temporary)
    if _faults.count_step():  # a write that returns normally although the disk was full
        os.truncate(temporary, os.path.getsize(temporary) // 2)
    _may_fail()
    _sync(temporary)


def _sync(path: Path, flags: int = os.O_RDONLY) -> None:
    handle = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    _may_fail()
    with suppress(PermissionError):  # a folder may be writable without being readable
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def write_bytes(path: Path, data: bytes) -> None:
    """A file with exactly these bytes. OutputError."""
    expected = hashlib.sha256(data).hexdigest()

    def write(temporary: Path) -> None:
        with create(temporary) as file:
            file.write(data)

    def verify(temporary: Path) -> None:
        if sha256_of(temporary) != expected:
            raise ValueError(f"what was read back is not what was written ({os.path.getsize(temporary)} of {len(data)} bytes)")

    write_atomically(path, write, verify)


def create(path: Path) -> BinaryIO:
    """A new file open for writing; for `write` functions given to `write_atomically`. OSError when it exists."""
    return open(path, "xb")


def write_text(path: Path, text: str) -> None:
    """UTF-8 text; a lone surrogate (a file name that is not UTF-8) is written escaped. OutputError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Strict JSON, two spaces, UTF-8. OutputError, also for NaN and for types JSON has not."""
    try:
        data = strict_json.dump(value)
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: could not be written: {error}") from error
    write_bytes(path, data)


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file of at most 20 MB. JsonError names the file, `what` it is, and the line or key."""
    name = path.name if what == path.name else f"{path.name} ({what})"
    try:
        with open_regular(path) as file:
            return strict_json.parse(file.read(strict_json.MAX_BYTES + 1))
    except InputError as error:
        raise JsonError(f"{name}: {error.what}") from None
    except strict_json.JsonRejected as error:
        raise JsonError(f"{name}: {error}") from None
    except OSError as error:
        raise JsonError(f"{name}: cannot be read: {error_reason(error)}") from None


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """A .npy file (no pickles), compared with the array after writing. OutputError."""

    def write(temporary: Path) -> None:
        with create(temporary) as file:
            np.save(file, array, allow_pickle=False)

    def verify(temporary: Path) -> None:
        found = open_npy(temporary)
        if found.dtype != array.dtype or found.shape != array.shape or not _same(found, array):
            raise ValueError("what was read back is not what was written")

    write_atomically(path, write, verify)


def _same(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Bit equality, slab by slab so that no copy of a large array is made."""
    if left.ndim == 0 or left.size == 0:
        return left.tobytes() == right.tobytes()
    rows = max(1, 16 * CHUNK // max(1, left[0].nbytes))
    return all(left[i : i + rows].tobytes() == right[i : i + rows].tobytes() for i in range(0, len(left), rows))


def open_npy(path: Path) -> NDArray[Any]:
    """A .npy file as a read-only memory map; no pickles, size checked against its header. ArrayError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except InputError as error:
        raise ArrayError(f"{path.name}: {error.what}") from None
    except (ValueError, OSError, EOFError) as error:
        raise ArrayError(f"{path.name}: not a whole .npy file: {error}") from None
    offset = getattr(array, "offset", None)
    if offset is not None and offset + array.nbytes != size:
        raise ArrayError(f"{path.name}: not a whole .npy file: {size} bytes do not match its header")
    return array


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a regular file's bytes; of a folder, that of its files' names and digests. InputError, OSError."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file_path in sorted(p for p in path.iterdir() if not is_ignored_name(p.name) and not p.is_dir()):
            digest.update(f"{os.fsencode(file_path.name).hex()} {sha256_of(file_path)}\n".encode())
        return digest.hexdigest()
    with open_regular(path) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock_folder(folder: Path, part: str = "") -> Iterator[None]:
    """Hold `folder` for writing; the kernel frees it when the process ends, however it ends.

    part: names one of several agreed parallel writers ("0-of-4"): parts exclude their like and a writer of the whole.
    What killed writers left unfinished is removed when the whole is held.
    LockError names the owner's process and start; OutputError when the folder cannot be written to.
    """
    _make_folder(folder)
    with _locked(folder / ".slmsam2.lock", shared=bool(part)):
        if part:
            with _locked(folder / f".slmsam2-{part}.lock", shared=False):
                yield
        else:
            _remove_leftovers(folder)
            yield


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{folder}: is a file, not a directory") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error_reason(error)}") from None


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for whoever holds it; the kernel frees it. OutputError when it cannot be made."""
    with _opened(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot be locked: {error_reason(error)}") from None
        yield


@contextmanager
def _locked(path: Path, shared: bool) -> Iterator[None]:
    with _opened(path) as handle:
        _lock(handle, path.parent, shared)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A lock file, open for reading and writing; made when it is absent. OutputError."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error_reason(error)}") from None
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, shared: bool) -> None:
    """Take the lock and leave owner and start time in the file, or raise LockError with those of the holder."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}, started {_start()}".encode(), 0)
    except BlockingIOError:
        owner = os.pread(handle, 200, 0).decode("ascii", "replace") or "another process"
        raise LockError(f"{folder}: {owner}, writes here already; wait for it or choose another folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be locked: {error_reason(error)}") from None


def _start() -> str:
    """When this process began, local time to the second; now where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        began = time.time()
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))


def _remove_leftovers(folder: Path) -> None:
    """Temporaries of writers that were killed; nobody else writes here while the folder is held."""
    for leftover in folder.rglob(_PREFIX + "*"):
        with suppress(OSError):
            leftover.unlink()


def open_partial(partial: Path) -> BinaryIO:
    """A partial file, made when it is absent, open for adding to its end; `commit_partial` gives it its final name. OSError."""
    _may_fail()
    partial.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(partial, flags, 0o666), "ab")


def commit_partial(partial: Path, path: Path, verify: Callable[[Path], None]) -> None:
    """Give a partial file its final name once it is on the disk and `verify` has read it back. OutputError; errors of `verify`."""
    try:
        _may_fail()
        _sync(partial)
        verify(partial)
        _may_fail()
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error_reason(error)}") from error
