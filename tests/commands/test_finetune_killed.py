"""A run that is killed five times at random moments ends with the weights of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small_runs import beside, small_workspace, write_organs

from slmsam2_cli.commands import finetune as stage
from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.training import label_unet

KILLS, STEPS = 5, 16
# Runs the console script once per line: the seconds between saves, and the arguments. In forks, so that the slow imports are done once.
STARTER = """
import json, os, sys
import matplotlib.pyplot, torch._dynamo
import slmsam2_cli.commands.finetune as stage
from slmsam2_cli.cli.app import main
from slmsam2_cli.training import label_unet
label_unet.LABEL_UNET_WIDTH = int(sys.argv[1])
print("ready", flush=True)
for line in iter(sys.stdin.readline, ""):
    process = os.fork()
    if not process:
        stage.SAVE_EVERY_S, *sys.argv = json.loads(line)
        main()
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Starter:
    """Starts one run at a time, and tells how it ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert self._answer() == "ready"

    def start(self, *arguments: str, save_every_s: float) -> int:
        """The process id of a new run."""
        self.process.stdin.write(json.dumps([save_every_s, "slmsam2", *arguments]) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Wait until the run has ended; its exit code, or minus the signal that killed it."""
        return int(self._answer())

    def _answer(self) -> str:
        return self.process.stdout.readline().strip()


@contextmanager
def starter(errors: Path) -> Iterator[Starter]:
    """Runs write their messages into the file `errors`."""
    with errors.open("w") as messages:
        command = [sys.executable, "-c", STARTER, str(label_unet.LABEL_UNET_WIDTH)]  # other widths have other weights
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True) as process:
            yield Starter(process)
            process.stdin.close()


def options(data, workspace, *more):
    names = ["-d", str(data), "-w", str(workspace.root), "-n", "2", "--weights", "random", "--steps", str(STEPS)]
    return ["finetune", *names, "--device", "cpu", "--quiet", *more]


def is_running(run: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(run, 0)
        return True
    return False


def wait_for_a_save(state, run):
    before = state.stat().st_mtime_ns if state.exists() else 0
    for _ in range(1200):
        if (state.exists() and state.stat().st_mtime_ns != before) or not is_running(run):
            return
        time.sleep(0.05)
    raise AssertionError("nothing was saved within a minute")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_five_times_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    data, errors = write_organs(tmp_path / "data", cases=2), tmp_path / "errors.txt"
    without_interrupts = small_workspace(tmp_path / "uninterrupted", data)
    killed = beside(without_interrupts, tmp_path / "killed")  # prepares the cases itself
    assert finetune(data, without_interrupts, cases=2, weights="random", steps=STEPS, device="cpu") == 0
    moments, state = random.Random(0), killed.finetuned / "state.safetensors"
    with starter(errors) as runs:
        for kill in range(KILLS):
            started = state.exists() or killed.split.exists()
            run = runs.start(*options(data, killed, *(["--continue"] if started else [])), save_every_s=0.0)
            if kill % 2:  # at any moment of a run that trains
                wait_for_a_save(state, run)
            time.sleep(moments.uniform(0.0, 1.0))
            with suppress(ProcessLookupError):
                os.kill(run, signal.SIGKILL)
            assert runs.wait() == -signal.SIGKILL, errors.read_text()
        log = (killed.finetuned / "log.csv").read_text().splitlines()
        assert 1 < len(log) < STEPS + 1, "killed too early to save anything, or too late"
        runs.start(*options(data, killed, "--continue"), save_every_s=stage.SAVE_EVERY_S)
        assert runs.wait() == 0, errors.read_text()
    assert read_checkpoint(killed.model).digest == read_checkpoint(without_interrupts.model).digest
    assert not list(killed.finetuned.glob("state*")) and len((killed.finetuned / "log.csv").read_text().splitlines()) == STEPS + 1
