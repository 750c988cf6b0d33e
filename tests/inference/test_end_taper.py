"""Towards a marked end a mask tapers as an ellipsoid would."""

import math

import pytest
import torch

from slmsam2_cli.inference.end_taper import MAX_LOGIT, SHARE, EndTaper
from slmsam2_cli.inference.propagation import AnnotatedSlice, propagate
from slmsam2_cli.model.slmsam2 import SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX, RADIUS = 96, 32


def disc():
    place = torch.arange(PX) - PX / 2 + 0.5
    return place[:, None] ** 2 + place[None] ** 2 <= RADIUS**2


def radius(logits):
    return math.sqrt(int((logits > 0).sum()) / math.pi)


@pytest.mark.parametrize("t", [0, 3, 6, 8, 9])
def test_a_disc_tapers_like_the_sections_of_a_sphere(t):
    found = EndTaper(disc(), 0, 10, PX).logits(t)
    assert radius(found) == pytest.approx(RADIUS * math.sqrt(1 - (t / 10) ** 2), abs=1.0)


def test_the_taper_is_the_same_backwards():
    assert torch.equal(EndTaper(disc(), 20, 10, PX).logits(14), EndTaper(disc(), 0, 10, PX).logits(6))


def test_the_taper_is_empty_at_the_end_mark():
    assert not (EndTaper(disc(), 0, 10, PX).logits(10) > 0).any()


def test_logits_of_the_taper_are_clamped():
    assert EndTaper(disc(), 0, 10, PX).logits(1).abs().max() == MAX_LOGIT


@pytest.mark.parametrize("wide", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [20, 21, 22, 23])
def test_a_line_thinner_than_a_mask_pixel_tapers(wide, start):
    line = torch.zeros(PX, PX, dtype=torch.bool)
    line[start : start + wide, 10:60] = True
    assert (EndTaper(line, 0, 10, PX // 4).logits(3) > 0).any()


def test_the_outline_stays_where_the_mask_meets_the_edge_of_the_image():
    half = torch.zeros(PX, PX, dtype=torch.bool)
    half[:40] = True
    kept = EndTaper(half, 0, 10, PX).logits(6)[0, 0] > 0  # a fifth of the way from the outline to the edge is gone: 8 rows
    assert kept[:31].all() and not kept[33:].any()
    assert (EndTaper(torch.ones(PX, PX, dtype=torch.bool), 0, 10, PX).logits(6) > 0).all()


def test_the_taper_of_an_empty_mask_is_empty():
    mixed = EndTaper(disc(), 0, 10, PX).weighted(output(-MAX_LOGIT, -4.0), 1)
    assert mixed.object_score.item() < 0


def test_the_taper_is_centred_on_the_predicted_mask():
    aside = torch.roll(disc(), (5, -9), (0, 1))
    moved, still = EndTaper(disc(), 0, 10, PX).logits(6, aside), EndTaper(disc(), 0, 10, PX).logits(6)
    assert torch.equal(moved > 0, torch.roll(still > 0, (5, -9), (-2, -1)))


def test_the_taper_is_not_centred_on_a_small_component():
    speck = torch.zeros(PX, PX, dtype=torch.bool)
    speck[3:8, 3:8] = True
    assert torch.equal(EndTaper(disc(), 0, 10, PX).logits(6, speck), EndTaper(disc(), 0, 10, PX).logits(6))


def test_the_shifted_taper_does_not_wrap_around_the_image():
    rim = torch.zeros(PX, PX, dtype=torch.bool)
    rim[:, 60:] = True
    moved = EndTaper(disc(), 0, 10, PX).logits(1, rim) > 0
    assert not moved[..., :20].any()


def output(logit, object_score):
    mask, one = torch.full((1, 1, PX, PX), logit), torch.ones(1, 1)
    return SliceOutput(mask, one, torch.zeros(1, dtype=torch.long), object_score * one, mask, mask, torch.zeros(1, 8))


def test_the_taper_and_the_prediction_are_mixed_by_their_shares():
    mixed = EndTaper(disc(), 0, 10, PX).weighted(output(-4.0, -1.0), 1)
    assert mixed.chosen.max().item() == pytest.approx(SHARE * MAX_LOGIT - (1 - SHARE) * 4)
    assert mixed.object_score.item() == pytest.approx(SHARE * MAX_LOGIT - (1 - SHARE) * 1)


def test_a_confident_absence_stays_an_absence():
    assert (EndTaper(disc(), 0, 10, PX).weighted(output(-MAX_LOGIT, -MAX_LOGIT), 1).logits < 0).all()


def test_only_passes_towards_an_end_mark_taper():
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, -2.0)  # it sees nothing anywhere
    frames, nothing = torch.rand(9, 3, PX, PX, generator=torch.Generator().manual_seed(0)), torch.zeros(PX, PX, dtype=torch.bool)
    found = propagate(model, frames, {1: [AnnotatedSlice(4, disc()), AnnotatedSlice(8, nothing)]})[1]
    shown = [bool((plane > 0).any()) for plane in found.logits]
    elsewhere = propagate(model, frames, {1: [AnnotatedSlice(4, disc()), AnnotatedSlice(8, nothing, end=False)]})[1]
    assert not (elsewhere.logits[5] > 0).any()
    assert shown[5] and not any(shown[:4]) and not shown[8]
