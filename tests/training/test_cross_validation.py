"""Short runs that leave something out: what they leave out, how it is judged, and what follows."""

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
from slmsam2_cli.training.cross_validation import Fold, conclude, fold_settings, judged, make_folds, settings_after_folds, stopped_early

PX = 32


def plan(labels=None, ignore=None):
    return SimpleNamespace(labels=labels or {1: "organ"}, ignore=ignore, geometry=whole(PX), inference=InferencePlan())


def prepared(**options):
    made = case(size=(PX, PX), **options)
    return PreparedCase(made.id, made.frames, made.labels, None, {})


# What is left out


def test_the_volumes_in_the_middle_of_the_order_by_size_are_left_out():
    cases = [prepared(name=name, held=range(5, 5 + count)) for name, count in (("a", 9), ("b", 3), ("c", 5), ("d", 12), ("e", 4))]
    folds = make_folds(cases, plan())
    assert [fold.name for fold in folds] == ["e", "c"]  # of b, e, c, a, d
    assert [{one.id for one in fold.cases} for fold in folds] == [{"a", "b", "c", "d"}, {"a", "b", "d", "e"}]
    assert all(fold.until is None for fold in folds)


def test_of_two_volumes_each_is_left_out_once():
    folds = make_folds([prepared(name="a"), prepared(name="b")], plan())
    assert [(fold.held.id, fold.cases[0].id) for fold in folds] == [("a", "b"), ("b", "a")]


def test_a_volume_that_the_base_has_learned_from_is_not_left_out():
    """Its base knows b already, so it would seem better there than it is; to learn from, b is as good as any."""
    a, b, c = (replace(prepared(name=name), record={"inputs": {f"{name}.nii.gz": f"digest of {name}"}}) for name in "abc")
    folds = make_folds([a, b, c], plan(), learned={"digest of b"})
    assert [(fold.held.id, {case.id for case in fold.cases}) for fold in folds] == [("a", {"b", "c"}), ("c", {"a", "b"})]
    assert make_folds([b], plan(), learned={"digest of b"}) == ()
    assert len(make_folds([b], plan(), learned={"digest of a"})) == 1


def test_of_one_volume_the_upper_part_is_learned_from_and_the_lower_judged():
    (fold,) = make_folds([prepared(slices=20, held=range(6, 15))], plan())
    assert fold.until == 10 and fold.held.frames.shape[1] == 20
    (upper,) = fold.cases
    assert upper.frames.shape[1] == len(upper.labels) == 10 and upper.frames[0, 0, 0, 0] == np.float16(0.1)


def test_what_cannot_be_judged_or_learned_from_makes_no_fold():
    """b was looked at as a whole on no slice: without a there would be nothing to learn, and b itself says nothing."""
    a, b = prepared(name="a"), prepared(name="b")
    labels = np.array(b.labels)
    labels[:, 0, 0] = 9
    assert make_folds([a, PreparedCase("b", b.frames, labels, None, {})], plan(ignore=9)) == ()


def test_a_single_volume_that_cannot_be_divided_is_not():
    assert make_folds([prepared(slices=20, held=[7, 8])], plan()) == ()
    assert make_folds([prepared(slices=20, held=[])], plan()) == ()


# How long


def test_a_fold_takes_its_share_of_steps_and_minutes_and_leaves_the_rest():
    training = choose_training("nano", 5).value.model_copy(update={"minutes": 10.0})
    short = fold_settings(training, 5)
    assert (short.steps, short.minutes) == (180, 1.5)
    assert (fold_settings(training, 1).steps, fold_settings(training, 1).minutes) == (120, 3.0)
    rest = settings_after_folds(training, 2, None)
    assert rest.minutes == pytest.approx(7.0) and rest.steps == 600
    assert settings_after_folds(training, 0, None) == training


def test_where_the_folds_speak_for_fewer_steps_minutes_are_fewer_too():
    training = choose_training("nano", 5).value.model_copy(update={"minutes": 10.0})
    told = conclude({"a": {0: (0.5,), 1: (0.9,), 2: (0.8,)}}, training, False)
    rest = settings_after_folds(training, 2, told)
    assert rest.steps == 200 and rest.minutes == pytest.approx(7 / 3)


def test_a_fold_that_is_too_short_to_tell_anything_is_left_away():
    training = choose_training("nano", 5).value
    assert fold_settings(training.model_copy(update={"steps": 66}), 5).steps == 20
    assert fold_settings(training.model_copy(update={"steps": 63}), 5) is None


# How it is judged


@pytest.fixture
def copying(monkeypatch):
    """A model that copies the given slice to all others."""

    def propagate(model, frames, objects, options):
        found = {}
        for value, (anchor,) in objects.items():
            logits = torch.where(anchor.mask[None, ::4, ::4], 10.0, -10.0).expand(len(frames), -1, -1)
            found[value] = Propagation(logits, torch.full((len(frames),), 0.7), torch.zeros(len(frames)))
        return found

    monkeypatch.setattr(propagation, "propagate", propagate)


def test_all_slices_but_the_given_one_count_empty_ones_too(copying):
    held = prepared(slices=12, held=range(4, 9))  # copied to 11 more: 2 * 4 / (4 + 11)
    assert judged(None, Fold("a", (), held), plan(), weighted=False).score == pytest.approx(8 / 15, abs=0.02)


