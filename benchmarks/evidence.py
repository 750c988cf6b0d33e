"""What block matching brings before anything is learned: a mask carried from slice to slice, against the mask copied.

    python benchmarks/evidence.py ../shared/data

On the cases on which choices were made (zero_shot.py), each label from its middle slice to its ends, which are given; Dice of single
slices on the network's square, mean over slices, then over labels and cases. No weights.
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
from slmsam2_cli.dataset.intensity import make_frames
from slmsam2_cli.dataset.prompts import choose_slice
from slmsam2_cli.io.volume import read_image, read_labels
from slmsam2_cli.model.block_matching import warp_to_slice
from slmsam2_cli.model.roi import mask_box, pad_to_square, roi_around, to_input
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.rules import decide

Carry = Callable[[Tensor, Tensor, Tensor], Tensor]


def squares(root: Path, cases: set[str]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Slices (T, 1, px, px), masks (T, 1, px, px) and the given slice, of every label of the cases."""
    data = read_dataset(root)
    plan = decide(measure(data)[0], "nano")
    geometry, px = plan.geometry, plan.geometry.stack_size
    for case in (case for case in data.training if case.id in cases):
        view, frames = make_frames(read_image(case.images, case=case.id, root=root, channels=1), geometry, plan.intensity)
        labels = view.labels(read_labels(case.label, case=case.id, root=root).voxels)
        stack = pad_to_square(to_input(torch.from_numpy(frames)), px)[:, :1]
        for value in plan.labels:
            masks = pad_to_square(torch.from_numpy(labels == value), px)
            given = choose_slice(masks.flatten(1).sum(1).numpy(), "middle")
            square = roi_around(mask_box([masks[given]]), geometry.roi_scale or 2.0, px)
            yield square.crop(stack, geometry.input_size), square.crop_masks(masks, geometry.input_size).float()[:, None], given


def carried(slices: Tensor, masks: Tensor, given: int, carry: Carry) -> list[float]:
    """Dice on every slice from the given one to the ends, one step at a time."""
    found = []
    for step in (1, -1):
        mask, t = masks[given : given + 1], given + step
        while 0 <= t < len(masks) and masks[t].any():
            mask = carry(slices[t : t + 1], slices[t - step : t - step + 1], mask)
            one, other = mask[0] > 0.5, masks[t] > 0.5
            found.append(float(2 * (one & other).sum() / (one.sum() + other.sum())))
            t += step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    print("| set (labels) | copied | warp_to_slice | ms a slice |")
    print("|---|---|---|---|")
    for name, cases in CHOSEN_ON.items():
        shown = list(squares(options.data / name, cases))
        copied = [np.mean(found) for one in shown if (found := carried(*one, lambda here, before, mask: mask))]
        started, slices = time.perf_counter(), sum(len(carried(*one, lambda here, before, mask: mask)) for one in shown)
        follows = [np.mean(found) for one in shown if (found := carried(*one, warp_to_slice))]
        ms = 1000 * (time.perf_counter() - started) / slices
        print(f"| {name} ({len(shown)}) | {np.mean(copied):.3f} | {np.mean(follows):.3f} | {ms:.1f} |")


if __name__ == "__main__":
    main()
