"""Loss of accuracy by masks on coarser pixels than the image's, without any network.

    python benchmarks/mask_stride.py [--windows 64] [--px 128]

Generated pairs of slices. A mask is averaged over K by K pixels and resampled back bilinearly, as a decoder of stride K would draw it.
Dice of the true mask at that stride, and of the adjacent slice's mask at that stride (copying), mean over tracks. Large structures cover
at least 3 % of the image.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.pretraining.recipe import NANO, read_recipe
from slmsam2_cli.pretraining.volumes import ClipShape, draw_clips

STRIDES = (1, 2, 4)
LARGE = 0.03


def at_stride(masks: Tensor, stride: int) -> Tensor:
    """Return masks (M, 1, H, W) as a decoder of that stride would draw them."""
    size = masks.shape[-1]
    coarse = F.interpolate(masks, size=(size // stride,) * 2, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False) > 0.5


def mask_dice(one: Tensor, other: Tensor) -> Tensor:
    """Compute the Dice of every pair of masks, (M,)."""
    shared, first, second = (mask.sum(dim=(1, 2, 3)) for mask in (one & other, one, other))
    return dice(shared, first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--px", type=int, default=128)
    options = parser.parse_args()
    recipe = read_recipe(NANO)
    pairs = next(phase for phase in recipe.phases if phase.ends_in_clip is not None)  # most structures continue
    volumes = recipe.volumes_at(pairs.until - 1e-6)
    clips = draw_clips(volumes, torch.Generator().manual_seed(0), ClipShape(options.windows, 2, 2 * options.windows, options.px))
    both = clips.masks.flatten(2).any(dim=2).all(dim=0)
    before, here = clips.masks[0, both], clips.masks[1, both]
    large = here.mean(dim=(1, 2, 3)) >= LARGE
    columns = ("true mask", "true mask, large", "adjacent slice's mask", "adjacent slice's mask, large")
    print(f"| stride ({len(here)} tracks, {int(large.sum())} large) | " + " | ".join(columns) + " |")
    print("|---" * 5 + "|")
    for stride in STRIDES:
        found = mask_dice(at_stride(here, stride), here > 0.5), mask_dice(at_stride(before, stride), here > 0.5)
        print(f"| {stride} | " + " | ".join(f"{float(d.mean()):.3f} | {float(d[large].mean()):.3f}" for d in found) + " |")


if __name__ == "__main__":
    main()
