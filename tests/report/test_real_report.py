"""The report of thirty-five real cases, written by the command and used in a browser by benchmarks/report.py."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk

from slmsam2_cli.commands.evaluate import evaluate

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT.parent / "shared" / "data" / "Task04_Hippocampus"
CASES = 35

pytestmark = [
    pytest.mark.skipif(not SOURCE.is_dir(), reason="the shared real volumes are not beside this checkout"),
    pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no Chromium on this machine"),
]


def benchmark() -> ModuleType:
    """Import benchmarks/report.py, a script outside any package."""
    spec = importlib.util.spec_from_file_location("benchmark_report", ROOT / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate predictions made from the labels: shifted by one to three voxels, without their first slice."""
    masks, labels, out = (tmp_path_factory.mktemp(name) for name in ("masks", "labels", "out"))
    for number, path in enumerate(sorted((SOURCE / "labelsTr").glob("hippocampus_*.nii.gz"))[:CASES]):
        label = sitk.ReadImage(str(path))
        moved = np.roll(sitk.GetArrayFromImage(label), 1 + number % 3, axis=1)
        moved[np.flatnonzero(moved.any(axis=(1, 2)))[0]] = 0
        image = sitk.GetImageFromArray(moved)
        image.CopyInformation(label)
        sitk.WriteImage(image, str(masks / path.name))
        shutil.copy(path, labels)
    assert evaluate((masks,), labels, None, out, dataset=None, images=SOURCE / "imagesTr") == 0
    return out


def test_the_report_of_real_cases_is_one_file_and_works_in_a_browser(evaluated: Path, tmp_path: Path) -> None:
    seen = benchmark().check_page(evaluated / "report.html", tmp_path, "report")
    scored = [case for case in json.loads((evaluated / "summary.json").read_text())["metric_per_case"] if case["status"] == "ok"]
    assert len(scored) == CASES
    assert seen[-1] == "no console message, no outside request"
    assert not (evaluated / "report_files").exists()
    assert (evaluated / "report.html").stat().st_size < 8 * 2**20
