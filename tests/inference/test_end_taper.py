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
def test_a_disc_becomes_the_sections_of_a_sphere(t):
    found = EndTaper(disc(), 0, 10, PX).logits(t)
    assert radius(found) == pytest.approx(RADIUS * math.sqrt(1 - (t / 10) ** 2), abs=1.0)


def test_it_tapers_the_same_backwards():
    assert torch.equal(EndTaper(disc(), 20, 10, PX).logits(14), EndTaper(disc(), 0, 10, PX).logits(6))


def test_at_the_end_nothing_is_left():
    assert not (EndTaper(disc(), 0, 10, PX).logits(10) > 0).any()


def test_no_logit_is_surer_than_sure():
    assert EndTaper(disc(), 0, 10, PX).logits(1).abs().max() == MAX_LOGIT


@pytest.mark.parametrize("wide", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [20, 21, 22, 23])
def test_a_thin_line_can_taper_also_where_masks_are_drawn_in_larger_pixels(wide, start):
    line = torch.zeros(PX, PX, dtype=torch.bool)
    line[start : start + wide, 10:60] = True
    assert (EndTaper(line, 0, 10, PX // 4).logits(3) > 0).any()


def test_where_the_mask_meets_the_edge_of_the_frame_its_outline_stays():
    half = torch.zeros(PX, PX, dtype=torch.bool)
    half[:40] = True
    kept = EndTaper(half, 0, 10, PX).logits(6)[0, 0] > 0  # a fifth of the way from the outline to the edge is gone: 8 rows
    assert kept[:31].all() and not kept[33:].any()
    assert (EndTaper(torch.ones(PX, PX, dtype=torch.bool), 0, 10, PX).logits(6) > 0).all()


def test_an_empty_mask_is_no_object():
    mixed = EndTaper(disc(), 0, 10, PX).weighted(output(-MAX_LOGIT, -4.0), 1)
    assert mixed.object_score.item() < 0


def test_it_lies_where_the_network_s_mask_lies():
    aside = torch.roll(disc(), (5, -9), (0, 1))
    moved, still = EndTaper(disc(), 0, 10, PX).logits(6, aside), EndTaper(disc(), 0, 10, PX).logits(6)
    assert torch.equal(moved > 0, torch.roll(still > 0, (5, -9), (-2, -1)))


def test_a_speck_does_not_say_where_the_structure_is():
    speck = torch.zeros(PX, PX, dtype=torch.bool)
    speck[3:8, 3:8] = True
    assert torch.equal(EndTaper(disc(), 0, 10, PX).logits(6, speck), EndTaper(disc(), 0, 10, PX).logits(6))


def test_it_does_not_come_in_again_at_the_other_side():
    rim = torch.zeros(PX, PX, dtype=torch.bool)
    rim[:, 60:] = True
    moved = EndTaper(disc(), 0, 10, PX).logits(1, rim) > 0
    assert not moved[..., :20].any()


def output(logit, object_score):
    mask, one = torch.full((1, 1, PX, PX), logit), torch.ones(1, 1)
    return SliceOutput(mask, one, torch.zeros(1, dtype=torch.long), object_score * one, mask, mask, torch.zeros(1, 8))


def test_it_counts_by_its_share_and_the_network_by_the_rest():
    mixed = EndTaper(disc(), 0, 10, PX).weighted(output(-4.0, -1.0), 1)
    assert mixed.chosen.max().item() == pytest.approx(SHARE * MAX_LOGIT - (1 - SHARE) * 4)
    assert mixed.object_score.item() == pytest.approx(SHARE * MAX_LOGIT - (1 - SHARE) * 1)


def test_a_network_that_is_sure_of_absence_is_predicted():
    assert (EndTaper(disc(), 0, 10, PX).weighted(output(-MAX_LOGIT, -MAX_LOGIT), 1).logits < 0).all()


def test_only_a_pass_towards_a_marked_end_tapers():
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, -2.0)  # it sees nothing anywhere
    frames, nothing = torch.rand(9, 3, PX, PX, generator=torch.Generator().manual_seed(0)), torch.zeros(PX, PX, dtype=torch.bool)
    found = propagate(model, frames, {1: [AnnotatedSlice(4, disc()), AnnotatedSlice(8, nothing)]})[1]
    shown = [bool((plane > 0).any()) for plane in found.logits]
    elsewhere = propagate(model, frames, {1: [AnnotatedSlice(4, disc()), AnnotatedSlice(8, nothing, end=False)]})[1]
    assert not (elsewhere.logits[5] > 0).any()
    assert shown[5] and not any(shown[:4]) and not shown[8]
