"""Speed and memory of measuring a data set, ours against nnU-Net's, in megabytes of voxels per second.

    python -m venv nnunet && PIP_CONSTRAINT=constraints.txt nnunet/bin/pip install nnunetv2 torch==2.13.0
    python benchmarks/fingerprint.py ../shared/data/Task04_Hippocampus ... --nnunet nnunet/bin [--repeats 5] [--processes 2]
    python benchmarks/fingerprint.py --memory 1000 [--nnunet nnunet/bin]

Megabytes are those of the images' voxels as stored, uncompressed. Each tool runs in its own processes, alternating, with the same
number of workers. All values are medians. Three times are measured:

whole command        from the start of the interpreter to its end: nnUNetv2_extract_fingerprint --clean, and slmsam2 plan up to
                     the file fingerprint.json
inside               DatasetFingerprintExtractor.run and measure(): without the start of the interpreter, with that of workers
cases, one process   every case in turn, with everything loaded before: DatasetFingerprintExtractor.analyze_case and measure_case

Ours measures more: labels along three axes, the intensities of the whole image, exact percentiles. nnU-Net samples 100 million foreground
voxels. --memory N: peak memory of a process that measures one case of 512 × 512 × N voxels with a mask, beyond what it had loaded.
Without --nnunet ours runs alone. nnU-Net gets the data set as links in its own layout, which is not possible for 4-D images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from slmsam2_cli.dataset.dataset import Dataset, read_dataset

OURS = """
import json, resource, sys, time
from pathlib import Path
import nibabel
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.planning.fingerprint import write_fingerprint
from slmsam2_cli.planning.measure import measure, measure_case
root, out, what, processes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
data = read_dataset(root)
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
if what == "command":
    fingerprint, problems = measure(data, workers=processes if processes >= 0 else None)
else:
    problems = [measure_case(case, data) for case in data.training][:0]
inside = time.perf_counter() - started
if what == "command":
    write_fingerprint(out / "fingerprint.json", fingerprint)
