"""Accuracy of propagation: the fine-tuned model against copies of the annotated slice, on the same held-out cases.

    python benchmarks/copying.py DATASET [-w WORKSPACE]

Run slmsam2 finetune and slmsam2 predict first (inside the data set, so that predictions are in the workspace). The
annotated slices are those of the predictions' manifest. The slice is copied to every slice of the volume, and to the true
extent of the structure (an oracle that knows its ends). Dice of whole volumes, mean over cases, then over labels.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.mask_measures import bounding_box
from slmsam2_cli.evaluation.metrics import dice, hd95
from slmsam2_cli.io.volume import read_labels
from slmsam2_cli.workspace import Workspace


def copies(truth: np.ndarray, slices: list[int], axis: int) -> dict[str, np.ndarray]:
    """Copy the annotated slice to all slices, and to those between the first and the last slice with the label."""
    stack = np.moveaxis(truth, axis, 0)
    box = bounding_box(stack)
    assert box is not None
    (first, stop), *_ = box
    everywhere = np.broadcast_to(stack[slices[0]], stack.shape).copy()
    extent = np.zeros_like(everywhere)
    extent[first:stop] = stack[slices[0]]
    return {"copy to all slices": np.moveaxis(everywhere, 0, axis), "copy to the true extent (oracle)": np.moveaxis(extent, 0, axis)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-w", "--workspace", type=Path)
    options = parser.parse_args()
    space, data = Workspace.of(options.dataset, options.workspace), read_dataset(options.dataset)
    manifest = json.loads((space.predictions / "manifest.json").read_text(encoding="utf-8"))
    labels = {case.id: case.label for case in data.training}
    scores: dict[str, dict[int, list[tuple[float, float | None]]]] = {}
    for case, metadata in manifest["cases"].items():
        if metadata["training"] or labels.get(case) is None:
            continue
        truth = read_labels(labels[case], case=case, root=data.root)
        predicted = read_labels(space.predictions / metadata["output"], case=case, root=space.predictions).voxels
        for value, slices in metadata["annotated_slices"].items():
            mask = truth.voxels == int(value)
            for method, found in (copies(mask, slices, metadata["array_axis"]) | {"slmsam2": predicted == int(value)}).items():
                score = (dice(mask, found), hd95(mask, found, truth.grid.spacing_mm))
                scores.setdefault(method, {}).setdefault(int(value), []).append(score)
    names = [data.labels[value] for value in sorted(next(iter(scores.values())))]
    print(f"| {data.name}, held-out cases | " + " | ".join(f"{name} Dice / HD95 mm" for name in names) + " | mean Dice |")
    print("|---" * (len(names) + 2) + "|")
    for method, found in scores.items():
        dices = [np.mean([d for d, _ in found[value]]) for value in sorted(found)]
        distances = [np.mean([h for _, h in found[value] if h is not None]) for value in sorted(found)]
        cells = [f"{d:.3f} / {h:.1f} (n = {len(found[value])})" for d, h, value in zip(dices, distances, sorted(found))]
        print(f"| {method} | " + " | ".join(cells) + f" | {np.mean(dices):.3f} |")


if __name__ == "__main__":
    main()
