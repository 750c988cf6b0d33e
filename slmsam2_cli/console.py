"""The only place that prints. Rich on a terminal; plain lines without control characters elsewhere.

Results go to stdout, everything about the run (progress, warnings, errors) to stderr.
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
    """How talkative the console is; set once by the command line."""

    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    debug: bool = False


settings = Settings()


def printable(text: str) -> str:
    """The text with control characters escaped, so that a file name cannot forge a line or steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _stream(text: str, to_stderr: bool) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def result(text: str) -> None:
    """What was asked for, on stdout."""
    _stream(text, to_stderr=False)


def say(line: str) -> None:
    """One line about the run."""
    if not settings.quiet:
        _stream(printable(line), to_stderr=True)


def detail(line: str) -> None:
    """One line that only --verbose shows."""
    if settings.verbose:
        _stream(printable(line), to_stderr=True)


def warn(line: str) -> None:
    """One warning line; shown even when quiet."""
    _stream(printable(f"warning: {line}"), to_stderr=True)


def error(line: str) -> None:
    """One error line; shown even when quiet."""
    _stream(printable(f"error: {line}"), to_stderr=True)


def trace(problem: BaseException) -> None:
    """Where an error that the run survives came from; only --debug shows it."""
    if settings.debug:
        for line in "".join(traceback.format_exception(problem)).splitlines():
            _stream(printable(line), to_stderr=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: rich on a terminal, aligned plain text elsewhere."""
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
    """A progress bar with time left on a terminal; elsewhere a plain line about every ten seconds.

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
