"""The Python side: what goes in at any size comes out at that size, and files are segmented as the command does it."""

import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from made_models import planned, save_adapter_alone, save_model, sure

import slmsam2_cli
from slmsam2_cli import build, load, propagate, segment, segment_images
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import CaseError, DeviceError, PlanError, WeightsError
from slmsam2_cli.inference.propagation import AnnotatedSlice, full_resolution
from slmsam2_cli.inference.propagation import propagate as through_the_engine
from slmsam2_cli.model.calibration import Calibration
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan, write_plan

PX = 64
HALVED = Calibration(method="isotonic", confidence=(0.0, 1.0), dice=(0.0, 0.5), slices=99, error_before=0.3, error_after=0.1)


@pytest.fixture(scope="module")
def model():
    made = build("nano", input_size=PX, device="cpu")
    sure(made.network)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two synthetic phantoms, a plan for them, and a model that was tuned by it, or so its file says."""
    folder = tmp_path_factory.mktemp("python")
    write_phantom_dataset(folder, cases=2, test_cases=0, seed=5, shape=(8, 40, 36))
    plan = planned(folder)
    write_plan(folder / "plan.json", plan)
    save_model(folder / "model.safetensors", plan, HALVED)
    return folder


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def square(height=40, width=56):
    mask = np.zeros((height, width), bool)
    mask[8:24, 10:30] = True
    return mask


# The package


def test_importing_the_package_imports_no_torch():
    code = "import sys, slmsam2_cli as s; dir(s); before = 'torch' in sys.modules; s.build; print(before, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True"]


def test_the_package_exports_exactly_the_documented_names():
    assert set(slmsam2_cli.__all__) <= set(dir(slmsam2_cli))
    with pytest.raises(AttributeError, match="has no attribute 'prpagate'"):
        slmsam2_cli.prpagate  # noqa: B018


# Build


def test_the_same_seed_builds_the_same_network_and_disturbs_no_other_random_draw():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (build("nano", input_size=PX, seed=seed, device="cpu").network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_built_network_has_the_requested_settings_and_warns_that_it_is_random():
    made = build("nano", input_size=96, policy="fifo", shared_memory=True, device="cpu")
    assert made.network.network == NetworkPlan(size="nano", policy="fifo", shared_memory=True)
    assert (made.input_size, made.plan, made.network.training) == (96, None, False)
    assert repr(made) == "SlmSam2(nano, fifo, 96 px, cpu)" and "random weights" in made.warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "size: .*'nano'.*found 'huge'"),
        ({"input_size": 100}, "input_size is 100; it must be a positive multiple of 32"),
        ({"polcy": "fifo"}, "polcy: unknown key"),
        ({"policy": "lifo"}, "policy: .*found 'lifo'"),
        ({"input_size": "64"}, "input_size: '64'; give a whole number"),
        ({"input_size": 64.0}, "input_size: 64.0; give a whole number"),
        ({"seed": None}, "seed: None; give a whole number"),
    ],
)
def test_invalid_network_settings_are_rejected_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(**{"size": "nano", "input_size": PX, **options})
    assert "\n" not in str(caught.value)


# Encode


def test_slices_of_any_size_are_encoded_at_strides_of_16_4_and_8(model):
    for slices in (noise(3, 40, 56), noise(3, 3, 40, 56), torch.rand(3, 2, 99, 20)):
        features = model.encode(slices)
        channels = features.top.shape[1]
        assert features.top.shape == (3, channels, PX // 16, PX // 16)
        assert [part.shape for part in features.fine] == [(3, channels // 8, PX // 4, PX // 4), (3, channels // 4, PX // 8, PX // 8)]


def test_slices_of_the_input_size_are_encoded_unchanged(model):
    frames = torch.rand(2, 3, PX, PX)
    with torch.no_grad():
        expected = model.network.encode(frames)
    assert torch.equal(model.encode(frames).top, expected.top)


def test_adjacent_slices_of_the_plan_are_used_here_too(folder):
    plan = planned(folder)
    geometry = plan.geometry.model_copy(update={"adjacent_slices": True})
    told = load(folder / "model.safetensors", plan=plan.model_copy(update={"geometry": geometry}), device="cpu")
    slices = torch.rand(3, told.input_size, told.input_size)
    colours = torch.stack([slices, slices[[0, 0, 1]], slices[[1, 2, 2]]], dim=1)
    with torch.no_grad():
        expected = told.network.encode(colours)
    assert torch.equal(told.encode(slices).top, expected.top)


# Propagate


def test_masks_have_the_size_of_the_slices_and_annotated_slices_are_unchanged(model):
    for height, width in ((40, 56), (56, 40), (200, 33), (64, 64)):
        drawn = np.zeros((height, width), bool)
        drawn[5:20, 7:25] = True
        track = propagate(model, noise(5, height, width), {"organ": {2: drawn}})["organ"]
        assert track.mask.shape == (5, height, width) and track.mask.dtype == bool
        assert np.array_equal(track.mask[2], drawn)
        assert track.confidence.shape == (5,) and track.confidence[2] == 1 and ((track.confidence >= 0) & (track.confidence <= 1)).all()


def test_slices_of_the_input_size_are_propagated_unchanged(model):
    slices, drawn = noise(5, PX, PX), square(PX, PX)
    frames = torch.from_numpy(slices)[:, None].expand(-1, 3, -1, -1)
    found = through_the_engine(model.network, frames, {1: [AnnotatedSlice(2, torch.from_numpy(drawn))]})[1]
    expected = (full_resolution(found.logits, PX, PX, PX) > 0).numpy()
    track = propagate(model, slices, {1: {2: drawn}})[1]
    others = [0, 1, 3, 4]
    assert np.array_equal(track.mask[others], expected[others]) and expected[others].any()
    assert np.array_equal(track.confidence, found.confidence.numpy())


def test_nothing_is_found_beyond_an_empty_slice(model):
    track = propagate(model, noise(7, 40, 56), {"organ": {2: square(), 4: np.zeros((40, 56), bool)}})["organ"]
    assert not track.mask[4:].any() and (track.confidence[[0, 1, 3]] > 0).all()
    assert track.confidence[4] == 1 and (track.confidence[5:] == 0).all()


def test_between_two_annotated_slices_there_is_a_disagreement(model):
    disagreement = propagate(model, noise(5, 40, 56), {"organ": {1: square(), 3: square()}})["organ"].disagreement
    assert [bool(np.isnan(one)) for one in disagreement] == [True, True, False, True, True] and 0 <= disagreement[2] <= 1


def test_labels_are_segmented_independently_and_may_overlap(model):
    slices, inner = noise(4, 40, 56), np.zeros((40, 56), bool)
    inner[10:20, 12:24] = True
    both = propagate(model, slices, {"organ": {1: square()}, "lesion": {1: inner}})
    assert np.array_equal(both["organ"].mask[1], square()) and np.array_equal(both["lesion"].mask[1], inner)
    alone = propagate(model, slices, {"lesion": {1: inner}})["lesion"]
    assert np.array_equal(both["lesion"].mask, alone.mask) and list(both) == ["organ", "lesion"]


def test_masks_may_be_numpy_arrays_or_tensors_of_any_type(model):
    slices, drawn = noise(3, 40, 56), square()
    expected = propagate(model, slices, {1: {1: drawn}})[1].mask
    for given in (drawn.astype(np.uint8) * 255, drawn.astype(np.float32), torch.from_numpy(drawn)):
        found = propagate(model, torch.from_numpy(slices), {1: {np.int64(1): given}})[1].mask
        assert np.array_equal(found, expected)


def test_the_window_sets_the_intensities_that_become_0_and_1(model):
    slices = np.round(noise(3, 40, 56) * 256) / 256
    shifted = (slices * 1024 - 512).astype(np.int16)
    expected = propagate(model, slices, {1: {1: square()}})[1]
    found = propagate(model, shifted, {1: {1: square()}}, window=(-512, 512))[1]
    assert np.array_equal(found.mask, expected.mask) and np.array_equal(found.confidence, expected.confidence)


NAN = np.full((3, 40, 56), np.nan, np.float32)


@pytest.mark.parametrize(
    ("slices", "prompts", "window", "message"),
    [
        (noise(40, 56), None, None, r"slices: shape \(40, 56\); give \(T, H, W\) or \(T, C, H, W\)"),
        (noise(0, 40, 56), None, None, r"slices: shape \(0, 40, 56\) holds nothing"),
        ([[1]], None, None, "slices: a list; give a NumPy array or a torch tensor"),
        (np.array([["a"]]), None, None, "slices: values of type <U1; give numbers"),
        (NAN, None, None, "slices: holds NaN"),
        (noise(3, 40, 56) * 300 - 100, None, None, r"slices: values from -\d.* to 1\d\d.*, not from 0 to 1; give window="),
        (noise(3, 5, 40, 56), None, None, "slices have 5 channels, but the network reads 3"),
        (None, None, (5, 5), "window: 5 to 5; the second value must be above the first"),
        (None, None, "percent", "window: 'percent'; give"),
        (None, None, (-np.inf, np.inf), "window: -inf to inf; give finite values"),
        (None, None, (0, np.inf), "window: 0 to inf; give finite values"),
        (np.ma.masked_less(noise(3, 40, 56), 0.5), None, None, "slices: a masked array"),
        (torch.rand(3, 40, 56).to_sparse(), None, None, "slices: a sparse tensor; give a dense one"),
        (None, None, (1, 2, 3), "window: .*give the grey values that become 0 and 1"),
        (None, {}, None, "prompts: give {label: {slice index: mask}}"),
        (None, {1: square()}, None, r"prompts\[1\]: give {slice index: mask}"),
        (None, {1: {}}, None, r"prompts\[1\]: give {slice index: mask}"),
        (None, {"a": {3: square()}}, None, r"prompts\['a'\]: no slice 3; they are numbered from 0 to 2"),
        (None, {1: {-1: square()}}, None, r"prompts\[1\]: no slice -1"),
        (None, {1: {1.0: square()}}, None, r"prompts\[1\]: no slice 1.0"),
        (None, {1: {1: square(56, 40)}}, None, r"prompts\[1\], slice 1: shape \(56, 40\), but the image's is \(40, 56\)"),
        (None, {1: {1: square() * 2 + np.eye(40, 56)}}, None, r"prompts\[1\], slice 1: more than one value besides 0 \(1, 2, 3, …\)"),
        (None, {1: {1: ~square() & square()}}, None, r"prompts\[1\]: every mask is empty"),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line_that_names_them(model, slices, prompts, window, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        propagate(model, noise(3, 40, 56) if slices is None else slices, {1: {1: square()}} if prompts is None else prompts, window=window)
    assert "\n" not in str(caught.value)


# Load


def test_a_fine_tuned_model_has_its_plan_calibration_and_warnings(folder):
    tuned = load(folder / "model.safetensors", device="cpu")
    assert (tuned.plan, tuned.calibration, tuned.network.training) == (planned(folder), HALVED, False)
    assert tuned.input_size == tuned.plan.geometry.input_size and "random weights" in tuned.warnings[0]
    assert repr(tuned) == f"SlmSam2(nano, shortlong, {tuned.input_size} px, cpu, fine-tuned on Phantom_MR)"
    loaded = tuned.network.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in read_checkpoint(folder / "model.safetensors").state.items())


def test_the_folder_of_finetune_is_accepted_as_a_model(folder):
    assert load(str(folder), device="cpu").plan == planned(folder)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A file in SAM 2.1's layout, which knows nothing of plans."""
    path = tmp_path_factory.mktemp("sam") / "sam2.1.pt"
    torch.manual_seed(3)
    torch.save({"model": SlmSam2(NetworkPlan(size="nano", policy="fifo"), PX).state_dict()}, path)
    return path


