"""A label U-Net is weighted as far as it agrees with what was drawn on this volume, and no further."""

from dataclasses import replace

import pytest
import torch

from slmsam2_cli.inference.label_prior import (
    FULL_WEIGHT_DICE,
    MAX_LEARNED_WEIGHT,
    MAX_LOGIT,
    MAX_WEIGHT,
    MIN_AREA_FRACTION,
    LabelPrior,
    best_label_priors,
    compute_label_priors,
)
from slmsam2_cli.inference.propagation import AnnotatedSlice, PropagationOptions, propagate
from slmsam2_cli.model.label_unet import REACH, LabelUNet
from slmsam2_cli.model.roi import RoiCrop
from slmsam2_cli.model.slmsam2 import SliceOutput, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX = 64


class Bright(LabelUNet):
    """Finds label 4 wherever the slice in the middle of its reach is brighter than a half, and is sure of it."""

    def __init__(self):
        super().__init__(1, [4], PX, width=8)

    def forward(self, slices):
        sure = 20 * (slices[:, REACH : REACH + 1] - 0.5)
        return torch.cat([-sure, sure], dim=1)


def stack(slices=7, held=(2, 3, 4)):
    """Bright squares on some slices."""
    frames = torch.zeros(slices, 3, PX, PX)
    frames[list(held), :, 24:40, 24:40] = 1.0
    return frames


def drawn(low=24, high=40):
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def label_prior(prompt_dice=1.0, margin=MAX_LOGIT, roi=None, area=16.0):
    return LabelPrior(torch.full((1, PX, PX), margin), roi or RoiCrop(0, 0, PX), PX, prompt_dice, area)


def output(logit, object_score, edge=PX):
    mask = torch.full((1, 1, edge, edge), logit)
    one = torch.ones(1, 1)
    return SliceOutput(mask, 0.8 * one, torch.zeros(1, dtype=torch.long), object_score * one, mask, mask, torch.zeros(1, 8))


def test_a_prediction_equal_to_the_annotation_has_dice_1_and_weight_one_half():
    found = compute_label_priors(Bright(), stack(), {4: [(3, drawn())]})[4]
    assert found.prompt_dice == pytest.approx(1.0)
    assert found.weight == MAX_WEIGHT


def test_prompt_dice_compares_the_label_unet_with_the_annotated_slices():
    half = drawn()
    half[32:] = False  # 8 rows of 16: Dice 2 * 128 / (256 + 128)
    found = compute_label_priors(Bright(), stack(), {4: [(3, half)]})[4]
    assert found.prompt_dice == pytest.approx(2 / 3)
    assert found.weight == pytest.approx(MAX_WEIGHT * (2 / 3 / FULL_WEIGHT_DICE) ** 2)


def test_end_marks_do_not_count_in_prompt_dice():
    found = compute_label_priors(Bright(), stack(), {4: [(0, torch.zeros(PX, PX, dtype=torch.bool)), (3, drawn())]})[4]
    assert found.prompt_dice == pytest.approx(1.0)


def test_unknown_and_unannotated_labels_have_no_prior():
    assert compute_label_priors(Bright(), stack(), {5: [(3, drawn())]}) == {}
    assert compute_label_priors(Bright(), stack(), {4: [(3, torch.zeros(PX, PX, dtype=torch.bool))]}) == {}


def test_a_prior_with_prompt_dice_0_changes_nothing():
    found = compute_label_priors(Bright(), stack(held=()), {4: [(3, drawn())]})[4]
    seen = output(3.0, 2.0)
    assert found.weight == 0
    assert found.weighted(seen, 3, None) is seen


def test_with_weight_one_half_logits_and_object_score_are_means():
    mixed = label_prior(margin=4.0).weighted(output(-2.0, -1.0), 0, None)
    assert mixed.chosen.unique().tolist() == [1.0]
    assert mixed.object_score.item() == pytest.approx(1.5)
    assert (mixed.logits > 0).all()


def test_a_prior_that_cannot_add_ends_structures_but_starts_none():
    """Object score -4 and recognised at +10, which counts one half: +3 for one that may; +4 and -10: -3 for both."""
    for raises, found in ((True, 3.0), (False, -4.0)):
        assert float(replace(label_prior(), can_add=raises).weighted(output(2.0, -4.0), 0, None).object_score) == pytest.approx(found)
        assert float(
            replace(label_prior(margin=-MAX_LOGIT), can_add=raises).weighted(output(2.0, 4.0), 0, None).object_score
        ) == pytest.approx(-3.0)


def test_logits_of_prior_and_prediction_are_clamped():
    mixed = label_prior(margin=-500.0).weighted(output(500.0, 500.0), 0, None)
    assert mixed.chosen.abs().max() < 1e-5
    assert mixed.object_score.item() < 0  # an empty mask is no object


def test_outside_the_label_unets_roi_the_mask_is_unchanged():
    mixed = label_prior(roi=RoiCrop(0, 0, 32)).weighted(output(-3.0, 1.0), 0, None)
    assert (mixed.chosen[..., :31, :31] > 0).all()
    assert torch.equal(mixed.chosen[..., 33:, :], torch.full((1, 1, 31, 64), -3.0))


def test_pixels_outside_the_roi_do_not_raise_the_object_score():
    mixed = label_prior(margin=-MAX_LOGIT, roi=RoiCrop(16, 16, 32)).weighted(output(3.0, 3.0), 0, None)
    assert mixed.object_score.item() == pytest.approx(-3.5)
    assert (mixed.logits < 0).all()


