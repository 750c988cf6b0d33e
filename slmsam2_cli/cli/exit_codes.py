"""Turn exceptions and signals into error lines and exit codes; no other module does.

0: done. 1: some cases failed, the others are done. 2: nothing done. 130: interrupted (SIGINT). 143: terminated (SIGTERM). 141: output
pipe closed.
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
    """Raised on SIGTERM. Not an Exception, so that no handler of errors catches it."""


def terminate(signal_number: int, frame: object) -> NoReturn:
    """Handle SIGTERM: ignore further ones while the command ends. Raises: Terminated always."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def run_for_exit_code(work: Callable[[], int], debug: bool = False) -> int:
    """Run `work` and return its exit code; print an exception as one error line (plus one line per invalid case) and return its code."""
    try:
        return work()
    except KeyboardInterrupt:
        console.error("interrupted; finished results are kept. Run the same command again to resume (finetune, pretrain: add --continue)")
        return INTERRUPTED
    except Terminated:
        console.error("terminated; finished results are kept. Run the same command again to resume (finetune, pretrain: add --continue)")
        return TERMINATED
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)  # buffered output must not fail when Python ends
        for stream in (sys.stdout, sys.stderr):
            os.dup2(devnull, stream.fileno())
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 last handler: every exception becomes an error line
        if debug:
            for line in traceback.format_exc().splitlines():
                console.say(line)
        for line in _lines(error):
            console.error(line)
        return error.exit_code if isinstance(error, SlmSam2Error) else NOTHING_DONE


def _lines(error: Exception) -> list[str]:
    """Describe an exception in one line, a DatasetError in one more per invalid case."""
    if isinstance(error, DatasetError):
        return [*(str(problem) for problem in error.problems), str(error)]
    if isinstance(error, SlmSam2Error):
        return [str(error)]
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if is_out_of_memory(error):
        return ["out of memory. Close other programs, use --device cpu, or use a smaller network (slmsam2 plan --network nano)"]
    return [f"unexpected {text}. Run again with --debug for the traceback"]
