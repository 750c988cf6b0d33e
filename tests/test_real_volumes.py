"""The pipeline on real volumes, and the broken ones beside them. Skipped where the shared data are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from slmsam2_cli.cli.exit_codes import run_for_exit_code
from slmsam2_cli.commands.evaluate import evaluate
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.workspace import Workspace

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SOURCE = DATA / "Task04_Hippocampus"
BAD = DATA / "bad_fixtures"
CASES = ["hippocampus_014", "hippocampus_015", "hippocampus_058"]

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="the shared real volumes are not beside this checkout")


def data_set(root: Path, pairs: dict[str, tuple[Path | None, Path | None]]) -> Path:
    """A Decathlon folder of copies: case id -> (image, label), either of which may be missing."""
    for index, folder in enumerate(("imagesTr", "labelsTr")):
        (root / folder).mkdir(parents=True)
        for case, paths in pairs.items():
            if paths[index] is not None:
                shutil.copy(paths[index], root / folder / f"{case}.nii.gz")
    entries = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in pairs]
    described = {"name": "real", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
    (root / "dataset.json").write_text(json.dumps({**described, "numTraining": len(pairs), "training": entries}))
    return root


def healthy(case: str) -> tuple[Path, Path]:
    return SOURCE / "imagesTr" / f"{case}.nii.gz", SOURCE / "labelsTr" / f"{case}.nii.gz"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three hippocampi: one learned from for two steps, two predicted and scored."""
    dataset = data_set(tmp_path_factory.mktemp("real") / "data", {case: healthy(case) for case in CASES})
    space = Workspace.of(dataset, None)
    assert plan(dataset, space) == 0
    assert finetune(dataset, space, cases=1, weights="random", steps=2) == 0
    assert predict(None, None, dataset=dataset, workspace=space) == 0
    assert evaluate((), None, space, None, dataset=dataset) == 0
    return space


def test_every_held_out_case_has_a_mask_on_its_own_grid(scored: Workspace) -> None:
    held_out = json.loads(scored.split.read_text())["held_out"]
    assert len(held_out) == 2
    for case in held_out:
        image, mask = nibabel.load(SOURCE / "imagesTr" / f"{case}.nii.gz"), nibabel.load(scored.predictions / f"{case}.nii.gz")
        assert mask.shape == image.shape
        assert np.abs(mask.affine - image.affine).max() <= 1e-6


def test_the_annotated_slices_of_the_manifest_are_those_of_the_labels(scored: Workspace) -> None:
    for case, metadata in json.loads((scored.predictions / "manifest.json").read_text())["cases"].items():
        mask = np.asarray(nibabel.load(scored.predictions / f"{case}.nii.gz").dataobj).T
        truth = np.asarray(nibabel.load(SOURCE / "labelsTr" / f"{case}.nii.gz").dataobj).T
        assert set(metadata["annotated_slices"]) == {"1", "2"}
        for label, (given,) in metadata["annotated_slices"].items():
            axis = metadata["array_axis"]
            assert np.array_equal(mask.take(given, axis) == int(label), truth.take(given, axis) == int(label))


def test_the_headline_counts_the_held_out_cases_alone(scored: Workspace) -> None:
    summary = json.loads((scored.evaluation / "summary.json").read_text())
    assert {entry["case"] for entry in summary["metric_per_case"] if entry["group"] == "held_out"} == set(
        json.loads(scored.split.read_text())["held_out"]
    )
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


def test_every_artefact_says_that_its_model_descends_from_random_weights(scored: Workspace) -> None:
    for text in (scored.predictions / "manifest.json", scored.evaluation / "summary.json", scored.evaluation / "summary.md"):
        assert "descends from random weights" in text.read_text()
    assert b"descends from random weights" in scored.model.read_bytes()[:20_000]


BROKEN = {
    "hippocampus_118": ("image_without_label_hippocampus_118.nii.gz", None),
    "hippocampus_010": (None, "label_without_image_hippocampus_010.nii.gz"),
    "heart": ("slicecount_mismatch_image_12sl.nii.gz", "slicecount_mismatch_label_18sl.nii.gz"),
    "hippocampus_281": ("image_without_label_hippocampus_118.nii.gz", "wrong_shape_label_hippocampus_281_512x512x94.nii.gz"),
}


def test_every_invalid_case_is_reported_in_one_line_and_the_valid_one_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {case: tuple(BAD / name if name else None for name in names) for case, names in BROKEN.items()}
    dataset = data_set(tmp_path / "data", {**pairs, CASES[0]: healthy(CASES[0])})
    space = Workspace.of(dataset, None)
    assert plan(dataset, space) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: case ")]
    assert sorted(line.split()[2].rstrip(":") for line in lines) == sorted(BROKEN)
    assert all(".nii.gz" in line and ". " in line for line in lines)
    capsys.readouterr()
    assert run_for_exit_code(lambda: finetune(dataset, space, cases=1, weights="random", steps=1)) == 2
    assert not space.finetuned.exists()


def test_a_dicom_series_is_one_volume_to_predict(scored: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a prompt it cannot be segmented, and the line says what is missing rather than that it cannot be read."""
    images, prompts = tmp_path / "images", tmp_path / "prompts"
    prompts.mkdir()
    shutil.copytree(BAD / "dicom_series_HCrop_unlabelled", images / "series")
    assert run_for_exit_code(lambda: predict(images, tmp_path / "masks", prompts=prompts, model=scored.model)) == 2
    assert "case series: no annotated slice" in capsys.readouterr().err
    assert not list((tmp_path / "masks").glob("*.nii.gz"))
