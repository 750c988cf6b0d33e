"""Which files of a folder are slices of a DICOM series: by their mark alone, without the library that reads them."""

from __future__ import annotations

from pathlib import Path

from slmsam2_cli.data.files import InputError, is_junk, open_regular


def is_dicom_file(path: Path) -> bool:
    """Whether a regular file carries DICOM's mark; never blocks. False for anything that cannot be opened."""
    try:
        with open_regular(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (InputError, OSError):
        return False


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files directly inside a folder, sorted by name."""
    try:
        return [path for path in sorted(folder.iterdir()) if not is_junk(path.name) and path.name != "DICOMDIR" and is_dicom_file(path)]
    except OSError:
        return []