def test_weights_of_sam_2_1_need_an_input_size(sam):
    made = load(sam, input_size=96, device="cpu")
    assert (made.plan, made.input_size, made.network.network.policy) == (None, 96, "fifo")
    with pytest.raises(ValueError, match=r"^input_size: sam2.1.pt carries no plan; give the edge of its input in pixels, or a plan$"):
        load(sam)


def test_weights_of_sam_2_1_with_a_plan_keep_their_network(sam, folder):
    for plan in (planned(folder), folder / "plan.json"):
        made = load(sam, plan=plan, device="cpu")
        assert made.plan.geometry == planned(folder).geometry and made.plan.network == NetworkPlan(size="nano", policy="fifo")


def test_an_input_size_beside_a_plan_is_rejected(folder):
    with pytest.raises(ValueError, match="^input_size: 160, but the plan says 96"):
        load(folder / "model.safetensors", input_size=160)


@pytest.fixture(scope="module")
def adapter(folder):
    """An adapter for the model, saved alone."""
    save_adapter_alone(folder / "alone" / "adapter.safetensors", folder / "model.safetensors")
    return folder / "alone" / "adapter.safetensors"


def test_an_adapter_is_applied_to_the_given_pretrained_weights(folder, adapter):
    plain, tuned = load(folder / "model.safetensors", device="cpu"), load(adapter, base=folder / "model.safetensors", device="cpu")
    slices = noise(1, 40, 56)
    assert not torch.allclose(plain.encode(slices).top, tuned.encode(slices).top)
    with pytest.raises(WeightsError, match="adapter for the base model.safetensors"):
        load(adapter)
    with pytest.raises(ValueError, match=r"^base: model.safetensors is no adapter but a whole model; leave it out$"):
        load(folder / "model.safetensors", base=adapter)


