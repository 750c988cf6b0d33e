"""Time `slmsam2 predict` on DICOM series and on the same volumes as NIfTI, alternating.

    python benchmarks/dicom_time.py --series 500
    python benchmarks/dicom_time.py [--volumes 200] [--slices 40] [--size 192] [--rounds 3] [--format auto]

Volumes are synthetic phantoms (uncompressed DICOM, a file a slice; gzip-compressed NIfTI), the prompt is label 1 on its middle slice.
Prints seconds a round, their ratio, and the same for reading alone. --format nifti: without the DICOM segmentations beside the masks.
--series: instead, list and read a folder in which so many series of 20 slices lie side by side, and print seconds and memory.
"""

import argparse
import contextlib
import io
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import dicom_writer

from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import read_image_folder
from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.io.image import Grid, Source
from slmsam2_cli.io.volume import Volume, read_image, volume_digests, write_mask


def write_volumes(folder: Path, volumes: int, shape: tuple[int, int, int]) -> None:
    """Write each volume as nifti/NAME.nii.gz and dicom/NAME/, and its prompt as prompts/NAME.nii.gz."""
    import nibabel

    for name in ("nifti", "dicom", "prompts"):
        (folder / name).mkdir()
    image, labels, spacing = phantom_volume(np.random.default_rng(0), shape, "CT")
    grid = Grid(shape, spacing, (0.0, 0.0, 0.0), np.eye(3))
    middle = int(np.median(np.flatnonzero((labels == 1).any(axis=(1, 2)))))
    prompt = np.where((np.arange(shape[0]) == middle)[:, None, None] & (labels == 1), 1, 0).astype(np.uint8)
    for number in range(volumes):
        voxels, name = np.round(image + number % 7).astype(np.int16), f"v{number:03d}"
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid.affine()
        nibabel.save(nibabel.Nifti1Image(voxels.T, affine), folder / "nifti" / f"{name}.nii.gz")
        dicom_writer.write_series(folder / "dicom" / name, voxels, grid)
        write_mask(folder / "prompts" / f"{name}.nii.gz", prompt, Volume(prompt[None], grid, Source(".nii.gz", ".nii.gz")))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.perf_counter() - started


def read_many_series(folder: Path, series: int) -> None:
    """Print the time and memory to list the series of one folder, and to read and digest one of them."""
    shape = (20, 64, 64)
    voxels, grid = np.arange(20 * 64 * 64, dtype=np.int16).reshape(shape), Grid(shape, (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    for number in range(series):
        for z in range(shape[0]):
            dicom_writer.save(dicom_writer.slice_of(voxels, grid, z, number + 1), folder / "images" / "p" / f"{number}-{z}")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cases, _ = read_image_folder(folder / "images", "all")
    listed = time.perf_counter()
    for case in cases[:20]:
        read_image(case.images, case=case.id, root=folder)
        volume_digests(case.images[0])
    each = (time.perf_counter() - listed) / len(cases[:20])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{len(cases)} series listed in {listed - started:.1f} s, each read and digested in {each:.2f} s; memory grew by {grown:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--series", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", choices=["auto", "nifti"], default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.series is not None:
            read_many_series(folder, options.series)
            return
        write_volumes(folder, options.volumes, (options.slices, options.size, options.size))
        seconds: dict[str, list[float]] = {"nifti": [], "dicom": []}
        reading: dict[str, list[float]] = {"nifti": [], "dicom": []}
        for number in range(options.rounds):
            for kind in seconds:
                masks = folder / f"masks-{kind}-{number}"
                run = (folder / kind, masks)
                seconds[kind].append(timed(lambda run=run: predict(*run, prompts=folder / "prompts", report=False, format=options.format)))
                paths = sorted((folder / kind).iterdir())[:10]
                reading[kind].append(timed(lambda paths=paths: [read_image([path], case="v", root=folder) for path in paths]) / len(paths))
        for name, found in (("predict, s", seconds), ("reading one volume, s", reading)):
            nifti, dicom = (statistics.median(found[kind]) for kind in ("nifti", "dicom"))
            print(f"{name}: NIfTI {nifti:.3f}, DICOM {dicom:.3f}, ratio {dicom / nifti:.2f}; rounds {found}")


if __name__ == "__main__":
    from slmsam2_cli import parallel

    parallel.prepare(["slmsam2_cli.commands.predict"])
    main()
