"""Read dataset.json of the Medical Segmentation Decathlon and of nnU-Net v2, and define `Case` and `Dataset`.

A region is a label that nnU-Net defines as a list of values: the values are segmented, the region is reported. Unknown keys, and `relase`
for `release`, are ignored. Paths must be relative and stay inside the dataset, also through links. Whether listed files exist is not
checked here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from slmsam2_cli.dataset.discovery import stem
from slmsam2_cli.errors import CaseError, DatasetError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.volume import ENDINGS, MAX_LABEL

Region = tuple[int, ...]
Structure = int | Region  # what is reported: a label value, or a region, the values that make it up


@dataclass(frozen=True)
class PromptFiles:
    """The files with the annotated slices of a case: its mask, and CASE.prompts.json; None where there is none."""

    mask: Path | None = None
    listing: Path | None = None


@dataclass(frozen=True)
class Case:
    """One patient: one image file per channel, or one file (or DICOM folder) holding all; label None when there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None
    prompts: PromptFiles = PromptFiles()


@dataclass(frozen=True)
class Dataset:
    """A dataset: its labels, channels and cases (sorted by id, files present), and the problems of the other cases.

    labels: foreground value -> name, sorted by value, without background and ignore. regions: empty unless dataset.json declares regions;
    then the reported structures, which are the regions and the labels with a name.
    """

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: dict[int, str]
    ignore: int | None
    file_ending: str
    training: tuple[Case, ...]
    test: tuple[Case, ...]
    problems: tuple[CaseError, ...]
    warnings: tuple[str, ...]
    regions: Mapping[Structure, str] = field(default_factory=dict)

    @property
    def structures(self) -> Mapping[Structure, str]:
        """Return the reported structures and their names: the labels, unless regions are declared."""
        return self.regions or dict[Structure, str](self.labels.items())


NAME = "dataset.json"
_LONGEST_ID = 240  # bytes; leaves room for the longest ending


@dataclass(frozen=True)
class Entry:
    """One case as listed in dataset.json; paths inside the root that may not exist, label None when none is listed."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Description:
    """The content of dataset.json.

    labels: foreground value -> name; structures: declared labels and regions, empty when there are no regions;
    training, test: None where the file does not list them; count: numTraining as written, or None.
    """

    name: str
    channels: tuple[str, ...]
    labels: dict[int, str]
    structures: dict[Structure, str]
    ignore: int | None
    file_ending: str
    training: tuple[Entry, ...] | None
    test: tuple[Entry, ...] | None
    count: object


def read_description(root: Path) -> Description:
    """Read and check the dataset.json in a folder.

    Raises: DatasetError when the file is missing or invalid.
    """
    if not root.is_dir():
        raise_dataset_error(f"not found: {root.name} is not a directory")
    try:
        content = atomic.read_json(root / NAME, NAME)
    except atomic.JsonError as error:
        raise DatasetError(str(error)) from None
    if not isinstance(content, dict):
        raise_dataset_error("must be a JSON object, {...}")
    regions, plain = _regions(content)
    labels, ignore = _labels(plain, {value for region in regions for value in region})
    structures: dict[Structure, str] = {value: name for value, name in labels.items() if name in plain} if regions else {}
    structures.update(regions.items())
    channels, ending = _channels(content), content.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise_dataset_error(f"'file_ending' is {str(ending)[:40]!r}, but must be one of {', '.join(ENDINGS)}")
    training = _list(content, "training", root) if content.get("training") else None
    if content.get("dataset"):
        training = _mapping(content["dataset"], root)
    name = content.get("name")
    return Description(
        name=name if isinstance(name, str) and name else root.resolve().name,
        channels=channels,
        labels=labels,
        structures=structures,
        ignore=ignore,
        file_ending=str(ending),
        training=training,
        test=_list(content, "test", root) if content.get("test") else None,
        count=content.get("numTraining"),
    )


def raise_dataset_error(what: str) -> NoReturn:
    """Raise a DatasetError about dataset.json."""
    raise DatasetError(f"{NAME}: {what}")


def _channels(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the channel names in order, from nnU-Net's or the Decathlon's key."""
    key = next((key for key in ("channel_names", "modality") if key in content), None)
    if key is None:
        raise_dataset_error("has neither 'channel_names' nor 'modality'")
    names = content[key]
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise_dataset_error(f'\'{key}\' must map channel numbers to names, as in {{"0": "MRI"}}')
    if sorted(names) != sorted(str(number) for number in range(len(names))):
        raise_dataset_error(f"'{key}' must number the channels from \"0\" without a gap")
    return tuple(names[str(number)] for number in range(len(names)))


