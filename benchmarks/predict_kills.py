"""Check that a prediction survives the end of a worker, of the whole run, and Ctrl-C, at random moments.

    python benchmarks/predict_kills.py [--times 20] [--seed 0] [--workers 2]

Eight synthetic phantoms. After each blow, all processes of the run must have ended, or the run must go on without the worker. The same
command then continues; its masks must equal those of an uninterrupted run byte for byte, and no temporary file may be left. A worker that
is killed may cost its case, named in the message, in that run alone. Takes about fifteen minutes for 3 x 20 blows.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slmsam2_cli.dataset.phantom import write_phantom_dataset

COMMAND = [sys.executable, "-c", "from slmsam2_cli.cli.app import main; main()", "predict", "--no-report", "--quiet"]
ORPHANS_END_S = 5.0


def start(root: Path, masks: Path, workers: int) -> "subprocess.Popen[bytes]":
    """Start a prediction in a session of its own, where its processes can be counted."""
    line = [*COMMAND, "-i", root / "imagesTr", "--simulate-prompts", root / "labelsTr", "-o", masks, "--workers", str(workers)]
    return subprocess.Popen(line, start_new_session=True, stderr=subprocess.PIPE, cwd=root)


def processes(session: int) -> dict[int, int]:
    """List the processes of a session: process id -> id of its parent; zombies do not count."""
    listed = subprocess.run(["ps", "-eo", "sid,pid,ppid,stat"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = [line.split() for line in listed]
    return {int(pid): int(parent) for sid, pid, parent, state in rows if int(sid) == session and state[0] != "Z"}


def kill_worker(run: "subprocess.Popen[bytes]", draw: random.Random) -> bool:
    """Kill one of the processes that a child of the run has started; False when there is none yet."""
    found = processes(run.pid)
    workers = [pid for pid, parent in found.items() if parent in found and parent != run.pid]
    if workers:
        os.kill(draw.choice(workers), signal.SIGKILL)
    return bool(workers)


def kill_parent(run: "subprocess.Popen[bytes]", draw: random.Random) -> bool:
    """Kill the process that the user has started."""
    run.kill()
    return True


def interrupt(run: "subprocess.Popen[bytes]", draw: random.Random) -> bool:
    """Press Ctrl-C: all processes of the terminal get the signal."""
    os.killpg(run.pid, signal.SIGINT)
    return True


def contents(masks: Path) -> dict[str, bytes]:
    """Read every mask, and name the temporary files."""
    return {p.name: p.read_bytes() if p.name.endswith(".nii.gz") else b"" for p in masks.iterdir() if p.suffix == ".gz" or "tmp" in p.name}


def strike(blow: Callable[..., bool], root: Path, masks: Path, options: argparse.Namespace, took: float, draw: random.Random) -> str:
    """Run once with one blow at a random moment, then until done. Returns what went wrong, or nothing."""
    run = start(root, masks, options.workers)
    time.sleep(draw.uniform(0.2, 1.0) * took)
    while run.poll() is None and not blow(run, draw):
        time.sleep(0.05)
    said = run.communicate()[1].decode(errors="replace")
    deadline = time.monotonic() + ORPHANS_END_S
    while processes(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left := processes(run.pid):
        return f"processes left: {left}"
    if "Traceback" in said:
        return f"a traceback: {said}"
    again = start(root, masks, options.workers)
    said = again.communicate()[1].decode(errors="replace")
    return f"exit code {again.returncode}: {said}" if again.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    draw, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "Phantoms"
        write_phantom_dataset(root, cases=8, test_cases=0, seed=3, shape=(16, 64, 64))
        started = time.monotonic()
        if start(root, Path(name) / "uninterrupted", options.workers).wait():
            sys.exit("the uninterrupted run failed")
        took, expected = time.monotonic() - started, contents(Path(name) / "uninterrupted")
        print(f"uninterrupted: {took:.0f} s, {len(expected)} masks", flush=True)
        for blow in (kill_worker, kill_parent, interrupt):
            equal = 0
            for time_ in range(options.times):
                masks = Path(name) / f"{blow.__name__}_{time_}"
                wrong = strike(blow, root, masks, options, took, draw)
                wrong = wrong or ("" if contents(masks) == expected else "the masks differ, or a temporary file is left")
                equal += not wrong
                if wrong:
                    print(f"{blow.__name__} {time_}: {wrong}", flush=True)
            print(f"{blow.__name__}: {equal} of {options.times} ended byte-equal, without orphans and temporary files", flush=True)
            failures += options.times - equal
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
