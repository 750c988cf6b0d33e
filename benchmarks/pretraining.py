"""Time of a pretraining step on this machine's CPU, with and without optimised modules, in one process and in two.

    python benchmarks/pretraining.py [--repeats 5] [--windows 8] [--length 8] [--steps 6]

First table, one thread: the phases of a step, with SAM 2's modules and with optimised ones (model/cpu_ops.py), alternating on the
same clips; the minimum of the repeats, in seconds of CPU time, which other programs disturb less than wall-clock time. Second table:
wall-clock time of whole steps in one process of one thread, one of two threads, and two of one thread each; medians.
"""

import argparse
import itertools
import random
import statistics
import time

import torch

from slmsam2_cli.model import cpu_ops
from slmsam2_cli.model.slmsam2 import MemoryBank
from slmsam2_cli.pretraining import step as models
from slmsam2_cli.pretraining import train
from slmsam2_cli.pretraining.recipe import NANO, Recipe, read_recipe
from slmsam2_cli.pretraining.step import MemoryReader, draw_part_clips
from slmsam2_cli.pretraining.workers import flatten_gradients
from slmsam2_cli.training.learner import optimiser_step, total_loss
from slmsam2_cli.training.trainer import ClipState, track_losses

CPU = torch.device("cpu")
NAMES = ("draw", "encode", "annotate", "track", "backward", "optimise")
PROCESSES = {"1 process, 1 thread": (1, 1, False), "1 process, 2 threads": (1, 2, False), "2 processes, 1 thread each": (2, 1, True)}


def fixed(windows: int, length: int, parts: int = 1, policy: str = "shortlong") -> Recipe:
    """Return the bundled recipe with fixed clip length, prompt, policy and memory, so that only the volumes are random."""
    changes = {"parts": parts, "max_windows": windows, "slices_per_step": windows * length, "other_input_sizes": {}, "minutes": None}
    changes |= {"phases": ({"until": 1.0, "lengths": (length,)},), "prompts": {"box": 0.0, "points": 0.0}}
    changes |= {
        "memory": {
            "policies": {policy: 1.0},
            "drop_tracked": 0.0,
            "drop_previous_mask": 0.0,
            "previous_mask_only": 0.0,
            "two_conditioning_slices": 0.0,
        }
    }
    return Recipe.model_validate(read_recipe(NANO).model_dump() | changes)


def one_step(learner: train.Pretrainer, recipe: Recipe, gradients: torch.Tensor, step: int) -> list[float]:
    """Run one step. Return the seconds of CPU time of every phase."""
    model, marks = learner.model, [time.process_time()]
    gradients.zero_()
    clips = draw_part_clips(recipe, step, 0, 0.5, CPU)
    marks.append(time.process_time())
    features = model.encode(clips.frames.flatten(0, 1))
    marks.append(time.process_time())
    first = features.at(clips.feature_index(0))
    bank = MemoryBank({0: model.remember(first, model.condition_on_mask(first, clips.masks[0]), clips.masks[0])})
    marks.append(time.process_time())
    reader = MemoryReader(model, recipe, clips.slices, random.Random(0))
    total = total_loss(track_losses(model, ClipState(clips, features, bank, reader.track, len(clips.masks))))
    marks.append(time.process_time())
    total.backward()
    marks.append(time.process_time())
    optimiser_step(learner, 1e-5, recipe.ema_decay)
    marks.append(time.process_time())
    return [after - before for before, after in itertools.pairwise(marks)]


def phases(windows: int, length: int, repeats: int) -> None:
    """Print the first table."""
    recipe = fixed(windows, length)
    optimised = train.new_learner(recipe, CPU)
    original, models.optimise_for_cpu = models.optimise_for_cpu, lambda model: None
    plain = train.new_learner(recipe, CPU)
    models.optimise_for_cpu = original
    assert any(type(module) is cpu_ops.PointwiseConv2d for module in optimised.model.modules())
    arms = {"as in SAM 2": plain, "optimised": optimised}
    gradients = {name: flatten_gradients(arm.model) for name, arm in arms.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            found[name].append(one_step(arm, recipe, gradients[name], repeat % 2))
    print(f"| {windows} clips of {length} slices, {recipe.input_size} px | " + " | ".join(NAMES) + " | sum | clips/s |")
    print("|" + "---|" * (len(NAMES) + 3))
    for name, rows in found.items():
        least = [min(column) for column in zip(*rows[1:])]
        print(f"| {name} | " + " | ".join(f"{s:.2f}" for s in least) + f" | {sum(least):.2f} | {windows / sum(least):.1f} |")


def processes(windows: int, length: int, steps: int) -> None:
    """Print the second table."""
    print("\n| | seconds per step | clips/s |\n|---|---|---|")
    for name, (parts, threads, use_processes) in PROCESSES.items():
        torch.set_num_threads(threads)
        recipe = fixed(windows, length, parts)
        seconds = [
            step.seconds for step in itertools.islice(train.train(train.new_learner(recipe, CPU), recipe, bool, use_processes), steps + 1)
        ]
        median = statistics.median(seconds[1:])
        print(f"| {name} | {median:.2f} | {windows / median:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    phases(options.windows, options.length, options.repeats)
    processes(options.windows, options.length, options.steps)


if __name__ == "__main__":
    main()
