"""Cross-validation: which cases are held out, how they are scored, and what is concluded."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stacks import case, whole

from slmsam2_cli.dataset.cache import PreparedCase
from slmsam2_cli.inference import propagation
from slmsam2_cli.inference.propagation import Propagation
from slmsam2_cli.planning.plan import InferencePlan
from slmsam2_cli.planning.rules import choose_training
from slmsam2_cli.training import cross_validation
from slmsam2_cli.training.cross_validation import (
    CrossValidation,
    Fold,
    FoldRecord,
    conclude,
    fold_settings,
    make_folds,
    score_fold,
    settings_after_folds,
    stopped_early,
)

PX = 32


def plan(labels=None, ignore=None):
    return SimpleNamespace(labels=labels or {1: "organ"}, ignore=ignore, geometry=whole(PX), inference=InferencePlan())


def prepared(**options):
    made = case(size=(PX, PX), **options)
    return PreparedCase(made.id, made.frames, made.labels, None, {})


# Which cases are held out


def test_the_cases_in_the_middle_of_the_order_by_size_are_held_out():
    cases = [prepared(name=name, held=range(5, 5 + count)) for name, count in (("a", 9), ("b", 3), ("c", 5), ("d", 12), ("e", 4))]
    folds = make_folds(cases, plan())
    assert [fold.name for fold in folds] == ["e", "c"]  # of b, e, c, a, d
    assert [{one.id for one in fold.cases} for fold in folds] == [{"a", "b", "c", "d"}, {"a", "b", "d", "e"}]
    assert all(fold.end_slice is None for fold in folds)


def test_of_two_cases_each_is_held_out_once():
    folds = make_folds([prepared(name="a"), prepared(name="b")], plan())
    assert [(fold.held_out.id, fold.cases[0].id) for fold in folds] == [("a", "b"), ("b", "a")]


def test_a_case_on_which_the_pretrained_model_was_trained_is_not_held_out():
    """The pretrained model would score too well on b; for training, b is as good as any case."""
    a, b, c = (replace(prepared(name=name), record={"inputs": {f"{name}.nii.gz": f"digest of {name}"}}) for name in "abc")
    folds = make_folds([a, b, c], plan(), known_images={"digest of b"})
    assert [(fold.held_out.id, {case.id for case in fold.cases}) for fold in folds] == [("a", {"b", "c"}), ("c", {"a", "b"})]
    assert make_folds([b], plan(), known_images={"digest of b"}) == ()
    assert len(make_folds([b], plan(), known_images={"digest of a"})) == 1


def test_of_one_case_the_upper_part_is_for_training_and_the_lower_is_scored():
    (fold,) = make_folds([prepared(slices=20, held=range(6, 15))], plan())
    assert fold.end_slice == 10 and fold.held_out.frames.shape[1] == 20
    (upper,) = fold.cases
    assert upper.frames.shape[1] == len(upper.labels) == 10 and upper.frames[0, 0, 0, 0] == np.float16(0.1)


def test_a_case_with_ignored_pixels_on_every_slice_makes_no_fold():
    """Every slice of b has an ignored pixel, so b can neither be scored nor trained on."""
    a, b = prepared(name="a"), prepared(name="b")
    labels = np.array(b.labels)
    labels[:, 0, 0] = 9
    assert make_folds([a, PreparedCase("b", b.frames, labels, None, {})], plan(ignore=9)) == ()


def test_a_single_case_with_too_few_labelled_slices_makes_no_fold():
    assert make_folds([prepared(slices=20, held=[7, 8])], plan()) == ()
    assert make_folds([prepared(slices=20, held=[])], plan()) == ()


# Length of a fold


def test_folds_take_their_share_of_steps_and_minutes():
    training = choose_training("nano", 5).value.model_copy(update={"minutes": 10.0})
    short = fold_settings(training, 5)
    assert (short.steps, short.minutes) == (180, 1.5)
    assert (fold_settings(training, 1).steps, fold_settings(training, 1).minutes) == (120, 3.0)
    rest = settings_after_folds(training, 2, None)
    assert rest.minutes == pytest.approx(7.0) and rest.steps == 600
    assert settings_after_folds(training, 0, None) == training


def test_fewer_steps_also_mean_fewer_minutes():
    training = choose_training("nano", 5).value.model_copy(update={"minutes": 10.0})
    result = conclude({"a": {0: (0.5,), 1: (0.9,), 2: (0.8,)}}, training, False)
    rest = settings_after_folds(training, 2, result)
    assert rest.steps == 200 and rest.minutes == pytest.approx(7 / 3)


def test_a_fold_of_fewer_than_twenty_steps_is_not_run():
    training = choose_training("nano", 5).value
    assert fold_settings(training.model_copy(update={"steps": 66}), 5).steps == 20
    assert fold_settings(training.model_copy(update={"steps": 63}), 5) is None


# Scores


@pytest.fixture
def copying(monkeypatch):
    """A model that copies the annotated slice to all others."""

    def propagate(model, frames, objects, options):
        found = {}
        for value, (anchor,) in objects.items():
            logits = torch.where(anchor.mask[None, ::4, ::4], 10.0, -10.0).expand(len(frames), -1, -1)
            found[value] = Propagation(logits, torch.full((len(frames),), 0.7), torch.zeros(len(frames)))
        return found

    monkeypatch.setattr(propagation, "propagate", propagate)


def test_all_slices_but_the_annotated_one_are_scored_empty_ones_included(copying):
    held = prepared(slices=12, held=range(4, 9))  # copied to 11 more: 2 * 4 / (4 + 11)
    assert score_fold(None, Fold("a", (), held), plan(), use_label_prior=False).score == pytest.approx(8 / 15, abs=0.02)


def test_of_a_split_case_only_the_lower_part_is_scored(copying):
    held = prepared(slices=12, held=range(4, 9))  # slices 0 to 5, of which 4 and 5 hold it: 2 * 2 / (2 + 6)
    assert score_fold(None, Fold("a", (), held, end_slice=6), plan(), use_label_prior=False).score == pytest.approx(0.5, abs=0.02)


def test_ignored_pixels_do_not_count(copying):
    held = prepared(slices=12, held=range(4, 9))
    labels = np.array(held.labels)
    labels[9:] = 9
    score = score_fold(None, Fold("a", (), PreparedCase("a", held.frames, labels, None, {})), plan(ignore=9), use_label_prior=False).score
    assert score == pytest.approx(2 * 4 / (4 + 8), abs=0.02)


def test_a_label_that_is_absent_and_not_predicted_scores_one(monkeypatch):
    def propagate(model, frames, objects, options):
        nothing = torch.full((len(frames), PX // 4, PX // 4), -10.0)
        return {value: Propagation(nothing, torch.ones(len(frames)), torch.zeros(len(frames))) for value in objects}

    monkeypatch.setattr(propagation, "propagate", propagate)
    held = prepared(slices=12, held=[5])  # on the annotated slice alone
    assert score_fold(None, Fold("a", (), held), plan(), use_label_prior=False).score == 1


def test_a_pixel_of_two_labels_gets_the_one_with_the_larger_logit(monkeypatch):
    def propagate(model, frames, objects, options):
        everywhere = torch.full((len(frames), PX // 4, PX // 4), 1.0)
        return {v: Propagation(everywhere * (2 if v == 2 else 1), torch.ones(len(frames)), torch.zeros(len(frames))) for v in objects}

    monkeypatch.setattr(propagation, "propagate", propagate)
    held = prepared(slices=12, held=range(4, 9))
    labels = np.array(held.labels)
    labels[4:9, 20:24, 20:24] = 2
    found = score_fold(
        None, Fold("a", (), PreparedCase("a", held.frames, labels, None, {})), plan({1: "a", 2: "b"}), use_label_prior=False
    ).labels
    assert (found[0] == 2).all() and (found[6][labels[6] == 1] == 1).all()  # but annotated slices stay


# Conclusion


def concluded(folds, steps_fixed=False):
    return conclude(folds, choose_training("nano", 5).value, steps_fixed)


def test_the_model_with_the_better_mean_over_folds_is_kept():
    better = concluded({"a": {0: (0.5,), 1: (0.6,), 2: (0.7,), 3: (0.8,)}, "b": {0: (0.7,), 1: (0.6,), 2: (0.6,), 3: (0.6,)}})
    assert (better.pretrained, better.fine_tuned, better.kept, better.held_out, better.label_unet) == (
        0.6,
        0.7,
        "fine_tuned",
        ("a", "b"),
        None,
    )
    worse = concluded({"a": {0: (0.9,), 1: (0.6,), 2: (0.7,), 3: (0.8,)}})
    assert (worse.pretrained, worse.fine_tuned, worse.kept, worse.steps) == (0.9, 0.8, "pretrained", 0)


def test_a_better_early_checkpoint_reduces_the_steps_unless_they_are_fixed():
    folds = {"a": {0: (0.5,), 1: (0.6,), 2: (0.9,), 3: (0.8,)}}
    assert concluded(folds).steps == 400 and concluded(folds, steps_fixed=True).steps == 600


def test_with_fixed_steps_only_the_last_checkpoint_is_used():
    folds = {"a": {0: (0.8,), 1: (0.82,), 2: (0.79,), 3: (0.7,)}}
    assert (concluded(folds).kept, concluded(folds, steps_fixed=True).kept) == ("fine_tuned", "pretrained")
    assert concluded(folds, steps_fixed=True).fine_tuned == 0.7


def test_of_checkpoints_with_nearly_the_same_dice_the_latest_is_chosen():
    found = concluded({"a": {0: (0.5,), 1: (0.801,), 2: (0.803,), 3: (0.8,)}})
    assert found.steps == 600 and found.fine_tuned == 0.8


def test_a_checkpoint_better_than_the_pretrained_model_comes_before_a_later_worse_one():
    found = concluded({"a": {0: (0.8,), 1: (0.803,), 2: (0.801,), 3: (0.799,)}})
    assert (found.kept, found.steps, found.fine_tuned) == ("fine_tuned", 400, 0.801)


def test_a_label_unet_that_does_not_improve_dice_is_dropped():
    without = concluded({"a": {0: (0.5, 0.5), 1: (0.4, 0.6), 3: (0.45, 0.7)}})
    assert without.label_unet is False and without.fine_tuned == 0.7
    with_it = concluded({"a": {0: (0.5, 0.5), 1: (0.4, 0.6), 3: (0.697, 0.7)}})
    assert with_it.label_unet is True and with_it.fine_tuned == 0.697
    worse_than_pretrained = concluded({"a": {0: (0.798, 0.798), 3: (0.796, 0.8)}})
    assert worse_than_pretrained.label_unet is False and worse_than_pretrained.kept == "fine_tuned"


def test_only_checkpoints_that_every_fold_reached_are_compared():
    found = concluded({"a": {0: (0.5,), 1: (0.6,), 2: (0.5,)}, "b": {0: (0.5,), 1: (0.6,), 2: (0.6,), 3: (0.9,)}})
    assert found.steps == 200 and found.fine_tuned == 0.6


def test_without_a_scored_fold_there_is_no_result():
    assert concluded({}) is None and concluded({"a": {0: (0.5,)}}) is None


@pytest.mark.parametrize(
    ("checkpoints", "ends"),
    [({0: (0.9,)}, False), ({0: (0.9,), 1: (0.5,)}, False), ({1: (0.5,), 2: (0.49,)}, False), ({1: (0.5, 0.2), 2: (0.3, 0.47)}, True)],
)
def test_a_fold_is_stopped_when_it_falls_well_below_its_best_checkpoint(checkpoints, ends):
    assert stopped_early(checkpoints) is ends


# How much time a fold has


@pytest.mark.parametrize(
    ("processes", "done", "started", "minutes"),
    [(1, [], True, [3, 3]), (2, [], True, []), (2, [], False, [3, 3]), (2, ["a"], True, [6])],
    ids=["one after another", "side by side", "no process can be started", "the second of two is resumed alone"],
)
def test_folds_side_by_side_share_the_time_and_the_last_one_keeps_its_part(processes, done, started, minutes, tmp_path, monkeypatch):
    """Two folds of three minutes each; `minutes` are those of the folds that run in this process."""
    found, beside = [], []

    def side_by_side(work, jobs, *arguments):
        beside.extend(one.training.minutes for one in jobs.values())
        return started

    monkeypatch.setattr(cross_validation, "pieces_at_once", lambda *arguments: processes)
    monkeypatch.setattr(cross_validation, "run_side_by_side", side_by_side)
    monkeypatch.setattr(cross_validation, "run_fold", lambda job, watch: found.append(job.training.minutes))
    folds = [Fold(name, (), prepared(name=name)) for name in ("a", "b")]
    training = choose_training("nano", 2).value.model_copy(update={"minutes": 3})
    job = CrossValidation(SimpleNamespace(plan=None), torch.device("cpu"), tmp_path, 60.0, False, lambda: False)
    record = FoldRecord(tmp_path / "validation.json", "run", {"a": {}, "b": {}}, done)
    cross_validation._run_folds(job, folds, training, record)
    assert found == minutes and beside in ([], [6, 6])
