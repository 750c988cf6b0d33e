"""Accuracy of the bundled model without fine-tuning, from one annotated slice, against copies of that slice and optical flow.

    python benchmarks/zero_shot.py ../shared/data [--weights nano] [--sets NAME ...] [-o TABLE.md] [--json ROWS.json]

For every data set below the folder: slmsam2 plan, then slmsam2 predict from the middle slice per case and label, and again with the first
empty slice beyond each end marked (--mark-ends). Three baselines get the same slice: copied to every slice, copied to the true extent (an
oracle that knows the ends of the structure), and carried from slice to slice by optical flow (skimage.registration.optical_flow_tvl1).
Means over cases, then over labels, of whole volumes including the annotated slice. Development cases (CHOSEN_ON) are excluded unless --all.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from skimage.registration import optical_flow_tvl1
from skimage.transform import warp

from slmsam2_cli.commands.plan import plan as make_plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import Case, Dataset, read_dataset
from slmsam2_cli.dataset.intensity import normalise
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.dataset.slices import View
from slmsam2_cli.evaluation.metrics import dice, hd95
from slmsam2_cli.io.volume import read_image, read_labels
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace

Array = np.ndarray[Any, Any]
# Development cases: sizes, ROI crops, losses and the generator were chosen on them; no model was trained on them.
CHOSEN_ON = {
    "Task04_Hippocampus": {"hippocampus_014", "hippocampus_015", "hippocampus_058", "hippocampus_075"},
    "Sarcoma_MR_T1": {"STS_001_MR_T1", "STS_002_MR_T1", "STS_004_MR_T1"},
    "Sarcoma_CT": {"STS_001_CT", "STS_002_CT", "STS_004_CT"},
    "Sarcoma_PET": {"STS_001_PET", "STS_002_PET"},
    "SpinalCord_MRI": {"unf01_T1w"},
}
MODEL, ENDS, COPY, ORACLE, FLOW = "nano", "nano, ends marked", "copy to all slices", "copy to the true extent (oracle)", "optical flow"
METHODS = (MODEL, ENDS, COPY, ORACLE, FLOW)
Score = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--all", action="store_true", help="include the development cases")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path, help="every score of every case and label")
    options = parser.parse_args()
    names = options.sets or sorted(path.parent.name for path in options.data.glob("*/dataset.json"))
    rows = [row for name in names for row in of_dataset(options.data / name, options.weights, options.all)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = table(rows)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def of_dataset(root: Path, weights: str, everything: bool) -> list[dict[str, Any]]:
    """Return a row for every case, label and method."""
    data, rows = read_dataset(root), []
    with tempfile.TemporaryDirectory() as folder:
        space = Workspace.of(root, Path(folder) / "workspace")
        make_plan(root, space)
        started, runs = time.monotonic(), {MODEL: Path(folder) / "middle", ENDS: Path(folder) / "ends"}
        for method, masks in runs.items():
            predict(None, masks, dataset=root, workspace=space, weights=weights, mark_ends=method == ENDS, report=False)
        print(f"{root.name}: predicted twice in {time.monotonic() - started:.0f} s", file=sys.stderr)
        for case in data.training:
            if everything or case.id not in CHOSEN_ON.get(root.name, ()):
                rows += list(of_case(case, data, space, runs))
    return rows


def of_case(case: Case, data: Dataset, space: Workspace, runs: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Yield the scores of one case."""
    plan, manifest = read_plan(space.plan), json.loads((runs[MODEL] / "manifest.json").read_text(encoding="utf-8"))
    metadata = manifest["cases"][case.id]
    truth = read_labels(case.label, case=case.id, root=data.root)
    image = read_image(case.images, case=case.id, root=data.root, channels=len(data.channels))
    view = View.fit(image, plan.geometry)
    slices = view.oriented(normalise(image.voxels, plan.intensity)[0])
    found = {method: read_labels(masks / metadata["output"], case=case.id, root=masks).voxels for method, masks in runs.items()}
    flows = Flows(slices)
    for value, annotated_slices in metadata["annotated_slices"].items():
        mask = view.oriented(truth.voxels == int(value))
        if not annotated_slices:
            continue
        annotated = view.file_index(annotated_slices[0])
        masks = (
            {method: view.oriented(one == int(value)) for method, one in found.items()}
            | copies(mask, annotated)
            | {FLOW: flows(mask, annotated)}
        )
        spacing = [float(truth.grid.spacing_mm[axis]) for axis in view.orientation.order]
        for method in METHODS:
            yield {"set": data.root.name, "case": case.id, "label": int(value), "method": method} | score(mask, masks[method], spacing)


