"""Draw the README's picture from a demo: one held-out case, its annotated slice and the predicted masks.

    slmsam2 demo -o demo && python benchmarks/picture.py demo/dataset docs/images/result.png

The case is the one of median Dice. Filled: prediction; white outline: reference; framed: slices annotated for at least one label.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.slices import make_frames
from slmsam2_cli.io.volume import read_image, read_labels
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace

COLOURS = np.array([[0, 0, 0], [230, 120, 40], [60, 150, 230], [120, 200, 80]], dtype=float)
ZOOM, COLUMNS, GAP, MARGIN = 5, 6, 8, 22


def median_case(summary: dict) -> dict:
    """Return the held-out case whose mean Dice over labels is the median."""
    held_out = [entry for entry in summary["metric_per_case"] if entry["group"] == "held_out"]
    scores = [np.mean([m["Dice"] for m in entry["metrics"].values() if m["Dice"] is not None]) for entry in held_out]
    return held_out[int(np.argsort(scores)[(len(scores) - 1) // 2])]


def tile(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> Image.Image:
    """Draw one slice (R, C), enlarged: image, tinted prediction, outlined reference."""
    zoom = [np.kron(a, np.ones((ZOOM, ZOOM), a.dtype)) for a in (image, predicted, truth)]
    rgb = np.repeat(zoom[0][..., None] * 255, 3, axis=2)
    rgb = np.where(zoom[1][..., None] > 0, 0.45 * rgb + 0.55 * COLOURS[zoom[1] % len(COLOURS)], rgb)
    for value in np.unique(truth[truth > 0]):
        mask = zoom[2] == value
        rgb[mask & ~binary_erosion(mask, iterations=1)] = 255
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    space, data = Workspace.of(options.dataset, None), read_dataset(options.dataset)
    plan = read_plan(space.plan)
    entry = median_case(json.loads((space.evaluation / "summary.json").read_text(encoding="utf-8")))
    case = next(case for case in data.training if case.id == entry["case"])
    metadata = json.loads((space.predictions / "manifest.json").read_text(encoding="utf-8"))["cases"][case.id]
    image = read_image(case.images, case=case.id, root=data.root)
    view, _ = make_frames(image, plan.geometry, plan.intensity)
    low, high = np.percentile(image.voxels, (0.5, 99.5))
    grey = view.oriented(((image.voxels[0] - low) / (high - low)).clip(0, 1))
    truth = view.oriented(read_labels(case.label, case=case.id, root=data.root).voxels)
    predicted = view.oriented(read_labels(space.predictions / metadata["output"], case=case.id, root=space.predictions).voxels)
    annotated = {view.file_index(s) for slices in metadata["annotated_slices"].values() for s in slices}
    held = np.flatnonzero((truth > 0).any(axis=(1, 2)) | (predicted > 0).any(axis=(1, 2)))
    others = [t for t in range(held[0], held[-1] + 1) if t not in annotated]
    spread = np.linspace(0, len(others) - 1, 2 * COLUMNS - len(annotated)).round().astype(int)
    shown = sorted({*(others[i] for i in spread), *annotated})
    tiles = [tile(grey[t], predicted[t], truth[t]) for t in shown]
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, rows * (height + GAP + MARGIN) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (t, drawn) in enumerate(zip(shown, tiles)):
        x, y = GAP + index % COLUMNS * (width + GAP), GAP + index // COLUMNS * (height + GAP + MARGIN)
        sheet.paste(drawn, (x, y + MARGIN))
        pen.text((x, y + 4), f"slice {t}" + (" - annotated" if t in annotated else ""), fill="black")
        if t in annotated:
            pen.rectangle((x - 3, y + MARGIN - 3, x + width + 2, y + MARGIN + height + 2), outline=(220, 30, 60), width=3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, optimize=True)
    print(f"{options.out}: case {case.id}")


if __name__ == "__main__":
    main()
