"""The predictions' own account of themselves, read or refused."""

from __future__ import annotations

import json

import pytest

from slmsam2_cli.errors import SlmSam2Error, UsageError
from slmsam2_cli.inference.manifest import read_manifest


def written(folder, value):
    (folder / "manifest.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_a_folder_without_manifest_has_none(tmp_path):
    assert read_manifest(tmp_path) is None


def test_annotated_slices_are_numbered_along_the_array_axis(tmp_path):
    case = {
        "output": "a.nii.gz",
        "slice_axis": "SI",
        "array_axis": 2,
        "annotated_slices": {"1": [12], "3": []},
        "training": True,
        "seconds": 1.5,
    }
    found = read_manifest(written(tmp_path, {"format_version": 2, "tool_version": "1", "model": {"digest": "ab"}, "cases": {"a": case}}))
    assert (found.cases["a"].array_axis, found.cases["a"].annotated_slices, found.cases["a"].training) == (2, {1: (12,), 3: ()}, True)
    assert found.model == {"digest": "ab"}


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"cases": {"a": {"array_axis": 3}}},
        {"cases": {"a": {"annotated_slices": {"1": [-1]}}}},
        {"cases": {"a": {"annotated_slices": {"one": [1]}}}},
        {"cases": []},
    ],
)
def test_an_invalid_manifest_is_rejected_with_the_key(tmp_path, value):
    with pytest.raises(UsageError, match=r"manifest\.json"):
        read_manifest(written(tmp_path, value))


def test_a_newer_manifest_is_rejected_naming_both_versions(tmp_path):
    with pytest.raises(UsageError, match=r"format_version 3 is newer than this tool's 2"):
        read_manifest(written(tmp_path, {"format_version": 3}))


def test_an_older_manifest_is_rejected_in_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"format_version 1 is of an older slmsam2 \(now 2\)\. Run slmsam2 predict --overwrite again"):
        read_manifest(written(tmp_path, {"format_version": 1, "cases": {"a": {"prompted_slices": {"1": [2]}}}}))


def test_a_truncated_manifest_is_reported_without_traceback(tmp_path):
    with pytest.raises(SlmSam2Error, match=r"manifest\.json"):
        read_manifest(written(tmp_path, '{"cases": {'))


def test_confidence_and_disagreement_are_read_slice_by_slice(tmp_path):
    case = {"confidence": {"1": {"mean": 0.5, "slices": {"3": 0.25, "4": 1}}}, "disagreement": {"1": {"3": 0.125}, "2": {}}}
    found = read_manifest(written(tmp_path, {"cases": {"a": case}})).cases["a"]
    assert found.confidence == {1: {3: 0.25, 4: 1.0}}
    assert found.disagreement == {1: {3: 0.125}}


@pytest.mark.parametrize(
    "odd", [None, 3, [], {"one": {"slices": {"1": 0.5}}}, {"1": 0.5}, {"1": {"slices": {"x": 0.5, "2": "high", "3": 7, "-1": 0.5}}}]
)
def test_an_invalid_confidence_is_left_out_and_the_rest_is_read(tmp_path, odd):
    found = read_manifest(written(tmp_path, {"cases": {"a": {"annotated_slices": {"1": [2]}, "confidence": odd, "disagreement": odd}}}))
    assert found.cases["a"].annotated_slices == {1: (2,)}
    assert found.cases["a"].confidence == found.cases["a"].disagreement == {}