def test_a_model_not_trained_on_its_plans_channels_has_a_warning(sam, folder, capsys):
    plan = planned(folder)
    four = plan.model_copy(update={"channels": ("T1", "T2", "FLAIR", "T1c"), "intensity": plan.intensity * 4})
    assert "sam2.1.pt was not trained on 4 channels" in load(sam, plan=four, device="cpu").warnings[0]
    assert capsys.readouterr() == ("", "")


def test_an_unknown_device_is_rejected(sam):
    with pytest.raises(DeviceError, match="--device gpu: unknown device. Use auto, cpu, cuda or mps"):
        load(sam, input_size=PX, device="gpu")


def test_files_that_are_no_models_give_the_commands_error(folder):
    with pytest.raises(WeightsError, match="no such file"):
        load(folder / "absent.safetensors")
    with pytest.raises(PlanError, match="no plan at"):
        load(folder / "model.safetensors", plan=folder / "absent.json")


# Segment


@pytest.fixture(scope="module")
def tuned(folder):
    return load(folder / "model.safetensors", device="cpu")


def truth(folder, case="phantom_000"):
    """(Z, Y, X) labels."""
    return voxels(folder / "labelsTr" / f"{case}.nii.gz")


def voxels(path):
    """(Z, Y, X) as stored."""
    return np.asarray(nibabel.load(path).dataobj).T


