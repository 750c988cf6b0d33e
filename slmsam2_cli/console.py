"""Print results, messages, tables and progress; no other module prints. Rich is used on a terminal, plain text elsewhere.

Results go to stdout; progress, warnings and errors go to stderr.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Settings:
    """What is printed; set once by the command line."""

    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    debug: bool = False


settings = Settings()


def printable(text: str) -> str:
    """Escape control characters, so that a file name cannot fake a line or control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _stream(text: str, to_stderr: bool) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def result(text: str) -> None:
    """Print a result to stdout."""
    _stream(text, to_stderr=False)


def say(line: str) -> None:
    """Print one line about the run, unless --quiet is set."""
    if not settings.quiet:
        _stream(printable(line), to_stderr=True)


def detail(line: str) -> None:
    """Print one line if --verbose is set."""
    if settings.verbose:
        _stream(printable(line), to_stderr=True)


def warn(line: str) -> None:
    """Print one warning, also with --quiet."""
    _stream(printable(f"warning: {line}"), to_stderr=True)


def error(line: str) -> None:
    """Print one error, also with --quiet."""
    _stream(printable(f"error: {line}"), to_stderr=True)


def trace(problem: BaseException) -> None:
    """Print the traceback of a handled error if --debug is set."""
    if settings.debug:
        for line in "".join(traceback.format_exception(problem)).splitlines():
            _stream(printable(line), to_stderr=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout: with rich on a terminal, as aligned text elsewhere."""
    if settings.quiet:
        return
    names = [printable(column) for column in columns]
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=Text(printable(title)), title_justify="left")
        for column in names:
            drawn.add_column(Text(column))
        for row in cells:
            drawn.add_row(*[Text(cell) for cell in row])
        Console().print(drawn)
        return
    widths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(names)]
    lines = [printable(title), *("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [names, *cells])]
    _stream("\n".join(lines), to_stderr=False)


Advance = Callable[..., None]


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show a progress bar with remaining time on a terminal; elsewhere print a line about every ten seconds.

    Yields advance(steps=1, note=""), to be called as work is done.
    """
    if settings.quiet or not settings.progress:
        yield lambda steps=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(description, total)
    else:
        yield from _lines(description, total)


def _bar(description: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(description), total=total, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=printable(note))


def _lines(description: str, total: int) -> Iterator[Advance]:
    started = shown = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += steps
        now = time.monotonic()
        if now - shown >= 10 or done == total:
            shown = now
            left = (now - started) / max(done, 1) * (total - done)
            say(f"{description}: {done}/{total}, {now - started:.0f} s, about {left:.0f} s left{'; ' + note if note else ''}")

    yield advance
