"""Memory and time of a run as slmsam2 plan estimates them, against measured values.

    python benchmarks/cost.py ../shared/data [--sets Task04_Hippocampus Sarcoma_CT SpinalCord_MRI] [-n 1] [--steps 60]

For every set: slmsam2 plan, then slmsam2 predict on all its cases and slmsam2 finetune -n N, each in its own process; peak resident
memory and wall-clock seconds. --steps shortens fine-tuning; the estimate is then for that number of steps. The speed of this machine is
measured once, before the first run. Linux only.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from slmsam2_cli.commands.plan import plan
from slmsam2_cli.model.speed import seconds_per_slice
from slmsam2_cli.parallel import available_cpus
from slmsam2_cli.planning.estimate import Estimate, estimate_finetuning, estimate_prediction
from slmsam2_cli.planning.fingerprint import read_fingerprint
from slmsam2_cli.planning.plan import NetworkPlan, read_plan
from slmsam2_cli.workspace import Workspace

SLMSAM2 = str(Path(sys.executable).with_name("slmsam2"))


def measured(command: list[str]) -> tuple[float, float]:
    """Return seconds and peak bytes of a command; it runs below a process of its own, so that the peak is of this command alone."""
    reading, writing = os.pipe()
    started, child = time.perf_counter(), os.fork()
    if child == 0:
        failed = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        os.write(writing, f"{failed} {peak}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    failed, peak = map(int, os.read(reading, 100).split())
    if failed:
        raise SystemExit(f"{' '.join(command)} failed with exit code {failed}")
    return time.perf_counter() - started, float(peak)


def table_row(name: str, run: str, estimated: Estimate | None, took: tuple[float, float]) -> str:
    assert estimated is not None and estimated.seconds is not None
    memory, seconds = estimated.memory_bytes / took[1], estimated.seconds / took[0]
    shown = (
        f"{estimated.memory_bytes / 1e6:.0f} | {took[1] / 1e6:.0f} | {memory:.2f} | {estimated.seconds:.0f} | {took[0]:.0f} | {seconds:.2f}"
    )
    return f"| {name} | {run} | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["Task04_Hippocampus", "Sarcoma_CT", "SpinalCord_MRI"])
    parser.add_argument("-n", "--cases", type=int, default=1)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    speed = seconds_per_slice(NetworkPlan(), 128, torch.device("cpu"))
    workers = available_cpus()
    print(f"measured speed: {1000 * speed:.1f} ms per slice\n", flush=True)
    print(
        "| set | run | MB estimated | MB taken | ratio | seconds estimated | seconds taken | ratio |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.sets:
        root = options.data / name
        with tempfile.TemporaryDirectory() as folder:
            space = Workspace(Path(folder) / "workspace")
            plan(root, space, report=False)
            final_plan, fingerprint = read_plan(space.plan), read_fingerprint(space.fingerprint)
            common = ["-d", str(root), "-w", str(space.root), "--quiet", "--disable-progress"]
            took = measured([SLMSAM2, "predict", "-o", str(Path(folder) / "masks"), "--weights", "nano", "--no-report", *common])
            count = len(fingerprint.cases)
            print(
                table_row(name, f"predict {count} volumes", estimate_prediction(final_plan, fingerprint.cases, speed, workers), took),
                flush=True,
            )
            steps = ["--steps", str(options.steps)] if options.steps else []
            took = measured([SLMSAM2, "finetune", "-n", str(options.cases), "--weights", "nano", *steps, *common])
            if options.steps:  # as a manual edit of the plan
                final_plan = final_plan.model_copy(update={"training": final_plan.training.model_copy(update={"steps": options.steps})})
            tuning = estimate_finetuning(final_plan, fingerprint, options.cases, speed, workers)
            print(
                table_row(name, f"finetune -n {options.cases}{f', {options.steps} steps' * bool(options.steps)}", tuning, took), flush=True
            )


if __name__ == "__main__":
    main()
