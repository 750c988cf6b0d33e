"""What a command's end is called: exceptions and signals become exit codes, here alone.

0 done, 1 some cases failed and the others are done, 2 nothing done, 130 and 143 ended by SIGINT and SIGTERM, 141 nobody reads the output.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from slmsam2_cli import console
from slmsam2_cli.device import is_out_of_memory
from slmsam2_cli.errors import NOTHING_DONE, DatasetError, SlmSam2Error

INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived; not an error, so nothing that handles errors holds it up."""


def terminate(signal_number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the way out is not interrupted again
    raise Terminated


def run_for_exit_code(work: Callable[[], int], debug: bool = False) -> int:
    """What the work returns, or the exit code of what stopped it, after saying so in one line (and one for each bad case)."""
    try:
        return work()
    except KeyboardInterrupt:
        console.error("interrupted. What is finished is kept; run the same command again to go on, finetune and pretrain with --continue")
        return INTERRUPTED
    except Terminated:
        console.error("terminated. What is finished is kept; run the same command again to go on, finetune and pretrain with --continue")
        return TERMINATED
    except BrokenPipeError:
        _redirect_to_devnull()
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 the last place where an exception can become a line
        if debug:
            for line in traceback.format_exc().splitlines():
                console.say(line)
        for line in _lines(error):
            console.error(line)
        return error.exit_code if isinstance(error, SlmSam2Error) else NOTHING_DONE


def _lines(error: Exception) -> list[str]:
    """What to tell a person about an exception."""
    if isinstance(error, DatasetError):
        return [*(str(problem) for problem in error.problems), str(error)]
    if isinstance(error, SlmSam2Error):
        return [str(error)]
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if is_out_of_memory(error):
        return ["out of memory. Close other programs, try --device cpu, or plan a smaller network (slmsam2 plan --network nano)"]
    return [f"unexpected {text}. Run again with --debug for the traceback"]


def _redirect_to_devnull() -> None:
    """Whoever read our output has left; what is still buffered goes nowhere instead of failing when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
