"""Matching predictions to references by file name."""

from __future__ import annotations

import pytest

from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.matching import References, find_masks, pair, references_of_folder
from slmsam2_cli.inference.manifest import Manifest, ManifestCase


@pytest.fixture
def folders(tmp_path):
    """folders(labels, predictions) -> (References, predictions folder), with empty files of those names."""

    def make(labels, predictions):
        for folder, names in (("labels", labels), ("predictions", predictions)):
            (tmp_path / folder).mkdir()
            for name in names:
                (tmp_path / folder / name).touch()
        return references_of_folder(tmp_path / "labels", None, None), tmp_path / "predictions"

    return make


def matched(pairing):
    return [(case, None if prediction is None else prediction.name) for case, _, prediction in pairing.pairs]


def test_files_of_the_same_name_match_whatever_their_format(folders):
    references, predictions = folders(["a.nii.gz", "b.nrrd"], ["a.mha", "b.nii.gz", "manifest.json", "summary.json", "._a.mha"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a.mha"), ("b", "b.nii.gz")]


def test_a_channel_suffix_is_ignored_on_either_side(folders):
    references, predictions = folders(["a.nii.gz", "b_0000.nii.gz"], ["a_0000.nii.gz", "b.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a_0000.nii.gz"), ("b_0000", "b.nii.gz")]


def test_a_label_without_prediction_is_missing(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a.nii.gz"), ("b", None)]


def test_a_held_out_case_that_is_not_in_the_manifest_is_missing(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz"])
    manifest = Manifest(cases={"a": ManifestCase()})
    assert matched(pair(references, predictions, manifest, ())) == [("a", "a.nii.gz"), ("b", None)]


def test_a_training_case_that_was_not_predicted_is_not_missing(folders):
    references, predictions = folders(["a.nii.gz", "t.nii.gz"], ["a.nii.gz"])
    found = pair(references, predictions, Manifest(), {"t"})
    assert (matched(found), found.not_requested) == ([("a", "a.nii.gz")], ("t",))


def test_a_training_case_in_the_manifest_without_a_mask_is_missing(folders):
    references, predictions = folders(["a.nii.gz", "t.nii.gz"], ["a.nii.gz"])
    manifest = Manifest(cases={"t": ManifestCase(training=True)})
    assert matched(pair(references, predictions, manifest, {"t"})) == [("a", "a.nii.gz"), ("t", None)]


def test_predictions_without_a_label_are_listed(folders):
    references, predictions = folders(["a.nii.gz"], ["a.nii.gz", "x.nii.gz"])
    assert pair(references, predictions, None, ()).without_reference == ("x",)


def test_a_case_without_a_usable_reference_is_not_a_prediction_without_label(folders):
    references, predictions = folders(["a.nii.gz"], ["a.nii.gz", "x.nii.gz"])
    references_with_problem = References(references.root, references.masks, None, None, (CaseError("x", "x.nii.gz", "no label", "Add it"),))
    found = pair(references_with_problem, predictions, None, ())
    assert (matched(found), found.without_reference) == ([("a", "a.nii.gz")], ())


def test_two_masks_of_one_case_are_a_problem(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "a.nrrd", "b.nii.gz", "other.nii", "other.nrrd"])
    found = pair(references, predictions, None, ())
    assert matched(found) == [("b", "b.nii.gz")]
    assert [(p.case, "two files have the same case id" in str(p)) for p in found.problems] == [("a", True)]


def test_composed_and_decomposed_unicode_names_are_one_case(folders):
    references, predictions = folders(["Mu\u0308ller.nii.gz"], ["M\u00fcller.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("M\u00fcller", "M\u00fcller.nii.gz")]


def test_names_with_a_common_affix_are_matched_and_listed(folders):
    references, predictions = folders(["a_seg.nii.gz", "b_seg.nii.gz"], ["pred-a.nii.gz", "pred-b.nii.gz"])
    found = pair(references, predictions, None, ())
    assert matched(found) == [("a_seg", "pred-a.nii.gz"), ("b_seg", "pred-b.nii.gz")]
    assert found.renamed == (("a_seg", "pred-a"), ("b_seg", "pred-b"))


def test_affixes_are_not_used_when_any_name_is_the_same(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "b_seg.nii.gz"])
    found = pair(references, predictions, None, ())
    assert (matched(found), found.without_reference, found.renamed) == ([("a", "a.nii.gz"), ("b", None)], ("b_seg",), ())


def test_folders_and_system_files_are_not_masks(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / ".DS_Store").touch()
    assert find_masks(tmp_path) == ({}, ())
