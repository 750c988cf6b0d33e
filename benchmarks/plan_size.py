"""Time and accuracy of the planned size, against SAM 2's own pipeline and against other sizes.

    python benchmarks/plan_size.py ../shared/data [--sets Task04_Hippocampus Sarcoma_MR_T1] [--repeats 3]
    python benchmarks/plan_size.py ../shared/data --accuracy [-n 5] [--steps 300] [--settings 128:2 160:whole 128:2:adjacent_slices]

Time in seconds per volume on this CPU: the planned pipeline, the plan for tiny, and stock SAM 2, which enlarges every slice to
1024 × 1024 (tiny, random weights: time does not depend on them). One volume per set from its middle slice; CLIP slices of it are timed,
times its number of slices. The three alternate; medians. Accuracy: the bundled model fine-tuned on n volumes at several sizes. Each size
is PX:WIDTH, the edge of the ROI crop in pixels and in widths of the annotation, or PX:whole for whole slices. With adjacent_slices, the
slices before and after are two of the three input channels. Dice of held-out cases, mean over labels. One seed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from strategies import mean_dice

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.prompts import simulate_prompts
from slmsam2_cli.dataset.slices import make_frames
from slmsam2_cli.inference.propagation import AnnotatedSlice, PropagationOptions, propagate
from slmsam2_cli.inference.segment import annotated_slices_of
from slmsam2_cli.io.atomic import read_json
from slmsam2_cli.io.volume import read_image, read_labels
from slmsam2_cli.model.roi import pad_to_square, to_input
from slmsam2_cli.model.slmsam2 import SlmSam2
from slmsam2_cli.planning.fingerprint import Fingerprint
from slmsam2_cli.planning.measure import measure
from slmsam2_cli.planning.plan import Plan, write_plan
from slmsam2_cli.planning.rules import decide
from slmsam2_cli.workspace import Workspace

STOCK_PX, CLIP = 1024, 6


def stock(plan: Plan) -> Plan:
    """Return the plan for a SAM 2 network at the input size of SAM 2."""
    geometry, px = plan.geometry, STOCK_PX
    larger = geometry.model_copy(
        update={"input_size": px, "storage_size": px, "in_plane_mm": geometry.in_plane_mm * geometry.input_size / px}
    )
    return plan.model_copy(update={"geometry": larger})


class Pipeline:
    """One volume preprocessed by a plan, reduced to CLIP slices around the annotated slice."""

    def __init__(self, root: Path, plan: Plan) -> None:
        data = read_dataset(root)
        case = data.training[0]
        image = read_image(case.images, case=case.id, root=root, channels=len(data.channels))
        view, frames = make_frames(image, plan.geometry, plan.intensity)
        labels = read_labels(case.label, case=case.id, root=root)
        objects = annotated_slices_of(
            simulate_prompts(labels.voxels, view, tuple(plan.labels), "middle"), view, tuple(plan.labels), plan.geometry.storage_size
        )
        annotated = next(prompt.slice for prompts in objects.values() for prompt in prompts)
        start = max(0, min(annotated - CLIP // 2, frames.shape[1] - CLIP))
        self.plan, self.slices, self.objects = plan, frames.shape[1], len(objects)
        self.prompts = {
            value: [AnnotatedSlice(a.slice - start, a.mask) for a in one if start <= a.slice < start + CLIP]
            for value, one in objects.items()
        }
        self.stack = pad_to_square(to_input(torch.from_numpy(frames[:, start : start + CLIP])), plan.geometry.storage_size)
        self.model = SlmSam2(plan.network, plan.geometry.input_size).eval()

    def seconds(self) -> float:
        """Propagate once. Return seconds for the whole volume."""
        started = time.perf_counter()
        propagate(
            self.model,
            self.stack,
            {v: a for v, a in self.prompts.items() if a},
            options=PropagationOptions(roi_scale=self.plan.geometry.roi_scale),
        )
        return (time.perf_counter() - started) * self.slices / len(self.stack)


def cost(root: Path, repeats: int) -> list[str]:
    fingerprint, _ = measure(read_dataset(root))
    tiny = decide(fingerprint, "tiny")
    plans = {"planned": decide(fingerprint), "planned for tiny": tiny, "stock": stock(tiny)}
    pipelines = {name: Pipeline(root, plan) for name, plan in plans.items()}
    times: dict[str, list[float]] = {name: [] for name in plans}
    for repeat in range(repeats + 1):
        for name, pipeline in pipelines.items():
            taken = pipeline.seconds()
            if repeat:  # the first round warms up
                times[name].append(taken)
    slowest = statistics.median(times["stock"])
    lines = []
    for name, pipeline in pipelines.items():
        took, geometry = statistics.median(times[name]), pipeline.plan.geometry
        seen = f"{geometry.input_size} px" + (f", {geometry.roi_scale:g} widths" if geometry.roi_scale else "")
        about = f"| {root.name} | {name}: {pipeline.plan.network.size} | {seen} | {pipeline.slices} x {pipeline.objects}"
        lines.append(f"{about} | {took:.1f} | {slowest / took:.0f} |")
    return lines


def accuracy(root: Path, settings: list[str], count: int, steps: int | None) -> list[str]:
    fingerprint, _ = measure(read_dataset(root))
    lines = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            space = Workspace(Path(folder))
            write_plan(space.plan, at(fingerprint, setting))
            started = time.perf_counter()
            finetune(root, space, cases=count, weights="nano", steps=steps)
            tuned = time.perf_counter()
            predict(None, None, dataset=root, workspace=space, report=False)
            split: Any = read_json(space.split, "split")
            took = (time.perf_counter() - tuned) / len(split["held_out"])
            score = mean_dice(root, space.predictions, split["held_out"])
        lines.append(f"| {root.name} | {setting} | {score:.3f} | {(tuned - started) / 60:.1f} | {took:.1f} |")
        print(lines[-1], flush=True)
    return lines


def at(fingerprint: Fingerprint, setting: str) -> Plan:
    """Return the plan with the input size and ROI crop of a setting."""
    px, width, *more = setting.split(":")
    plan = decide(fingerprint)
    geometry = plan.geometry.model_copy(update={"adjacent_slices": "adjacent_slices" in more})
    if width == "whole":
        scale = geometry.storage_size / int(px)
        changed: dict[str, object] = {"roi_scale": None, "storage_size": int(px), "in_plane_mm": geometry.in_plane_mm * scale}
    else:
        changed = {"roi_scale": float(width)}
    training = plan.training.model_copy(update={"validation": "none"})
    return plan.model_copy(update={"geometry": geometry.model_copy(update={"input_size": int(px), **changed}), "training": training})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("-n", "--cases", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of fine-tuning  [default: from the plan]")
    parser.add_argument("--settings", nargs="+", default=["128:2", "96:2", "160:2", "128:3", "160:whole"])
    options = parser.parse_args()
    if options.accuracy:
        rows = [
            accuracy(options.data / name, options.settings, options.cases, options.steps) for name in options.sets or ["Task04_Hippocampus"]
        ]
        print("| set | px:widths | Dice, held-out | minutes of fine-tuning | seconds per volume |\n|---|---|---|---|---|")
    else:
        rows = [cost(options.data / name, options.repeats) for name in options.sets or ["Task04_Hippocampus", "Sarcoma_MR_T1"]]
        print("| set | pipeline | network input | slices x labels | seconds per volume | ratio, stock to ours |\n|---|---|---|---|---|---|")
    print("\n".join(line for lines in rows for line in lines))


if __name__ == "__main__":
    main()
