"""Small pictures of slices: which slices are chosen, where outlines are drawn, and the thumbnails of plan.html."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report.cases import block, loaded_case
from report.planning import case_of, dataset, plan_of

from slmsam2_cli.report.contact_sheet import (
    COLOURS,
    PREDICTION,
    REFERENCE,
    SAMPLE,
    MissingThumbnail,
    SliceChoice,
    Thumbnail,
    choose_evenly,
    display_size,
    draw_slices,
    make_pictures,
    middle_of_largest,
    montage,
    outline,
    paint_outlines,
    sample_values,
    worst_of_all,
    worst_slices,
)
from slmsam2_cli.report.schema import Picture, SliceMark, Structure


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def rgb(place):
    return tuple(COLOURS[place].to_bytes(3, "big"))


def test_a_thumbnail_shows_the_middle_slice_of_the_largest_label():
    labels = np.zeros((9, 4, 4), np.uint8)
    labels[1:4, :3] = 2
    labels[6:9, 0] = 1
    assert middle_of_largest(labels, (1, 2)) == (2, 2)


def test_an_empty_mask_shows_the_middle_slice():
    assert middle_of_largest(np.zeros((9, 4, 4), np.uint8), (1,)) == (4, None)


def test_the_ignored_label_is_not_the_largest():
    labels = np.full((9, 4, 4), 3, np.uint8)
    labels[7, 0, 0] = 1
    assert middle_of_largest(labels, (1,)) == (7, 1)


def test_a_picture_is_as_wide_and_high_as_its_slice_in_mm():
    assert display_size((50, 50), (2.0, 1.0), (200, 240)) == (120, 240)
    assert display_size((50, 100), (1.0, 1.0), (200, 240)) == (200, 100)


def test_outlines_lie_inside_their_label_in_its_colour():
    canvas = np.zeros((20, 20, 3), np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    labels[4:16, 4:10], labels[4:16, 10:16] = 5, 7
    paint_outlines(canvas, labels, (5, 7))
    assert tuple(canvas[10, 4]) == rgb(0) and tuple(canvas[10, 15]) == rgb(1)
    assert tuple(canvas[10, 7]) == tuple(canvas[2, 2]) == (0, 0, 0)


def test_touching_labels_each_have_an_outline_and_the_edge_of_the_picture_is_a_border():
    labels = np.zeros((6, 8), np.uint8)
    labels[:4, 1:4], labels[:4, 4:7] = 1, 2
    border = outline(labels)
    assert (border[1, 3], border[1, 4], border[1, 2], border[0, 2], border[4, 2]) == (True, True, False, True, False)
    assert np.array_equal(outline(labels, 2), labels > 0)  # three pixels wide: the second ring fills the rest


def test_of_many_cases_evenly_spaced_ones_are_shown():
    assert choose_evenly(range(100), 4) == (12, 37, 62, 87)
    assert choose_evenly("abc", 4) == ("a", "b", "c")


def test_a_sample_of_intensities_covers_all_columns_evenly():
    columns = np.tile(np.arange(1000), 1000)
    sample = sample_values(columns)
    assert sample.size == SAMPLE
    assert np.histogram(sample, 10, (0, 1000))[0] == pytest.approx(SAMPLE / 10, rel=0.02)


def test_few_values_are_all_sampled():
    assert sample_values(np.arange(3)).tolist() == [0, 1, 2]


def test_a_thumbnail_has_the_planned_window_and_the_sizes_of_its_case(tmp_path):
    data, fingerprint = dataset(tmp_path, case_of("a", spacing=(5.0, 2.0, 1.0)))
    (look,) = montage(data, plan_of(fingerprint, axis="SI"))
    assert isinstance(look, Thumbnail)
    assert (look.case, look.axis, look.slice, look.label) == ("a", "SI", 4, 1)
    assert (look.size, look.spacing_mm) == ((24, 20, 8), (1.0, 2.0, 5.0))
    assert look.width * 40 == pytest.approx(look.height * 24, rel=0.01)
    shown = decode(look.pictures[0])
    assert shown.shape == (2 * look.height, 2 * look.width, 3)
    assert shown[:4].max() < 40 and shown[len(shown) // 2, shown.shape[1] // 2].min() > 215  # 100 and 300 of a window from 100 to 300
    assert look.samples[0].window == pytest.approx((100, 300))
    assert set(look.samples[0].labelled) == {300.0}


def test_the_head_is_up_in_a_sagittal_thumbnail(tmp_path):
    case = case_of("a")
    case.image[4:] = 100  # S increases with the slice as stored: the lower half is bright where labelled
    case.image[:4] = 300
    data, fingerprint = dataset(tmp_path, case)
    (look,) = montage(data, plan_of(fingerprint, axis="LR"))
    shown = decode(look.pictures[0]).mean(axis=(1, 2))
    assert shown[: len(shown) // 4].mean() < shown[-len(shown) // 4 :].mean()


def test_an_unreadable_case_has_no_thumbnail_but_a_reason_and_the_others_are_drawn(tmp_path):
    data, fingerprint = dataset(tmp_path, case_of("a"), case_of("b"))
    (tmp_path / "imagesTr" / "a.nii.gz").unlink()
    advanced = []
    missing, look = montage(data, plan_of(fingerprint), lambda steps, note: advanced.append(note))
    assert isinstance(missing, MissingThumbnail) and missing.case == "a" and "imagesTr/a.nii.gz" in missing.problem
    assert isinstance(look, Thumbnail) and look.case == "b"
    assert advanced == ["a", "b"]


def structure(*marks, name="liver"):
    return Structure("1", name, "ok", {}, slices=marks)


def mark(k, dice, reference=100, prediction=100, **more):
    return SliceMark(k, prediction, reference, dice, **more)


def pictures(case, found, choices):
    return make_pictures(case, choices, draw_slices(found, [choice.slice for choice in choices]))


def chosen(*structures, most=4):
    return [choice.slice for choice in worst_slices(structures, most)]


def test_the_lowest_dice_comes_first():
    assert chosen(structure(mark(0, 0.9), mark(10, 0.2), mark(20, 0.5))) == [10, 20, 0]


def test_half_an_organ_missed_comes_before_a_few_voxels():
    assert chosen(structure(mark(0, 0.0, reference=1, prediction=0), mark(10, 0.0, prediction=0), mark(20, 0.95))) == [10, 0, 20]


def test_the_worst_slices_are_not_close_together():
    assert chosen(structure(*(mark(k, 0.1 + k / 1000) for k in range(12)), mark(30, 0.8)), most=2) == [0, 2]
    long = structure(*(mark(k, 0.1 + k / 1000) for k in range(120)))
    assert chosen(long) == [0, 10, 20, 30]


def test_annotated_and_perfect_slices_are_shown_only_when_there_are_no_others():
    assert chosen(structure(mark(3, 1.0, prompted=True), mark(9, 0.5))) == [9]
    assert chosen(structure(mark(3, 1.0, prompted=True))) == [3]
    assert chosen() == []


def test_a_slice_is_rated_by_its_worst_structure_and_names_it():
    (first, *_) = worst_slices([structure(mark(0, 0.9), mark(9, 0.8)), structure(mark(0, 0.3), name="spleen")])
    assert (first.slice, first.words) == (0, "spleen Dice 0.300")


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (mark(0, 0.5, distance=-3), "Dice 0.500, 3 slices from the prompt"),
        (mark(0, 0.0, prediction=0), "missed (100 px)"),
        (mark(0, 0.0, reference=0, distance=1), "false positive (100 px), 1 slice from the prompt"),
        (SliceMark(0, 50, confidence=0.25, disagreement=0.5), "confidence 0.250, forward and backward pass disagree by 0.500"),
        (SliceMark(0, 50, prompted=True, confidence=1.0), "annotated"),
    ],
)
def test_captions_name_the_fault(one, words):
    assert worst_slices([structure(one)])[0].words == words


def test_without_a_reference_slices_with_low_confidence_come_first():
    marks = [SliceMark(0, 50, confidence=0.9), SliceMark(10, 50, confidence=0.3), SliceMark(20, 50, confidence=0.8, disagreement=0.6)]
    assert chosen(structure(*marks)) == [10, 20, 0]


def drawn(picture):
    return decode(picture.uri).astype(int)


def near(pixels, colour):
    """Return which pixels have about this colour; WebP is lossy, and more so in colour than in brightness."""
    return np.abs(pixels - np.array(colour)).sum(axis=-1) < 150


def shown(case, k=4):
    (picture,) = pictures("a", case, [SliceChoice(k, 1.0, "")])
    return picture, drawn(picture)


def test_a_picture_shows_the_structures_and_a_margin_in_square_mm():
    case = loaded_case(block((8, 200, 200), y=(100, 140), x=(50, 150)), spacing=(3, 1.0, 0.5))
    picture, pixels = shown(case)
    assert pixels.shape[:2] == (picture.height, picture.width)
    rows_mm, columns_mm = 40 + 2 * 10, 50 + 2 * 12.5
    assert picture.width == 220 and picture.height == pytest.approx(220 * rows_mm / columns_mm, abs=1)
    assert picture.uri.startswith("data:image/webp;base64,") and len(picture.uri) < 8000


def test_both_outlines_lie_at_the_borders_of_the_masks():
    truth, prediction = block((8, 40, 40), y=(10, 20), x=(10, 20)), block((8, 40, 40), y=(10, 20), x=(20, 30))
    _, pixels = shown(loaded_case(prediction, truth))
    left, right = near(pixels, REFERENCE), near(pixels, PREDICTION)
    assert left.any() and right.any() and not (left & right).any()
    middle = pixels.shape[1] / 2
    assert np.nonzero(left)[1].max() < middle <= np.nonzero(right)[1].min() + 1


def test_colours_alternate_where_both_outlines_coincide():
    mask = block((8, 40, 40))
    _, both = shown(loaded_case(mask, mask))
    _, alone = shown(loaded_case(None, mask))
    blue, orange = (np.sign(colour[2] - colour[0]) for colour in (REFERENCE, PREDICTION))
    towards = np.where(np.abs(both[..., 2] - both[..., 0]) > 20, np.sign(both[..., 2] - both[..., 0]), 0)
    assert (towards == blue).sum() > 100 and (towards == orange).sum() > 100
    assert near(alone, REFERENCE).sum() > near(both, REFERENCE).sum() and not near(alone, PREDICTION).any()


def test_a_picture_shows_the_intensities_of_its_slice():
    image = np.zeros((8, 20, 24), np.float32)
    image[:, :, 12:] = 100
    _, pixels = shown(loaded_case(block(y=(8, 12), x=(10, 14)), image=image))
    assert pixels[5, 3].max() < 30 and pixels[5, -3].min() > 220


def test_without_an_image_outlines_are_drawn_on_plain_grey():
    _, pixels = shown(loaded_case(block()))
    assert np.abs(pixels[2, 2] - 32).max() < 8


def test_pictures_are_reproducible_and_small_even_for_noise():
    image = np.random.default_rng(0).normal(size=(8, 300, 300)).astype(np.float32)
    case = loaded_case(block((8, 300, 300), y=(20, 280), x=(20, 280)), image=image)
    one, two = shown(case)[0], shown(case)[0]
    assert one == two and len(one.uri) < 14000


def test_empty_masks_and_slices_outside_the_volume_have_no_picture():
    empty = np.zeros((8, 20, 24), np.uint8)
    assert pictures("a", loaded_case(empty, empty), [SliceChoice(1, 1.0, "")]) == ()
    assert pictures("a", loaded_case(block()), [SliceChoice(8, 1.0, "")]) == ()


def test_the_worst_slices_of_all_cases_are_at_most_two_per_case():
    def of(case, k):
        return Picture(case, k, "", 1, 1, "")

    shown = {"a": [(0.1, of("a", 1)), (0.9, of("a", 2)), (0.8, of("a", 3))], "b": [(0.5, of("b", 4))]}
    assert [(p.case, p.slice) for p in worst_of_all(shown)] == [("a", 2), ("a", 3), ("b", 4)]
    assert [(p.case, p.slice) for p in worst_of_all(shown, most=2, per_case=1)] == [("a", 2), ("b", 4)]
