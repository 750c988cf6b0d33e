"""Speed of the generator of procedural volumes, statistics of its volumes, and a picture of them.

    python benchmarks/generator.py [--threads 1] [--repeats 5] [--device cpu] [--statistics] [--picture docs/images/procedural.png]

Speed: windows per second for clips of 1, 3 and 8 slices at 128 and 256 px, with as many windows per call as in training, two tracks
each. Lengths alternate; medians over the repeats. Also per second of processor time, which other programs disturb less.
Statistics: Dice of copying a mask to other slices, slices without the structure, ends and sizes, over many clips of 8 slices.
Picture: six slices of each window, with the tracked structures outlined.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from slmsam2_cli.dataset.mask_measures import dice
from slmsam2_cli.pretraining.volumes import ClipShape, VolumesRecipe, draw_clips
from slmsam2_cli.training.clips import Clips

SETTINGS = [(length, windows, px) for px in (128, 256) for length, windows in ((1, 24), (3, 21), (8, 8))]
TRACKS = 2  # per window
COLOURS = torch.tensor([[255, 64, 64], [64, 255, 64], [80, 150, 255], [255, 224, 0]], dtype=torch.uint8)
SIZES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 1.01)


def speed(device: torch.device, repeats: int) -> None:
    """Print the table of windows per second."""
    rng, recipe = torch.Generator(device).manual_seed(0), VolumesRecipe()
    taken: dict[tuple[int, int, int], list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for repeat in range(repeats + 1):
        for length, windows, px in SETTINGS:
            wall, cpu = time.perf_counter(), time.process_time()
            draw_clips(recipe, rng, ClipShape(windows, length, TRACKS * windows, px), device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                taken[length, windows, px].append((time.perf_counter() - wall, time.process_time() - cpu))
    print("| px | slices | windows per call | windows/s | per second of processor time |\n|---|---|---|---|---|")
    for (length, windows, px), times in taken.items():
        wall, cpu = (windows / statistics.median(column) for column in zip(*times))
        print(f"| {px} | {length} | {windows} | {wall:.0f} | {cpu:.0f} |")


def copy_dice(masks: Tensor, distance: int) -> Tensor:
    """Compute the Dice of every mask with the one `distance` slices further, where neither is empty. masks (T, M, px, px)."""
    first, second = masks[:-distance].flatten(2), masks[distance:].flatten(2)
    both = first.any(2) & second.any(2)
    return dice((first * second).sum(2), first.sum(2), second.sum(2))[both]


def sides(masks: Tensor) -> Tensor:
    """Compute the longest side of the box around each of (M, px, px) masks, in image widths."""
    spans = []
    for axis in (1, 2):
        held = masks.any(axis)
        place = torch.arange(held.shape[1], device=masks.device)
        low, high = torch.where(held, place, held.shape[1]).amin(1), torch.where(held, place, -1).amax(1)
        spans.append(high - low + 1)
    return torch.maximum(*spans) / masks.shape[-1]


def contrast(clips: Clips) -> Tensor:
    """Compute the difference in intensity between each track's first mask and the five pixels around it, (M,)."""
    mask = clips.masks[0]
    surroundings = max_pool2d(mask, 11, 1, 5) - mask
    frames = clips.frames[torch.where(clips.reverse, len(clips.frames) - 1, 0), clips.window, :1]
    inside, around = ((frames * part).sum((1, 2, 3)) / part.sum((1, 2, 3)) for part in (mask, surroundings))
    return (inside - around).abs()


def quantiles(values: Tensor) -> str:
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return f"{values.mean():.2f} | {low:.2f} | {middle:.2f} | {high:.2f}"


