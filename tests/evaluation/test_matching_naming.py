"""Matching names that differ by an affix, when no two files have the same name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmsam2_cli.evaluation.matching import match_by_affix


@pytest.mark.parametrize(
    ("labels", "predictions", "found"),
    [
        (["a_seg", "b_seg"], ["a_pred", "b_pred"], {"a_seg": "a_pred", "b_seg": "b_pred"}),
        (["case_001", "case_002"], ["pred_001", "pred_002"], {"case_001": "pred_001", "case_002": "pred_002"}),
        (["case_001", "case_009"], ["pred_001", "pred_009", "pred_011"], {"case_001": "pred_001", "case_009": "pred_009"}),
        (["p1", "p2"], ["nnunet-p1", "nnunet-p2"], {"p1": "nnunet-p1", "p2": "nnunet-p2"}),
        (["p1_gt"], ["p1"], {"p1_gt": "p1"}),
        (["p1"], ["p1_T1_mask"], {"p1": "p1_T1_mask"}),
        (["STS_001_CT", "STS_002_CT"], ["STS_002_CT_seg"], {"STS_002_CT": "STS_002_CT_seg"}),
        (["1_left_gt", "2_left_gt"], ["1_left_net", "2_left_net"], {"1_left_gt": "1_left_net", "2_left_gt": "2_left_net"}),
        (["anna", "anna_maria"], ["pred_anna", "pred_anna_maria"], {"anna": "pred_anna", "anna_maria": "pred_anna_maria"}),
    ],
)
def test_names_that_differ_by_an_affix_match(labels, predictions, found):
    assert match_by_affix(labels, predictions) == found


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        (["case_1", "case_2"], ["case_1_2"]),  # another case, not case_1 with an affix
        (["a"], ["b"]),
        (["case_1"], ["case_12"]),
        (["a"], ["a_x", "a_y"]),
        (["1", "2"], ["11", "12"]),
        ([], ["a"]),
        (["a"], []),
    ],
)
def test_names_that_differ_by_more_or_ambiguously_do_not_match(labels, predictions):
    assert match_by_affix(labels, predictions) == {}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("{}_T1", "{}_T2"), ("left_{}", "right_{}"), ("{}_pre", "{}_post"), ("anna_{}", "bob_{}"), ("site1_{}_seg", "site2_{}")],
)
def test_words_that_distinguish_cases_are_not_removed_from_both_sides(ours, theirs):
    assert match_by_affix([ours.format(n) for n in (1, 2)], [theirs.format(n) for n in (1, 2)]) == {}


@pytest.mark.parametrize("left_over", ["case_1_right", "case_2_right", "old_case_2_left"])
def test_nothing_matches_when_a_label_fits_a_second_prediction(left_over):
    assert match_by_affix(["case_1", "case_2"], ["case_1_left", "case_2_left", left_over]) == {}


@given(
    st.sets(st.integers(0, 999), min_size=2, max_size=12),
    st.sampled_from(["", "pred_", "my-model_"]),
    st.sampled_from(["", "_seg", "_CT.label"]),
)
def test_every_case_is_found_behind_an_affix(numbers, before, after):
    labels = [f"case_{n:03}" for n in numbers]
    expected = {name: f"{before}{name}{after}" for name in labels}
    assert match_by_affix(labels, list(expected.values())) == expected
