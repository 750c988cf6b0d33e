"""Time per slice on this machine's CPU, for encoding and for tracking one object, at several sizes.

    python benchmarks/slice_time.py [--threads 2] [--repeats 5] [--only nano:128 tiny:1024]

Sizes alternate within one process; medians over the repeats. Random weights: time does not depend on the values.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.sam2_config import SIZE_OPTIONS, Widths
from slmsam2_cli.model.slmsam2 import MemoryBank, SlmSam2
from slmsam2_cli.planning.plan import NetworkPlan

SETTINGS = [("nano", 128), ("nano", 160), ("nano", 256), ("tiny", 128), ("tiny", 256), ("tiny", 512), ("tiny", 1024)]
CANDIDATES = {  # other widths of nano, at 160 px
    "nano, trunk 32, neck 96, memory 32": Widths(32, 96, 32),
    "nano, trunk 48, neck 128, memory 32": Widths(48, 128, 32),
    "nano, trunk 48, neck 192, memory 64": Widths(48, 192, 64),
}
SLICES = 8


@torch.inference_mode()
def once(model: SlmSam2, frames: torch.Tensor) -> tuple[float, float]:
    """Return milliseconds per slice of encoding, and of tracking one object with a full memory."""
    started = time.perf_counter()
    features = model.encode(frames)
    encoded = time.perf_counter()
    first = features.at(slice(0, 1))
    mask = torch.zeros(1, 1, model.input_size, model.input_size)
    mask[..., : model.input_size // 2, : model.input_size // 2] = 1
    bank = MemoryBank({0: model.remember(first, model.condition_on_mask(first, mask), mask)})
    tracking = time.perf_counter()
    for t in range(1, len(frames)):
        here = features.at(slice(t, t + 1))
        bank.tracked[t] = model.remember(here, model.track(here, bank, ReadContext(t, 1, bank.conditioning, bank.tracked, 30)))
    return 1000 * (encoded - started) / len(frames), 1000 * (time.perf_counter() - tracking) / (len(frames) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="SIZE:PX", help="only these settings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = SETTINGS if options.only is None else [(s, int(px)) for s, _, px in (one.partition(":") for one in options.only)]
    models = {(size, px): SlmSam2(NetworkPlan(size=size), px).eval() for size, px in settings}
    for name, widths in CANDIDATES.items() if options.only is None else ():
        models[name, 160] = SlmSam2(NetworkPlan(size="nano"), 160, replace(SIZE_OPTIONS["nano"], widths=widths)).eval()
    frames = {px: torch.rand(SLICES, 3, px, px) for _, px in models}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {setting: [] for setting in models}
    for repeat in range(options.repeats + 1):
        for setting, model in models.items():
            taken = once(model, frames[setting[1]])
            if repeat:  # the first round warms up
                times[setting].append(taken)
    print("| network | px | parameters (M) | encode, ms per slice | track, ms per slice and object | ratio of the sum to nano 128 |")
    print("|---|---|---|---|---|---|")
    sums = {s: statistics.median(a + b for a, b in taken) for s, taken in times.items()}
    for (size, px), taken in times.items():
        encode, track = (statistics.median(column) for column in zip(*taken))
        millions = sum(p.numel() for p in models[size, px].parameters()) / 1e6
        print(f"| {size} | {px} | {millions:.2f} | {encode:.1f} | {track:.1f} | {sums[size, px] / sums['nano', 128]:.1f} |")


if __name__ == "__main__":
    main()
