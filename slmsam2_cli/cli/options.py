"""Options that several commands share, and the decorator that turns a function into a command with them."""

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
    "verbose": (bool, typer.Option("--verbose", help="Verbose output.")),
    "quiet": (bool, typer.Option("--quiet", help="Print warnings and errors only.")),
    "disable_progress": (bool, typer.Option("--disable-progress", help="Hide progress bars.")),
    "debug": (bool, typer.Option("--debug", help="Show the traceback of errors.")),
}
CommandFunction = Callable[..., int]

DatasetOption = Annotated[
    Path | None, typer.Option("-d", "--dataset", metavar="DATASET", help="Data set folder (with dataset.json).  [default: current folder]")
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option("-w", "--workspace", metavar="FOLDER", help="Folder for plans, models and results.  [default: DATASET/slmsam2]"),
]
DeviceOption = Annotated[DeviceName, typer.Option("--device", help="Device to run on; auto picks the fastest available.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Network size: nano (for CPUs), tiny, small, base_plus, large.  [default: from plan.json, else nano]"
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Recompute and replace existing results.")]


def format_examples(*lines: str) -> str:
    """Format example command lines for the end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def command_decorator(app: typer.Typer) -> Callable[..., Callable[[CommandFunction], CommandFunction]]:
    """Return a decorator that adds a function to `app` as a command, with the common options.

    The decorator takes example command lines for the help text, and `name` where the command is not called like the function.
    """

    def command(*examples: str, name: str | None = None) -> Callable[[CommandFunction], CommandFunction]:
        def register(function: CommandFunction) -> CommandFunction:
            @functools.wraps(function)
            def run(*, verbose: bool, quiet: bool, disable_progress: bool, debug: bool, **options: Any) -> None:
                console.settings = console.Settings(quiet and not debug, verbose or debug, not disable_progress, debug)
                raise typer.Exit(run_for_exit_code(lambda: function(**options), debug))

            own = inspect.signature(function, eval_str=True).parameters.values()
            common = {name: Annotated[kind, option] for name, (kind, option) in COMMON_OPTIONS.items()}
            parameters = [
                *(parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own),
                *(Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind) for name, kind in common.items()),
            ]
            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
            app.command(name, epilog=format_examples(*examples))(run)
            return function

        return register

    return command
