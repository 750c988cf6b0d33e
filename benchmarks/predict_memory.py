"""Measure memory and time of predictions of unusual size: a very large volume, many volumes, many labels.

    python benchmarks/predict_memory.py [--parts large,many,labels] [--volumes 1000]

large   512 x 512 x 1000 voxels, one label: peak memory of the process (the target is 4 GB), and seconds per slice beside those of a volume
        of 96 x 96 x 60
many    1,000 volumes of 8 x 40 x 40 voxels in one run: memory of all its processes over time, seconds per case
labels  a volume of 60 x 160 x 160 voxels with 1, 20 and 35 labels, of equal size: seconds, and their ratio to one label

Each prediction is the command `slmsam2 predict`, with the bundled model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from slmsam2_cli.dataset.phantom import nifti_bytes, write_phantom_dataset

COMMAND = [sys.executable, "-c", "from slmsam2_cli.cli.app import main; main()", "predict", "--no-report", "--quiet"]
SAMPLE_S = 0.25


def resident_bytes(session: int) -> list[int]:
    """List the memory of the processes of a session in bytes, without what they share with others."""
    found = []
    listed = subprocess.run(["ps", "-eo", "sid,pid"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    for pid in [line.split()[1] for line in listed if int(line.split()[0]) == session]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found.append(sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")))
    return found


def predict(images: Path, prompts: Path, masks: Path, *more: str) -> tuple[float, list[int]]:
    """Run a prediction. Returns its seconds, and the memory of all its processes in bytes, at intervals of SAMPLE_S."""
    line = [*COMMAND, "-i", images, "--simulate-prompts", prompts, "-o", masks, *more]
    started, samples, done = time.monotonic(), list[int](), threading.Event()
    run = subprocess.Popen(line, start_new_session=True)

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            samples.append(sum(resident_bytes(run.pid)))

    watch = threading.Thread(target=sample)
    watch.start()
    code = run.wait()
    seconds = time.monotonic() - started
    done.set()
    watch.join()
    if code:
        sys.exit(f"the prediction of {images} failed with exit code {code}")
    return seconds, samples


def segmentation_seconds(masks: Path) -> float:
    """Return the seconds that the cases took, from the manifest."""
    return sum(case["seconds"] for case in json.loads((masks / "manifest.json").read_text())["cases"].values())


def write(folder: Path, shape: tuple[int, int, int], objects: int, radius: float) -> None:
    """Write a volume (T, R, C) with `objects` ellipsoids through most of its slices, in rows, and its mask."""
    slices, rows, columns = shape
    image, labels, draw = np.empty(shape, np.int16), np.zeros(shape, np.uint8), np.random.default_rng(0)
    per_row = int(np.ceil(np.sqrt(objects)))
    way = np.sqrt(np.clip(1 - ((np.arange(slices) - slices / 2) / (0.45 * slices)) ** 2, 0, None))
    y, x = np.ogrid[:rows, :columns]
    for label in range(objects):
        row, column = ((place + 0.5) * edge / per_row for place, edge in zip(divmod(label, per_row), (rows, columns)))
        for t in np.flatnonzero(way):
            labels[t][(y - row) ** 2 + (x - column) ** 2 < (radius * way[t]) ** 2] = label + 1
    for t in range(slices):  # slice by slice, so that this script needs less memory than what it measures
        noise = draw.normal(200, 25, (rows, columns)) + np.where(labels[t] > 0, 250 + 10 * labels[t], 0)
        image[t] = noise
    for name, voxels in (("images", image), ("labels", labels)):
        (folder / name).mkdir(parents=True)
        (folder / name / "case.nii").write_bytes(nifti_bytes(voxels, (1.0, 1.0, 1.0)))


def measure_large(folder: Path) -> None:
    for shape in ((60, 96, 96), (1000, 512, 512)):
        place = folder / "x".join(map(str, shape))
        write(place, shape, 1, shape[1] / 8)
        seconds, samples = predict(place / "images", place / "labels", place / "masks")
        inside = segmentation_seconds(place / "masks")
        print(f"{place.name}: peak {max(samples) / 1e9:.2f} GB, {seconds:.0f} s, {1e3 * inside / shape[0]:.0f} ms per slice", flush=True)


def measure_many(folder: Path, volumes: int) -> None:
    write_phantom_dataset(folder, cases=20, test_cases=0, seed=1, shape=(8, 40, 40))
    for name in ("imagesTr", "labelsTr"):
        files = sorted((folder / name).glob("*.nii.gz"))
        for number in range(volumes):
            place = folder / name.replace("Tr", "") / f"case{number:04d}.nii.gz"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(files[number % len(files)].read_bytes())
    seconds, samples = predict(folder / "images", folder / "labels", folder / "masks")
    tenths = np.array_split(np.array(samples), 10)
    print(f"{volumes} volumes: {seconds:.0f} s, {seconds / volumes:.2f} s per case; memory of all processes in GB, median of each tenth:")
    print("  " + " ".join(f"{np.median(tenth) / 1e9:.2f}" for tenth in tenths), flush=True)


def measure_labels(folder: Path) -> None:
    reference = None
    for objects in (1, 20, 35):
        place = folder / f"{objects}"
        write(place, (60, 160, 160), objects, 9)
        predict(place / "images", place / "labels", place / "masks")
        seconds = segmentation_seconds(place / "masks")
        reference = reference or seconds
        print(f"{objects} labels: {seconds:.1f} s, {seconds / reference:.1f} times one label", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="large,many,labels")
    parser.add_argument("--volumes", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for part in options.parts.split(","):
            folder = Path(name) / part
            folder.mkdir()
            {"large": measure_large, "labels": measure_labels, "many": lambda at: measure_many(at, options.volumes)}[part](folder)


if __name__ == "__main__":
    main()
