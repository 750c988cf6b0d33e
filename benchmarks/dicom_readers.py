"""Read every DICOM file that pydicom ships for its tests, and series with known faults; say which are read right, refused, or wrong.

    python benchmarks/dicom_readers.py [--table docs/reference/dicom.md] [--dcm2niix PATH]

A file is right when its values are those of pydicom's pixel_array, scaled as its tags say, and its spacing, position and directions are
those of the tags. A series with a fault is right when it has the voxels and the grid that it was written from, or is refused where no
grid holds it. --table: replace the table in that page. --dcm2niix: read the series with that program, too.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import dicom_writer as writer

from slmsam2_cli.dataset.phantom import phantom_volume
from slmsam2_cli.errors import CaseError
from slmsam2_cli.io.dicom_files import is_dicom
from slmsam2_cli.io.image import Grid
from slmsam2_cli.io.volume import Volume, read_image

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"
SHAPE = (8, 48, 40)
GRID = writer.oriented_grid((1, 0, 0), (0, 1, 0), SHAPE)
VOXELS = np.round(phantom_volume(np.random.default_rng(24), SHAPE, "CT")[0]).astype(np.int16)


def outcome_of(path: Path) -> tuple[str, str]:
    """Return "read", "refused" or "wrong", and the shape and type that were read, or the reason."""
    try:
        found = read_image([path], case="c", root=path.parent)
    except CaseError as error:
        return "refused", error.what
    header = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in header.file_meta:
        header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    shape = "×".join(map(str, found.voxels.shape[1:])) + (f", {len(found.voxels)} colours" if len(found.voxels) > 1 else "")
    return ("read" if agrees(found, header) else "wrong"), f"{shape}, {found.voxels.dtype}"


def agrees(found: Volume, header: pydicom.Dataset) -> bool:
    """Return whether values and geometry of one slice are those of its header."""
    pixels = header.pixel_array.reshape(-1, header.Rows, header.Columns, header.get("SamplesPerPixel", 1)).astype(float)
    values = pixels * float(header.get("RescaleSlope") or 1) + float(header.get("RescaleIntercept") or 0)
    if not np.allclose(np.moveaxis(values, -1, 0), found.voxels, rtol=1e-6):
        return False
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    same = spacing is None or np.allclose(found.grid.spacing_mm[1:], [float(mm) for mm in spacing], rtol=1e-4)
    if position := header.get("ImagePositionPatient"):
        same &= np.allclose(found.grid.origin_mm, [float(mm) for mm in position], atol=1e-3)
    if directions := header.get("ImageOrientationPatient"):
        same &= np.allclose(found.grid.direction[:, :2].T.ravel(), [float(one) for one in directions], atol=1e-3)
    return bool(same)


def merged(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Merge the rows of a folder whose outcomes are the same but for the file's name."""
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for row in rows:
        folder, _, name = row[0].rpartition("/")
        groups.setdefault((folder or name, row[1], row[2].replace(name, "")), []).append(row)
    found = []
    for (folder, outcome, _), group in groups.items():
        name, _, detail = group[0]
        found.append((name if len(group) == 1 else f"{folder}/ ({len(group)} files)", outcome, detail.replace("|", "/")))
    return found


