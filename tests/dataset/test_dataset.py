"""Data sets in both shapes of dataset.json, folders of images, and pairs of image and mask."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmsam2_cli.console import printable
from slmsam2_cli.dataset.checks import compare_geometry, count_values
from slmsam2_cli.dataset.dataset import Case, Dataset, check_pair, find_label, read_dataset, read_image_folder
from slmsam2_cli.errors import CaseError, DatasetError
from slmsam2_cli.io.image import Source
from slmsam2_cli.io.volume import Grid, LabelVolume, Volume, read_image, read_labels, write_mask

SHARED = Path(__file__).parents[2].parent / "shared"
NNUNET: dict[str, Any] = {
    "channel_names": {"0": "T2"},
    "labels": {"background": 0, "PZ": 1, "TZ": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
DECATHLON: dict[str, Any] = {
    "name": "Prostate",
    "relase": "1.0",
    "tensorImageSize": "4D",
    "modality": {"0": "T2", "1": "ADC"},
    "labels": {"0": "background", "2": "TZ", "1": "PZ"},
    "numTraining": 1,
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    "test": ["./imagesTs/t.nii.gz"],
}


def make(root: Path, content: object, *files: str) -> Path:
    """A data set of empty files: names and lists are all that is looked at."""
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def ids(cases: tuple[Case, ...]) -> list[str]:
    return [case.id for case in cases]


def said(problems: tuple[CaseError, ...]) -> dict[str, str]:
    return {problem.case: f"{problem.file}: {problem.what}" for problem in problems}


# ---- dataset.json


def test_nnunet_data_sets_find_their_cases_in_the_folders(tmp_path: Path) -> None:
    root = make(tmp_path, NNUNET, "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz", "imagesTs/t_0000.nii.gz")
    found = read_dataset(root)
    assert found.training == (Case("b", (root / "imagesTr/b_0000.nii.gz",), root / "labelsTr/b.nii.gz"),)
    assert found.test == (Case("t", (root / "imagesTs/t_0000.nii.gz",), None),)
    assert found.channels == ("T2",)
    assert found.labels == {1: "PZ", 2: "TZ"}
    assert (found.ignore, found.file_ending, found.name) == (None, ".nii.gz", tmp_path.name)
    assert (found.problems, found.warnings) == ((), ())


def test_decathlon_data_sets_list_their_cases(tmp_path: Path) -> None:
    root = make(tmp_path, DECATHLON, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/t.nii.gz", "labelsTs/t.nii.gz")
    found = read_dataset(root)
    assert found.training == (Case("a", (root / "imagesTr/a.nii.gz",), root / "labelsTr/a.nii.gz"),)
    assert found.test == (Case("t", (root / "imagesTs/t.nii.gz",), root / "labelsTs/t.nii.gz"),)
    assert found.channels == ("T2", "ADC")
    assert list(found.labels.items()) == [(1, "PZ"), (2, "TZ")]
    assert found.name == "Prostate"
    assert (found.problems, found.warnings) == ((), ())


def test_channels_in_files_of_their_own_are_put_together(tmp_path: Path) -> None:
    content = NNUNET | {"channel_names": {"0": "T2", "1": "ADC"}}
    files = ["imagesTr/a_0001.nii.gz", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"]
    found = read_dataset(make(tmp_path, content | {"numTraining": 2}, *files))
    assert [path.name for path in found.training[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert ids(found.training) == ["a", "b"]  # b may be one file with both channels: only its header tells
    three = read_dataset(make(tmp_path, content, "imagesTr/a_0002.nii.gz"))
    assert "3 image files, but dataset.json declares 2 channels" in said(three.problems)["a"]


def test_the_dataset_object_of_nnunet_is_followed(tmp_path: Path) -> None:
    content = NNUNET | {"dataset": {"x": {"images": ["raw/1.nii.gz"], "label": "masks/one.nii.gz"}}}
    root = make(tmp_path, content, "raw/1.nii.gz", "masks/one.nii.gz", "imagesTr/other_0000.nii.gz")
    found = read_dataset(root)
    assert found.training == (Case("x", (root / "raw/1.nii.gz",), root / "masks/one.nii.gz"),)
    assert any("imagesTr: 1 files are not listed in dataset.json" in line for line in found.warnings)


def test_names_listed_without_the_channel_number_are_found_with_it(tmp_path: Path) -> None:
    found = read_dataset(make(tmp_path, DECATHLON, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"))
    assert [path.name for path in found.training[0].images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert found.warnings == ("dataset.json: 1 of 1 test images are missing, first: t",)


def test_the_ignore_label_is_set_apart(tmp_path: Path) -> None:
    files = ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"]
    found = read_dataset(make(tmp_path, NNUNET | {"labels": {"background": 0, "PZ": 1, "ignore": 2}}, *files))
    assert (found.labels, found.ignore) == ({1: "PZ"}, 2)
    with pytest.raises(DatasetError, match="'ignore' must have the highest value"):
        read_dataset(make(tmp_path, NNUNET | {"labels": {"background": 0, "ignore": 1, "PZ": 2}}))


def test_regions_are_reported_and_their_values_segmented(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [3, 2], "enhancing": 3}
    found = read_dataset(make(tmp_path, NNUNET | {"labels": labels}, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"))
    assert found.labels == {1: "label 1", 2: "label 2", 3: "enhancing"}
    assert found.structures == {3: "enhancing", (1, 2, 3): "whole", (2, 3): "core"}


def test_without_regions_the_labels_are_what_is_reported(tmp_path):
    found = read_dataset(make(tmp_path, NNUNET, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"))
    assert found.structures == found.labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": []}}, "region 'whole'"),
        ({"labels": {"background": 0, "whole": [0, 1]}}, "region 'whole'"),
        ({"labels": {"background": 0, "whole": [1, 1]}}, "region 'whole'"),
        ({"labels": {"background": 0, "whole": [1, "2"]}}, "label 'whole'"),
        ({"labels": {"background": 0, "whole": [1, 2], "all": [2, 1]}}, "'whole' and 'all' list the same values"),
        ({"labels": {"background": 0, "whole": [1, 2], "ignore": 2}}, "'ignore' is in a region"),
        ({"labels": {"whole": [1, 2]}}, "no background"),
        ({"labels": {"background": 0, "a": "one"}}, "label 'a'"),
        ({"labels": {"background": 0, "a": True}}, "label 'a'"),
        ({"labels": {"background": 0, "a": 1.0}}, "label 'a'"),
        ({"labels": {"background": 0, "a": 70000}}, "label 'a'"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "label value 1 is given twice, to 'a' and 'b'"),
        ({"labels": {"a": 1}}, "no background"),
        ({"labels": {"background": 0}}, "no structure"),
        ({"labels": {}}, "labels"),
        ({"labels": ["background"]}, "labels"),
        ({"labels": {"0": "background", "x": "PZ"}}, "label 'x'"),
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {"1": "T2"}}, "without a gap"),
        ({"channel_names": {"0": 7}}, "channel_names"),
        ({"file_ending": "/../x.nii.gz"}, "file_ending"),
        ({"file_ending": 7}, "file_ending"),
        ({"file_ending": ["a"]}, "file_ending"),
        ({"dataset": ["a"]}, "'dataset' must be an object"),
        ({"dataset": {"a": {}}}, "'images' must be a list"),
        ({"dataset": {"../a": {"images": ["x.nii.gz"]}}}, "one path component"),
        ({"dataset": {".a": {"images": ["x.nii.gz"]}}}, "one path component"),
        ({"dataset": {"a": {"images": ["../x.nii.gz"]}}}, "outside"),
        ({"dataset": {"a": {"images": ["/etc/passwd"]}}}, "relative"),
        ({"dataset": {"a": {"images": ["a\0b"]}}}, "not a path"),
        ({"dataset": {"a": {"images": [7]}}}, "not a path"),
        ({"training": "imagesTr"}, "'training' must be a list"),
        ({"training": [{}]}, "not a path"),
        ({"training": [{"image": "C:\\x.nii.gz"}]}, "relative"),
    ],
)
def test_invalid_entries_of_dataset_json_are_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=f"^dataset.json: .*{re.escape(message)}"):
        read_dataset(make(tmp_path, NNUNET | changes))


def test_links_are_followed_inside_the_data_set_and_refused_outside(tmp_path: Path) -> None:
    outside = tmp_path / "outside.nii.gz"
    outside.touch()
    root = make(tmp_path / "set", DECATHLON, "store/a.nii.gz", "labelsTr/a.nii.gz")
    (root / "imagesTr").mkdir()
    (root / "imagesTr/a.nii.gz").symlink_to("../store/a.nii.gz")
    assert ids(read_dataset(root).training) == ["a"]
    (root / "imagesTr/a.nii.gz").unlink()
    (root / "imagesTr/a.nii.gz").symlink_to(outside)
    with pytest.raises(DatasetError, match="leads outside the dataset"):
        read_dataset(root)


def test_unusable_descriptions_name_the_file(tmp_path: Path) -> None:
    for content, message in [("", "empty"), ("[]", "object"), ('{"a": 1, "a": 2}', "twice"), ('{"a": NaN}', "line 1"), ("{", "line 1")]:
        with pytest.raises(DatasetError, match=f"^dataset.json: .*{message}"):
            read_dataset(make(tmp_path, content))
    with pytest.raises(DatasetError, match="dataset.json: not found"):
        read_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no training case"):
        read_dataset(make(tmp_path, NNUNET))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([NNUNET, DECATHLON]), st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_byte_gives_a_data_set_or_a_clean_error(tmp_path: Path, content: dict[str, Any], position: int, byte: int) -> None:
    make(tmp_path, content, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    data = bytearray((tmp_path / "dataset.json").read_bytes())
    data[position % len(data)] = byte
    (tmp_path / "dataset.json").write_bytes(data)
    try:
        assert isinstance(read_dataset(tmp_path), Dataset)
    except DatasetError as error:
        assert "dataset.json" in str(error)


# ---- cases


def test_all_problems_are_found_in_one_pass(tmp_path: Path) -> None:
    files = [f"imagesTr/{name}" for name in ("ok_0000.nii.gz", "alone_0000.nii.gz", "two_0000.nii.gz", "two_0000.nii")]
    found = read_dataset(make(tmp_path, NNUNET, *files, "labelsTr/ok.nii.gz", "labelsTr/lost.nii.gz", "labelsTr/two.nii.gz"))
    assert ids(found.training) == ["ok"]
    problems = said(found.problems)
    assert problems["alone"].startswith("imagesTr/alone_0000.nii.gz: no label")
    assert problems["lost"].startswith("labelsTr/lost.nii.gz: no image")
    assert "duplicate" in problems["two"]
    assert len(problems) == 3
    assert found.warnings == ("dataset.json: numTraining is 1, but 4 training cases were found",)


def test_listed_cases_with_missing_files_or_listed_twice_are_problems(tmp_path: Path) -> None:
    training = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in ("a", "b", "c", "c")]
    content = DECATHLON | {"training": [*training, {"image": "imagesTr/d.nii.gz"}], "test": []}
    files = ["imagesTr/a.nii.gz", "labelsTr/b.nii.gz", "imagesTr/c.nii.gz", "labelsTr/c.nii.gz", "imagesTr/d.nii.gz"]
    problems = said(read_dataset(make(tmp_path, content, *files)).problems)
    assert "label missing" in problems["a"]
    assert "image missing" in problems["b"]
    assert "listed twice" in problems["c"]
    assert "no label" in problems["d"]
    assert len(problems) == 4


def test_two_spellings_of_one_name_are_duplicates(tmp_path: Path) -> None:
    files = ["imagesTr/\u00e9_0000.nii.gz", "imagesTr/e\u0301_0000.nii.gz", "labelsTr/\u00e9.nii.gz", "labelsTr/e\u0301.nii.gz"]
    found = read_dataset(make(tmp_path, NNUNET, *files, "imagesTr/ok_0000.nii.gz", "labelsTr/ok.nii.gz"))
    assert ids(found.training) == ["ok"]
    assert "duplicate" in said(found.problems)["\u00e9"]


def test_an_image_finds_its_label_in_the_other_spelling(tmp_path: Path) -> None:
    found = read_dataset(make(tmp_path, NNUNET, "imagesTr/e\u0301_0000.nii.gz", "labelsTr/\u00e9.nii.gz"))
    assert ids(found.training) == ["e\u0301"]
    assert find_label(tmp_path / "labelsTr", "e\u0301") == tmp_path / "labelsTr/\u00e9.nii.gz"


def test_a_name_that_is_not_utf8_is_a_problem(tmp_path: Path) -> None:
    root = make(tmp_path, NNUNET, "imagesTr/ok_0000.nii.gz", "labelsTr/ok.nii.gz")
    for name in (b"imagesTr/\xff_0000.nii.gz", b"labelsTr/\xff.nii.gz"):
        os.close(os.open(os.path.join(os.fsencode(root), name), os.O_CREAT))
    found = read_dataset(root)
    assert ids(found.training) == ["ok"]
    assert [problem.what for problem in found.problems] == ["the file name holds bad bytes (not UTF-8)"]
    assert "\\udcff" in printable(str(found.problems[0]))


def test_files_of_operating_systems_are_ignored(tmp_path: Path) -> None:
    junk = ["._a_0000.nii.gz", ".DS_Store", "Thumbs.db", "desktop.ini", ".a_0000.nii.gz.tmp-1", "README.txt", ".slmsam2-tmp-1-x.nii.gz"]
    found = read_dataset(make(tmp_path, NNUNET, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", *[f"imagesTr/{name}" for name in junk]))
    assert ids(found.training) == ["a"]
    assert (found.problems, found.warnings) == ((), ())


@pytest.mark.parametrize("name", ["-rf", "=1+cmd|' C'!A1", "%s{0}", "a\nERROR", "<img>", "CON", "Müller  患者", "x" * 235])
def test_case_names_may_hold_spaces_and_other_characters(tmp_path: Path, name: str) -> None:
    found = read_dataset(make(tmp_path, NNUNET, f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz"))
    assert ids(found.training) == [name]


# ---- folders


def test_a_folder_of_images_without_dataset_json_is_enough(tmp_path: Path) -> None:
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a.nrrd", "scan_2021.nii.gz", "scan_2022.nii.gz", "notes.txt", "._a.nrrd"):
        (tmp_path / name).touch()
    cases, problems = read_image_folder(tmp_path)
    assert [(case.id, len(case.images)) for case in cases] == [("a", 1), ("b", 2), ("scan_2021", 1), ("scan_2022", 1)]
    assert problems == ()
    assert ids(read_image_folder(tmp_path / "b_0000.nii.gz")[0]) == ["b"]


def test_a_dicom_series_is_a_case_as_a_folder_and_inside_one(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "series"
    folder.mkdir(parents=True)
    (folder / "1").write_bytes(bytes(128) + b"DICM")
    assert ids(read_image_folder(folder)[0]) == ["series"]
    assert read_image_folder(tmp_path / "images")[0] == (Case("series", (folder,), None),)
    (folder / "a.nii.gz").touch()
    cases, problems = read_image_folder(folder)
    assert ids(cases) == ["a"]
    assert "1 DICOM slices in one folder with other volumes" in str(problems[0])


def test_a_folder_that_does_not_exist_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(DatasetError, match="not a directory"):
        read_image_folder(tmp_path / "file.txt")
    with pytest.raises(DatasetError, match="no such file"):
        read_image_folder(tmp_path / "gone")
    assert read_image_folder(make(tmp_path / "empty", NNUNET)) == ((), ())


def test_masks_are_found_by_name_whatever_their_ending(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").touch()
    assert find_label(tmp_path, "a") == tmp_path / "a.nrrd"
    assert find_label(tmp_path, "b") is None
    assert find_label(tmp_path / "gone", "é") is None


# ---- pairs


def grid(**changes: Any) -> Grid:
    return Grid(**({"shape": (2, 3, 4), "spacing_mm": (1.0, 1.0, 1.0), "origin_mm": (0.0, 0.0, 0.0), "direction": np.eye(3)} | changes))


def pair(image: Grid, label: Grid, values: list[int], **source: Any) -> list[str]:
    labels = np.zeros(label.shape, np.uint8)
    labels.ravel()[: len(values)] = values
    one = Volume(np.zeros((1, *image.shape)), image, Source(".nii.gz", ".nii.gz", **source))
    other = LabelVolume(labels, label, Source(".nii.gz", ".nii.gz"))
    dataset = Dataset(Path("d"), "d", ("CT",), {1: "a", 2: "b"}, 7, ".nii.gz", (), (), (), ())
    return check_pair(one, other, dataset, Case("c", (), Path("d/labelsTr/c.nii.gz")))


def test_a_pair_on_one_grid_with_declared_values_is_fine() -> None:
    assert pair(grid(), grid(), [0, 1, 2, 7]) == []


def test_undeclared_values_are_listed_with_their_counts() -> None:
    with pytest.raises(CaseError, match=r"case c: labelsTr/c.nii.gz: label values 3 \(1 voxels\), 9 \(2 voxels\) are not declared"):
        pair(grid(), grid(), [1, 9, 3, 9])


def test_a_mask_without_foreground_is_a_warning() -> None:
    assert pair(grid(), grid(), [0, 7]) == ["the label is empty: no foreground"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2, 3, 5)}, "shape"),
        ({"spacing_mm": (2.0, 1.0, 1.0)}, "spacing"),
        ({"origin_mm": (0.0, 0.0, 7.5)}, "origin"),
        ({"direction": np.diag([1.0, -1.0, 1.0])}, "direction"),
    ],
)
def test_a_mask_on_another_grid_is_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError, match=f"differ in {message}"):
        pair(grid(), grid(**changes), [1])


def test_uncertain_parts_of_a_geometry_are_not_compared() -> None:
    turned = grid(direction=np.diag([-1.0, -1.0, 1.0]), origin_mm=(5.0, 5.0, 5.0))
    assert "partly comparable: the orientation" in pair(grid(), turned, [1], uncertain=frozenset({"orientation"}))[0]
    with pytest.raises(CaseError, match="spacing"):
        pair(grid(), grid(spacing_mm=(2.0, 1.0, 1.0)), [1], uncertain=frozenset({"orientation"}))
    assert "partly comparable: the spacing" in pair(grid(), grid(spacing_mm=(2.0, 1.0, 1.0)), [1], uncertain=frozenset({"spacing"}))[0]
    with pytest.raises(CaseError, match="shape"):
        pair(grid(), grid(shape=(2, 3, 5)), [1], uncertain=frozenset({"orientation", "spacing"}))
    mirrored = grid(direction=np.diag([-1.0, 1.0, 1.0]))
    assert "only one of them matches" in pair(grid(), mirrored, [1], qform_grid=mirrored)[0]


def test_comparing_is_symmetric() -> None:
    one = LabelVolume(np.zeros((2, 3, 4)), grid(), Source(".nii", ".nii", uncertain=frozenset({"orientation"})))
    other = LabelVolume(np.zeros((2, 3, 4)), grid(origin_mm=(9.0, 9.0, 9.0)), Source(".nii", ".nii"))
    assert compare_geometry(one, other) == compare_geometry(other, one)
    assert compare_geometry(one, one) == (None, [])


def test_the_voxels_of_each_label_value_are_counted() -> None:
    labels = np.zeros((2, 3, 4), np.uint16)
    labels[1] = 1000
    assert count_values(labels) == {0: 12, 1000: 12}


# ---- the broken inputs kept beside the repository


def _examine(root: Path) -> tuple[int, list[str], list[str]]:
    """(exit code, lines, cases that went through) of reading everything in a data set."""
    lines: list[str] = []
    done: list[str] = []
    try:
        dataset = read_dataset(root)
    except DatasetError as error:
        return 2, [str(error)], []
    problems = list(dataset.problems)
    lines += dataset.warnings
    for case in dataset.training:
        try:
            image = read_image(case.images, case=case.id, root=root, channels=len(dataset.channels))
            assert case.label is not None
            label = read_labels(case.label, case=case.id, root=root)
            lines += [f"case {case.id}: {line}" for line in (*image.warnings, *label.warnings, *check_pair(image, label, dataset, case))]
            done.append(case.id)
        except CaseError as error:
            problems.append(error)
    return int(bool(problems)), [*lines, *map(str, problems)], done


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], Path]]:
    if not (SHARED / "bad_inputs").is_dir():
        pytest.skip("the generator of broken inputs is not beside the repository")
    folder = tmp_path_factory.mktemp("broken")
    rng = np.random.default_rng(0)
    labels = np.zeros((14, 16, 18), np.uint8)
    labels[4:10, 4:10, 4:10] = 1
    where = grid(shape=labels.shape, spacing_mm=(3.0, 0.8, 0.8), direction=np.diag([-1.0, -1.0, 1.0]), origin_mm=(10.0, 20.0, 30.0))
    like = Volume(labels[None], where, Source(".nii.gz", ".nii.gz"))
    write_mask(folder / "image.nii.gz", rng.integers(300, 500, labels.shape), like)
    write_mask(folder / "label.nii.gz", labels, like)
    make = [sys.executable, "-X", "utf8", SHARED / "bad_inputs" / "bad_inputs.py", "make"]
    subprocess.run([*make, folder / "image.nii.gz", folder / "label.nii.gz", folder / "out"], check=True, capture_output=True)
    cases = json.loads((folder / "out" / "expectations.json").read_text("utf-8"))
    for case in cases:  # the generator wants an error; every other reader takes lengths as positive, and so does a later decision here
        if case["id"] == "spacing_negative":
            case |= {"expect": "warn", "exit_code": 0, "message": "negative spacing"}
    return [(case, folder / "out" / case["id"]) for case in cases if case["group"] not in ("model", "output")]


def test_every_broken_input_gives_the_expected_error_or_warning(broken: list[tuple[dict[str, Any], Path]]) -> None:
    misses: list[str] = []
    assert len(broken) > 90
    for want, root in broken:
        if want["id"] == "no_permission" and os.geteuid() == 0:
            continue
        code, lines, done = _examine(root)
        matching = [line for line in map(printable, lines) if re.search(want["message"], line, re.IGNORECASE)]
        if code != want["exit_code"]:
            misses.append(f"{want['id']}: exit {code}, {lines}")
        elif want["message"] and not matching:
            misses.append(f"{want['id']}: no line matches {want['message']!r}: {lines}")
        elif want["expect"] == "reject" and not any(want["bad"] in line for line in matching):
            misses.append(f"{want['id']}: the case is not named: {lines}")
        elif want["other_cases_finish"] and "good" not in done:
            misses.append(f"{want['id']}: the healthy case did not go through: {lines}")
        if any(str(root) in line for line in lines):
            misses.append(f"{want['id']}: a message shows an absolute path: {lines}")
    assert misses == []


def test_a_bids_tree_is_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("sub-01/anat/sub-01_T1w", "sub-02/ses-1/anat/sub-02_ses-1_T1w", "sub-02/ses-1/anat/sub-02_ses-1_defacemask"):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "dataset_description.json").write_text("{}")
    cases, problems = read_image_folder(tmp_path)
    assert [(case.id, case.images[0].parent.parent.name) for case in cases] == [("sub-01_T1w", "sub-01"), ("sub-02_ses-1_T1w", "ses-1")]
    assert problems == ()
