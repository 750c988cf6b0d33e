"""dataset.json in both its shapes: the Medical Segmentation Decathlon's and nnU-Net v2's. Files on disk are not checked here.

A region (nnU-Net's label that is a list of values) is what is reported, its values are what is segmented. Unknown keys, and `relase` for
`release`, are left alone.
Paths must be relative and lead nowhere outside the data set, also through links.
Defines `Case` and `Dataset`, the description of a data set that all other modules use.
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
class Case:
    """One patient: one image file per channel, or one file (or DICOM folder) holding all; label None when there is none."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """labels: foreground value -> name, sorted by value, without background and ignore; cases sorted by id, usable by path.

    regions: what is reported where dataset.json declares regions: those, and the labels with a name of their own; else empty.
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
        """What is reported -> its name: the labels, unless regions are declared."""
        return self.regions or dict[Structure, str](self.labels.items())


NAME = "dataset.json"
_LONGEST_ID = 240  # bytes; leaves room for the longest ending


@dataclass(frozen=True)
class Entry:
    """One case as dataset.json lists it; paths as written, inside the root, not known to exist. label may be None."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Description:
    """What dataset.json says.

    labels: foreground value -> name; structures: what is declared, labels and regions, empty when these are just the labels;
    training, test: None where it does not list them; count: numTraining as written, or None.
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
    """The dataset.json of a data set. DatasetError whose message names dataset.json."""
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
    name = content.get("name")
    return Description(
        name=name if isinstance(name, str) and name else root.resolve().name,
        channels=_channels(content),
        labels=labels,
        structures=structures,
        ignore=ignore,
        file_ending=_file_ending(content),
        training=_training(content, root),
        test=_list(content, "test", root) if content.get("test") else None,
        count=content.get("numTraining"),
    )


def raise_dataset_error(what: str) -> NoReturn:
    """A DatasetError that names dataset.json."""
    raise DatasetError(f"{NAME}: {what}")


def _channels(content: Mapping[str, Any]) -> tuple[str, ...]:
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
    """(values -> name of every label that is a list of values, the labels that are not)."""
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
    """(foreground value -> name sorted by value, ignore value); a value that only regions name is "label VALUE"."""
    by_value = bool(given) and all(isinstance(value, str) for value in given.values())
    pairs = [(_decathlon_value(key), name) if by_value else (_value(key, name), key) for key, name in given.items()]
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


def _decathlon_value(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 5 and int(key) <= MAX_LABEL):
        raise_dataset_error(f"the label {key!r} must be a whole number from 0 to {MAX_LABEL}, or have one as its value")
    return int(key)


def _value(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LABEL:
        raise_dataset_error(f"the label {name!r} must be a whole number from 0 to {MAX_LABEL}, not {str(value)[:40]!r}")
    return value


def _file_ending(content: Mapping[str, Any]) -> str:
    ending = content.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise_dataset_error(f"'file_ending' is {str(ending)[:40]!r}, but must be one of {', '.join(ENDINGS)}")
    return str(ending)


def _training(content: Mapping[str, Any], root: Path) -> tuple[Entry, ...] | None:
    if content.get("dataset"):
        return _mapping(content["dataset"], root)
    return _list(content, "training", root) if content.get("training") else None


def _mapping(cases: object, root: Path) -> tuple[Entry, ...]:
    """nnU-Net's `dataset`: {case: {"images": [...], "label": ...}}."""
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
    """The Decathlon's lists: strings, or objects with `image` (one path, or a list of channels) and `label`."""
    if not isinstance(content[key], list):
        raise_dataset_error(f"'{key}' must be a list of cases")
    entries = []
    for number, item in enumerate(content[key]):
        case = f"{key}[{number}]"
        image, label = (item.get("image"), item.get("label")) if isinstance(item, dict) else (item, None)
        images = tuple(_path(one, case, root) for one in (image if isinstance(image, list) and image else [image]))
        case = case_of(images[0], many=len(images) > 1)
        _check_id(case)
        entries.append(Entry(case, images, _path(label, case, root) if label else None))
    return tuple(entries)


def case_of(image: Path, many: bool) -> str:
    """The case id of a listed image: its name without ending, and without _0000 where channels are listed."""
    name = stem(image)
    return name.removesuffix("_0000") if many or name.endswith("_0000") else name


def _check_id(case: str) -> None:
    """Ids become file names: one path component, not hidden."""
    bad = case.startswith(".") or any(c in case for c in "/\\\0") or not case
    if bad or len(case.encode("utf-8", "surrogatepass")) > _LONGEST_ID or any("\ud800" <= c <= "\udfff" for c in case):
        raise_dataset_error(f"the case id {case[:60]!r} cannot be a file name: it must be one path component")


def _path(text: object, case: str, root: Path) -> Path:
    """A path inside the root, as written; refused without being opened when it leads elsewhere."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise_dataset_error(f"case {case}: {str(text)[:60]!r} is not a path")
    pure = PurePosixPath(text.replace("\\", "/"))
    if pure.is_absolute() or pure.parts[:1] and pure.parts[0].endswith(":"):
        raise_dataset_error(f"case {case}: the path {text[:80]!r} must be relative to the data set")
    path = root.joinpath(*pure.parts)
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, UnicodeEncodeError):
        raise_dataset_error(f"case {case}: the path {text[:80]!r} is a link that leads back to itself, or no path")
    if not inside:
        raise_dataset_error(f"case {case}: the path {text[:80]!r} leads outside the data set")
    return path
