"""A run that is asked to stop finishes its step and saves what it has."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from slmsam2_cli import console
from slmsam2_cli.data.store import ArrayError
from slmsam2_cli.errors import OutputError


class Continuable(OutputError):
    """A file could not be written, or was cut short while it was read, but the run can go on."""


@contextmanager
def continuable(command: str) -> Iterator[None]:
    """Say of what cannot be written or read inside how to go on."""
    try:
        yield
    except OutputError as error:
        raise Continuable(f"{error}. Mend that, and go on with {command} --continue") from error
    except ArrayError as error:
        raise Continuable(f"{error}. Go on with {command} --continue, which makes it anew") from error


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that answers True; raise it when the block is done.

    A signal that was ignored before (nohup, a job in the background) stays ignored.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            signal.signal(number, before[signal.Signals(number)])
        caught.append(number)
        console.say("stopping after this step …")

    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(signal.Signals(caught[0]))
