"""Find the cases in a folder of images by file name. Only files that may be DICOM are opened.

With nnU-Net's names, `case_0000.nii.gz` and `case_0001.nii.gz` are the channels of `case`; names without such a number are case ids.
Names that differ only in Unicode normalisation (NFC, NFD) are the same name on some file systems and count as duplicates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slmsam2_cli.errors import CaseError, DatasetError
from slmsam2_cli.io.dicom_files import holds_dicom, series_path
from slmsam2_cli.io.files import InputError, error_reason, is_ignored_name
from slmsam2_cli.io.volume import SEG_NRRD, image_ending

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})\Z", re.DOTALL)
_RENAME = "Rename the file"


@dataclass
class DiscoveredCases:
    """Files of each case id in channel order, and the problems of names that cannot be used."""

    cases: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    problems: list[CaseError] = field(default_factory=list)


def normalise_name(text: str) -> str:
    """Return a name in Unicode normal form NFC, for comparisons."""
    return unicodedata.normalize("NFC", text)


def stem(path: Path) -> str:
    """Return the file name without its volume ending; for a DICOM folder, its full name."""
    ending = image_ending(path)
    return path.name[: -len(ending)] if ending else path.name


def list_images(folder: Path, root: Path, series: str | None = None) -> DiscoveredCases:
    """List the images in a folder: files grouped by case, one per channel, and DICOM series in subfolders. series: as in choose_series.

    Raises: DatasetError when the folder cannot be read.
    """
    found = DiscoveredCases()
    groups: dict[str, dict[int, list[Path]]] = {}
    folders: dict[str, Path] = {}
    for path in _entries(folder, root, found.problems):
        if image_ending(path) is None:
            folders[path.name] = path
            continue
        if image_ending(path) == SEG_NRRD:  # a mask that 3D Slicer saved beside its image
            continue
        match = _CHANNEL.match(stem(path))
        case, channel = (match["case"], int(match["channel"])) if match else (stem(path), -1)
        groups.setdefault(case, {}).setdefault(channel, []).append(path)
    for case, channels in groups.items():
        numbered = sorted(channel for channel in channels if channel >= 0)
        if numbered == list(range(len(numbered))):  # the channels of one case, without a gap; otherwise each file is a case
            paths = [path for channel in sorted(channels) for path in channels[channel]]
            _add(found, case, paths, root, expected=0 if -1 in channels and numbered else len(channels))
            continue
        for channel, files in channels.items():
            _add(found, case if channel < 0 else f"{case}_{channel:04d}", files, root, expected=1)
    chosen = choose_series(folders, series)
    for case, (path,) in chosen.cases.items():
        _add(found, case, [*found.cases.pop(case, ()), path], root, expected=1)
    found.problems += chosen.problems
    _reject_duplicates(found, root)
    found.cases = dict(sorted(found.cases.items()))
    return found


def list_bids_images(folder: Path, root: Path) -> DiscoveredCases:
    """List the anatomical images of a BIDS tree (sub-*/anat, sub-*/ses-*/anat); the case id is the file name without its ending."""
    found = DiscoveredCases()
    groups: dict[str, list[Path]] = {}
    for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*"):
        for path in sorted(folder.glob(pattern)):
            if image_ending(path) and not is_ignored_name(path.name) and not stem(path).endswith("mask"):
                groups.setdefault(stem(path), []).append(path)
    for case, paths in sorted(groups.items()):
        _add(found, case, paths, root, expected=1)
    return found


def choose_series(folders: Mapping[str, Path], series: str | None) -> DiscoveredCases:
    """Make the cases of DICOM folders, by name. series: the number of the series to read where a folder holds several; "all": every one.

    With "all", the series of a folder that holds several are the cases NAME#SERIES. None: a folder of several is refused when it is read.
    """
    found = DiscoveredCases()
    for name, folder in folders.items():
        if series is None:
            found.cases[name] = (folder,)
            continue
        from slmsam2_cli.io.dicom import ALL_SERIES, list_series, path_of  # pydicom is slow to import

        try:
            held = list_series(folder)
        except (InputError, OSError) as error:
            what, remedy = (error.what, error.remedy) if isinstance(error, InputError) else (error_reason(error), "Check the folder")
            found.problems.append(CaseError(normalise_name(name), folder.name, what, remedy))
            continue
        wanted = series.lstrip("0") or "0"
        paths = {one.name: path_of(one, folder, held) for one in held}
        if len(paths) == 1:
            found.cases[name] = (folder,)
        elif series == ALL_SERIES:
            found.cases |= {f"{name}#{one}": (path,) for one, path in paths.items()}
        else:
            found.cases[name] = (paths.get(wanted, series_path(folder, wanted)),)
    return found


def list_labels(folder: Path, root: Path) -> DiscoveredCases:
    """List the masks in a folder; the case id is the file name without its ending.

    Raises: DatasetError when the folder cannot be read.
    """
    found = DiscoveredCases()
    groups: dict[str, list[Path]] = {}
    for path in _entries(folder, root, found.problems):
        if image_ending(path):
            groups.setdefault(stem(path), []).append(path)
    for case, paths in groups.items():
        _add(found, case, paths, root, expected=1)
    _reject_duplicates(found, root)
    return found


def _entries(folder: Path, root: Path, problems: list[CaseError]) -> list[Path]:
    """List the entries that may be volumes, sorted; names that are not UTF-8 become problems.

    Raises: DatasetError when the folder cannot be read.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not is_ignored_name(path.name))
    except NotADirectoryError:
        raise DatasetError(f"{_shown(folder, root)}: not a directory") from None
    except OSError as error:
        raise DatasetError(f"{_shown(folder, root)}: cannot be read: {error_reason(error)}") from None
    usable: list[Path] = []
    for path in entries:
        if image_ending(path) is None and not (path.is_dir() and holds_dicom(path)):
            continue
        if not any("\ud800" <= character <= "\udfff" for character in path.name):  # bytes that are not UTF-8 become surrogates
            usable.append(path)
        else:
            case = stem(path).removesuffix("_0000")
            problems.append(CaseError(case, _shown(path, root), "the file name holds bad bytes (not UTF-8)", _RENAME))
    return usable


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else path.name


def _add(found: DiscoveredCases, case: str, paths: list[Path], root: Path, expected: int) -> None:
    """Add a case with its files, or the problem that there are more or fewer files than expected."""
    if len(paths) == expected:
        found.cases[case] = tuple(paths)
    else:
        found.problems.append(_duplicate(case, paths, root))


def _duplicate(case: str, paths: list[Path], root: Path) -> CaseError:
    names = ", ".join(sorted(_shown(path, root) for path in paths))
    return CaseError(normalise_name(case), names, "a duplicate: two files have the same case id", "Keep one of them")


def _reject_duplicates(found: DiscoveredCases, root: Path) -> None:
    """Turn case ids that differ only in Unicode normalisation into a problem."""
    spellings: dict[str, list[str]] = {}
    for case in found.cases:
        spellings.setdefault(normalise_name(case), []).append(case)
    for duplicates in spellings.values():
        if len(duplicates) > 1:
            found.problems.append(_duplicate(duplicates[0], [path for case in duplicates for path in found.cases.pop(case)], root))
