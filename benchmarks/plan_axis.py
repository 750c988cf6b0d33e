"""Dice of the bundled model without fine-tuning along each of the three axes, to check the planned slice axis.

    python benchmarks/plan_axis.py ../shared/data [--sets Task04_Hippocampus] [--weights nano] [--cases 12]

For every axis: slmsam2 plan --axis, slmsam2 predict from the middle slice of each label, and again with --mark-ends. Dice of whole
volumes, mean over cases, then over labels. Each axis has another annotated slice. Development cases (CHOSEN_ON in zero_shot.py) are
excluded.
"""

import argparse
import tempfile
from pathlib import Path

from strategies import mean_dice
from zero_shot import CHOSEN_ON

from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace


def rows_of(root: Path, weights: str, most: int | None) -> list[str]:
    data, rows = read_dataset(root), []
    cases = [case.id for case in data.training if case.id not in CHOSEN_ON.get(root.name, ())][:most]
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(Path(folder) / "planned")
        plan(root, space, report=False)
        planned = read_plan(space.plan).geometry.slice_axis
        for axis in AXES:
            turned = Workspace(Path(folder) / axis)
            plan(root, turned, axis=axis, report=False)
            scores = []
            for ends in (False, True):
                masks = Path(folder) / f"{axis}{ends}"
                predict(None, masks, dataset=root, workspace=turned, weights=weights, mark_ends=ends, report=False)
                scores.append(mean_dice(root, masks, cases))
            rows.append(
                f"| {root.name} | {axis}{', planned' if axis == planned else ''} | {scores[0]:.3f} | {scores[1]:.3f} | {len(cases)} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["Task04_Hippocampus"])
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--cases", type=int, help="maximum number of cases to score")
    options = parser.parse_args()
    rows = [row for name in options.sets for row in rows_of(options.data / name, options.weights, options.cases)]
    print("| set | slices along | Dice | Dice, ends marked | cases |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
