"""Plans of real datasets stay as reviewed. After an intended change, run: python tests/golden/data_sets.py ../shared/data"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden.data_sets import NAMES, golden_fingerprint, golden_plan

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import differences
from slmsam2_cli.planning.rules import decide

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def test_there_are_seven_golden_plans():
    assert len(NAMES) == 7


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_gives_the_reviewed_settings(name):
    assert differences(decide(golden_fingerprint(name)), golden_plan(name)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_reasons_are_as_reviewed(name):
    assert decide(golden_fingerprint(name)).reasons == golden_plan(name).reasons


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real volumes are not next to this checkout")
@pytest.mark.parametrize("name", NAMES)
def test_measuring_the_volumes_again_gives_the_same_fingerprint(name):
    fingerprint, problems = measure(read_dataset(SHARED / name))
    assert problems == () and fingerprint.digest == golden_fingerprint(name).digest
