"""Find the cases, channels and labels of a dataset from dataset.json and the folders next to it.

    imagesTr/  labelsTr/   training images and masks      imagesTs/ (labelsTs/)   test images (and masks, if any)

An invalid case becomes a problem in `Dataset.problems`; an invalid dataset.json is a DatasetError. No voxels are read here.
Where dataset.json lists the cases (the Decathlon, or nnU-Net's `dataset`), unlisted files give a warning; otherwise every image in
imagesTr needs a mask and every mask an image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from slmsam2_cli.dataset.checks import check_pair, compare_geometry
from slmsam2_cli.dataset.dataset_json import NAME, Case, Dataset, Entry, raise_dataset_error, read_description
from slmsam2_cli.dataset.discovery import DiscoveredCases, choose_series, list_bids_images, list_images, list_labels, normalise_name, stem
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.dicom_files import dicom_files, is_dicom
from slmsam2_cli.io.files import is_ignored_name
from slmsam2_cli.io.volume import image_ending, relative

__all__ = ["Case", "Dataset", "check_pair", "compare_geometry", "find_label", "read_dataset", "read_image_folder"]


def read_dataset(root: Path) -> Dataset:
    """Read the dataset in the folder `root`.

    Raises: DatasetError when dataset.json is invalid or there is no training case, valid or not.
    """
    description = read_description(root)
    problems: list[CaseError] = []
    warnings: list[str] = []
    if description.training is None:
        training = _discover_training(root, problems)
    else:
        training = _listed(description.training, root, problems)
        warnings += _unlisted(description.training, root)
    training = _with_all_channels(training, len(description.channels), problems)
    test = _test_cases(description.test, root, warnings)
    seen = len(training) + len({problem.case for problem in problems})
    if not seen:
        raise_dataset_error("no training case was found: imagesTr is missing or empty")
    if description.count is not None and description.count != seen:
        warnings.append(f"{NAME}: numTraining is {str(description.count)[:20]}, but {seen} training cases were found")
    ordered = tuple(sorted(problems, key=lambda problem: (problem.case, problem.file)))
    return Dataset(
        root,
        description.name,
        description.channels,
        description.labels,
        description.ignore,
        description.file_ending,
        tuple(training),
        tuple(test),
        ordered,
        tuple(warnings),
        description.structures,
    )


def _discover_training(root: Path, problems: list[CaseError]) -> list[Case]:
    """Pair the files of imagesTr and labelsTr by case id; append files without partner to `problems`."""
    images = _images(root / "imagesTr", root)
    labels = list_labels(root / "labelsTr", root) if (root / "labelsTr").is_dir() else DiscoveredCases()
    named = {normalise_name(problem.case) for problem in images.problems}
    problems += images.problems + [problem for problem in labels.problems if normalise_name(problem.case) not in named]
    refused = {normalise_name(problem.case) for problem in problems}
    by_name = {normalise_name(case): paths[0] for case, paths in labels.cases.items()}
    cases: list[Case] = []
    for case, paths in images.cases.items():
        label = by_name.pop(normalise_name(case), None)
        if label is not None:
            cases.append(Case(case, paths, label))
        elif normalise_name(case) not in refused:
            problems.append(
                CaseError(case, relative(paths[0], root), "no label: its mask in labelsTr is missing", "Add the mask, or remove the image")
            )
    for case, label in by_name.items():
        if case not in refused:
            problems.append(
                CaseError(case, relative(label, root), "no image: its image in imagesTr is missing", "Add the image, or remove the mask")
            )
    return cases


def _images(folder: Path, root: Path) -> DiscoveredCases:
    return list_images(folder, root) if os.path.lexists(folder) else DiscoveredCases()


def _listed(entries: Sequence[Entry], root: Path, problems: list[CaseError]) -> list[Case]:
    """Build the cases that dataset.json lists; append those listed twice or with missing files to `problems`."""
    times = Counter(normalise_name(entry.id) for entry in entries)
    cases: list[Case] = []
    for entry in sorted(entries, key=lambda entry: entry.id):
        images = _on_disk(entry)
        missing = next((path for path in (*images, entry.label) if path is not None and not os.path.lexists(path)), None)
        if times[normalise_name(entry.id)] != 1:
            if times.pop(normalise_name(entry.id), None):
                problems.append(_problem(entry, entry.images[0], root, "a duplicate: listed twice in dataset.json", "List it once"))
        elif entry.label is None:
            problems.append(_problem(entry, images[0], root, "no label is listed in dataset.json", "Add its 'label', or move it to 'test'"))
        elif missing is not None:
            kind = "label" if missing == entry.label else "image"
            problems.append(_problem(entry, missing, root, f"{kind} missing: file not found", "Restore the file, or remove the case"))
        else:
            cases.append(Case(entry.id, images, entry.label))
    return cases


def _problem(entry: Entry, path: Path, root: Path, what: str, remedy: str) -> CaseError:
    return CaseError(normalise_name(entry.id), relative(path, root), what, remedy)


def _on_disk(entry: Entry) -> tuple[Path, ...]:
    """Return the listed images; where a listed x.nii.gz exists only as x_0000.nii.gz, ... (lists of nnU-Net v1), those channels."""
    if len(entry.images) > 1 or os.path.lexists(entry.images[0]):
        return entry.images
    image = entry.images[0]
    ending = image_ending(image) or ""
    channels: list[Path] = []
    while os.path.lexists(numbered := image.with_name(f"{stem(image)}_{len(channels):04d}{ending}")):
        channels.append(numbered)
    return tuple(channels) or entry.images


def _unlisted(entries: Iterable[Entry], root: Path) -> list[str]:
    """Return warnings about files in imagesTr and labelsTr that dataset.json does not list."""
    listed = {path for entry in entries for path in (*_on_disk(entry), entry.label)}
    warnings: list[str] = []
    for name in ("imagesTr", "labelsTr"):
        folder = root / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        extra = [path.name for path in files if image_ending(path) and not is_ignored_name(path.name) and path not in listed]
        if extra:
            warnings.append(f"{name}: {len(extra)} files are not listed in {NAME} and are ignored, first: {extra[0]}")
    return warnings


def _with_all_channels(cases: list[Case], channels: int, problems: list[CaseError]) -> list[Case]:
    """Keep the cases with a single file or one file per channel; append the others to `problems`."""
    for case in cases:
        if len(case.images) not in (1, channels):
            what = f"{len(case.images)} image files, but {NAME} declares {channels} channel{'s' * (channels > 1)}"
            problems.append(CaseError(case.id, case.images[0].parent.name, what, "Add or remove channel files"))
    return [case for case in cases if len(case.images) in (1, channels)]


def _test_cases(entries: Sequence[Entry] | None, root: Path, warnings: list[str]) -> list[Case]:
    """Return the test cases whose images exist, with their masks in labelsTs if any; missing images are warnings."""
    if entries is None:
        found = _images(root / "imagesTs", root)
        warnings += [str(problem) for problem in found.problems]
        pairs = list(found.cases.items())
    else:
        pairs = [(entry.id, _on_disk(entry)) for entry in sorted(entries, key=lambda entry: entry.id)]
        absent = [case for case, images in pairs if not all(os.path.lexists(path) for path in images)]
        if absent:
            warnings.append(f"{NAME}: {len(absent)} of {len(pairs)} test images are missing, first: {absent[0]}")
        pairs = [(case, images) for case, images in pairs if case not in set(absent)]
    cases = []
    for case, images in pairs:
        try:
            cases.append(Case(case, images, find_label(root / "labelsTs", case)))
        except CaseError as error:
            warnings.append(str(error))
            cases.append(Case(case, images, None))
    return cases


def read_image_folder(folder: Path, series: str | None = None) -> tuple[tuple[Case, ...], tuple[CaseError, ...]]:
    """Return the volumes in a folder as cases without label, and the problems of file names that cannot be used.

    Where there are none, those of a BIDS tree.

    Channels are grouped; a folder with DICOM files in it or below it is one case, series: as in list_images. `folder` may also be a
    single volume.

    Raises: DatasetError when `folder` is neither a readable folder nor a volume.
    """
    if folder.is_file() and (image_ending(folder) or is_dicom(folder)):
        return (Case(stem(folder).removesuffix("_0000"), (folder,), None),), ()
    found = list_images(folder, folder, series)
    slices = dicom_files(folder, below=False)
    if slices and not found.cases and not found.problems:
        found = choose_series({folder.resolve().name: folder}, series)
        return tuple(Case(case, paths, None) for case, paths in found.cases.items()), tuple(found.problems)
    if not found.cases and not found.problems:
        found = list_bids_images(folder, folder)
    if slices:
        what = f"{len(slices)} DICOM slices in one folder with other volumes"
        found.problems.append(CaseError(stem(slices[0]), slices[0].name, what, "Move the series into a folder of its own"))
    return tuple(Case(case, paths, None) for case, paths in found.cases.items()), tuple(found.problems)


def find_label(folder: Path, case_id: str, images: Collection[Path] = ()) -> Path | None:
    """Return the mask with the case's name, or that name and _0000 as nnU-Net's images have it; None when there is none.

    images: files of the case itself, which may lie in the same folder. A mask CASE_0000 is not that of CASE where CASE_0001 lies beside
    it: then these are masks of several cases, or of channels.

    Raises: CaseError when there are several, of different endings.
    """
    own = {path.resolve() for path in images}
    names = {normalise_name(case_id): 0, f"{normalise_name(case_id)}_0000": 1, f"{normalise_name(case_id)}_0001": 2}
    found: tuple[list[Path], ...] = ([], [], [])
    with suppress(OSError):
        for entry in os.scandir(folder):
            name = normalise_name(entry.name)
            if name.startswith(normalise_name(case_id)) and image_ending(Path(name)) and (place := names.get(stem(Path(name)))) is not None:
                found[place].extend([folder / entry.name] if Path(entry).resolve() not in own else [])
    masks = found[0] or ([] if found[2] else found[1])
    if len(masks) > 1:
        files = ", ".join(sorted(path.name for path in masks))
        raise CaseError(case_id, files, "a duplicate: several masks have this case's name", "Keep one of them")
    return masks[0] if masks else None