def faulty_series(folder: Path) -> dict[str, tuple[Path, np.ndarray | None]]:
    """Write series with faults: name -> its folder, and the values that it holds, None where no grid holds it."""
    unsigned = (VOXELS.astype(int) + 2000).astype(np.uint16)
    scales = [(1 + z / 8, -100 * z) for z in range(len(VOXELS))]
    made: dict[str, tuple[list[pydicom.Dataset], np.ndarray | None]] = {
        "frames in another order": ([writer.enhanced(VOXELS, GRID, order=[3, 0, 7, 5, 1, 4, 2, 6])], VOXELS),
        "a slope for each frame": (
            [writer.enhanced(VOXELS, GRID, scales=scales)],
            np.stack([plane * slope + intercept for plane, (slope, intercept) in zip(VOXELS, scales, strict=True)]),
        ),
        "signed and unsigned slices": (
            [writer.slice_of(unsigned if z % 2 else VOXELS, GRID, z) for z in range(len(VOXELS))],
            np.stack([unsigned[z].astype(int) if z % 2 else VOXELS[z] for z in range(len(VOXELS))]),
        ),
        "a slice missing": ([writer.slice_of(VOXELS, GRID, z) for z in (0, 1, 2, 4, 5, 6, 7)], None),
        "frames missing": ([writer.enhanced(VOXELS, GRID, order=[0, 1, 2, 5, 6, 7])], None),
        "two echoes in one file": ([writer.enhanced(VOXELS, GRID, order=[*range(8), *range(8)])], None),
        "gantry tilt": ([tilted(z) for z in range(len(VOXELS))], None),
    }
    found = {}
    for name, (items, values) in made.items():
        place = folder / name.replace(" ", "_")
        for number, item in enumerate(items):
            writer.save(item, place / f"{number}.dcm")
        found[name] = (place, values)
    found["deflated"] = (writer.write_series(folder / "deflated", VOXELS, GRID, writer.PLAIN[3]), VOXELS)
    return found


def tilted(z: int) -> pydicom.Dataset:
    item = writer.slice_of(VOXELS, GRID, z)
    item.ImagePositionPatient[1] += 1.5 * z
    return item


def verdict(voxels: np.ndarray | None, grid: Grid | None, expected: np.ndarray | None) -> str:
    """Return "read", "refused" or "wrong" for what a reader made of a series; None: it made nothing."""
    if voxels is None or grid is None:
        return "refused" if expected is None else "refused, though a grid holds it"
    if expected is None:
        return "wrong: read as if nothing were amiss"
    same = voxels.shape == expected.shape and np.allclose(voxels, expected, rtol=1e-6)
    return "read" if same and grid.difference(GRID) is None else "wrong values or grid"


def read_with(program: str, folder: Path) -> tuple[np.ndarray | None, Grid | None]:
    """Convert a series with dcm2niix and return its one volume, with rows and columns as in the DICOM."""
    with tempfile.TemporaryDirectory() as output:
        run = subprocess.run([program, "-b", "n", "-z", "n", "-o", output, folder], capture_output=True, check=False)
        files = sorted(Path(output).glob("*.nii"))
        if run.returncode or len(files) != 1:
            return None, None
        image = nibabel.load(files[0])
        voxels, affine = np.asarray(image.dataobj), np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    if voxels.ndim != 3:
        return voxels, GRID
    affine[:, 3] += affine[:, 1] * (voxels.shape[1] - 1)  # it stores rows from the last one
    affine[:, 1] *= -1
    try:
        return voxels[:, ::-1].T, Grid.from_affine(voxels.T.shape, affine)
    except ValueError:
        return voxels, GRID


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--dcm2niix")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    paths = [path for path in sorted(FILES.rglob("*")) if path.is_file() and path.name != "README" and is_dicom(path)]
    rows = [(path.relative_to(FILES).as_posix(), *outcome_of(path)) for path in paths]
    counts = Counter(outcome for _, outcome, _ in rows)
    lines = [
        f"pydicom {pydicom.__version__} ships {len(rows)} DICOM files. {counts['read']} are read right, {counts['refused']} are refused, "
        f"{counts['wrong']} are wrong.\n",
        "| file | outcome | what was read, or why not |\n|---|---|---|",
        *(f"| {name} | {outcome} | {detail} |" for name, outcome, detail in merged(rows)),
    ]
    print("\n".join(lines))
    if options.table is not None:
        before, rest = options.table.read_text().split(BEGIN)
        options.table.write_text(f"{before}{BEGIN}{chr(10).join(lines)}\n{END}{rest.split(END)[1]}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, (folder, expected) in faulty_series(Path(temporary)).items():
            try:
                found = read_image([folder], case="c", root=folder)
                ours = verdict(found.voxels[0], found.grid, expected)
            except CaseError:
                ours = verdict(None, None, expected)
            print(f"{name}: {ours}", f"; dcm2niix: {verdict(*read_with(options.dcm2niix, folder), expected)}" if options.dcm2niix else "")


if __name__ == "__main__":
    main()