def print_statistics(calls: int, px: int) -> None:
    """Print statistics of `calls` draws of 8 windows."""
    rng, recipe = torch.Generator().manual_seed(1), VolumesRecipe()
    drawn = [draw_clips(recipe, rng, ClipShape(8, 8, 8 * TRACKS, px)) for _ in range(calls)]
    masks = [clips.masks[:, :, 0].bool() for clips in drawn]
    there = torch.cat([m.flatten(2).any(2) for m in masks], 1)
    print(f"{there.shape[1]} tracks in {8 * calls} windows of 8 slices at {px} px", end="\n\n")
    print("| tracks | mean | p10 | median | p90 |", "|---|---|---|---|---|", sep="\n")
    for distance in (1, 2, 3, 4):
        print(f"| copy Dice at distance {distance} | {quantiles(torch.cat([copy_dice(m.float(), distance) for m in masks]))} |")
    size = torch.cat([sides(m[0]) for m in masks])
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0)):
        sized = torch.cat([copy_dice(m[:, (low < sides(m[0])) & (sides(m[0]) <= high)].float(), 1) for m in masks])
        print(f"| the same at distance 1, {100 * low:.0f}-{100 * high:.0f} % of the image | {quantiles(sized)} |")
    print(f"| contrast with the surroundings | {quantiles(torch.cat([contrast(clips) for clips in drawn]))} |")
    counts = torch.histogram(size, torch.tensor(SIZES)).hist / len(size)
    returns = (there[1:] & ~there[:-1]).any(0)
    facts = {
        "slices without the tracked structure": ~there,
        "first slice after the last": there[:-1] & ~there[1:],
        "tracks whose structure ends within the clip": ~there[-1],
        "tracks whose structure is on the first slice only": ~there[1:].any(0),
        "tracks whose structure comes back": returns,
        "tracks from the last slice": torch.cat([clips.reverse for clips in drawn]),
    }
    print("\n| share of | |\n|---|---|")
    for name, happened in facts.items():
        print(f"| {name} | {100 * happened.float().mean():.0f} % |")
    spans = [f"{100 * low:.0f}-{min(100 * high, 100):.0f} %" for low, high in pairwise(SIZES)]
    print("\n| longest side, of the image | " + " | ".join(spans) + " |\n" + "|---" * len(SIZES) + "|")
    print("| share of tracks | " + " | ".join(f"{100 * count:.0f} %" for count in counts) + " |")


def outlined(clips: Clips, window: int, px: int) -> Tensor:
    """Return six slices of one window, resized, with its tracks outlined: (px, 6 * px, 3) uint8."""
    shown = [0, 1, 3, 4, 6, 7]
    strip = interpolate(clips.frames[shown, window], (px, px), mode="area").mul(255).to(torch.uint8).permute(0, 2, 3, 1).clone()
    for n, m in enumerate((clips.window == window).nonzero()[:, 0].tolist()):
        mask = interpolate((clips.masks[:, m].flip(0) if clips.reverse[m] else clips.masks[:, m])[shown], (px, px))
        strip[(mask > -max_pool2d(-mask, 3, 1, 1))[:, 0]] = COLOURS[n % len(COLOURS)]
    return strip.permute(1, 0, 2, 3).flatten(1, 2)


def picture(path: Path, windows: int, seed: int, px: int) -> None:
    """Save a contact sheet of clips of 8 slices, two windows per row."""
    clips = draw_clips(VolumesRecipe(), torch.Generator().manual_seed(seed), ClipShape(windows, 8, 3 * windows, 128))
    strips = [outlined(clips, window, px) for window in range(windows)]
    gap = torch.full((px, 6, 3), 255, dtype=torch.uint8)
    rows = [torch.cat([left, gap, right], 1) for left, right in zip(strips[::2], strips[1::2])]
    Image.fromarray(torch.cat(rows).numpy()).quantize(96, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--statistics", type=int, metavar="CALLS", help="print statistics of this many calls of 8 windows")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--windows", type=int, default=16, help="windows in the picture, an even number")
    parser.add_argument("--seed", type=int, default=0, help="of the picture")
    parser.add_argument("--px", type=int, default=88, help="of a slice in the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.statistics:
        print_statistics(options.statistics, 128)
    if options.picture:
        picture(options.picture, options.windows, options.seed, options.px)
    if not options.statistics and not options.picture:
        speed(torch.device(options.device), options.repeats)


if __name__ == "__main__":
    main()
