"""slmsam2 preprocess: dataset + plan -> preprocessed cases.   Reads plan.json, images, labels.   Writes prepared/<case>/."""

from __future__ import annotations

from pathlib import Path

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import PreprocessSettings, prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.errors import DONE, SOME_FAILED, DatasetError, OutputError, PlanError
from slmsam2_cli.io.atomic import lock_folder
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace


def preprocess(dataset: Path, workspace: Workspace, *, overwrite: bool = False) -> int:
    """Convert all training cases to stacks of slices, except those that are up to date. Returns the exit code: 0, or 1 with invalid cases.

    Raises: DatasetError, with all problems, when no case is valid; PlanError when plan.json is missing or has other channels;
    OutputError when the workspace cannot be written.
    """
    plan = read_plan(workspace.plan)
    data = read_dataset(dataset)
    if data.channels != plan.channels:
        raise PlanError(
            f"plan.json is for the channels {', '.join(plan.channels)}, but the dataset has {', '.join(data.channels)}. "
            "Run slmsam2 plan --overwrite"
        )
    try:
        with lock_folder(workspace.root), console.progress("Preprocessing", len(data.training)) as advance:
            outcome = prepare_all(
                data,
                PreprocessSettings(plan.geometry, plan.intensity),
                workspace.prepared,
                overwrite=overwrite,
                log=console.say,
                advance=advance,
            )
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    if not outcome.cases:
        raise DatasetError(f"{data.name}: none of its {len(outcome.problems)} training cases is usable", outcome.problems)
    for problem in outcome.problems:
        console.error(str(problem))
    for case in outcome.cases:
        if case.view.scale < 1:
            console.warn(
                f"case {case.id}: slices were reduced to {case.view.scale:.0%} of their size to fit {plan.geometry.storage_size} pixels"
            )
    console.say(f"{len(outcome.cases)} cases ready, {outcome.prepared_now} preprocessed in this run")
    return SOME_FAILED if outcome.problems else DONE
