"""The DICOM files that pydicom ships: each is read as its tags and pixel_array say, or refused, and the page in docs says which."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pydicom
import pytest

from slmsam2_cli.io.dicom_files import is_dicom

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readers() -> ModuleType:
    """Import benchmarks/dicom_readers.py, a script outside any package."""
    spec = importlib.util.spec_from_file_location("dicom_readers", ROOT / "benchmarks" / "dicom_readers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dicom_readers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_no_file_of_pydicom_is_read_wrong_and_the_page_counts_them(readers: ModuleType) -> None:
    paths = [path for path in sorted(readers.FILES.rglob("*")) if path.is_file() and path.name != "README" and is_dicom(path)]
    counts = Counter(readers.outcome_of(path)[0] for path in paths)
    assert counts["wrong"] == 0
    assert counts["read"] >= 75
    page = (ROOT / "docs" / "reference" / "dicom.md").read_text()
    match = re.search(r"pydicom (\S+) ships (\d+) DICOM files\. (\d+) are read right, (\d+) are refused", page)
    assert match is not None
    if match[1] == pydicom.__version__:
        assert [int(number) for number in match.groups()[1:]] == [len(paths), counts["read"], counts["refused"]]


def test_series_with_faults_are_read_right_or_refused(readers: ModuleType, tmp_path: Path) -> None:
    for name, (folder, expected) in readers.faulty_series(tmp_path).items():
        try:
            found = readers.read_image([folder], case="c", root=folder)
            outcome = readers.verdict(found.voxels[0], found.grid, expected)
        except readers.CaseError:
            outcome = readers.verdict(None, None, expected)
        assert outcome == ("refused" if expected is None else "read"), name