def sparse(labels, slices=(3, 6)):
    """The mask of a person who painted those slices."""
    painted = np.zeros_like(labels)
    painted[list(slices)] = labels[list(slices)]
    return painted


@pytest.fixture(scope="module", params=["from the feet", "from the head"])
def predicted(folder, tmp_path_factory, request):
    """What `slmsam2 predict` wrote for the first patient, from two annotated slices and an empty one, however the file stores its slices:
    (labels, account, image, prompts).
    """
    prompts, masks = tmp_path_factory.mktemp("prompts"), tmp_path_factory.mktemp("predicted") / "masks"
    image = nibabel.load(folder / "imagesTr" / "phantom_000.nii.gz")
    painted = nibabel.Nifti1Image(sparse(truth(folder)).T, image.affine, image.header)
    file = tmp_path_factory.mktemp("images") / "phantom_000.nii.gz"
    for volume, path in ((image, file), (painted, prompts / file.name)):
        nibabel.save(volume.slicer[:, :, ::-1] if request.param == "from the head" else volume, path)
    (prompts / "phantom_000.prompts.json").write_text(json.dumps({"axis": "SI", "annotated_slices": [0]}))
    assert predict(file, masks, prompts=prompts, model=folder / "model.safetensors", device="cpu", report=False) == 0
    metadata = json.loads((masks / "manifest.json").read_text())["cases"]["phantom_000"]
    return voxels(masks / file.name), metadata, file, prompts / file.name


