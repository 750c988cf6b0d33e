"""Time of `slmsam2 finetune` on this machine's CPU, one piece of work at a time and side by side, with and without other programs.

    python benchmarks/finetune_time.py DATASET [--cases 5] [--steps 80] [--repeats 2] [--busy 0]

DATASET: a data set folder. Both settings alternate, each in new worker processes and a workspace of its own. Folds have three tenths of
the steps. --busy: other programs that compute meanwhile. Printed, per part of the run: median seconds, and the median ratio to the run
before it; and a digest of validation.json and of the weights, the same for all.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from busy import busy_programs

from slmsam2_cli import console
from slmsam2_cli.commands import finetune as stage
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.preprocess import preprocess
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.workspace import Workspace

SETTINGS = ("one at a time", "side by side")
PARTS = {"cross-validation": "validate", "training": "_train", "calibration": "calibrate_model"}


def timed(part: str, work: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    """Record how long a function takes."""

    def run(*given: Any) -> Any:
        started = time.perf_counter()
        result = work(*given)
        seconds[part] = time.perf_counter() - started
        return result

    return run


def run_once(dataset: Path, workspace: Path, cases: int, steps: int, setting: str) -> None:
    """Fine-tune in this process, and print the seconds of its parts and a digest of the results."""
    console.settings.quiet, seconds = True, dict[str, float]()
    for part, name in PARTS.items():
        setattr(stage, name, timed(part, getattr(stage, name), seconds))
    if setting == SETTINGS[0]:
        stage.finetuning_bytes = lambda *given: None
    space, started = Workspace(workspace), time.perf_counter()
    stage.finetune(dataset, space, cases=cases, steps=steps, device="cpu")
    seconds["all"] = time.perf_counter() - started
    content = (space.finetuned / "validation.json").read_bytes() + read_checkpoint(space.model).digest.encode()
    print(json.dumps({"seconds": seconds, "digest": hashlib.sha256(content).hexdigest()[:12]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--once", nargs=2, metavar=("WORKSPACE", "SETTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        return run_once(options.dataset, Path(options.once[0]), options.cases, options.steps, options.once[1])
    console.settings.quiet = True
    found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as folder, busy_programs(options.busy):
        empty = Workspace(Path(folder) / "empty")
        plan(options.dataset, empty, report=False)
        preprocess(options.dataset, empty)
        for repeat in range(options.repeats):
            for setting in SETTINGS:
                place = Path(folder) / f"{repeat} {setting}"
                shutil.copytree(empty.root, place)
                command = [sys.executable, *sys.argv, "--once", str(place), setting]
                found[setting].append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    print("| part | " + " | ".join(SETTINGS) + " | ratio |\n|---|---|---|---|")
    for part in [*PARTS, "all"]:
        taken = {setting: [one["seconds"][part] for one in found[setting]] for setting in SETTINGS}
        ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
        print(f"| {part} | " + " | ".join(f"{statistics.median(values):.0f} s" for values in taken.values()) + f" | {ratio:.2f} |")
    print("digests:", *{one["digest"] for ones in found.values() for one in ones})
    return None


if __name__ == "__main__":
    main()
