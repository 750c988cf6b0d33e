"""Dice of each training strategy on a modality that the initial weights were not trained on, and calibration on held-out cases.

    python benchmarks/strategies.py FOLDER [--minutes 4] [--steps 30] [--cases 2]

Synthetic phantoms: a model is trained on 5 MR cases from random weights for --minutes, then fine-tuned to CT by every strategy with
the same steps on the same few cases. Dice of whole volumes of the held-out CT cases, from the middle slice of each label. Calibration
error (10 groups) of slices of these cases, without and with the calibration that fine-tuning fitted on the training cases. One run and
one seed, so differences of a few hundredths mean nothing.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.cache import PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.evaluation.metrics import dice
from slmsam2_cli.inference.load_model import build_model
from slmsam2_cli.io.volume import read_labels
from slmsam2_cli.model.calibration import calibration_error
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.training.calibrate import confidence_and_dice
from slmsam2_cli.workspace import Workspace

SHAPE = (16, 34, 34)  # slices, rows, columns: 128 px
CLIP = {"clip_slices": 4, "warmup_steps": 4}  # short, as the volumes are
STRATEGIES = ("full", "frozen-encoder", "decoder+memory", "adapters")


def mean_dice(dataset: Path, masks: Path, held_out: list[str]) -> float:
    """Return the mean Dice over labels and held-out cases."""
    data = read_dataset(dataset)
    manifest = json.loads((masks / "manifest.json").read_text(encoding="utf-8"))["cases"]
    scores = []
    for case in (case for case in data.training if case.id in held_out):
        truth = read_labels(case.label, case=case.id, root=data.root).voxels
        found = read_labels(masks / manifest[case.id]["output"], case=case.id, root=masks).voxels
        scores += [dice(truth == value, found == value) for value in data.labels if (truth == value).any()]
    return float(np.mean(scores))


def calibration_errors(dataset: Path, model: Path, held_out: list[str], prepared: Path) -> tuple[float, float | None]:
    """Return the calibration errors of raw and of calibrated confidence, on slices of held-out cases."""
    checkpoint = read_checkpoint(model)
    outcome = prepare_all(read_dataset(dataset), PreprocessSettings(checkpoint.plan.geometry, checkpoint.plan.intensity), prepared)
    cases = [case for case in outcome.cases if case.id in held_out]
    confidence, true_dice = np.array(confidence_and_dice(build_model(checkpoint, checkpoint.plan), cases, checkpoint.plan)).T
    table = checkpoint.calibration
    return calibration_error(confidence, true_dice), calibration_error(table(confidence), true_dice) if table else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes of training on MR")
    parser.add_argument("--steps", type=int, default=30, help="steps of every strategy")
    parser.add_argument("--cases", type=int, default=2, help="CT cases to fine-tune on")
    options = parser.parse_args()
    mr, ct = options.folder / "MR", options.folder / "CT"
    for dataset, modality, seed in ((mr, "MR", 0), (ct, "CT", 1)):
        if not (dataset / "dataset.json").exists():
            write_phantom_dataset(dataset, cases=8, test_cases=0, seed=seed, shape=SHAPE, modality=modality)
    base = Workspace.of(mr, None)
    finetune(mr, base, cases=5, weights="random", minutes=options.minutes)
    plan(ct, Workspace(ct / "planned"))
    planned, rows = read_plan(ct / "planned" / "plan.json"), []
    planned = planned.model_copy(update={"network": read_checkpoint(base.model).network})
    for strategy in STRATEGIES:
        space = Workspace(ct / strategy)
        write_plan(space.plan, planned.model_copy(update={"training": planned.training.model_copy(update=CLIP | {"strategy": strategy})}))
        finetune(ct, space, cases=options.cases, weights=str(base.model), steps=options.steps)
        held_out = json.loads(space.split.read_text())["held_out"]
        for name, weights in (("", None), ("before", str(base.model)))[: 2 if strategy == "full" else 1]:
            masks = space.root / f"masks{name}"
            predict(None, masks, dataset=ct, workspace=space, weights=weights, report=False)
            errors = calibration_errors(ct, space.model, held_out, space.prepared) if not name else (float("nan"), None)
            small = space.finetuned / "adapter.safetensors"
            size = (small if small.exists() else space.model).stat().st_size / 2**20
            rows.append((name and "not fine-tuned" or strategy, mean_dice(ct, masks, held_out), *errors, size))
    print(
        f"| strategy | Dice, {len(held_out)} held-out CT cases | calibration error, raw | calibrated | file (MB) |\n|---|---|---|---|---|"
    )
    for name, score, raw, after, size in rows:
        shown = "" if np.isnan(raw) else f"{raw:.3f}"
        print(f"| {name} | {score:.3f} | {shown} | {'' if after is None else f'{after:.3f}'} | {size:.1f} |")


if __name__ == "__main__":
    main()
