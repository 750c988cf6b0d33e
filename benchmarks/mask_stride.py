"""What drawing masks on coarser pixels than the frame's costs, before any network has said anything.

    python benchmarks/mask_stride.py [--windows 64] [--px 128]

Procedural pairs of slices. A mask is averaged to a pixel in K by K and brought back bilinearly, as a decoder that draws at stride K
has to draw it: Dice of the truth so drawn, and of the neighbouring slice's mask so drawn (copying), mean over tracks; large ones cover
at least 3 % of the frame.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.pretraining.recipe import NANO, read_recipe
from slmsam2_cli.pretraining.volumes import draw_clips

STRIDES = (1, 2, 4)
LARGE = 0.03


def drawn(masks: Tensor, stride: int) -> Tensor:
    """Masks (M, 1, H, W) as a decoder at that stride would draw them."""
    size = masks.shape[-1]
    coarse = F.interpolate(masks, size=(size // stride,) * 2, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False) > 0.5


def dice(one: Tensor, other: Tensor) -> Tensor:
    """(M,)."""
    shared = (one & other).sum(dim=(1, 2, 3))
    return 2 * shared / (one.sum(dim=(1, 2, 3)) + other.sum(dim=(1, 2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--px", type=int, default=128)
    options = parser.parse_args()
    recipe = read_recipe(NANO)
    pairs = next(phase for phase in recipe.phases if phase.ends is not None)  # in which most structures go on
    volumes = recipe.volumes_at(pairs.until - 1e-6)
    clips = draw_clips(volumes, torch.Generator().manual_seed(0), options.windows, 2, 2 * options.windows, options.px)
    both = clips.masks.flatten(2).any(dim=2).all(dim=0)
    before, here = clips.masks[0, both], clips.masks[1, both]
    large = here.mean(dim=(1, 2, 3)) >= LARGE
    print(f"| stride ({len(here)} tracks, {int(large.sum())} large) | truth | truth, large | neighbour copied | copied, large |")
    print("|---" * 5 + "|")
    for stride in STRIDES:
        found = dice(drawn(here, stride), here > 0.5), dice(drawn(before, stride), here > 0.5)
        print(f"| {stride} | " + " | ".join(f"{float(d.mean()):.3f} | {float(d[large].mean()):.3f}" for d in found) + " |")


if __name__ == "__main__":
    main()
