"""Stage 2: dataset + plan -> prepared cases.   Reads plan.json, images, labels.   Writes prepared/<case>/."""

from __future__ import annotations

from pathlib import Path

from slmsam2_cli import console
from slmsam2_cli.dataset.cache import prepare_all
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.errors import DONE, SOME_FAILED, DatasetError, OutputError, PlanError
from slmsam2_cli.io.atomic import lock_folder
from slmsam2_cli.planning.plan import read_plan
from slmsam2_cli.workspace import Workspace


def preprocess(dataset: Path, workspace: Workspace, *, overwrite: bool = False) -> int:
    """Turn every training case into a stack of slices, once. The exit code: 0, or 1 when some cases are unusable.

    Raises DatasetError with all problems when no case is usable, PlanError without a plan, OutputError.
    """
    plan = read_plan(workspace.plan)
    data = read_dataset(dataset)
    if data.channels != plan.channels:
        raise PlanError(f"plan.json knows the channels {plan.channels}, the data set has {data.channels}. Run slmsam2 plan --overwrite")
    try:
        with lock_folder(workspace.root), console.progress("preparing", len(data.training)) as advance:
            outcome = prepare_all(
                data, plan.geometry, plan.intensity, workspace.prepared, overwrite=overwrite, log=console.say, advance=advance
            )
    except OutputError as error:
        raise OutputError(f"{error}. Choose a workspace you can write to with -w") from None
    if not outcome.cases:
        raise DatasetError(f"{data.name}: none of its {len(outcome.problems)} training cases is usable", outcome.problems)
    for problem in outcome.problems:
        console.error(str(problem))
    for case in outcome.cases:
        if case.view.scale < 1:
            console.warn(f"case {case.id}: slices were shrunk to {case.view.scale:.0%} to fit {plan.geometry.stack_size} px")
    console.say(f"{len(outcome.cases)} cases ready, {outcome.prepared_now} of them prepared now")
    return SOME_FAILED if outcome.problems else DONE
