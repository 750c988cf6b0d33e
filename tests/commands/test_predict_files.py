"""Predict takes files as hospitals and annotation tools write them, and writes masks that these tools read."""

import json

import dicom_writer as writer
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from made_models import save_base

from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.errors import DatasetError, DeviceError, OutputError, UsageError
from slmsam2_cli.io.image import Grid, Segment, Source
from slmsam2_cli.io.volume import Volume, read_labels, write_mask
from slmsam2_cli.planning.plan import read_plan

SHAPE = (10, 40, 36)
GRID = Grid(SHAPE, (3.0, 1.0, 1.0), (-17.0, -20.0, 5.0), np.eye(3))
IMAGE, LABELS, _ = phantom_volume(np.random.default_rng(3), SHAPE, "CT")
IMAGE = np.round(IMAGE).astype(np.int16)
PAINTED = np.where((np.arange(10) == 5)[:, None, None] & (LABELS == 1), 1, 0).astype(np.uint8)
assert PAINTED.any()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("weights") / "base.safetensors")


@pytest.fixture
def run(weights, tmp_path):
    """Run predict on IMAGES and PROMPTS; returns the folder of the masks."""

    def predict_here(images="images", prompts="prompts", **options):
        masks = tmp_path / "masks"
        predict(tmp_path / images, masks, prompts=tmp_path / prompts, weights=weights, report=False, **options)
        return masks

    (tmp_path / "images").mkdir()
    (tmp_path / "prompts").mkdir()
    return predict_here


def itk(path, array, grid=GRID, **texts):
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing(grid.spacing_mm[::-1])
    image.SetOrigin(grid.origin_mm)
    for name, text in texts.items():
        image.SetMetaData(name, text)
    sitk.WriteImage(image, str(path))
    return path


def slicer(number, name, value=1, layer=0):
    keys = {"ID": f"Segment_{number}", "Name": name, "LabelValue": str(value), "Layer": str(layer), "Color": "0.25 0.5 0.75"}
    return {f"Segment{number}_{key}": text for key, text in keys.items()}


def annotated_slice_of(mask):
    return read_labels(mask, case="a", root=mask.parent).voxels[5]


def test_a_segmentation_of_slicer_is_a_prompt_and_its_names_and_colours_come_back(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "images" / "a.seg.nrrd", PAINTED, **slicer(0, "tumour"))  # beside its image, as Slicer saves it
    masks = run(prompts="images")
    found = read_labels(masks / "a.seg.nrrd", case="a", root=masks)
    assert np.array_equal(found.voxels[5], PAINTED[5])
    assert found.source.segments == (Segment(1, "tumour", (0.25, 0.5, 0.75)),)
    assert read_plan(masks / "plan.json").labels == {1: "tumour"}
    assert not list(masks.glob("*.dcm"))


