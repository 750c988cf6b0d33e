"""Pictures of slices: which are chosen, and that both outlines can be seen where they belong."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report.cases import block, opened

from slmsam2_cli.report.contact_sheet import PREDICTION, TRUTH, Choice, captioned, cohort_sheet, draw_slices, worst_slices
from slmsam2_cli.report.schema import Picture, SliceMark, Structure


def structure(*marks, name="liver"):
    return Structure("1", name, "ok", {}, slices=marks)


def mark(k, dice, reference=100, prediction=100, **more):
    return SliceMark(k, prediction, reference, dice, **more)


def pictures(case, found, choices):
    return captioned(case, choices, draw_slices(found, [choice.slice for choice in choices]))


def chosen(*structures, most=4):
    return [choice.slice for choice in worst_slices(structures, most)]


def test_the_lowest_dice_comes_first():
    assert chosen(structure(mark(0, 0.9), mark(10, 0.2), mark(20, 0.5))) == [10, 20, 0]


def test_half_an_organ_missed_comes_before_a_speck():
    assert chosen(structure(mark(0, 0.0, reference=1, prediction=0), mark(10, 0.0, prediction=0), mark(20, 0.95))) == [10, 0, 20]


def test_of_a_bad_stretch_only_one_in_a_neighbourhood_is_shown():
    assert chosen(structure(*(mark(k, 0.1 + k / 1000) for k in range(12)), mark(30, 0.8)), most=2) == [0, 2]
    long = structure(*(mark(k, 0.1 + k / 1000) for k in range(120)))
    assert chosen(long) == [0, 10, 20, 30]


def test_given_slices_and_perfect_ones_are_shown_only_when_there_is_nothing_else():
    assert chosen(structure(mark(3, 1.0, prompted=True), mark(9, 0.5))) == [9]
    assert chosen(structure(mark(3, 1.0, prompted=True))) == [3]
    assert chosen() == []


def test_a_slice_is_as_bad_as_its_worst_structure_which_is_named():
    (first, *_) = worst_slices([structure(mark(0, 0.9), mark(9, 0.8)), structure(mark(0, 0.3), name="spleen")])
    assert (first.slice, first.words) == (0, "spleen Dice 0.30")


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (mark(0, 0.5, distance=-3), "Dice 0.50, 3 from the prompt"),
        (mark(0, 0.0, prediction=0), "missed (100 px)"),
        (mark(0, 0.0, reference=0, distance=7), "false (100 px), 7 from the prompt"),
        (SliceMark(0, 50, confidence=0.25, disagreement=0.5), "confidence 0.25, passes disagree by 0.50"),
        (SliceMark(0, 50, prompted=True, confidence=1.0), "given"),
    ],
)
def test_the_caption_says_what_is_wrong(one, words):
    assert worst_slices([structure(one)])[0].words == words


def test_without_a_truth_the_least_sure_slices_come_first():
    marks = [SliceMark(0, 50, confidence=0.9), SliceMark(10, 50, confidence=0.3), SliceMark(20, 50, confidence=0.8, disagreement=0.6)]
    assert chosen(structure(*marks)) == [10, 20, 0]


def drawn(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGB")).astype(int)


def near(pixels, colour):
    """Which pixels have about this colour; the file is lossy, and more so in colour than in brightness."""
    return np.abs(pixels - np.array(colour)).sum(axis=-1) < 150


def shown(case, k=4):
    (picture,) = pictures("a", case, [Choice(k, 1.0, "")])
    return picture, drawn(picture)


def test_a_picture_shows_the_structures_and_a_margin_with_square_pixels_in_mm():
    case = opened(block((8, 200, 200), y=(100, 140), x=(50, 150)), spacing=(3, 1.0, 0.5))
    picture, pixels = shown(case)
    assert pixels.shape[:2] == (picture.height, picture.width)
    rows_mm, columns_mm = 40 + 2 * 10, 50 + 2 * 12.5
    assert picture.width == 220 and picture.height == pytest.approx(220 * rows_mm / columns_mm, abs=1)
    assert picture.uri.startswith("data:image/webp;base64,") and len(picture.uri) < 8000


def test_both_outlines_are_where_the_masks_end():
    truth, prediction = block((8, 40, 40), y=(10, 20), x=(10, 20)), block((8, 40, 40), y=(10, 20), x=(20, 30))
    _, pixels = shown(opened(prediction, truth))
    left, right = near(pixels, TRUTH), near(pixels, PREDICTION)
    assert left.any() and right.any() and not (left & right).any()
    middle = pixels.shape[1] / 2
    assert np.nonzero(left)[1].max() < middle <= np.nonzero(right)[1].min() + 1


def test_where_both_outlines_coincide_the_colours_take_turns():
    mask = block((8, 40, 40))
    _, both = shown(opened(mask, mask))
    _, alone = shown(opened(None, mask))
    blue, orange = (np.sign(colour[2] - colour[0]) for colour in (TRUTH, PREDICTION))
    towards = np.where(np.abs(both[..., 2] - both[..., 0]) > 20, np.sign(both[..., 2] - both[..., 0]), 0)
    assert (towards == blue).sum() > 100 and (towards == orange).sum() > 100
    assert near(alone, TRUTH).sum() > near(both, TRUTH).sum() and not near(alone, PREDICTION).any()


def test_the_grey_values_are_those_of_the_slice():
    image = np.zeros((8, 20, 24), np.float32)
    image[:, :, 12:] = 100
    _, pixels = shown(opened(block(y=(8, 12), x=(10, 14)), image=image))
    assert pixels[5, 3].max() < 30 and pixels[5, -3].min() > 220


def test_without_an_image_the_outlines_are_on_plain_grey():
    _, pixels = shown(opened(block()))
    assert np.abs(pixels[2, 2] - 32).max() < 8


def test_the_same_case_gives_the_same_bytes_and_noise_stays_small():
    image = np.random.default_rng(0).normal(size=(8, 300, 300)).astype(np.float32)
    case = opened(block((8, 300, 300), y=(20, 280), x=(20, 280)), image=image)
    one, two = shown(case)[0], shown(case)[0]
    assert one == two and len(one.uri) < 14000


def test_empty_masks_and_slices_beyond_the_volume_give_no_picture():
    empty = np.zeros((8, 20, 24), np.uint8)
    assert pictures("a", opened(empty, empty), [Choice(1, 1.0, "")]) == ()
    assert pictures("a", opened(block()), [Choice(8, 1.0, "")]) == ()


def test_the_cohorts_sheet_holds_two_of_a_case_and_the_worst_first():
    def of(case, k):
        return Picture(case, k, "", 1, 1, "")

    shown = {"a": [(0.1, of("a", 1)), (0.9, of("a", 2)), (0.8, of("a", 3))], "b": [(0.5, of("b", 4))]}
    assert [(p.case, p.slice) for p in cohort_sheet(shown)] == [("a", 2), ("a", 3), ("b", 4)]
    assert [(p.case, p.slice) for p in cohort_sheet(shown, most=2, a_case=1)] == [("a", 2), ("b", 4)]