def _regions(content: Mapping[str, Any]) -> tuple[dict[Region, str], dict[str, Any]]:
    """Split the declared labels into regions (values -> name) and labels with a single value (as written)."""
    given = content.get("labels")
    if not isinstance(given, dict) or not given:
        raise_dataset_error("'labels' must be an object that names the label values")
    regions: dict[Region, str] = {}
    for name, values in given.items():
        if isinstance(values, list):
            region = tuple(sorted({_value(name, value) for value in values}))
            if len(region) != len(values) or not region or 0 in region:
                raise_dataset_error(f"the region {name!r} must list different label values above 0")
            if region in regions:
                raise_dataset_error(f"the regions {regions[region]!r} and {name!r} list the same values")
            regions[region] = name
    return regions, {name: value for name, value in given.items() if not isinstance(value, list)}


def _labels(given: Mapping[str, Any], in_regions: Collection[int]) -> tuple[dict[int, str], int | None]:
    """Return the foreground labels (value -> name, sorted by value) and the ignore value; values found only in regions get a name."""
    by_value = bool(given) and all(isinstance(value, str) for value in given.values())
    for key in given if by_value else ():
        if not (key.isascii() and key.isdigit() and len(key) <= 5 and int(key) <= MAX_LABEL):
            raise_dataset_error(f"the label {key!r} must be a whole number from 0 to {MAX_LABEL}, or have one as its value")
    pairs = [(int(key), name) if by_value else (_value(key, name), key) for key, name in given.items()]
    names: dict[int, str] = {}
    for value, name in sorted(pairs):
        if value in names:
            raise_dataset_error(f"the label value {value} is given twice, to {names[value]!r} and {name!r}")
        names[value] = name
    if 0 not in names:
        raise_dataset_error("'labels' has no background, the value 0")
    ignore = next((value for value, name in names.items() if name == "ignore"), None)
    if ignore in in_regions:
        raise_dataset_error("the label 'ignore' is in a region")
    names |= {value: f"label {value}" for value in in_regions if value not in names}
    foreground = {value: names[value] for value in sorted(names) if value not in (0, ignore)}
    if not foreground:
        raise_dataset_error("'labels' names no structure besides the background")
    if ignore is not None and ignore < max(foreground):
        raise_dataset_error(f"the label 'ignore' must have the highest value, not {ignore}")
    return foreground, ignore


def _value(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LABEL:
        raise_dataset_error(f"the label {name!r} must be a whole number from 0 to {MAX_LABEL}, not {str(value)[:40]!r}")
    return value


def _mapping(cases: object, root: Path) -> tuple[Entry, ...]:
    """Read nnU-Net's `dataset`: {case: {"images": [...], "label": ...}}."""
    if not isinstance(cases, dict):
        raise_dataset_error("'dataset' must be an object of cases")
    entries = []
    for case, files in cases.items():
        _check_id(case)
        images = files.get("images") if isinstance(files, dict) else None
        if not isinstance(images, list) or not images:
            raise_dataset_error(f"case {case}: 'images' must be a list of paths")
        label = files.get("label")
        entries.append(Entry(case, tuple(_path(one, case, root) for one in images), _path(label, case, root) if label else None))
    return tuple(entries)


def _list(content: Mapping[str, Any], key: str, root: Path) -> tuple[Entry, ...]:
    """Read a list of the Decathlon: strings, or objects with `image` (one path, or a list of channels) and `label`."""
    if not isinstance(content[key], list):
        raise_dataset_error(f"'{key}' must be a list of cases")
    entries = []
    for number, item in enumerate(content[key]):
        case = f"{key}[{number}]"
        image, label = (item.get("image"), item.get("label")) if isinstance(item, dict) else (item, None)
        images = tuple(_path(one, case, root) for one in (image if isinstance(image, list) and image else [image]))
        case = stem(images[0]).removesuffix("_0000")
        _check_id(case)
        entries.append(Entry(case, images, _path(label, case, root) if label else None))
    return tuple(entries)


def _check_id(case: str) -> None:
    """Reject case ids that cannot be file names: they must be one path component, not hidden."""
    bad = case.startswith(".") or any(c in case for c in "/\\\0") or not case
    if bad or len(case.encode("utf-8", "surrogatepass")) > _LONGEST_ID or any("\ud800" <= c <= "\udfff" for c in case):
        raise_dataset_error(f"the case id {case[:60]!r} cannot be a file name: it must be one path component")


def _path(text: object, case: str, root: Path) -> Path:
    """Resolve a listed path; paths outside the root are rejected without opening them."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise_dataset_error(f"case {case}: {str(text)[:60]!r} is not a path")
    pure = PurePosixPath(text.replace("\\", "/"))
    if pure.is_absolute() or pure.parts[:1] and pure.parts[0].endswith(":"):
        raise_dataset_error(f"case {case}: the path {text[:80]!r} must be relative to the dataset")
    path = root.joinpath(*pure.parts)
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, UnicodeEncodeError):
        raise_dataset_error(f"case {case}: the path {text[:80]!r} is a circular link, or not a path")
    if not inside:
        raise_dataset_error(f"case {case}: the path {text[:80]!r} leads outside the dataset")
    return path
