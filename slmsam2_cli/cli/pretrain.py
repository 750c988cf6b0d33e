"""The command `slmsam2 pretrain`: options -> stage. Decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slmsam2_cli.device import DeviceName

EXAMPLES = (
    "slmsam2 pretrain -o run",
    "slmsam2 pretrain -o run --continue",
    "slmsam2 pretrain -o trial --smoke",
    "slmsam2 pretrain -o run --recipe mine.json --minutes 60",
)


def pretrain(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Folder of this run.", show_default=False)],
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="How to train.  [default: the recipe of the packaged base]")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Weights to start from.  [default: random ones]", show_default=False)
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A recipe of two minutes, to see that it learns.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, metavar="M", help="Stop after so many minutes.  [default: what the recipe says]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after so many optimiser steps.  [default: what the recipe says]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Of weights and draws.  [default: what the recipe says]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Cores of the CPU to use.  [default: all]")] = None,
    commit: Annotated[str, typer.Option(metavar="TEXT", help="Version of the code, noted in the weights.", show_default=False)] = "",
    resume: Annotated[bool, typer.Option("--continue", help="Go on where an interrupted run stopped.")] = False,
    device: Annotated[DeviceName, typer.Option("--device", help="Where the network runs; auto takes the fastest there is.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder that holds a run.")] = False,
) -> int:
    """Train the packaged base from nothing.

    Learns from procedural volumes that are made while it trains, so it needs no data and no network. Writes nano.safetensors, which
    finetune and predict take with --weights, the recipe, and what was measured on the way. Takes hours; goes on after an interruption.
    """
    from slmsam2_cli.commands import pretrain as stage

    return stage.pretrain(
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