def test_an_roi_without_prediction_is_unchanged():
    seen = output(3.0, 3.0)
    assert label_prior(margin=-MAX_LOGIT, roi=RoiCrop(0, 0, 16)).weighted(seen, 0, RoiCrop(32, 32, 32)) is seen


def test_the_pointer_follows_the_object_score():
    absent, present = torch.zeros(1, 8), torch.ones(1, 8)
    lost = replace(output(-2.0, -1.0), pointer=absent, pointers=(absent, present))
    assert torch.equal(label_prior(margin=MAX_LOGIT).weighted(lost, 0, None).pointer, present)
    held = replace(output(2.0, 1.0), pointer=present, pointers=(absent, present))
    assert torch.equal(label_prior(margin=-MAX_LOGIT).weighted(held, 0, None).pointer, absent)


def test_the_label_unet_reads_the_channels_it_was_trained_on():
    class Second(Bright):
        """Two channels, of which the second one counts."""

        def __init__(self):
            LabelUNet.__init__(self, 2, [4], PX, width=8)

        def forward(self, slices):
            sure = 20 * (slices[:, 2 * REACH + 1 : 2 * REACH + 2] - 0.5)
            return torch.cat([-sure, sure], dim=1)

    frames = torch.zeros(7, 3, PX, PX)
    frames[:, 1] = stack()[:, 0]
    assert compute_label_priors(Second(), frames, {4: [(3, drawn())]})[4].prompt_dice == pytest.approx(1.0)


def test_a_small_component_does_not_raise_the_object_score():
    margins = torch.full((1, PX, PX), -MAX_LOGIT)
    margins[0, 5:7, 5:7] = MAX_LOGIT  # 4 pixels
    speck = LabelPrior(margins, RoiCrop(0, 0, PX), PX, 1.0, area=40 / MIN_AREA_FRACTION)  # 40 would be enough
    assert speck.weighted(output(-MAX_LOGIT, -MAX_LOGIT), 0, None).object_score.item() < -5
    assert (speck.weighted(output(-MAX_LOGIT, -MAX_LOGIT), 0, None).logits < 0).all()


def test_the_prior_is_cropped_to_the_networks_roi():
    margins = torch.full((1, PX, PX), -4.0)
    margins[0, :, 32:] = 4.0
    mixed = LabelPrior(margins, RoiCrop(0, 0, PX), PX, 1.0, 16.0).weighted(output(0.0, 5.0, edge=32), 0, RoiCrop(16, 40, 16))
    assert (mixed.chosen == 2.0).all()


@pytest.fixture(scope="module")
def model():
    """Random weights that believe nothing to be present."""
    torch.manual_seed(0)
    made = SlmSam2(NetworkPlan(size="nano"), PX).eval()
    torch.nn.init.constant_(made.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, -6.0)
    made.label_unet = Bright().eval()
    return made


def shown(found):
    return [bool((plane > 0).any()) for plane in found.logits]


@pytest.mark.parametrize("roi_scale", [None, 2.0])
def test_the_prior_recovers_a_lost_structure_and_ends_it(model, roi_scale):
    anchors = {4: [AnnotatedSlice(3, drawn())]}
    heard = propagate(model, stack(), anchors, options=PropagationOptions(roi_scale=roi_scale, use_label_prior=True))[4]
    assert shown(heard) == [False, False, True, True, True, False, False]
    assert heard.prompt_dice == pytest.approx(1.0)
    alone = propagate(model, stack(), anchors, options=PropagationOptions(roi_scale=roi_scale))[4]
    assert shown(alone) == [False, False, False, True, False, False, False]
    assert alone.prompt_dice is None


def test_objects_that_are_no_labels_of_the_data_set_have_no_prior(model):
    found = propagate(model, stack(), {9: [AnnotatedSlice(3, drawn())]}, options=PropagationOptions(use_label_prior=True))[9]
    assert found.prompt_dice is None and shown(found)[2:5] == [False, True, False]


class Dark(Bright):
    """Finds label 4 wherever it is dark, so never where it was annotated here."""

    def forward(self, slices):
        return super().forward(slices).flip(1)


def test_of_two_label_unets_the_one_that_agrees_better_with_the_annotation_counts():
    annotated = {4: [(3, drawn())]}
    kept, replaced = best_label_priors(Bright(), Dark(), stack(), annotated)[4], best_label_priors(Dark(), Bright(), stack(), annotated)[4]
    assert not kept.learned and kept.weight == MAX_WEIGHT
    assert replaced.learned and replaced.weight == MAX_LEARNED_WEIGHT
    assert torch.equal(kept.margins, replaced.margins) and kept.roi == replaced.roi


def test_where_both_agree_equally_the_models_own_label_unet_counts():
    assert not best_label_priors(Bright(), Bright(), stack(), {4: [(3, drawn())]})[4].learned


def test_one_label_unet_alone_counts_with_the_weight_of_its_kind():
    annotated = {4: [(3, drawn())]}
    assert best_label_priors(None, Bright(), stack(), annotated)[4].weight == MAX_LEARNED_WEIGHT
    assert best_label_priors(Bright(), None, stack(), annotated)[4].weight == MAX_WEIGHT
    assert best_label_priors(None, None, stack(), annotated) == {}
