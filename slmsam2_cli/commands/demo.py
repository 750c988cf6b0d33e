"""Run the whole pipeline on synthetic phantoms.   Writes DIR/dataset and, inside it, the workspace.

Every command skips what is up to date, so a second run trains nothing and ends with the same table.
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
SHAPE = (24, 44, 44)  # slices, rows, columns: small enough to train in minutes on two cores
MINUTES = 5.0  # of training; the rest takes seconds


def demo(folder: Path, *, minutes: float = MINUTES, device: DeviceName = "auto", overwrite: bool = False) -> int:
    """Generate a phantom data set, then plan, preprocess, fine-tune, predict and evaluate. Return the worst exit code of the commands."""
    dataset = folder / "dataset"
    space = Workspace.of(dataset, None)
    if (dataset / "dataset.json").is_file():
        console.say(f"using existing phantom data set: {dataset}")
    else:
        write_phantom_dataset(dataset, cases=LABELLED_CASES, shape=SHAPE)
        console.say(f"wrote {LABELLED_CASES} labelled synthetic phantoms: {dataset}")
    commands: dict[str, Callable[[], int]] = {
        "plan": lambda: plan(dataset, space, overwrite=overwrite),
        "preprocess": lambda: preprocess(dataset, space, overwrite=overwrite),
        "finetune": lambda: _finetune(dataset, space, minutes, device, overwrite),
        "predict": lambda: predict(None, None, dataset=dataset, workspace=space, prompt_slice="middle", device=device, overwrite=overwrite),
        "evaluate": lambda: evaluate((), None, space, None, dataset=dataset),
    }
    worst = DONE
    for number, (name, run) in enumerate(commands.items(), start=1):
        console.say(f"[{number}/{len(commands)}] {name}")
        worst = max(worst, run())
    results = {"plan": space.plan, "model": space.model, "masks": space.predictions, "scores": space.evaluation}
    for name, path in {"data set": dataset, **results}.items():
        console.say(f"{name}: {path}")
    return worst


def _finetune(dataset: Path, space: Workspace, minutes: float, device: DeviceName, overwrite: bool) -> int:
    """Fine-tune the bundled weights, or random ones where there are none; resume an interrupted run, keep a finished one."""
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
