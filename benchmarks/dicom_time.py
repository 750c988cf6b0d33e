"""Time `slmsam2 predict` on DICOM series and on the same volumes as NIfTI, alternating.

    python benchmarks/dicom_time.py [--volumes 200] [--slices 40] [--size 192] [--rounds 3] [--format auto]

Volumes are synthetic phantoms (uncompressed DICOM, a file a slice; gzip-compressed NIfTI), the prompt is label 1 on its middle slice.
Prints seconds a round, their ratio, and the same for reading alone. --format nifti: without the DICOM segmentations beside the masks.
"""

import argparse
import contextlib
import io
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
from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.io.image import Grid, Source
from slmsam2_cli.io.volume import Volume, read_image, write_mask


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", choices=["auto", "nifti"], default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
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
