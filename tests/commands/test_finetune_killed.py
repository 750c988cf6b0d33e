"""A run that is killed five times at random moments ends with the weights of an uninterrupted one."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.workspace import Workspace

KILLS, STEPS = 5, 16
# As the console script, but saving after every step.
COMMAND = "import slmsam2_cli.commands.finetune as stage; stage.SAVE_EVERY_S = 0.0; from slmsam2_cli.cli.app import main; main()"


def options(data, workspace, *more):
    names = ["-d", str(data), "-w", str(workspace.root), "-n", "2", "--weights", "random", "--steps", str(STEPS)]
    return [sys.executable, "-c", COMMAND, "finetune", *names, "--device", "cpu", "--quiet", *more]


def wait_for_a_save(state, process):
    before = state.stat().st_mtime_ns if state.exists() else 0
    for _ in range(1200):
        if (state.exists() and state.stat().st_mtime_ns != before) or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("nothing was saved within a minute")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_run_killed_five_times_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    data = tmp_path / "data"
    write_phantom_dataset(data, cases=2, test_cases=0, seed=3, shape=(8, 32, 32))
    without_interrupts, killed = Workspace(tmp_path / "uninterrupted"), Workspace(tmp_path / "killed")
    assert finetune(data, without_interrupts, cases=2, weights="random", steps=STEPS, device="cpu") == 0
    moments, state = random.Random(0), killed.finetuned / "state.safetensors"
    for kill in range(KILLS):
        started = state.exists() or killed.split.exists()
        process = subprocess.Popen(options(data, killed, *(["--continue"] if started else [])), stderr=subprocess.PIPE, text=True)
        if kill % 2:  # at any moment of a run that trains
            wait_for_a_save(state, process)
        time.sleep(moments.uniform(0.0, 3.0))
        process.kill()
        errors = process.communicate()[1]
        assert process.returncode in (-9, 0), errors
    log = (killed.finetuned / "log.csv").read_text().splitlines()
    assert 1 < len(log) < STEPS + 1, "killed too early to save anything, or too late"
    last = subprocess.run(options(data, killed, "--continue"), stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stderr
    assert read_checkpoint(killed.model).digest == read_checkpoint(without_interrupts.model).digest
    assert not list(killed.finetuned.glob("state*")) and len((killed.finetuned / "log.csv").read_text().splitlines()) == STEPS + 1
