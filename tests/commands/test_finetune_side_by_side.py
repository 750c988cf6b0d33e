"""Folds in worker processes: the same bytes as one after another, and what happens when a process is killed or the user stops the run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import beside, small, write_organs

from slmsam2_cli.commands.finetune import finetune
from slmsam2_cli.commands.plan import plan
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.planning.plan import read_plan, write_plan
from slmsam2_cli.training import background, cross_validation
from slmsam2_cli.workspace import Workspace

STEPS = 20  # also of a fold, for which it is the least that counts
# As the console script, on two cores, but with folds as long as the run, and saving every second.
COMMAND = (
    "import slmsam2_cli.commands.finetune as stage; stage.SAVE_EVERY_S = 1.0; "
    "from slmsam2_cli.training import background, cross_validation as folds; folds.FOLD_FRACTION = 1.0; "
    "background.available_cpus = lambda: 2; "
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored where the tests run in the background
    "from slmsam2_cli.cli.app import main; main()"
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_organs(tmp_path_factory.mktemp("organs"), cases=2)


@pytest.fixture(scope="module")
def one_after_another(data, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("one_core"))
    plan(data, workspace, report=False)  # with a fingerprint, from which the memory of a fold is estimated
    write_plan(workspace.plan, small(read_plan(workspace.plan), label_unet=False))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(background, "available_cpus", lambda: 1)
        patched.setattr(cross_validation, "FOLD_FRACTION", 1.0)
        assert finetune(data, workspace, cases=2, steps=STEPS, device="cpu") == 0
    return workspace


def start(data, workspace, *more):
    """Start the command in a session of its own."""
    names = ["-d", str(data), "-w", str(workspace.root), "-n", "2", "--steps", str(STEPS), "--device", "cpu"]
    command = [sys.executable, "-c", COMMAND, "finetune", *names, *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def session_of(program, part=""):
    """Process ids of a program's session that have not ended, with this part in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == program.pid and fields[0] != "Z" and part in (folder / "cmdline").read_bytes().decode():
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


def wait_until(is_true, program, seconds=300):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert program.poll() is None, program.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def both_train(workspace):
    return lambda: all((workspace.finetuned / f"fold_{number}.previous.safetensors").exists() for number in (1, 2))


def saved_again(workspace):
    """Whether the state of the second fold was saved after this call."""
    state = workspace.finetuned / "fold_2.safetensors"
    before = state.stat().st_mtime_ns
    return lambda: state.exists() and state.stat().st_mtime_ns != before


def assert_same(workspace, expected):
    digests = [read_checkpoint(one.model).digest for one in (workspace, expected)]
    records = [(one.finetuned / "validation.json").read_bytes() for one in (workspace, expected)]
    pictures = [{path.name: path.read_bytes() for path in one.finetuned.glob("held_out_*.png")} for one in (workspace, expected)]
    assert digests[0] == digests[1] and records[0] == records[1] and pictures[0] == pictures[1] and len(pictures[0]) == 2
    assert read_checkpoint(workspace.model).calibration == read_checkpoint(expected.model).calibration
    assert not list(workspace.finetuned.glob("fold*")) and not list(workspace.finetuned.glob("state*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_folds_side_by_side_give_the_bytes_of_one_after_another_though_interrupted_and_killed(data, tmp_path, one_after_another):
    workspace = beside(one_after_another, tmp_path)
    program = start(data, workspace)
    wait_until(both_train(workspace), program)
    os.killpg(program.pid, signal.SIGINT)  # as Ctrl-C does
    said = program.communicate(timeout=120)[1]
    assert "stopped during cross-validation. Resume with slmsam2 finetune --continue" in said and "Traceback" not in said
    assert program.returncode == 128 + signal.SIGINT
    assert json.loads((workspace.finetuned / "validation.json").read_text())["done"] == []

    program = start(data, workspace, "--quiet", "--continue")
    wait_until(saved_again(workspace), program)
    os.kill(max(session_of(program, "forkserver")), signal.SIGKILL)  # of the server and two workers the last one that was started
    said = program.communicate(timeout=120)[1]
    assert program.returncode == 2 and "Traceback" not in said
    assert re.search(r"error: cross-validation [12]/2, held out phantom_00\d: its process was killed.*slmsam2 finetune --continue", said)

    program = start(data, workspace, "--quiet", "--continue")
    wait_until(saved_again(workspace), program)
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 20
    while session_of(program):
        assert time.monotonic() < deadline, session_of(program)
        time.sleep(0.05)

    program = start(data, workspace, "--continue")
    said = program.communicate(timeout=500)[1]
    assert program.returncode == 0, said
    assert_same(workspace, one_after_another)
    assert re.search(r"cross-validation: \d+/2000, .*cross-validation 1/2, held out phantom_00\d: Dice", said), said
