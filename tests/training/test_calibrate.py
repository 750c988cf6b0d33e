"""Calibration data: which slices of the fine-tuning volumes count, and that there is a limit to them."""

from types import SimpleNamespace

import pytest
import torch
from stacks import case, whole

from slmsam2_cli.inference import propagation
from slmsam2_cli.inference.propagation import Propagation
from slmsam2_cli.planning.plan import InferencePlan
from slmsam2_cli.training import calibrate

PX = 32


def plan(labels=None, ignore=None):
    return SimpleNamespace(
        labels=labels or {1: "organ"}, ignore=ignore, geometry=whole(PX), inference=InferencePlan(batch_slices=2, max_empty_slices=6)
    )


@pytest.fixture
def copying(monkeypatch):
    """A model that copies the annotated slice to all others with confidence 0.7; records (slices, annotated slice) of each stack."""
    shown = []

    def propagate(model, frames, objects, options):
        assert options.use_label_prior and options.max_empty_slices == 6 and options.batch == 2  # as predict does
        ((value, (anchor,)),) = objects.items()
        shown.append((len(frames), anchor.slice))
        logits = torch.where(anchor.mask[None, ::4, ::4], 10.0, -10.0).expand(len(frames), -1, -1)
        return {value: Propagation(logits, torch.full((len(frames),), 0.7), torch.zeros(len(frames)))}

    monkeypatch.setattr(propagation, "propagate", propagate)
    return shown


def pairs(cases, settings):
    return calibrate.confidence_and_dice(None, cases, settings)


def test_every_slice_with_mask_or_ground_truth_counts_but_the_annotated_one(copying):
    found = pairs([case(slices=12, held=range(4, 9), size=(PX, PX))], plan())
    assert [confidence for confidence, _ in found] == [pytest.approx(0.7)] * 11
    assert sorted(round(score) for _, score in found) == [0] * 7 + [1] * 4
    assert copying == [(12, 6)]


def test_long_volumes_are_cut_around_the_annotated_slice_and_many_structures_share_the_limit(copying):
    many = [case(slices=80, held=range(30, 60), size=(PX, PX), name=str(k)) for k in range(40)]
    pairs(many, plan())
    assert sum(slices for slices, _ in copying) <= calibrate.MAX_SLICES
    assert {slices for slices, _ in copying} == {calibrate.MIN_SLICES}


def test_slices_with_ignored_pixels_are_not_annotated_and_ignored_pixels_do_not_count(copying):
    one = case(slices=12, held=range(4, 9), size=(PX, PX))
    one.labels[6, 20:, 20:] = 9
    one.labels[5, 4:12, 4:12] = 9
    found = pairs([one], plan(ignore=9))
    assert copying == [(12, 7)]
    assert len(found) == 10  # of 12, without the annotated one and the one on which all of the mask is ignored


def test_without_labels_there_is_no_calibration():
    bare = case(size=(PX, PX))
    bare.labels = None
    assert calibrate.calibrate_model(None, [bare], plan()) is None


def test_a_run_that_is_stopped_is_not_calibrated(copying):
    many = [case(slices=20, held=range(6, 14), size=(PX, PX), name=str(k)) for k in range(4)]
    assert calibrate.calibrate_model(None, many, plan()) is not None
    assert calibrate.calibrate_model(None, many, plan(), stop=lambda: len(copying) >= 6) is None
    assert len(copying) == 6
