"""How a stage's options become a command: the options that several or all commands have, examples in its help, its exit code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from slmsam2_cli import console
from slmsam2_cli.cli.exit_codes import run_for_exit_code
from slmsam2_cli.device import DeviceName

COMMON_OPTIONS = {
    "verbose": (bool, typer.Option("--verbose", help="Say more.")),
    "quiet": (bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")),
    "disable_progress": (bool, typer.Option("--disable-progress", help="No progress.")),
    "debug": (bool, typer.Option("--debug", help="Show the traceback of an error.")),
}
Stage = Callable[..., int]

DatasetOption = Annotated[
    Path | None, typer.Option("-d", "--dataset", metavar="DATASET", help="Folder with a dataset.json.  [default: the current folder]")
]
WorkspaceOption = Annotated[
    Path | None, typer.Option("-w", "--workspace", metavar="FOLDER", help="Where results are kept.  [default: DATASET/slmsam2]")
]
DeviceOption = Annotated[DeviceName, typer.Option("--device", help="Where the network runs; auto takes the fastest there is.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="nano (made for CPUs), tiny, small, base_plus or large.  [default: what the plan says, else nano]"),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Do again what is already there.")]


def format_examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def command_decorator(app: typer.Typer) -> Callable[..., Callable[[Stage], Stage]]:
    """The decorator that makes functions commands of an app: called with examples for the help, and a name if it is another."""

    def command(*examples: str, name: str | None = None) -> Callable[[Stage], Stage]:
        def register(function: Stage) -> Stage:
            @functools.wraps(function)
            def run(*, verbose: bool, quiet: bool, disable_progress: bool, debug: bool, **options: Any) -> None:
                talk = console.settings
                talk.verbose, talk.quiet, talk.progress = verbose or debug, quiet and not debug, not disable_progress
                talk.debug = debug
                raise typer.Exit(run_for_exit_code(lambda: function(**options), debug))

            parameters = [*_own(function), *_common()]
            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
            app.command(name, epilog=format_examples(*examples))(run)
            return function

        return register

    return command


def _own(function: Stage) -> list[Parameter]:
    own = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]


def _common() -> list[Parameter]:
    return [
        Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[t, option]) for n, (t, option) in COMMON_OPTIONS.items()
    ]
