"""Reviewed fingerprints and plans of real datasets; they contain no voxels.

python tests/golden/data_sets.py ../shared/data     rewrites plans/NAME.fingerprint.json and plans/NAME.plan.json; review the difference
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.planning.fingerprint import Fingerprint, read_fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan, read_plan
from slmsam2_cli.planning.rules import decide

PLANS = Path(__file__).with_name("plans")
NAMES = sorted(path.name.removesuffix(".plan.json") for path in PLANS.glob("*.plan.json"))


def golden_fingerprint(name: str) -> Fingerprint:
    return read_fingerprint(PLANS / f"{name}.fingerprint.json")


def golden_plan(name: str) -> Plan:
    return read_plan(PLANS / f"{name}.plan.json")


def write(root: Path) -> None:
    """Measure a dataset and write its fingerprint and plan, without the version of slmsam2, so that the files change only with settings."""
    fingerprint, problems = measure(read_dataset(root))
    assert not problems, problems
    for kind, value in (("fingerprint", fingerprint), ("plan", decide(fingerprint))):
        known = json.dumps(value.model_copy(update={"tool_version": "any"}).model_dump(mode="json"), indent=1)
        (PLANS / f"{root.name}.{kind}.json").write_text(known + "\n", encoding="utf-8")


if __name__ == "__main__":
    for dataset in sorted(Path(sys.argv[1]).glob("*/dataset.json")):
        write(dataset.parent)
