"""All commands in order on small synthetic phantoms, through the files that they write. One training step, so scores mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmsam2_cli.cli.exit_codes import run_for_exit_code
from slmsam2_cli.commands.demo import TRAINING_CASES, demo
from slmsam2_cli.commands.evaluate import evaluate
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.io.files import sha256_of
from slmsam2_cli.io.volume import read_labels, write_mask
from slmsam2_cli.workspace import Workspace

MINUTES = 0.001  # of training: one step
HELD_OUT = 1


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace of a demo with six small phantoms."""
    folder = tmp_path_factory.mktemp("demo")
    write_phantom_dataset(folder / "dataset", cases=TRAINING_CASES + HELD_OUT, test_cases=1, shape=(6, 28, 28))
    assert demo(folder, minutes=MINUTES, device="cpu") == 0
    return Workspace.of(folder / "dataset", None)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def held_out(space: Workspace) -> str:
    (case,) = read(space.split)["held_out"]
    return str(case)


def test_every_command_writes_the_files_that_the_next_one_reads(space: Workspace) -> None:
    split = read(space.split)
    assert len(split["training"]) == TRAINING_CASES
    assert {path.name for path in space.prepared.iterdir() if path.is_dir()} == {*split["training"], *split["held_out"]}
    assert list(read(space.predictions / "manifest.json")["cases"]) == split["held_out"]
    assert {path.name for path in space.evaluation.iterdir()} >= {"summary.json", "cases.csv", "slices.csv", "summary.md"}


def test_the_score_is_that_of_the_held_out_case_alone(space: Workspace) -> None:
    summary = read(space.evaluation / "summary.json")
    assert [case["case"] for case in summary["metric_per_case"]] == [held_out(space)]
    assert summary["cases"]["held_out"] == HELD_OUT
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


def test_the_manifest_names_training_cases_plan_and_weights(space: Workspace) -> None:
    model = read(space.predictions / "manifest.json")["model"]
    assert model["provenance"]["training"] == read(space.split)["training"]
    assert len(model["weights_digest"]) == len(model["plan_digest"]) == 64


def test_a_second_run_changes_nothing(space: Workspace) -> None:
    kept = [space.plan, space.model, space.split, *space.predictions.glob("*.nii.gz"), space.evaluation / "summary.json"]
    before = [(sha256_of(path), path.stat().st_mtime_ns) for path in kept[1:-1]]
    digests = [sha256_of(path) for path in kept]
    assert demo(space.root.parents[1], minutes=MINUTES, device="cpu") == 0
    assert [sha256_of(path) for path in kept] == digests
    assert [(sha256_of(path), path.stat().st_mtime_ns) for path in kept[1:-1]] == before


def test_the_annotated_slice_is_copied_to_the_mask_and_the_grid_is_that_of_the_image(space: Workspace, tmp_path: Path) -> None:
    dataset, case = space.root.parent, held_out(space)
    truth = read_labels(dataset / "labelsTr" / f"{case}.nii.gz", case=case, root=dataset)
    middle = int(np.flatnonzero((truth.voxels == 1).any(axis=(1, 2))).mean())
    annotated = np.zeros_like(truth.voxels)
    annotated[middle] = truth.voxels[middle]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{case}_0000.nii.gz").write_bytes((dataset / "imagesTr" / f"{case}.nii.gz").read_bytes())
    write_mask(tmp_path / "prompts" / f"{case}.nii.gz", annotated, truth)

    assert predict(tmp_path / "images", tmp_path / "masks", prompts=tmp_path / "prompts", model=space.finetuned, device="cpu") == 0
    found = read_labels(tmp_path / "masks" / f"{case}.nii.gz", case=case, root=tmp_path)
    assert found.grid.difference(truth.grid) is None
    assert np.array_equal(found.voxels[middle], truth.voxels[middle])

    assert evaluate((tmp_path / "masks",), dataset / "labelsTr", None, tmp_path / "scores", dataset=None) in (0, 1)
    assert {path.name for path in (tmp_path / "scores").iterdir()} >= {"summary.json", "cases.csv"}


def test_writing_masks_to_the_folder_of_the_images_is_rejected(space: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    images = space.root.parent / "imagesTr"
    before = {path.name: sha256_of(path) for path in images.iterdir()}
    assert (
        run_for_exit_code(
            lambda: predict(images, images, simulate_from=space.root.parent / "labelsTr", model=space.finetuned, device="cpu")
        )
        == 2
    )
    assert "same folder" in capsys.readouterr().err
    assert {path.name: sha256_of(path) for path in images.iterdir()} == before
