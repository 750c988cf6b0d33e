"""Which cases a folder of images holds, by names alone: nothing is opened but what may be a DICOM series.

nnU-Net's names: `case_0000.nii.gz`, `case_0001.nii.gz` are the channels of `case`. Names without such a number stand for
themselves. Names that differ only in how Unicode spells them (NFC, NFD) are the same name to some file systems: duplicates.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from slmsam2_cli.errors import CaseError, DatasetError
from slmsam2_cli.io.files import dicom_files, error_reason, is_ignored_name
from slmsam2_cli.io.volume import image_ending

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})\Z", re.DOTALL)
_RENAME = "Rename the file"


@dataclass
class DiscoveredCases:
    """Case id -> its files in channel order; problems: what was refused by name."""

    cases: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    problems: list[CaseError] = field(default_factory=list)


def normalise_name(text: str) -> str:
    """What two spellings of one name have in common."""
    return unicodedata.normalize("NFC", text)


def stem(path: Path) -> str:
    """The name without its volume ending (a DICOM folder: its whole name)."""
    ending = image_ending(path)
    return path.name[: -len(ending)] if ending else path.name


def list_images(folder: Path, root: Path) -> DiscoveredCases:
    """Every image in a folder: files, channels of a case put together, and DICOM series in sub-folders. DatasetError."""
    found = DiscoveredCases()
    groups: dict[str, dict[int, list[Path]]] = {}
    for path in _entries(folder, root, found.problems):
        match = _CHANNEL.match(stem(path)) if image_ending(path) else None
        case, channel = (match["case"], int(match["channel"])) if match else (stem(path), -1)
        groups.setdefault(case, {}).setdefault(channel, []).append(path)
    for case, channels in groups.items():
        _add(found, case, channels, root)
    _reject_duplicates(found, root)
    found.cases = dict(sorted(found.cases.items()))
    return found


def list_labels(folder: Path, root: Path) -> DiscoveredCases:
    """Every mask in a folder, by the whole of its name. DatasetError."""
    found = DiscoveredCases()
    groups: dict[str, list[Path]] = {}
    for path in _entries(folder, root, found.problems):
        if image_ending(path):
            groups.setdefault(stem(path), []).append(path)
    for case, paths in groups.items():
        if len(paths) > 1:
            found.problems.append(_duplicate(case, paths, root))
        else:
            found.cases[case] = (paths[0],)
    _reject_duplicates(found, root)
    return found


def _entries(folder: Path, root: Path, problems: list[CaseError]) -> list[Path]:
    """Entries that may be volumes, sorted; names that are not UTF-8 become problems."""
    try:
        entries = sorted(path for path in folder.iterdir() if not is_ignored_name(path.name))
    except NotADirectoryError:
        raise DatasetError(f"{_shown(folder, root)}: not a directory") from None
    except OSError as error:
        raise DatasetError(f"{_shown(folder, root)}: cannot be read: {error_reason(error)}") from None
    usable: list[Path] = []
    for path in entries:
        if image_ending(path) is None and not (path.is_dir() and dicom_files(path)):
            continue
        if _is_utf8(path.name):
            usable.append(path)
        else:
            case = stem(path).removesuffix("_0000")
            problems.append(CaseError(case, _shown(path, root), "the name holds bad bytes: it is not UTF-8", _RENAME))
    return usable


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else path.name


def _add(found: DiscoveredCases, case: str, channels: dict[int, list[Path]], root: Path) -> None:
    """One group of files: the channels of one case when numbered from 0 without a gap, else a case each."""
    numbered = sorted(channel for channel in channels if channel >= 0)
    if numbered == list(range(len(numbered))):
        paths = [path for channel in sorted(channels) for path in channels[channel]]
        if len(paths) != len(channels) or (-1 in channels and numbered):
            found.problems.append(_duplicate(case, paths, root))
        else:
            found.cases[case] = tuple(paths)
        return
    for channel, paths in channels.items():
        name = case if channel < 0 else f"{case}_{channel:04d}"
        if len(paths) > 1:
            found.problems.append(_duplicate(name, paths, root))
        else:
            found.cases[name] = (paths[0],)


def _duplicate(case: str, paths: list[Path], root: Path) -> CaseError:
    names = ", ".join(sorted(_shown(path, root) for path in paths))
    return CaseError(normalise_name(case), names, "a duplicate: two files have the same case id", "Keep one of them")


def _reject_duplicates(found: DiscoveredCases, root: Path) -> None:
    """Case ids that differ only in the spelling of Unicode are refused together."""
    spellings: dict[str, list[str]] = {}
    for case in found.cases:
        spellings.setdefault(normalise_name(case), []).append(case)
    for duplicates in spellings.values():
        if len(duplicates) > 1:
            found.problems.append(_duplicate(duplicates[0], [path for case in duplicates for path in found.cases.pop(case)], root))
