"""Write files atomically, so that a final name never holds a partial file, and lock folders against a second writer.

Every file is written under a temporary name in the same folder, synced, verified and renamed. All files of the package are written
through `replacing`; no other module opens a file for writing.

Locks are those of filelock, which the kernel releases when the process ends, however it ends. They are exclusive, so parallel writers
share a folder this way: each part holds its own lock file; it takes it while it briefly holds the folder's. A writer of the whole folder
holds the folder's lock file throughout and finds all the others free.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slmsam2_cli.errors import LockError, OutputError, SlmSam2Error
from slmsam2_cli.io import strict_json
from slmsam2_cli.io.files import InputError, error_reason, open_regular

CHUNK = 1 << 20
_PREFIX = ".slmsam2-tmp-"
_PART_PREFIX = ".slmsam2-part-"  # of the lock files of parallel writers
_HANDOVER_S = 1.0  # a part holds the lock of the whole folder for some milliseconds while it takes its own
_ENDING = re.compile(r"(\.nii|\.tar)?\.[A-Za-z0-9]{1,16}\Z")


class JsonError(SlmSam2Error):
    """A JSON file that cannot be read or is not strict JSON; the message names file and line or key."""


class ArrayError(SlmSam2Error):
    """A .npy file that cannot be read or is damaged."""


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


@contextmanager
def replacing(path: Path, verify: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary file to fill; afterwards let `verify` read it back and rename it to `path`, whose earlier file stays until then.

    The temporary file has a short hidden name with the ending of `path`, by which libraries choose the format. `verify` raises any
    SlmSam2Error, ValueError or OSError when the file is not what was written.

    Raises: OutputError with path and reason when any step fails; the temporary file is removed.
    """
    ending = _ENDING.search(path.name)
    temporary = path.with_name(f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}{ending[0] if ending else ''}")
    try:
        _may_fail()
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _may_fail()
        yield temporary
        if _faults.count_step():  # a write that returns normally although the disk was full
            os.truncate(temporary, os.path.getsize(temporary) // 2)
        _may_fail()
        _sync(temporary)
        if verify is not None:
            _may_fail()
            verify(temporary)
        _may_fail()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error_reason(error)}") from error
    except (SlmSam2Error, ValueError, EOFError) as error:
        raise OutputError(f"{path}: could not be written completely: {error}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


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
    """Write a file of exactly these bytes.

    Raises: OutputError when it cannot be written or differs when read back.
    """

    def verify(temporary: Path) -> None:
        with open(temporary, "rb") as file:
            same = all(file.read(CHUNK) == data[start : start + CHUNK] for start in range(0, len(data), CHUNK)) and not file.read(1)
        if not same:
            raise ValueError(f"the file differs from what was written ({os.path.getsize(temporary)} of {len(data)} bytes)")

    with replacing(path, verify) as temporary, create(temporary) as file:
        file.write(data)


def create(path: Path) -> BinaryIO:
    """Open a new file for writing; for the temporary file of `replacing`.

    Raises: OSError when the file exists.
    """
    return open(path, "xb")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; a lone surrogate (from a file name that is not UTF-8) is written escaped.

    Raises: OutputError when the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def to_json(value: object) -> bytes:
    """Serialise a value as strict JSON: UTF-8, indented by two spaces, with a line feed at the end.

    Raises: ValueError or TypeError when it holds NaN or a type that JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    return (text + "\n").encode("utf-8", "backslashreplace")  # lone surrogates become \udcxx, which JSON reads back


def write_json(path: Path, value: object) -> None:
    """Write a value as strict JSON.

    Raises: OutputError when the file cannot be written, or the value holds NaN or a type that JSON does not have.
    """
    try:
        data = to_json(value)
    except (ValueError, TypeError) as error:
        raise OutputError(f"{path}: could not be written: {error}") from error
    write_bytes(path, data)


def read_json(path: Path, what: str) -> Any:
    """Read the value in a JSON file of at most 20 MB. what: what kind of file it is, for messages.

    Raises: JsonError with file and line or key when it cannot be read or is not strict JSON.
    """
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
    """Write an array as .npy file without pickles, and compare the file with the array, bit for bit and in bounded memory.

    Raises: OutputError when it cannot be written or differs when read back.
    """

    def verify(temporary: Path) -> None:
        found = open_npy(temporary)
        same = found.dtype == array.dtype and found.shape == array.shape
        if same and array.ndim and array.size:
            rows = max(1, 16 * CHUNK // max(1, array[0].nbytes))
            same = all(found[i : i + rows].tobytes() == array[i : i + rows].tobytes() for i in range(0, len(array), rows))
        elif same:
            same = found.tobytes() == array.tobytes()
        if not same:
            raise ValueError("the file differs from what was written")

    with replacing(path, verify) as temporary, create(temporary) as file:
        np.save(file, array, allow_pickle=False)


def open_npy(path: Path) -> NDArray[Any]:
    """Open a .npy file as a read-only memory map; no pickles.

    Raises: ArrayError when it cannot be read or its size does not match its header.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except InputError as error:
        raise ArrayError(f"{path.name}: {error.what}") from None
    except (ValueError, OSError, EOFError) as error:
        raise ArrayError(f"{path.name}: damaged .npy file: {error}") from None
    offset = getattr(array, "offset", None)
    if offset is not None and offset + array.nbytes != size:
        raise ArrayError(f"{path.name}: damaged .npy file: its size of {size} bytes does not match its header")
    return array


@contextmanager
def lock_folder(folder: Path, part: str = "") -> Iterator[None]:
    """Hold `folder` for writing; create it when it is absent.

    part: names one of several parallel writers ("0-of-4"); a part excludes writers of the same part and of the whole folder. A writer
    of the whole folder excludes all others and first removes temporary files that killed writers left behind.

    Raises: LockError with the process that holds the lock and its start; OutputError when the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OutputError(f"{folder}: is a file, not a directory") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error_reason(error)}") from None
    whole = folder / ".slmsam2.lock"
    with ExitStack() as held:
        if part:
            with _hold(whole, _HANDOVER_S):
                held.enter_context(_hold(folder / f"{_PART_PREFIX}{part}.lock", 0))
        else:
            held.enter_context(_hold(whole, _HANDOVER_S))
            for other in folder.glob(f"{_PART_PREFIX}*.lock"):
                with _hold(other, 0):
                    pass
            for leftover in folder.rglob(_PREFIX + "*"):
                with suppress(OSError):
                    leftover.unlink()
        yield


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, after waiting for the process that holds it.

    Raises: OutputError when the lock file cannot be created.
    """
    with _hold(path, -1):
        yield


@contextmanager
def _hold(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path`; wait for it at most `timeout_s` seconds, without limit when negative. The file stays.

    Process and start time of the holder are in a file next to it, because filelock truncates the lock file.

    Raises: LockError with these when the time is over; OutputError when the lock file cannot be created.
    """
    import filelock  # 0.1 s, and not needed to read files

    owner, lock = path.with_name(f"{path.name}.owner"), filelock.FileLock(path, timeout=timeout_s)
    try:
        if not os.path.lexists(path):
            path.touch()  # with the permissions that the user's umask gives, so that a group can share the folder
        lock.acquire()
        owner.unlink(missing_ok=True)  # it may belong to another user, or be a link
        with open(owner, "x", encoding="ascii") as file:
            file.write(f"process {os.getpid()}, started {_start()}")
    except filelock.Timeout:
        text = ""
        with suppress(OSError):
            text = owner.read_text(encoding="ascii", errors="replace")[:200]
        raise LockError(
            f"{path.parent}: {text or 'another process'}, is writing to this folder. Wait for it to finish, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        reason = error_reason(error) if isinstance(error, OSError) else "the file system does not support locks"
        raise OutputError(f"{path.parent}: cannot be locked: {reason}") from None
    try:
        yield
    finally:
        lock.release()


def _start() -> str:
    """Return the start of this process in local time, to the second; the current time where the system does not provide it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        began = time.time()
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))


def open_partial(partial: Path) -> BinaryIO:
    """Open a partial file for appending, creating it when it is absent; `commit_partial` gives it its final name.

    Raises: OSError when it cannot be opened.
    """
    _may_fail()
    partial.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(partial, flags, 0o666), "ab")


def commit_partial(partial: Path, path: Path, verify: Callable[[Path], None]) -> None:
    """Rename a partial file to `path` after it was synced and `verify` has read it back.

    Raises: OutputError when it cannot be synced or renamed; whatever `verify` raises.
    """
    try:
        _may_fail()
        _sync(partial)
        verify(partial)
        _may_fail()
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error_reason(error)}") from error
