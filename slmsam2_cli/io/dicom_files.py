"""Find DICOM files by their first bytes, and name one series of a folder that holds several. No DICOM library is imported here.

A case is a folder. Its files may lie in any depth below it (PATIENT/STUDY/SERIES), under any name, with or without the 128 bytes that
precede "DICM". The path FOLDER/#NAME stands for one series of the folder.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from slmsam2_cli.io.files import InputError, is_ignored_name, open_regular

SERIES_MARK = "#"
RECORDS = ".slmsam2"  # in a folder of masks
_MAGIC_AT, _MAGIC = 128, b"DICM"
_FIRST_GROUPS, _LAST_FIRST_ELEMENT, _LONGEST_FIRST = (2, 8), 0x0100, 64  # of a file without preamble; bytes


def series_path(folder: Path, name: str) -> Path:
    """Return the path that stands for one series of a folder."""
    return folder / f"{SERIES_MARK}{name}"


def split_series(path: Path) -> tuple[Path, str | None]:
    """Split a path into the folder and the name of a series, None where the path names the whole folder."""
    return (path.parent, path.name[len(SERIES_MARK) :]) if path.name.startswith(SERIES_MARK) and not path.exists() else (path, None)


def dicom_files(path: Path, below: bool = True) -> list[Path]:
    """List the DICOM files in a folder, and unless told otherwise below it, sorted by path; or the one file itself. Empty where nothing
    can be read.
    """
    return [file for file in ([path] if path.is_file() else files_in(path, below)) if is_dicom(file)]


def holds_dicom(folder: Path) -> bool:
    """Return whether there is a DICOM file in a folder or below it."""
    return any(is_dicom(path) for path in files_in(folder))


def misnamed_files(folder: Path, known: Collection[Path]) -> list[Path]:
    """List the files below a folder that are called .dcm and are not among the known DICOM files."""
    listed = set(known)
    return [path for path in files_in(folder) if path.suffix.lower() == ".dcm" and path not in listed]


def is_dicom(path: Path) -> bool:
    """Return whether a file starts as DICOM files do: with "DICM" at byte 128, or at once with a data element of group 2 or 8."""
    with suppress(InputError, OSError), open_regular(path) as file:
        head = file.read(_MAGIC_AT + len(_MAGIC))
        return head[_MAGIC_AT:] == _MAGIC or _starts_with_element(head)
    return False


def _starts_with_element(head: bytes) -> bool:
    """Return whether the bytes are a data element as the first ones of a DICOM file: its tag, then its type or a short length."""
    if len(head) < 12:
        return False
    for order in "<>":
        group, element, length = struct.unpack_from(f"{order}HHI", head)
        typed = head[4:6].isalpha() and head[4:6].isupper()
        if group in _FIRST_GROUPS and element <= _LAST_FIRST_ELEMENT and (typed or length <= _LONGEST_FIRST and length % 2 == 0):
            return True
    return False


def files_in(folder: Path, below: bool = True) -> Iterator[Path]:
    """Yield the files in a folder, and below it, that could be DICOM, sorted; folders that cannot be read are empty.

    Links to folders are followed, each folder once. Folders of masks that were written here are left out.
    """
    seen = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or RECORDS in folders:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored_name(name)) if below else []
        for name in sorted(names):
            if not is_ignored_name(name) and name.upper() != "DICOMDIR":
                yield Path(place, name)
