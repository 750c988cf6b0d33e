"""How a stage's options become a command: the options every command has, examples in its help, its exit code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated, Any

import typer

from slmsam2_cli import console
from slmsam2_cli.outcome import exit_code_of

COMMON = {
    "verbose": (bool, typer.Option("--verbose", help="Say more.")),
    "quiet": (bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")),
    "disable_progress": (bool, typer.Option("--disable-progress", help="No progress.")),
    "debug": (bool, typer.Option("--debug", help="Show the traceback of an error.")),
}
Stage = Callable[..., int]


def examples_in_help(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def commands_of(app: typer.Typer) -> Callable[..., Callable[[Stage], Stage]]:
    """The decorator that makes functions commands of an app: called with examples for the help, and a name if it is another."""

    def command(*examples: str, name: str | None = None) -> Callable[[Stage], Stage]:
        def register(function: Stage) -> Stage:
            @functools.wraps(function)
            def run(*, verbose: bool, quiet: bool, disable_progress: bool, debug: bool, **options: Any) -> None:
                talk = console.settings
                talk.verbose, talk.quiet, talk.progress = verbose or debug, quiet and not debug, not disable_progress
                talk.debug = debug
                raise typer.Exit(exit_code_of(lambda: function(**options), debug))

            parameters = [*_own(function), *_common()]
            run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
            run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
            app.command(name, epilog=examples_in_help(*examples))(run)
            return function

        return register

    return command


def _own(function: Stage) -> list[Parameter]:
    own = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]


def _common() -> list[Parameter]:
    return [Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[t, option]) for n, (t, option) in COMMON.items()]
