"""The command `slmsam2 pretrain`: parse its options and call slmsam2_cli.commands.pretrain. Holds no decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmsam2_cli.cli.options import DeviceOption

EXAMPLES = (
    "slmsam2 pretrain -o run",
    "slmsam2 pretrain -o run --continue",
    "slmsam2 pretrain -o trial --smoke",
    "slmsam2 pretrain -o run --recipe mine.json --minutes 60",
)


def pretrain(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Folder of the run.", show_default=False)],
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="Training recipe.  [default: recipe of the bundled model]")] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Initial weights: a name or a file.  [default: random]", show_default=False),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two-minute smoke test.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, metavar="M", help="Maximum training time in minutes.  [default: from the recipe]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Maximum number of optimiser steps.  [default: from the recipe]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, metavar="N", help="Random seed for weights and training.  [default: from the recipe]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of CPU threads.  [default: all]")] = None,
    commit: Annotated[str, typer.Option(metavar="TEXT", help="Version of the code, noted in the weights.", show_default=False)] = "",
    resume: Annotated[bool, typer.Option("--continue", help="Resume an interrupted run.")] = False,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder that holds a run.")] = False,
) -> int:
    """Train the bundled model from scratch.

    Training volumes are generated while training runs, so no data and no internet connection are needed. Writes nano.safetensors, which
    finetune and predict accept as --weights, the recipe and logs. Takes hours; an interrupted run can be resumed with --continue.
    """
    from slmsam2_cli.commands import pretrain as command

    return command.pretrain(
        output,
        recipe=recipe,
        weights=weights,
        smoke=smoke,
        minutes=minutes,
        steps=steps,
        seed=seed,
        threads=threads,
        commit=commit,
        resume=resume,
        device=device,
        overwrite=overwrite,
    )
