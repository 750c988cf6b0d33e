"""Which file belongs to which, by name alone."""

from __future__ import annotations

import pytest

from slmsam2_cli.errors import CaseError
from slmsam2_cli.evaluation.matching import References, find_masks, pair, references_of_folder, relative_name
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


def test_same_name_belong_together_whatever_their_ending(folders):
    references, predictions = folders(["a.nii.gz", "b.nrrd"], ["a.mha", "b.nii.gz", "manifest.json", "summary.json", "._a.mha"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a.mha"), ("b", "b.nii.gz")]


def test_a_channel_suffix_is_tolerated_on_either_side(folders):
    references, predictions = folders(["a.nii.gz", "b_0000.nii.gz"], ["a_0000.nii.gz", "b.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a_0000.nii.gz"), ("b_0000", "b.nii.gz")]


def test_a_label_without_prediction_is_missing(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("a", "a.nii.gz"), ("b", None)]


def test_an_held_out_case_that_predict_never_listed_is_missing_too(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz"])
    manifest = Manifest(cases={"a": ManifestCase()})
    assert matched(pair(references, predictions, manifest, ())) == [("a", "a.nii.gz"), ("b", None)]


def test_a_training_case_that_was_not_predicted_is_only_mentioned(folders):
    references, predictions = folders(["a.nii.gz", "t.nii.gz"], ["a.nii.gz"])
    found = pair(references, predictions, Manifest(), {"t"})
    assert (matched(found), found.not_requested) == ([("a", "a.nii.gz")], ("t",))


def test_a_training_case_that_was_listed_but_is_gone_is_missing(folders):
    references, predictions = folders(["a.nii.gz", "t.nii.gz"], ["a.nii.gz"])
    manifest = Manifest(cases={"t": ManifestCase(training=True)})
    assert matched(pair(references, predictions, manifest, {"t"})) == [("a", "a.nii.gz"), ("t", None)]


def test_predictions_without_a_label_are_listed(folders):
    references, predictions = folders(["a.nii.gz"], ["a.nii.gz", "x.nii.gz"])
    assert pair(references, predictions, None, ()).without_reference == ("x",)


def test_a_case_refused_already_is_neither_missing_nor_a_stranger(folders):
    references, predictions = folders(["a.nii.gz"], ["a.nii.gz", "x.nii.gz"])
    refused = References(references.root, references.masks, None, None, (CaseError("x", "x.nii.gz", "no label", "Add it"),))
    found = pair(refused, predictions, None, ())
    assert (matched(found), found.without_reference) == ([("a", "a.nii.gz")], ())


def test_two_masks_of_one_case_are_a_problem_and_no_guess(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "a.nrrd", "b.nii.gz", "stranger.nii", "stranger.nrrd"])
    found = pair(references, predictions, None, ())
    assert matched(found) == [("b", "b.nii.gz")]
    assert [(p.case, "two files have the same case id" in str(p)) for p in found.problems] == [("a", True)]


def test_composed_and_decomposed_spellings_are_one_case(folders):
    references, predictions = folders(["Mu\u0308ller.nii.gz"], ["M\u00fcller.nii.gz"])
    assert matched(pair(references, predictions, None, ())) == [("M\u00fcller", "M\u00fcller.nii.gz")]


def test_names_with_a_common_affix_are_matched_and_told(folders):
    references, predictions = folders(["a_seg.nii.gz", "b_seg.nii.gz"], ["pred-a.nii.gz", "pred-b.nii.gz"])
    found = pair(references, predictions, None, ())
    assert matched(found) == [("a_seg", "pred-a.nii.gz"), ("b_seg", "pred-b.nii.gz")]
    assert found.renamed == (("a_seg", "pred-a"), ("b_seg", "pred-b"))


def test_one_same_name_is_enough_to_match_by_nothing_else(folders):
    references, predictions = folders(["a.nii.gz", "b.nii.gz"], ["a.nii.gz", "b_seg.nii.gz"])
    found = pair(references, predictions, None, ())
    assert (matched(found), found.without_reference, found.renamed) == ([("a", "a.nii.gz"), ("b", None)], ("b_seg",), ())


def test_folders_and_system_files_are_no_masks(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / ".DS_Store").touch()
    assert find_masks(tmp_path) == ({}, ())


def test_a_file_elsewhere_is_shown_by_its_bare_name(tmp_path):
    assert relative_name(tmp_path / "labelsTr" / "a.nii", tmp_path) == "labelsTr/a.nii"
    assert relative_name(tmp_path / "a.nii", tmp_path / "data") == "a.nii"
