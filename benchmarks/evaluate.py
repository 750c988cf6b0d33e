"""Time and memory of `slmsam2 evaluate` on large cases, from the start of the process to its end.

    python benchmarks/evaluate.py [--cases 20] [--repeats 5] [--workers N]

Generates livers of 1.5 litres in 512 × 512 × 120 voxels and predictions of them, as .nii.gz, in a temporary folder. Then runs the
command, and before each run a gunzip of the same files for comparison (the bytes that must be read). Memory is the resident size added up
over all processes every 10 ms, so shared pages count more than once. Processor seconds are the last values of all processes. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
from organs import LIVER, pair

PAGE = os.sysconf("SC_PAGE_SIZE")
SLMSAM2 = str(Path(sys.executable).with_name("slmsam2"))


def make(folder: Path, cases: int) -> None:
    """Write labels/ and predictions/ with `cases` pairs, uint8, with the usual compression."""
    affine = np.diag([*LIVER.spacing_mm[::-1], 1.0])
    for seed in range(cases):
        for name, mask in zip(("labels", "predictions"), pair(LIVER, seed)):
            (folder / name).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(mask.astype(np.uint8).T, affine)
            nibabel.save(image, folder / name / f"liver_{seed:03}.nii.gz")


def gunzip(folder: Path) -> tuple[float, int, int]:
    """Read every file once with its checksum, in one process. Return seconds, compressed bytes and decompressed bytes."""
    started, compressed, decompressed = time.perf_counter(), 0, 0
    for path in sorted(folder.glob("*/*.nii.gz")):
        data = path.read_bytes()
        compressed, decompressed = compressed + len(data), decompressed + len(zlib.decompress(data, 31))
    return time.perf_counter() - started, compressed, decompressed


def evaluate(folder: Path, out: Path, options: list[str]) -> tuple[float, float, float]:
    """Run the command. Return wall-clock seconds, processor seconds and peak memory in MB."""
    started = time.perf_counter()
    command = [SLMSAM2, "evaluate", "-p", str(folder / "predictions"), "-g", str(folder / "labels"), "-o", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    usage = Usage()
    watcher = threading.Thread(target=_watch, args=(process, usage))
    watcher.start()
    _, stderr = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(stderr)
    return seconds, sum(usage.ticks.values()) / os.sysconf("SC_CLK_TCK"), usage.peak / 1e6


@dataclass
class Usage:
    """Resources of a process and its children, sampled every 10 ms. peak: bytes; ticks: of the processor, by process."""

    peak: int = 0
    ticks: dict[int, int] = field(default_factory=dict)


def _watch(process: subprocess.Popen[str], usage: Usage) -> None:
    while process.poll() is None:
        family = _family(process.pid)
        usage.peak = max(usage.peak, sum(map(_resident, family)))
        for pid in family:
            usage.ticks[pid] = max(usage.ticks.get(pid, 0), _ticks(pid))
        time.sleep(0.01)


def _ticks(pid: int) -> int:
    """Return the processor ticks of a process so far, in user and in kernel mode."""
    try:
        counts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(counts[11]) + int(counts[12])


def _family(pid: int) -> list[int]:
    """Return the ids of a process and of all its children."""
    found = [pid]
    for parent in found:
        try:
            children = [Path(task / "children").read_text().split() for task in Path(f"/proc/{parent}/task").iterdir()]
        except OSError:
            continue
        found += [int(child) for several in children for child in several]
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def help_text() -> tuple[float, bool]:
    """Run `slmsam2 evaluate --help`. Return seconds and whether torch was imported."""
    started = time.perf_counter()
    subprocess.run([SLMSAM2, "evaluate", "--help"], capture_output=True, check=True)
    seconds = time.perf_counter() - started
    traced = [sys.executable, "-X", "importtime", SLMSAM2, "evaluate", "--help"]
    stderr = subprocess.run(traced, capture_output=True, text=True, check=True).stderr
    return seconds, any(line.rpartition("|")[2].strip() == "torch" for line in stderr.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--no-report", action="store_true", help="Write numbers and tables only, no page.")
    parser.add_argument("--data", type=Path, help="Keep the data in this folder, and reuse data that it holds.")
    options = parser.parse_args()
    passed = [] if options.workers is None else ["--workers", str(options.workers)]
    passed += ["--no-report"] * options.no_report
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary) / "data"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            make(folder, options.cases)
        floors, runs = [], []
        for repeat in range(options.repeats):
            floors.append(gunzip(folder))
            runs.append(evaluate(folder, Path(temporary) / f"out{repeat}", passed))
    seconds, worked, megabytes = zip(*runs)
    floor = statistics.median(f[0] for f in floors)
    wall = statistics.median(seconds)
    print(f"| {options.cases} cases of 512 × 512 × 120, {len(os.sched_getaffinity(0))} cores, {options.repeats} runs | median | worst |")
    print("|---|---|---|")
    print(f"| `slmsam2 evaluate{' --no-report' * options.no_report}`, wall s | {wall:.2f} | {max(seconds):.2f} |")
    print(f"| the same, processor s | {statistics.median(worked):.2f} | {max(worked):.2f} |")
    print(f"| peak memory, all processes, MB | {statistics.median(megabytes):.0f} | {max(megabytes):.0f} |")
    print(f"| gunzip alone of {floors[0][1] / 1e6:.0f} MB to {floors[0][2] / 1e6:.0f} MB, one process, s | {floor:.2f} | |")
    print(f"| evaluate / gunzip | {wall / floor:.1f} | |")
    took, torch = help_text()
    print(f"| `slmsam2 evaluate --help`, s ({'imports torch' if torch else 'without torch'}) | {took:.2f} | |")


if __name__ == "__main__":
    main()