def in_three_ways(painted, file):
    """The same prompts as one array, one file, and one mask a label by value or name."""
    names = {1: "organ", 2: torch.from_numpy(painted == 2), 3: (painted == 3) * 255}
    return [painted, painted.astype(float), file, str(file), {1: painted == 1, "vessel": names[2], 3: names[3]}]


def test_a_volume_is_segmented_exactly_as_by_predict_however_the_prompts_are_given(tuned, predicted):
    labels, metadata, image, file = predicted
    painted = voxels(file)
    given = np.flatnonzero(painted.any(axis=(1, 2)))
    assert (np.delete(labels, (0, *given), axis=0) != 0).any() and not labels[0].any()
    for prompts in in_three_ways(painted, file):
        found = segment(tuned, image, prompts, annotated_slices=[0])
        assert np.array_equal(found.labels, labels) and found.labels.dtype == labels.dtype
    told = {int(v): {int(k): share for k, share in one["slices"].items()} for v, one in metadata["confidence"].items()}
    assert found.confidence == told and metadata["calibrated"] and found.confidence[1][given[0]] == 1


def test_without_a_list_only_slices_with_a_mask_are_annotated(folder, tuned):
    found = segment(tuned, str(folder / "imagesTr" / "phantom_000.nii.gz"), sparse(truth(folder)))
    assert np.array_equal(found.labels[[3, 6]], truth(folder)[[3, 6]]) and found.labels[0].any()


def test_a_mask_is_saved_on_the_images_own_grid(folder, tuned, tmp_path):
    image = nibabel.load(folder / "imagesTr" / "phantom_000.nii.gz")
    found = segment(tuned, folder / "imagesTr" / "phantom_000.nii.gz", sparse(truth(folder)))
    found.write(tmp_path / "mask.nii.gz")
    saved = nibabel.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj).T, found.labels) and np.abs(saved.affine - image.affine).max() <= 1e-6


SHAPE = (8, 40, 36)