assert not problems, problems
print(json.dumps({"inside": inside, "peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)}))
"""
NNUNET = """
import json, resource, sys, time
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor as Extractor
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import extract_fingerprint_entry
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
what, processes = sys.argv[1], sys.argv[2]
run, found = Extractor.run, {}

def timed(self, **options):
    started = time.perf_counter()
    run(self, **options)
    found["inside"] = time.perf_counter() - started

Extractor.run = timed
if what == "command":
    sys.argv[1:] = ["-d", "1", "-np", processes, "--clean"]
    extract_fingerprint_entry()
else:
    extractor = Extractor(1, 1)
    files = list(extractor.dataset.values())
    reader = determine_reader_writer_from_dataset_json(extractor.dataset_json, files[0]["images"][0], verbose=False)
    samples = int(extractor.num_foreground_voxels_for_intensitystats // len(files))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    for file in files:
        extractor.analyze_case(file["images"], file["label"], reader, samples)
    found["inside"] = time.perf_counter() - started
    found["peak"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
print(json.dumps(found))
"""
Tool = Callable[[str], tuple[float, dict[str, float]]]  # "command" or "cases" -> (seconds of the process, values that it reports)


def child(command: list[str], **environment: str) -> tuple[float, dict[str, float]]:
    """Run a command with one thread per process. Return its seconds and the JSON object of its last line."""
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:1])} failed: {done.stderr[-2000:]}")
    return seconds, json.loads(done.stdout.strip().splitlines()[-1])


def ours(root: Path, folder: Path, processes: int) -> Tool:
    folder.mkdir()
    return lambda what: child([sys.executable, "-c", OURS, str(root), str(folder), what, str(processes)])


def nnunet(python: Path, data: Dataset, folder: Path, processes: int) -> Tool:
    """Return nnU-Net as a tool, with the data set as links in its own layout."""
    raw = folder / "Dataset001_Linked"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for case in data.training:
        for channel, image in enumerate(case.images):
            (raw / "imagesTr" / f"{case.id}_{channel:04d}{data.file_ending}").symlink_to(image.resolve())
        (raw / "labelsTr" / f"{case.id}{data.file_ending}").symlink_to(case.label.resolve())
    about = {
        "channel_names": {str(place): name for place, name in enumerate(data.channels)},
        "labels": {"background": 0} | {name: value for value, name in data.labels.items()},
        "numTraining": len(data.training),
        "file_ending": data.file_ending,
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    places = {name: str(folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return lambda what: child([str(python), "-c", NNUNET, what, str(processes)], **places)


def stored_bytes(data: Dataset) -> int:
    """Return the bytes of the images' voxels, uncompressed."""
    headers = [nibabel.load(image).header for case in data.training for image in case.images]
    return sum(int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize for header in headers)


def seconds(tools: dict[str, Tool], repeats: int) -> dict[str, dict[str, float]]:
    """Return tool -> time -> median. Tools alternate in changing order; the first round is a warm-up."""
    taken: dict[str, dict[str, list[float]]] = {name: {"whole command": [], "inside": [], "cases, one process": []} for name in tools}
    for repeat in range(repeats + 1):
        for what in ("command", "cases"):
            for name in list(tools)[:: 1 if repeat % 2 else -1]:
                whole, reported = tools[name](what)
                if repeat and what == "command":
                    taken[name]["whole command"].append(whole)
                    taken[name]["inside"].append(reported["inside"])
                elif repeat:
                    taken[name]["cases, one process"].append(reported["inside"])
    return {name: {what: statistics.median(found) for what, found in times.items()} for name, times in taken.items()}


def speed_rows(root: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of one data set."""
    data, megabytes = read_dataset(root), stored_bytes(read_dataset(root)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        tools = {"ours": ours(root, Path(folder, "ours"), options.processes)}
        if options.processes:
            tools["ours, as it chooses"] = ours(root, Path(folder, "chosen"), -1)
        if options.nnunet:
            tools["nnU-Net"] = nnunet(options.nnunet, data, Path(folder, "nnunet"), options.processes)
        found = seconds(tools, options.repeats)
    for what in found["ours"]:
        cells = [f"{megabytes / found[name][what]:.3g}" if name in found else "-" for name in ("ours", "ours, as it chooses", "nnU-Net")]
        ratio = f"{found['nnU-Net'][what] / found['ours'][what]:.3g}" if options.nnunet else "-"
        yield f"| {root.name}: {len(data.training)} cases, {megabytes:.1f} MB | {what} | {' | '.join(cells)} | {ratio} |"


@dataclass(frozen=True)
class Kind:
    """How an image is stored: NIfTI's data type code, slope and offset of the values."""

    name: str
    dtype: str
    code: int
    slope: float
    inter: float


KINDS = (Kind("int16", "<i2", 4, 1, 0), Kind("int16, scaled by 0.5", "<i2", 4, 0.5, 3), Kind("float32", "<f4", 16, 1, 0))


def write_case(root: Path, kind: Kind, slices: int) -> int:
    """Write a data set of one case, a noisy body with two organs in air, uncompressed, slice by slice. Return its bytes."""
    y, x = np.mgrid[:512, :512]
    body, organ = (y - 256) ** 2 + (x - 256) ** 2 < 180**2, (y - 200) ** 2 + (x - 200) ** 2 < 60**2
    noise = np.random.default_rng(0).normal(0, 300, (512, 512))
    fraction = 0.377 if kind.dtype == "<f4" else 0.0

    def image(z: int) -> np.ndarray:
        values = np.where(body, np.roll(noise, 7 * z) + 40, -1000)
        return values + fraction if fraction else np.rint(values)

    def mask(z: int) -> np.ndarray:
        return (body & (abs(y - 256) < 90)) + (organ & (z % 200 > 30)) * 1

    for folder, dtype, code, planes, slope, inter in (
        ("imagesTr", kind.dtype, kind.code, image, kind.slope, kind.inter),
        ("labelsTr", "u1", 2, mask, 1, 0),
    ):
        header = bytearray(352)
        struct.pack_into("<i", header, 0, 348)
        struct.pack_into("<8h", header, 40, 3, 512, 512, slices, 1, 1, 1, 1)
        struct.pack_into("<hh", header, 70, code, 8 * np.dtype(dtype).itemsize)
        struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 0, 0, 0, 0)
        struct.pack_into("<3f", header, 108, 352, slope, inter)
        struct.pack_into("<hh", header, 252, 0, 1)
        struct.pack_into("<12f", header, 280, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1, 0)
        header[344:348] = b"n+1\0"
        (root / folder).mkdir(parents=True)
        with (root / folder / ("case_0000.nii" if folder == "imagesTr" else "case.nii")).open("wb") as file:
            file.write(header)
            for z in range(slices):
                file.write(planes(z).astype(dtype).tobytes())
    labels = {"background": 0, "body": 1, "organ": 2}
    about = {"name": "Large", "channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii"}
    (root / "dataset.json").write_text(json.dumps(about))
    return slices * 512 * 512 * (np.dtype(kind.dtype).itemsize + 1)


def memory_rows(slices: int, python: Path | None) -> Iterator[str]:
    """Yield one row per kind of image."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            size = write_case(Path(folder, "data"), kind, slices)
            _, mine = ours(Path(folder, "data"), Path(folder, "ours"), 0)("cases")
            cells = [f"{mine['peak'] / 1e6:.0f} MB, {mine['peak'] / size:.2f} | {mine['inside']:.1f} s"]
            if python:
                _, theirs = nnunet(python, read_dataset(Path(folder, "data")), Path(folder, "nnunet"), 1)("cases")
                cells += [f"{theirs['peak'] / 1e6:.0f} MB, {theirs['peak'] / size:.2f} | {theirs['inside']:.1f} s"]
        yield f"| {kind.name}, {size / 1e6:.0f} MB with its mask | {' | '.join([*cells, *['- | -'] * (2 - len(cells))])} |"


def python_of(path: Path) -> Path:
    """Return the interpreter: the path itself, or `python` in that folder."""
    return path / "python" if path.is_dir() else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", type=Path)
    parser.add_argument("--nnunet", type=lambda text: python_of(Path(text)), help="The Python that has nnunetv2, or its bin folder.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="Workers of either tool.")
    parser.add_argument("--memory", type=int, metavar="SLICES")
    options = parser.parse_args()
    if not options.nnunet:
        print("no --nnunet: ours alone")
    if options.datasets:
        print(f"\n{options.processes} workers, medians of {options.repeats}\n")
        print("| data set | | ours, MB/s | ours as it chooses, MB/s | nnU-Net, MB/s | ours is faster by |\n|---|---|---|---|---|---|")
        for root in options.datasets:
            for row in speed_rows(root, options):
                print(row, flush=True)
    if options.memory:
        print("\npeak memory of one case beyond what was loaded, and as a multiple of the case as stored\n")
        print(f"| 512 × 512 × {options.memory} | ours | | nnU-Net | |\n|---|---|---|---|---|")
        for row in memory_rows(options.memory, options.nnunet):
            print(row, flush=True)


if __name__ == "__main__":
    main()
