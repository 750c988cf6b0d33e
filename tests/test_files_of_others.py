"""Files from public reports of users of neighbouring tools (shared/faults/files): each is read with the right values, or refused truly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmsam2_cli.commands.evaluate import evaluate
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import find_label, read_image_folder
from slmsam2_cli.errors import CaseError, DatasetError, UsageError
from slmsam2_cli.io.volume import Volume, read_image, read_labels

SHARED = Path(__file__).parents[2] / "shared" / "faults" / "files"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the files of others are not beside the repository")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "files"
    shutil.copytree(SHARED, folder)
    makers = [path.name for path in folder.iterdir() if (path / "make.py").is_file()]
    lines = ["import runpy, sys", "for name in sys.argv[2:]:", " sys.argv[0] = f'{sys.argv[1]}/{name}/make.py'"]
    code = "\n".join([*lines, " runpy.run_path(sys.argv[0])", " sys.modules.pop('made')"])
    subprocess.run([sys.executable, "-c", code, folder, *makers], check=True, env=os.environ | {"PYTHONPATH": str(folder)})
    return folder


def image(folder: Path) -> Volume:
    """Read the one image of a folder."""
    ((case, *_), _) = read_image_folder(folder)
    return read_image(case.images, case=case.id, root=folder)


@pytest.fixture
def masks(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Predict into a folder and return the one mask's voxels (Z, Y, X)."""

    def run(images: Path, prompts: Path) -> np.ndarray:
        assert predict(images, tmp_path / "masks", prompts=prompts, report=False) == 0
        (path,) = (path for path in (tmp_path / "masks").iterdir() if path.name.endswith((".nii.gz", ".nrrd", ".nii")))
        return read_labels(path, case="c", root=path.parent).voxels

    return run


def test_compressed_dicom_is_read_like_plain_dicom(files: Path) -> None:
    plain, rle, deflated = (image(files / "dicom_compressed" / "data" / name) for name in ("plain", "rle", "deflated"))
    for found in (rle, deflated):
        assert found.grid.difference(plain.grid) is None
        assert np.array_equal(found.voxels, plain.voxels)


def test_frames_are_sorted_by_position_and_scaled_by_their_own_slope(files: Path) -> None:
    data = files / "dicom_enhanced" / "data"
    shuffled = image(data / "shuffled")
    assert shuffled.voxels[0, :, 3, 2].tolist() == [1000 + 10 * k for k in range(12)]
    assert np.allclose(shuffled.grid.spacing_mm, (5, 1.5, 1.5))
    slopes = [1.0, *(0.001 * (k + 1) for k in range(1, 12))]
    assert np.allclose(image(data / "slopes").voxels[0, :, 3, 2], [(1000 + 10 * k) * slope for k, slope in enumerate(slopes)])
    refusals = {"two_echoes": "same position", "tilt": "gantry tilt", "missing": "slices are missing", "mosaic": "mosaic"}
    for name, message in refusals.items():
        with pytest.raises(CaseError, match=message):
            image(data / name)


@pytest.mark.parametrize("name", ["slope", "intercept", "signed"])
def test_each_slice_has_its_own_slope_intercept_and_sign(files: Path, name: str) -> None:
    data = files / "dicom_first_slice_decides" / "data"
    assert np.allclose(image(data / name).voxels, image(data / f"true_{name}").voxels, rtol=1e-6)


@pytest.mark.parametrize("name", ["dirfile", "report"])
def test_objects_without_an_image_are_left_out(files: Path, name: str) -> None:
    found = image(files / "dicom_no_image_beside" / "data" / name)
    assert found.voxels.shape[1] == 12
    assert any("hold no image" in line for line in found.warnings)


def test_a_mask_of_255_gets_a_hint(files: Path, tmp_path: Path) -> None:
    data = files / "evaluate_255" / "data"
    evaluate([data / "masks"], data / "labels", None, tmp_path / "out", dataset=None)
    assert "label 255 of the mask overlaps label 1 of the reference with Dice 0.939" in json.dumps(
        json.loads((tmp_path / "out" / "summary.json").read_text())
    )


@pytest.mark.parametrize("name", ["nan_slope", "zero_sform", "negative_pixdim", "trailing"])
def test_headers_that_other_readers_open_are_read_with_a_warning(files: Path, name: str) -> None:
    data = files / "nifti_headers" / "data" / name
    plain = image(files / "single_files" / "data" / "images")
    found = image(data / "images")
    assert found.grid.difference(plain.grid) is None and np.array_equal(found.voxels, plain.voxels)
    assert found.warnings
    prompt = find_label(data / "prompts", "a")
    assert prompt is not None and read_labels(prompt, case="a", root=data).voxels.any()


def test_labels_that_a_scale_moved_are_whole_numbers_again(files: Path) -> None:
    data = files / "nifti_label_rounding" / "data"
    found = read_labels(data / "prompts" / "a.nii.gz", case="a", root=data)
    assert np.unique(found.voxels).tolist() == [0, 1, 2]
    assert "are whole numbers again" in found.warnings[0]


@pytest.mark.parametrize("name", ["one", "upper"])
def test_a_prompt_of_the_images_own_name_is_found(files: Path, masks, name: str) -> None:  # type: ignore[no-untyped-def]
    data = files / "prompt_of_the_same_name" / "data" / name
    (prompt,) = (data / "prompts").iterdir()
    painted = read_labels(prompt, case="a", root=data).voxels
    assert np.array_equal(masks(data / "images", data / "prompts")[6], painted[6])


def test_three_prompts_of_one_name_are_refused(files: Path) -> None:
    (folder,) = files.glob("prompt_tw*")
    with pytest.raises(CaseError, match=r"a\.nii, a\.nii\.gz, a\.nrrd: a duplicate"):
        find_label(folder / "data" / "prompts", "a")


def test_single_files_are_taken_as_people_type_them(files: Path, tmp_path: Path) -> None:
    data, output = files / "single_files" / "data", tmp_path / "mask_a.nii.gz"
    predict(data / "images" / "a.nii.gz", output, prompts=data / "prompts" / "a.nii.gz", report=False)
    painted = read_labels(data / "prompts" / "a.nii.gz", case="a", root=data).voxels
    assert np.array_equal(read_labels(output, case="a", root=tmp_path).voxels[6], painted[6])
    with pytest.raises(UsageError, match="exists already"):
        predict(data / "images" / "a.nii.gz", output, prompts=data / "prompts", report=False)


@pytest.mark.parametrize("name", ["name", "cropped"])
def test_segmentations_of_slicer_are_prompts(files: Path, masks, name: str) -> None:  # type: ignore[no-untyped-def]
    data = files / "slicer_segmentation" / "data"
    painted = read_labels(data / "prompts_name" / "a.seg.nrrd", case="a", root=data).voxels
    assert np.array_equal(masks(data / "images", data / f"prompts_{name}")[6], painted[6])


def test_layers_of_slicer_that_nothing_describes_are_refused(files: Path, tmp_path: Path) -> None:
    data = files / "slicer_segmentation" / "data"
    with pytest.raises(DatasetError) as error:
        predict(data / "images", tmp_path / "masks", prompts=data / "prompts_layers", report=False)
    assert "layers of 3D Slicer" in str(error.value.problems[0])