def test_a_segmentation_cut_to_its_segments_is_put_in_place(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    low, high = np.argwhere(PAINTED).min(0), np.argwhere(PAINTED).max(0) + 1
    box = tuple(slice(*ends) for ends in zip(low, high, strict=True))
    origin = (GRID.affine() @ [*low[::-1], 1])[:3]
    cut = Grid(tuple(high - low), GRID.spacing_mm, tuple(origin), GRID.direction)
    itk(tmp_path / "prompts" / "a.nrrd", PAINTED[box], cut, **slicer(0, "tumour"))
    assert np.array_equal(annotated_slice_of(run() / "a.nrrd"), PAINTED[5])


def test_segments_in_layers_are_labels_in_their_order_unless_they_overlap(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    other = np.where(PAINTED, 0, 0).astype(np.uint8)
    other[5, 2:5, 2:5] = 1
    layers = slicer(0, "tumour") | slicer(1, "oedema", layer=1)
    itk(tmp_path / "prompts" / "a.seg.nrrd", np.stack([PAINTED, other], -1), **layers)
    masks = run()
    assert read_plan(masks / "plan.json").labels == {1: "tumour", 2: "oedema"}
    assert np.array_equal(annotated_slice_of(masks / "a.seg.nrrd"), PAINTED[5] + 2 * other[5])
    itk(tmp_path / "prompts" / "a.seg.nrrd", np.stack([PAINTED, PAINTED], -1), **layers)
    with pytest.raises(DatasetError, match="no prompt mask can be used") as error:
        run(overwrite=True)
    assert "belong to two segments" in str(error.value.problems[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Segment1_Layer": "7"}, "puts segment oedema into layer 7 of 2"),
        ({"Segment1_LabelValue": "3"}, "belong to no segment"),
        ({"Segment1_LabelValue": "70000"}, "without a whole number up to 65535"),
    ],
)
def test_segments_that_the_layers_do_not_hold_are_refused(run, tmp_path, changed, message):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    other = np.zeros_like(PAINTED)
    other[5, 2:5, 2:5] = 1
    itk(
        tmp_path / "prompts" / "a.seg.nrrd",
        np.stack([PAINTED, other], -1),
        **slicer(0, "tumour"),
        **(slicer(1, "oedema", layer=1) | changed),
    )
    with pytest.raises(DatasetError) as error:
        run()
    assert message in str(error.value.problems[0])


def test_an_image_is_not_its_own_prompt(run, tmp_path, monkeypatch):
    itk(tmp_path / "images" / "a.nrrd", PAINTED)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(DatasetError, match="no image has a prompt mask of the same name"):
        run(prompts="link")


def test_names_of_labels_come_from_the_descriptions_of_itk_snap(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "prompts" / "a.nrrd", 2 * PAINTED)
    lines = ["# ITK-SnAP Label Description File", '    0 0 0 0 0 0 0 "Clear Label"', '    2 255 0 0 1 1 1 "liver"', '  9 0 0 0 1 1 1 "x"']
    (tmp_path / "prompts" / "labels.txt").write_text("\n".join(lines))
    assert read_plan(run() / "plan.json").labels == {2: "liver"}


@pytest.mark.parametrize(("image", "prompt", "mask"), [("a_0000.nrrd", "a_0000.nrrd", "a.nrrd"), ("A.NRRD", "A.NRRD", "A.nrrd")])
def test_a_prompt_of_exactly_the_images_name_is_found(run, tmp_path, image, prompt, mask):
    for name, array in ((f"images/{image}", IMAGE), (f"prompts/{prompt}", PAINTED)):
        itk(tmp_path / "x.nrrd", array).rename(tmp_path / name)
    assert np.array_equal(annotated_slice_of(run() / mask), PAINTED[5])


def test_several_prompts_of_one_name_are_refused_and_named(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "prompts" / "a.nrrd", PAINTED)
    itk(tmp_path / "prompts" / "a.nii", PAINTED)
    with pytest.raises(DatasetError) as error:
        run()
    assert "a.nii, a.nrrd: a duplicate" in str(error.value.problems[0])


def test_numbered_patients_are_not_silently_the_channels_of_one(run, tmp_path, capsys):
    for number in range(3):
        itk(tmp_path / "images" / f"img_{number:04d}.nrrd", IMAGE)
        itk(tmp_path / "prompts" / f"img_{number:04d}.nrrd", PAINTED)
    with pytest.raises(DatasetError, match=r"it holds img_0000.nrrd, img_0001.nrrd, img_0002.nrrd, and the images are img\."):
        run()
    assert "case img: img_0000.nrrd ... img_0002.nrrd are taken for its 3 channels" in capsys.readouterr().err


def test_a_prompt_may_be_one_file_beside_one_image(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "prompts" / "my paint.nrrd", PAINTED)
    assert np.array_equal(annotated_slice_of(run("images/a.nrrd", "prompts/my paint.nrrd") / "a.nrrd"), PAINTED[5])
    itk(tmp_path / "images" / "b.nrrd", IMAGE)
    with pytest.raises(UsageError, match="one file of prompts, but -i names 2 images"):
        run("images", "prompts/my paint.nrrd")


# ---- DICOM


def as_nifti(path, array, grid=GRID):
    write_mask(path, array, Volume(array[None], grid, Source(".nii.gz", ".nii.gz")))


@pytest.fixture
def dicom(run, tmp_path):
    writer.write_series(tmp_path / "images" / "p" / "study" / "series", IMAGE, GRID, series=4)
    as_nifti(tmp_path / "prompts" / "p.nii.gz", PAINTED)
    return tmp_path


def test_a_series_gets_the_mask_of_the_same_volume_as_nifti_and_a_dicom_segmentation(run, dicom, weights):
    masks = run()
    nibabel.save(nibabel.Nifti1Image(IMAGE.T, np.diag([-1, -1, 1, 1]) @ GRID.affine()), dicom / "p.nii.gz")
    predict(dicom / "p.nii.gz", dicom / "other", prompts=dicom / "prompts", weights=weights, report=False)
    mask, other = (read_labels(folder / "p.nii.gz", case="p", root=folder) for folder in (masks, dicom / "other"))
    assert mask.grid.difference(GRID) is None and np.array_equal(mask.voxels, other.voxels)
    item = pydicom.dcmread(masks / "p.dcm")
    (segment,) = item.SegmentSequence
    assert (item.Modality, segment.SegmentLabel) == ("SEG", "label 1")
    assert item.NumberOfFrames == np.count_nonzero(mask.voxels.any(axis=(1, 2)))
    assert json.loads((masks / "manifest.json").read_text())["cases"]["p"]["dicom_segmentation"]["file"] == "p.dcm"


def test_all_series_of_a_folder_are_predicted_where_they_have_prompts(run, dicom):
    writer.write_series(dicom / "images" / "p" / "other", IMAGE[::-1], GRID, series=5)
    with pytest.raises(DatasetError, match="no case could be segmented|no image with a prompt can be used") as error:
        run()
    assert "2 DICOM series in one folder: 4 (MR, 10 files), 5 (MR, 10 files)" in "".join(map(str, error.value.problems))
    (dicom / "prompts" / "p.nii.gz").rename(dicom / "prompts" / "p#4.nii.gz")
    as_nifti(dicom / "prompts" / "p#5.nii.gz", PAINTED)
    masks = run(series="all")
    assert {path.name for path in masks.glob("*.nii.gz")} == {"p#4.nii.gz", "p#5.nii.gz"}
    assert {path.name for path in masks.glob("*.dcm")} == {"p#4.dcm", "p#5.dcm"}


def test_the_format_of_masks_can_be_chosen_and_the_earlier_file_goes(run, dicom):
    masks = run(format="seg.nrrd")
    assert {path.name for path in masks.glob("p.*")} == {"p.seg.nrrd"}
    run(format="nifti")
    assert {path.name for path in masks.glob("p.*")} == {"p.nii.gz"}


def test_a_segmentation_follows_its_mask(run, dicom):
    masks = run()
    (masks / "p.dcm").unlink()
    run()  # it is gone, so it is written again
    assert (masks / "p.dcm").is_file()
    as_nifti(dicom / "prompts" / "p.nii.gz", np.where(LABELS == 1, PAINTED, 0)[:, ::-1])
    run(format="nifti")
    assert not (masks / "p.dcm").exists()
    run()
    assert (masks / "p.dcm").is_file()


def test_a_series_to_which_nothing_can_refer_gets_its_mask_all_the_same(run, dicom, capsys):
    for path in (dicom / "images").rglob("*.dcm"):
        item = pydicom.dcmread(path)
        del item.StudyInstanceUID
        item.save_as(path)
    masks = run()
    assert (masks / "p.nii.gz").is_file() and not (masks / "p.dcm").exists()
    assert "case p: no DICOM segmentation: a slice of the series states no StudyInstanceUID" in capsys.readouterr().err


def test_a_mask_of_another_format_that_was_not_written_here_is_not_replaced(run, dicom):
    masks = run(format="nifti")
    itk(masks / "p.nrrd", PAINTED)
    before = (masks / "p.nrrd").read_bytes()
    with pytest.raises(OutputError, match=r"p.nrrd exists already, not as this slmsam2 wrote it"):
        run(format="nrrd")
    assert (masks / "p.nrrd").read_bytes() == before


def test_a_dicom_segmentation_needs_a_dicom_image(run, tmp_path):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "prompts" / "a.nrrd", PAINTED)
    with pytest.raises(DatasetError, match="no case could be segmented"):
        run(format="dicom-seg")
    assert not list((tmp_path / "masks").glob("a.*"))


def test_a_file_that_was_not_written_here_is_not_replaced_by_a_segmentation(run, dicom, capsys):
    (dicom / "masks").mkdir()
    (dicom / "masks" / "p.dcm").write_bytes(b"mine")
    with pytest.raises(DatasetError, match="no case could be segmented"):
        run()
    assert "p.dcm: exists already, not as this slmsam2 wrote it" in capsys.readouterr().err
    assert (dicom / "masks" / "p.dcm").read_bytes() == b"mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(run, tmp_path):
    (tmp_path / "images" / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(DeviceError, match="--device cuda"):
        run(device="cuda")


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.seg.nrrd"])
def test_a_file_as_output_is_written_for_one_image_and_never_replaced_unasked(run, tmp_path, weights, name):
    itk(tmp_path / "images" / "a.nrrd", IMAGE)
    itk(tmp_path / "prompts" / "a.nrrd", PAINTED)
    inputs = {"prompts": tmp_path / "prompts" / "a.nrrd", "weights": weights, "report": False}
    predict(tmp_path / "images" / "a.nrrd", tmp_path / name, **inputs)
    assert np.array_equal(annotated_slice_of(tmp_path / name), PAINTED[5])
    assert read_labels(tmp_path / name, case="a", root=tmp_path).grid.difference(GRID) is None
    with pytest.raises(UsageError, match="exists already. Use --overwrite"):
        predict(tmp_path / "images" / "a.nrrd", tmp_path / name, **inputs)
    for name_of_input in ("images/a.nrrd", "prompts/a.nrrd"):
        with pytest.raises(UsageError, match="is an input"):
            predict(tmp_path / "images" / "a.nrrd", tmp_path / name_of_input, overwrite=True, **inputs)
    itk(tmp_path / "images" / "b.nrrd", IMAGE)
    with pytest.raises(UsageError, match="names a file, but -i names 2 images"):
        predict(tmp_path / "images", tmp_path / f"new-{name}", prompts=tmp_path / "prompts", weights=weights)
    assert not (tmp_path / f"new-{name}").exists()
