"""Dice and time of passes by max_empty_slices, slice spacing and input size, without fine-tuning.

    python benchmarks/plan_passes.py ../shared/data [--weights nano]

The bundled model on the development cases (CHOSEN_ON in zero_shot.py), from the middle slice of each label. max_empty_slices:
propagation stops after this number of empty slices. Spacing: slices as stored, or resampled to a multiple of their distance along the
slice axis; 0.5 adds an interpolated slice between any two. Pixels: input size of the network, the same for every set. Dice of whole
volumes, mean over cases, then over labels; milliseconds per stored slice and label, alternating, one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from zero_shot import CHOSEN_ON

from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.slices import AXES
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.inference.load_model import build_model
from slmsam2_cli.inference.segment import PromptSource, Segmenter, segment_case
from slmsam2_cli.io.volume import read_labels
from slmsam2_cli.model.checkpoint import load_base_weights
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan
from slmsam2_cli.planning.rules import decide

Arm = Callable[[Plan, float], Plan]


def max_empty_slices(slices: int | None) -> Arm:
    return lambda plan, _: plan.model_copy(update={"inference": plan.inference.model_copy(update={"max_empty_slices": slices})})


def spacing(times: float) -> Arm:
    return lambda plan, mm: plan.model_copy(update={"geometry": plan.geometry.model_copy(update={"through_plane_mm": times * mm})})


def pixels(edge: int) -> Arm:
    return lambda plan, _: plan.model_copy(update={"geometry": plan.geometry.model_copy(update={"input_size": edge, "storage_size": edge})})


ARMS: dict[str, Arm] = {
    "as planned": lambda plan, _: plan,
    "`max_empty_slices` 3": max_empty_slices(3),
    "`max_empty_slices` 10": max_empty_slices(10),
    "no limit of empty slices": max_empty_slices(None),
    "0.5 times the spacing": spacing(0.5),
    "2 times the spacing": spacing(2.0),
    "3 times the spacing": spacing(3.0),
    "64 px": pixels(64),
    "96 px": pixels(96),
    "128 px": pixels(128),
    "160 px": pixels(160),
}


def through_mm(fingerprint: Fingerprint, plan: Plan) -> float:
    axis = plan.geometry.slice_axis
    return statistics.median(case.spacing_mm[AXES.index(case.axis(axis))] for case in fingerprint.cases)


def scores_of(root: Path, weights: str) -> dict[str, tuple[float, float]]:
    """Return arm -> mean Dice, milliseconds per slice and label."""
    data = read_dataset(root)
    fingerprint, _ = measure(data)
    checkpoint = load_base_weights(weights)
    assert checkpoint is not None
    planned = decide(fingerprint, checkpoint.network.size).model_copy(update={"network": checkpoint.network})
    plans = {name: arm(planned, through_mm(fingerprint, planned)) for name, arm in ARMS.items()}
    models = {px: build_model(checkpoint, plan).eval() for plan in plans.values() for px in [plan.geometry.input_size]}
    source = PromptSource(data.root, "middle", dataset_labels=True)
    found: dict[str, dict[int, list[float]]] = {name: {} for name in ARMS}
    seconds, slices = dict.fromkeys(ARMS, 0.0), 0
    for case in (case for case in data.training if case.id in CHOSEN_ON[root.name]):
        truth = read_labels(case.label, case=case.id, root=data.root).voxels
        held = [value for value in data.labels if (truth == value).any()]
        for name, plan in plans.items():
            started = time.perf_counter()
            result = segment_case(source.assign(case), data.root, source, Segmenter(models[plan.geometry.input_size], plan))
            seconds[name] += time.perf_counter() - started
            for value in held:
                found[name].setdefault(value, []).append(dice(truth == value, result.labels == value))
        slices += truth.shape[result.metadata["array_axis"]] * len(held)
    means = {name: float(np.mean([np.mean(each) for each in by_label.values()])) for name, by_label in found.items()}
    return {name: (means[name], 1000 * seconds[name] / slices) for name in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="nano")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores = {name: scores_of(options.data / name, options.weights) for name in CHOSEN_ON}
    print(f"| arm | {' | '.join(scores)} | mean Dice | ms |\n|{'---|' * (len(scores) + 3)}")
    for arm in ARMS:
        each = [score[arm] for score in scores.values()]
        shown = " | ".join(f"{value:.3f}" for value, _ in each)
        print(f"| {arm} | {shown} | {np.mean([v for v, _ in each]):.3f} | {np.mean([ms for _, ms in each]):.0f} |")


if __name__ == "__main__":
    main()