def test_of_a_divided_volume_only_the_lower_part_counts(copying):
    held = prepared(slices=12, held=range(4, 9))  # slices 0 to 5, of which 4 and 5 hold it: 2 * 2 / (2 + 6)
    assert judged(None, Fold("a", (), held, until=6), plan(), weighted=False).score == pytest.approx(0.5, abs=0.02)


def test_ignored_pixels_do_not_count(copying):
    held = prepared(slices=12, held=range(4, 9))
    labels = np.array(held.labels)
    labels[9:] = 9
    score = judged(None, Fold("a", (), PreparedCase("a", held.frames, labels, None, {})), plan(ignore=9), weighted=False).score
    assert score == pytest.approx(2 * 4 / (4 + 8), abs=0.02)


def test_a_label_that_is_rightly_not_found_counts_as_found(copying, monkeypatch):
    held = prepared(slices=12, held=[5])  # on the given slice alone, and nowhere else is anything found
    monkeypatch.setattr(cross_validation, "_labels", lambda found, truth, given, px: truth * (np.arange(12) == 5)[:, None, None])
    assert judged(None, Fold("a", (), held), plan(), weighted=False).score == 1


def test_where_two_labels_claim_a_pixel_the_surer_one_has_it(monkeypatch):
    def propagate(model, frames, objects, options):
        everywhere = torch.full((len(frames), PX // 4, PX // 4), 1.0)
        return {v: Propagation(everywhere * (2 if v == 2 else 1), torch.ones(len(frames)), torch.zeros(len(frames))) for v in objects}

    monkeypatch.setattr(propagation, "propagate", propagate)
    held = prepared(slices=12, held=range(4, 9))
    labels = np.array(held.labels)
    labels[4:9, 20:24, 20:24] = 2
    found = judged(None, Fold("a", (), PreparedCase("a", held.frames, labels, None, {})), plan({1: "a", 2: "b"}), weighted=False).labels
    assert (found[0] == 2).all() and (found[6][labels[6] == 1] == 1).all()  # but what is given stays


# What follows


def settled(looks, asked=False):
    return conclude(looks, choose_training("nano", 5).value, asked)


def test_the_better_of_base_and_tuned_is_kept_by_the_mean_over_folds():
    better = settled({"a": {0: (0.5,), 1: (0.6,), 2: (0.7,), 3: (0.8,)}, "b": {0: (0.7,), 1: (0.6,), 2: (0.6,), 3: (0.6,)}})
    assert (better.pretrained, better.fine_tuned, better.kept, better.held_out, better.label_unet) == (0.6, 0.7, "fine_tuned", ("a", "b"), None)
    worse = settled({"a": {0: (0.9,), 1: (0.6,), 2: (0.7,), 3: (0.8,)}})
    assert (worse.pretrained, worse.fine_tuned, worse.kept, worse.steps) == (0.9, 0.8, "pretrained", 0)


def test_where_an_earlier_look_was_better_fewer_steps_are_taken_unless_a_person_named_them():
    looks = {"a": {0: (0.5,), 1: (0.6,), 2: (0.9,), 3: (0.8,)}}
    assert settled(looks).steps == 400 and settled(looks, asked=True).steps == 600


def test_a_person_s_number_of_steps_is_judged_by_its_own_look_alone():
    looks = {"a": {0: (0.8,), 1: (0.82,), 2: (0.79,), 3: (0.7,)}}
    assert (settled(looks).kept, settled(looks, asked=True).kept) == ("fine_tuned", "pretrained")
    assert settled(looks, asked=True).tuned == 0.7


def test_of_looks_that_are_nearly_alike_the_latest_counts():
    found = settled({"a": {0: (0.5,), 1: (0.801,), 2: (0.803,), 3: (0.8,)}})
    assert found.steps == 600 and found.tuned == 0.8


def test_a_look_that_is_better_than_the_base_counts_before_a_later_one_that_is_not():
    found = settled({"a": {0: (0.8,), 1: (0.803,), 2: (0.801,), 3: (0.799,)}})
    assert (found.kept, found.steps, found.tuned) == ("tuned", 400, 0.801)


def test_a_label_unet_that_does_not_help_is_left_away():
    without = settled({"a": {0: (0.5, 0.5), 1: (0.4, 0.6), 3: (0.45, 0.7)}})
    assert without.label_unet is False and without.tuned == 0.7
    with_it = settled({"a": {0: (0.5, 0.5), 1: (0.4, 0.6), 3: (0.697, 0.7)}})
    assert with_it.label_unet is True and with_it.tuned == 0.697
    worse_than_the_base = settled({"a": {0: (0.798, 0.798), 3: (0.796, 0.8)}})
    assert worse_than_the_base.label_unet is False and worse_than_the_base.kept == "fine_tuned"


def test_only_looks_that_every_fold_came_to_are_compared():
    found = settled({"a": {0: (0.5,), 1: (0.6,), 2: (0.5,)}, "b": {0: (0.5,), 1: (0.6,), 2: (0.6,), 3: (0.9,)}})
    assert found.steps == 200 and found.tuned == 0.6


def test_without_a_fold_nothing_follows():
    assert settled({}) is None and settled({"a": {0: (0.5,)}}) is None


@pytest.mark.parametrize(
    ("looks", "ends"),
    [({0: (0.9,)}, False), ({0: (0.9,), 1: (0.5,)}, False), ({1: (0.5,), 2: (0.49,)}, False), ({1: (0.5, 0.2), 2: (0.3, 0.47)}, True)],
)
def test_a_fold_is_given_up_where_it_falls_well_below_its_best(looks, ends):
    assert stopped_early(looks) is ends