@pytest.mark.parametrize(
    ("prompts", "annotated_slices", "message"),
    [
        (lambda t: t[1:], None, r"prompts: shape .* but the image's is .* \(z, y, x\)"),
        (lambda t: {1: t[0]}, None, r"prompts\[1\]: shape .* but the image's is .* \(z, y, x\)"),
        (lambda t: t * 9, None, r"prompts: holds 9, 18, 27; the plan has 1 \(organ\), 2 \(vessel\), 3 \(nodule\)"),
        (lambda t: t + 0.5, None, "prompts: holds 0.5, 1.5"),
        (lambda t: {7: t == 1}, None, r"prompts: no label 7; the plan has 1 \(organ\)"),
        (lambda t: {"spleen": t == 1}, None, "prompts: no label 'spleen'; the plan has"),
        (lambda t: {1: t}, None, r"prompts\[1\]: more than one value besides 0"),
        (lambda t: {1: t == 1, "vessel": t == 1}, None, r"prompts\['vessel'\]: \d+ of its voxels belong to label 1 too"),
        (lambda t: t * 0, None, "prompts: the mask is empty"),
        (lambda t: {}, None, "prompts: the mask is empty"),
        (lambda t: None, None, "prompts: a NoneType; give"),
        (sparse, 3, "annotated_slices: 3; give a list of slice numbers"),
        (sparse, [99], "annotated_slices: no slice 99; they are numbered from 0 to"),
    ],
)
def test_invalid_prompts_are_rejected_in_one_line_that_names_them(folder, tuned, prompts, annotated_slices, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        segment(tuned, folder / "imagesTr" / "phantom_000.nii.gz", prompts(truth(folder)), annotated_slices=annotated_slices)


def test_invalid_files_give_the_commands_error(folder, tuned, model):
    image, other = (folder / "imagesTr" / f"phantom_00{k}.nii.gz" for k in (0, 1))
    with pytest.raises(CaseError, match="case absent: absent.nii.gz: not found"):
        segment(tuned, folder / "absent.nii.gz", truth(folder))
    with pytest.raises(CaseError, match="case phantom_000: phantom_001.nii.gz: the prompt's grid differs"):
        segment(tuned, image, {1: folder / "labelsTr" / other.name})
    with pytest.raises(ValueError, match="^image: 2 files, but the plan has the channels MRI; give one file of each"):
        segment(tuned, [image, image], truth(folder))
    for nothing in ([], None, [None]):
        with pytest.raises(ValueError, match="^image: give the path of a file"):
            segment(tuned, nothing, truth(folder))
    with pytest.raises(ValueError, match="^model: carries no plan"):
        segment(model, image, truth(folder))


# One annotated image, many to segment


def test_every_image_gets_a_mask_of_its_size_and_annotated_ones_are_unchanged(model):
    images = [noise(40, 56), noise(3, 30, 99, seed=1), torch.rand(64, 64)]
    found = segment_images(model, images, {0: square()})
    assert [one.mask.shape for one in found] == [(40, 56), (30, 99), (64, 64)]
    assert np.array_equal(found[0].mask, square()) and (found[0].confidence, found[0].nearest, found[0].similarity) == (1, 0, 1)
    assert all(one.mask.dtype == bool and 0 <= one.confidence <= 1 and one.nearest == 0 for one in found)


def test_the_order_of_the_images_does_not_matter(model):
    images = noise(4, 40, 56)
    found = segment_images(model, images, {1: square()})
    other = segment_images(model, images[::-1].copy(), {2: square()})
    assert all(np.array_equal(one.mask, same.mask) for one, same in zip(found, other[::-1]))


def test_an_image_annotated_as_empty_stays_empty(model):
    found = segment_images(model, noise(3, 40, 56), {0: square(), 2: np.zeros((40, 56))})
    assert not found[2].mask.any() and found[2].confidence == 1


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (noise(40, 56), {0: square()}, r"images: give an array \(N, H, W\)"),
        ([], {0: square()}, r"images: give an array \(N, H, W\)"),
        ([noise(40, 56), noise(3, 3, 40, 56)], {0: square()}, r"images\[1\]: shape \(3, 3, 40, 56\); give \(H, W\) or \(C, H, W\)"),
        ([noise(40, 56), noise(5, 40, 56)], {0: square()}, "images: some of 3 channels or fewer, some of 5; give as many channels of each"),
        ([noise(40, 56) * 9], {0: square()}, r"images\[0\]: values from .*, not from 0 to 1"),
        (None, {5: square()}, "prompts: no image 5; they are numbered from 0 to 2"),
        (None, {0: square(9, 9)}, r"prompts, image 0: shape \(9, 9\), but the image's is \(40, 56\)"),
        (None, {0: square() * 0}, "prompts: no mask holds the object"),
        (None, {}, "prompts: no mask holds the object"),
        (None, square(), "prompts: give {image index: mask}"),
    ],
)
def test_invalid_images_or_prompts_are_rejected_in_one_line(model, images, prompts, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        segment_images(model, noise(3, 40, 56) if images is None else images, prompts)
