"""One annotated image, many to segment: what is promised whatever the weights say, and in whatever order they come."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.inference.image_set import bank_policy, segment_images
from slmsam2_cli.io.volume import read_image
from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

PX = 64
REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SETS = ("Sarcoma_MR_T1", "SpinalCord_MRI", "Task09_Spleen_crop")


def build(policy="selfsort", **options):
    """Random weights that believe every object to be present, and a bank that takes nearly everything."""
    torch.manual_seed(0)
    model = SlmSam2(NetworkPlan(size="nano", policy=policy, **({"bank_confidence": 0.0} | options)), PX).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return model


@pytest.fixture(scope="module")
def model():
    return build(bank_slices=3, bank_read=2)


def noise(count, seed=0):
    return torch.rand(count, 3, PX, PX, generator=torch.Generator().manual_seed(seed))


def square(low=16, high=40):
    mask = torch.zeros(PX, PX, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def angled(*degrees):
    """Images whose grey value is an angle, to be used with `circle`."""
    return torch.tensor(degrees, dtype=torch.float32)[:, None, None, None].expand(-1, 3, PX, PX) / 1000


@pytest.fixture
def circle(monkeypatch):
    """An encoder that sees a point on a circle everywhere: the cosine of the angle between two images is their similarity."""
    encode = SlmSam2.encode

    def seen(self, frames):
        angle = (frames[:, 0, 0, 0] * 1000).deg2rad()
        features = encode(self, frames)
        top = torch.zeros_like(features.top)
        top[:, 0], top[:, 1] = angle.cos()[:, None, None], angle.sin()[:, None, None]
        return replace(features, top=top)

    monkeypatch.setattr(SlmSam2, "encode", seen)


@pytest.fixture
def tracked(monkeypatch):
    """(anchors, stored, read) of every image that is segmented, in order."""
    calls, track, long = [], SlmSam2.track, SelfSort.read
    monkeypatch.setattr(SlmSam2, "track", lambda self, f, bank, at, policy: calls.append([at.slice]) or track(self, f, bank, at, policy))

    def noted(self, moment):
        (stream,) = long(self, moment)
        calls[-1] += [list(moment.conditioning), list(moment.tracked), [s for s, _ in stream.spatial]]
        return (stream,)

    monkeypatch.setattr(SelfSort, "read", noted)
    return calls


def test_an_annotated_image_keeps_its_mask_and_is_nearest_to_itself(model):
    found = segment_images(model, noise(3), {1: square()})[1]
    assert ((found.logits > 0) == square()).all()
    assert (found.confidence, found.nearest, found.similarity, found.warning) == (1.0, 1, 1.0, "")


def test_every_image_gets_logits_and_a_confidence(model):
    found = segment_images(model, noise(5), {1: square()})
    assert len(found) == 5
    assert all(one.logits.shape == (PX, PX) and torch.isfinite(one.logits).all() and 0 <= one.confidence <= 1 for one in found)


def test_each_image_is_nearest_to_the_annotated_image_it_resembles(circle):
    found = segment_images(build(), angled(0, 20, 90, 80, 100), {0: square(), 2: square()})
    assert [one.nearest for one in found] == [0, 0, 2, 2, 2]
    expected = [1, math.cos(math.radians(20)), 1, math.cos(math.radians(10)), math.cos(math.radians(10))]
    assert [one.similarity for one in found] == pytest.approx(expected, abs=1e-5)


def test_an_image_that_resembles_no_annotated_one_is_warned_about(circle):
    found = segment_images(build(bank_similarity=0.5), angled(0, 59, 61, 180), {0: square()})
    assert [bool(one.warning) for one in found] == [False, False, True, True]
    assert found[3].warning == "resembles no annotated image (similarity -1.00, wanted 0.50). Check it, or annotate one like it"


def test_the_most_similar_image_is_segmented_first(circle, monkeypatch):
    angles, track = [], SlmSam2.track

    def noted(self, features, *rest):
        x, y = features.top[0, :2, 0, 0].tolist()
        angles.append(round(math.degrees(math.atan2(y, x))))
        return track(self, features, *rest)

    monkeypatch.setattr(SlmSam2, "track", noted)
    segment_images(build(), angled(0, 50, 10, 40, 30, 20), {0: square()})
    assert angles == [10, 20, 30, 40, 50] * 2


def test_in_the_second_round_images_read_the_same_bank_without_themselves(circle, tracked):
    segment_images(build(bank_slices=3), angled(0, 50, 10, 40, 30, 20), {0: square()})
    second = tracked[5:]
    banks = [set(stored) | ({image} if len(stored) < 3 else set()) for image, _, stored, _ in second]
    assert len(second) == 5 and all(bank == banks[0] and len(bank) == 3 for bank in banks)
    assert all(image not in read for image, _, _, read in second)


def test_the_annotated_images_are_always_read(circle, tracked):
    segment_images(build(bank_slices=1, bank_read=1), angled(0, 50, 10, 40, 175), {0: square(), 4: square()})
    assert all(len(anchors) == 2 and read[:2] == anchors for _, anchors, _, read in tracked)


def test_images_that_resemble_no_annotated_one_are_never_read(circle, tracked):
    segment_images(build(bank_similarity=0.5), angled(0, 120, 170, 200), {0: square()})
    assert all(read == anchors for _, anchors, _, read in tracked)


def test_an_annotated_image_without_the_object_affects_no_other_image(model, tracked):
    found = segment_images(model, noise(3), {0: square(), 1: torch.zeros(PX, PX, dtype=torch.bool)})
    assert (found[1].logits < 0).all() and found[1].confidence == 1 and found[1].nearest == 1
    assert all(len(anchors) == 1 for _, anchors, _, _ in tracked) and found[2].nearest == 0


def test_the_same_image_twice_gets_the_same_mask(model):
    images = noise(5)
    images[4] = images[2]
    found = segment_images(model, images, {0: square()})
    assert torch.equal(found[2].logits, found[4].logits) and found[2].confidence == found[4].confidence


def test_a_copy_of_the_annotated_image_is_segmented_and_nearest_to_it(model):
    images = noise(3)
    images[2] = images[0]
    found = segment_images(model, images, {0: square()})
    assert found[2].nearest == 0 and not torch.equal(found[2].logits, found[0].logits)


def test_without_an_annotated_object_there_is_an_error(model):
    for prompts in ({}, {0: torch.zeros(PX, PX, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="annotate one that does"):
            segment_images(model, noise(2), prompts)


def test_a_set_of_one_annotated_image_returns_its_annotation(model):
    assert [one.confidence for one in segment_images(model, noise(1), {0: square()})] == [1.0]


def test_progress_counts_two_rounds(model):
    steps = []
    segment_images(model, noise(4), {0: square()}, advance=steps.append)
    assert sum(steps) == 2 * 3


@pytest.mark.parametrize("name", ["fifo", "selfsort", "shortlong", "shortlong+selfsort"])
def test_weights_of_every_policy_can_be_used_and_keep_their_own_policy(name):
    other = build(name)
    before = other.policy
    found = segment_images(other, noise(4), {0: square()})
    assert other.policy is before and len(found) == 4
    assert bank_policy(other).name == ("shortlong+selfsort" if "short" in name else "selfsort")
    assert bank_policy(other).min_similarity == 0.5 and (name != "fifo" or isinstance(before, Fifo))


def assert_independent_of_order(model, images, masks, order):
    """masks: index in the original order -> mask."""
    place = {old: new for new, old in enumerate(order)}
    one = segment_images(model, images, masks)
    other = segment_images(model, images[list(order)], {place[i]: mask for i, mask in masks.items()})
    for old, new in place.items():
        assert (one[old].logits - other[new].logits).abs().max() <= 1e-4
        assert one[old].confidence == pytest.approx(other[new].confidence, abs=1e-4)
        assert place[one[old].nearest] == other[new].nearest and one[old].warning == other[new].warning


@settings(max_examples=8)
@given(order=st.permutations(range(7)))
def test_the_order_of_the_images_does_not_matter(model, order):
    assert_independent_of_order(model, noise(7), {2: square(), 5: square(8, 30)}, order)


def real_slices(name, count=8):
    """(count, 3, PX, PX) in [0, 1]: slices from the middle of a real volume, spread evenly."""
    folder = REAL / name / "imagesTr"
    if not folder.is_dir():
        pytest.skip("the shared real volumes are not beside this checkout")
    path = min(folder.iterdir())
    voxels = torch.from_numpy(read_image([path], case=name, root=REAL / name).voxels[0].astype("float32"))
    axis = min(range(3), key=lambda a: voxels.shape[a])
    spread = torch.linspace(0.2, 0.8, count) * (voxels.shape[axis] - 1)
    slices = voxels.movedim(axis, 0)[spread.long()]
    grey = ((slices - slices.min()) / (slices.max() - slices.min()))[:, None]
    return torch.nn.functional.interpolate(grey, size=(PX, PX), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("policy", ["selfsort", "shortlong+selfsort"])
def test_the_order_of_real_slices_does_not_matter(name, policy):
    images = real_slices(name)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 7, 5, 1, 6, 2, 4]):
        assert_independent_of_order(build(policy, bank_slices=3, bank_read=2), images, {4: square()}, order)