def copies(mask: Array, annotated: int) -> dict[str, Array]:
    """Copy the annotated slice to all slices, and to those between the first and the last slice with the label."""
    box = bounding_box(mask)
    assert box is not None
    (first, stop), *_ = box
    everywhere = np.broadcast_to(mask[annotated], mask.shape)
    extent = np.zeros_like(mask)
    extent[first:stop] = mask[annotated]
    return {COPY: everywhere, ORACLE: extent}


class Flows:
    """Carries a mask from slice to slice by the optical flow between them; flows are computed once for all labels."""

    def __init__(self, slices: Array) -> None:
        self.slices, self.known = slices, {}

    def __call__(self, mask: Array, annotated: int) -> Array:
        carried = np.zeros(mask.shape, np.float32)
        carried[annotated] = mask[annotated]
        for step, stop in ((1, len(mask)), (-1, -1)):
            for t in range(annotated + step, stop, step):
                carried[t] = warp(carried[t - step], self._flow(t, t - step), order=1, mode="edge")
        return carried > 0.5

    def _flow(self, here: int, before: int) -> Array:
        """Return the position of every pixel of slice `here` on slice `before`, (2, R, C)."""
        if (here, before) not in self.known:
            rows, columns = np.meshgrid(*(np.arange(n) for n in self.slices.shape[1:]), indexing="ij")
            down, across = optical_flow_tvl1(self.slices[here], self.slices[before])
            self.known[here, before] = np.stack([rows + down, columns + across])
        return self.known[here, before]


def score(truth: Array, found: Array, spacing_mm: list[float]) -> Score:
    """Return Dice, HD95 (NaN for an empty mask), the share of empty slices with a mask, and of the structure's slices without one."""
    there, drawn = truth.any(axis=(1, 2)), found.any(axis=(1, 2))
    distance = hd95(truth, found, spacing_mm)
    return {
        "dice": dice(truth, found) or 0.0,
        "hd95": float("nan") if distance is None else distance,
        "false": float((drawn & ~there).sum() / max(1, (~there).sum())),
        "missed": float((there & ~drawn).sum() / there.sum()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of means over cases, then over labels; the last rows are means over sets."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    means = {
        (name, method): mean_of([r for r in rows if r["set"] == name and r["method"] == method]) for name in sets for method in METHODS
    }
    lines = ["| set (cases, labels) | method | Dice | HD95 mm | false slices beyond ends | missed slices |", "|---|---|---|---|---|---|"]
    for name in sets:
        mine = [row for row in rows if row["set"] == name]
        counted = f"{name} ({len({r['case'] for r in mine})}, {len({r['label'] for r in mine})})"
        lines += [line(counted, method, means[name, method]) for method in METHODS]
    for method in METHODS:
        lines.append(line("**mean over sets**", method, {key: float(np.nanmean([means[n, method][key] for n in sets])) for key in KEYS}))
    return "\n".join(lines)


KEYS = ("dice", "hd95", "false", "missed")


def mean_of(rows: list[dict[str, Any]]) -> Score:
    """Return the mean over labels of the mean over cases."""
    labels = sorted({row["label"] for row in rows})
    return {key: float(np.mean([np.nanmean([r[key] for r in rows if r["label"] == label]) for label in labels])) for key in KEYS}


def line(name: str, method: str, mean: Score) -> str:
    return f"| {name} | {method} | {mean['dice']:.3f} | {mean['hd95']:.1f} | {100 * mean['false']:.0f} % | {100 * mean['missed']:.0f} % |"


if __name__ == "__main__":
    main()
