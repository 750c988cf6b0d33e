"""The whole pipeline, in order, on synthetic phantoms.   Writes DIR/dataset and, inside it, the workspace.

Every stage skips what it finds done, so a second run trains nothing and ends with the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slmsam2_cli import console
from slmsam2_cli.commands.evaluate import evaluate
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.commands.preprocess import preprocess
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.device import DeviceName
from slmsam2_cli.errors import DONE
from slmsam2_cli.inference.load_model import read_split
from slmsam2_cli.model.checkpoint import BUNDLED_WEIGHTS
from slmsam2_cli.workspace import Workspace

LABELLED_CASES, TRAINING_CASES = 8, 5
SHAPE = (24, 44, 44)  # slices, rows, columns: small enough to learn in minutes on two cores
MINUTES = 5.0  # of training; the rest takes seconds


def demo(folder: Path, *, minutes: float = MINUTES, device: DeviceName = "auto", overwrite: bool = False) -> int:
    """Made-up data set -> plan -> prepared -> tuned -> masks -> Dice and HD95. The exit code is that of the worst stage."""
    dataset = folder / "dataset"
    space = Workspace.of(dataset, None)
    _make_dataset(dataset)
    stages: dict[str, Callable[[], int]] = {
        "plan": lambda: plan(dataset, space, overwrite=overwrite),
        "preprocess": lambda: preprocess(dataset, space, overwrite=overwrite),
        "finetune": lambda: _finetune(dataset, space, minutes, device, overwrite),
        "predict": lambda: _predict(dataset, space, device, overwrite),
        "evaluate": lambda: evaluate((), None, space, None, dataset=dataset),
    }
    worst = DONE
    for number, (name, run) in enumerate(stages.items(), start=1):
        console.say(f"[{number}/{len(stages)}] {name}")
        worst = max(worst, run())
    _show(dataset, space)
    return worst


def _make_dataset(dataset: Path) -> None:
    if (dataset / "dataset.json").is_file():
        console.say(f"synthetic phantoms are there: {dataset}")
        return
    write_phantom_dataset(dataset, cases=LABELLED_CASES, shape=SHAPE)
    console.say(f"{LABELLED_CASES} synthetic phantoms: {dataset}")


def _finetune(dataset: Path, space: Workspace, minutes: float, device: DeviceName, overwrite: bool) -> int:
    """From the packaged base if there is one; goes on with an interrupted run, leaves a finished one alone."""
    interrupted = read_split(space).get("finished") is False
    no_model_yet = not interrupted and not space.model.exists()
    return finetune(
        dataset,
        space,
        cases=TRAINING_CASES,
        weights="auto" if BUNDLED_WEIGHTS.is_file() else "random",
        minutes=minutes,
        resume=interrupted and not overwrite,
        device=device,
        overwrite=overwrite or no_model_yet,
    )


def _predict(dataset: Path, space: Workspace, device: DeviceName, overwrite: bool) -> int:
    """The cases that were not learned from, each from the middle slice of each label."""
    return predict(None, None, dataset=dataset, workspace=space, prompt_slice="middle", device=device, overwrite=overwrite)


def _show(dataset: Path, space: Workspace) -> None:
    """Where everything is."""
    for what, path in {
        "data set": dataset,
        "decisions": space.plan,
        "model": space.model,
        "masks": space.predictions,
        "scores": space.evaluation,
    }.items():
        console.say(f"{what}: {path}")
