"""Check that a fine-tuning run that is killed repeatedly ends with the same bits as an uninterrupted one.

    python benchmarks/kills.py [--kills 10] [--seed 0] [--threads 2] [--validation cross-validation]

Two synthetic phantoms, 60 steps, a state saved every three seconds. With --validation cross-validation, short runs without one volume come
first (on these volumes they keep the pretrained weights, so the 60 steps are not run). The second run gets SIGKILL at random times and is
resumed with --continue each time. Then the weights of both runs are compared. Takes four to seven minutes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slmsam2_cli import console
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.workspace import Workspace

RUN = "import slmsam2_cli.commands.finetune as command; command.SAVE_EVERY_S = 3.0; from slmsam2_cli.cli.app import main; main()"


def finetune(root: Path, space: Workspace, validation: str, threads: int, *more: str) -> "subprocess.Popen[bytes]":
    line = [
        sys.executable,
        "-c",
        RUN,
        "finetune",
        "-n",
        "2",
        "--steps",
        "60" if validation == "none" else "100",
        "-d",
        str(root),
        "-w",
        str(space.root),
        "--quiet",
        *more,
    ]
    return subprocess.Popen(line, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))


def write_plan_of(root: Path, space: Workspace, validation: str) -> None:
    plan(root, space, report=False)
    decided = read_plan(space.plan)
    training = decided.training.model_copy(update={"validation": validation})
    space.plan.unlink()
    write_plan(space.plan, decided.model_copy(update={"training": training}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation", choices=["none", "cross-validation"], default="none")
    options = parser.parse_args()
    console.settings.quiet = True
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "Phantoms"
        write_phantom_dataset(root, cases=4, test_cases=0, seed=3, shape=(16, 64, 64))
        uninterrupted, killed = Workspace(Path(name) / "uninterrupted"), Workspace(Path(name) / "killed")
        for space in (uninterrupted, killed):
            write_plan_of(root, space, options.validation)
        started = time.monotonic()
        if finetune(root, uninterrupted, options.validation, options.threads).wait():
            sys.exit("the uninterrupted run failed")
        took = time.monotonic() - started
        print(f"uninterrupted: {took:.0f} s", flush=True)
        kills = 0
        while True:
            run = finetune(root, killed, options.validation, options.threads, *(["--continue"] if killed.split.exists() else []))
            try:
                code = run.wait(draw.uniform(2, took / 6) if kills < options.kills else None)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                kills += 1
                print(f"killed {kills} times", flush=True)
                continue
            if code:
                sys.exit(f"the run that was killed {kills} times failed with exit code {code}")
            break
        one, other = (read_checkpoint(space.model).digest for space in (uninterrupted, killed))
        print(f"{kills} kills; the same bits: {one == other} ({one[:12]}, {other[:12]})")
        sys.exit(one != other)


if __name__ == "__main__":
    main()
