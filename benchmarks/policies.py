"""Time and memory of each memory policy: `tiny` at 512 px, random weights, one object through slices of one real volume.

    python benchmarks/policies.py IMAGE LABEL [--slices 12] [--repeats 3] [--threads 2] [--size tiny] [--px 512]

All policies have the same weights and alternate at every slice, in one process; medians over the slices with a full memory (from
the 7th on). Time does not depend on the values of the weights, but the object score must be positive and the bank must accept all
slices. "Stored" is the size of the bank at the end; the peak is that of a separate process for one policy, encoding included.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from slmsam2_cli.inference.propagation import to_bfloat16
from slmsam2_cli.model.memory.interface import ReadContext
from slmsam2_cli.model.slmsam2 import MemoryBank, SliceFeatures, SlmSam2
from slmsam2_cli.planning.plan import POLICY_STREAMS, NetworkPlan

FULL = 7  # slices after which every policy reads a full memory
TARGET = 1.35  # of fifo, for shortlong
GATED = "fifo, object score gate"


def slices_of(image: Path, label: Path, count: int, px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read slices (T, 3, px, px) in [0, 1], from the slice with the largest mask upwards, and that mask (1, 1, px, px)."""
    voxels, mask = (np.asarray(nibabel.load(path).dataobj, dtype=np.float32) for path in (image, label))
    axis = int(np.argmin(voxels.shape))
    voxels, mask = np.moveaxis(voxels, axis, 0), np.moveaxis(mask, axis, 0) > 0
    start = min(int(mask.sum(axis=(1, 2)).argmax()), len(voxels) - count)
    low, high = np.percentile(voxels, (0.5, 99.5))
    grey = torch.from_numpy(((voxels[start : start + count] - low) / (high - low)).clip(0, 1).astype(np.float32))[:, None]
    drawn = torch.from_numpy(mask[start].astype(np.float32))[None, None]
    resized = [torch.nn.functional.interpolate(a, size=(px, px), mode=m) for a, m in ((grey, "bilinear"), (drawn, "nearest"))]
    return resized[0].expand(-1, 3, -1, -1).contiguous(), resized[1]


def build(name: str, size: str, px: int) -> SlmSam2:
    """Build a network whose random weights are the same for every policy."""
    torch.manual_seed(0)
    options = {"bank_confidence": 0.0, "bank_similarity": -1.0, "object_score_gate": name == GATED}
    model = SlmSam2(NetworkPlan(size=size, policy=name.partition(",")[0], **options), px).eval()
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 5.0)
    return model


class Run:
    """Propagation by one policy, upwards from the annotated slice."""

    def __init__(self, model: SlmSam2, first: SliceFeatures, mask: torch.Tensor, slices: int) -> None:
        self.model, self.slices = model, slices
        self.bank = MemoryBank({0: to_bfloat16(model.remember(first, model.condition_on_mask(first, mask), mask))})

    def step(self, t: int, here: SliceFeatures) -> float:
        """Track slice t and store it in memory. Return seconds."""
        started = time.perf_counter()
        context = ReadContext(t, 1, self.bank.conditioning, self.bank.tracked, self.slices)
        self.bank.write(t, to_bfloat16(self.model.remember(here, self.model.track(here, self.bank, context))))
        self.model.prune(self.bank, context)
        return time.perf_counter() - started

    def stored_mib(self) -> float:
        memories = [*self.bank.conditioning.values(), *self.bank.tracked.values()]
        return sum(t.nbytes for m in memories for t in (m.spatial, m.pointer, m.chosen, m.stats.vector)) / 2**20


@torch.inference_mode()
def measure(
    models: dict[str, SlmSam2], frames: torch.Tensor, mask: torch.Tensor, repeats: int
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the median seconds of encoding a slice; and per policy, of tracking and storing it, and MiB stored."""
    encoder = models["fifo"]
    features = [encoder.encode(frame[None]) for frame in frames]
    encoding, tracking = [], {name: [] for name in models}
    for _ in range(repeats):
        runs = {name: Run(model, features[0], mask, len(features)) for name, model in models.items()}
        for t, here in enumerate(features[1:], start=1):
            turn = list(runs)[t % len(runs) :] + list(runs)[: t % len(runs)]  # the first one changes
            taken = {name: runs[name].step(t, here) for name in turn}
            if t >= FULL:
                started = time.perf_counter()
                encoder.encode(frames[t : t + 1])
                encoding.append(time.perf_counter() - started)
                for name, seconds in taken.items():
                    tracking[name].append(seconds)
    return statistics.median(encoding), {name: (statistics.median(tracking[name]), run.stored_mib()) for name, run in runs.items()}


@torch.inference_mode()
def alone(name: str, size: str, frames: torch.Tensor, mask: torch.Tensor, threads: int, answer: "multiprocessing.Queue[float]") -> None:
    """Send the peak memory in MiB of this process, which runs one policy up to a full memory."""
    torch.set_num_threads(threads)
    model = build(name, size, frames.shape[-1])
    features = model.encode(frames[:1])
    run = Run(model, features, mask, len(frames))
    for t in range(1, FULL + 2):  # the same slice again needs as much memory as another one
        run.step(t, features)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(name: str, size: str, frames: torch.Tensor, mask: torch.Tensor, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=alone, args=(name, size, frames, mask, threads, answer))
    process.start()
    found = float(answer.get())
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("label", type=Path)
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--no-peak", action="store_true", help="skip the processes that measure peak memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    frames, mask = slices_of(options.image, options.label, options.slices, options.px)
    names = [*POLICY_STREAMS, GATED]
    models = {name: build(name, options.size, options.px) for name in names}
    encoding, found = measure(models, frames, mask, options.repeats)
    whole = {name: encoding + tracking for name, (tracking, _) in found.items()}
    print(f"{options.size} at {options.px} px, {options.slices} slices, {options.threads} threads; encoding {1000 * encoding:.0f} ms\n")
    print("| policy | track + store, ms per slice | with encoding, ms per slice | ratio to fifo | stored, MiB | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for name, (tracking, kept) in found.items():
        most = "" if options.no_peak else f"{peak(name, options.size, frames, mask, options.threads):.0f}"
        print(f"| {name} | {1000 * tracking:.0f} | {1000 * whole[name]:.0f} | {whole[name] / whole['fifo']:.2f} | {kept:.1f} | {most} |")
    ratio, tracked = whole["shortlong"] / whole["fifo"], found["shortlong"][0] / found["fifo"][0]
    print(f"\nshortlong: {ratio:.2f} times fifo per slice (target: at most {TARGET}); without encoding {tracked:.2f} times")


if __name__ == "__main__":
    main()
