"""Accuracy of block matching alone, without a network: a mask warped from slice to slice, against the mask copied.

    python benchmarks/evidence.py ../shared/data

On the development cases (zero_shot.py), each label from its middle slice to its known ends. Dice of single slices within the ROI crop,
mean over slices, then over labels and cases.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from zero_shot import CHOSEN_ON

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.dataset.slices import make_frames
from slmsam2_cli.io.volume import read_image, read_labels
from slmsam2_cli.model.block_matching import warp_to_slice
from slmsam2_cli.model.roi import mask_box, pad_to_square, roi_around, to_input
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.rules import decide

Carry = Callable[[Tensor, Tensor, Tensor], Tensor]


def roi_crops(root: Path, cases: set[str]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield slices (T, 1, px, px), masks (T, 1, px, px) and the annotated slice, of every label of the cases."""
    data = read_dataset(root)
    plan = decide(measure(data)[0], "nano")
    geometry, px = plan.geometry, plan.geometry.storage_size
    for case in (case for case in data.training if case.id in cases):
        view, frames = make_frames(read_image(case.images, case=case.id, root=root, channels=1), geometry, plan.intensity)
        labels = view.labels(read_labels(case.label, case=case.id, root=root).voxels)
        stack = pad_to_square(to_input(torch.from_numpy(frames)), px)[:, :1]
        for value in plan.labels:
            masks = pad_to_square(torch.from_numpy(labels == value), px)
            annotated = choose_slice(masks.flatten(1).sum(1).numpy(), "middle")
            roi = roi_around(mask_box([masks[annotated]]), geometry.roi_scale or 2.0, px)
            yield roi.crop(stack, geometry.input_size), roi.crop_masks(masks, geometry.input_size).float()[:, None], annotated


def carried_dice(slices: Tensor, masks: Tensor, annotated: int, carry: Carry) -> list[float]:
    """Carry the mask of the annotated slice to both ends, slice by slice. Return the Dice of every other slice."""
    found = []
    for step in (1, -1):
        mask, t = masks[annotated : annotated + 1], annotated + step
        while 0 <= t < len(masks) and masks[t].any():
            mask = carry(slices[t : t + 1], slices[t - step : t - step + 1], mask)
            predicted, true = mask[0] > 0.5, masks[t] > 0.5
            found.append(float(dice((predicted & true).sum(), predicted.sum(), true.sum())))
            t += step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    print("| set (labels) | mask copied | mask moved by block matching | ms per slice |")
    print("|---|---|---|---|")
    for name, cases in CHOSEN_ON.items():
        shown = list(roi_crops(options.data / name, cases))
        copied = [np.mean(found) for one in shown if (found := carried_dice(*one, lambda here, before, mask: mask))]
        started, slices = time.perf_counter(), sum(len(carried_dice(*one, lambda here, before, mask: mask)) for one in shown)
        matched = [np.mean(found) for one in shown if (found := carried_dice(*one, warp_to_slice))]
        ms = 1000 * (time.perf_counter() - started) / slices
        print(f"| {name} ({len(shown)}) | {np.mean(copied):.3f} | {np.mean(matched):.3f} | {ms:.1f} |")


if __name__ == "__main__":
    main()
