"""A prepared volume that is cut short under a run that reads it costs a line, and nothing of what was learned."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from slmsam2_cli.data.phantom import write_phantom_dataset
from slmsam2_cli.model.checkpoint import read_checkpoint
from slmsam2_cli.stages.finetune import finetune
from slmsam2_cli.workspace import Workspace

STEPS = 16
COMMAND = "import slmsam2_cli.stages.finetune as stage; stage.SAVE_EVERY_S = 0.0; from slmsam2_cli.cli import main; main()"


def options(data, workspace, *more):
    names = ["-d", str(data), "-w", str(workspace.root), "-n", "2", "--weights", "random", "--steps", str(STEPS)]
    return [sys.executable, "-c", COMMAND, "finetune", *names, "--device", "cpu", "--quiet", *more]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be cut short there")
def test_the_run_ends_in_one_line_and_goes_on_to_the_same_weights(tmp_path):
    data = tmp_path / "data"
    write_phantom_dataset(data, cases=2, test_cases=0, seed=3, shape=(8, 32, 32))
    undisturbed, cut = Workspace(tmp_path / "undisturbed"), Workspace(tmp_path / "cut")
    assert finetune(data, undisturbed, cases=2, weights="random", steps=STEPS, device="cpu") == 0
    process = subprocess.Popen(options(data, cut), stderr=subprocess.PIPE, text=True)
    log = cut.finetuned / "log.csv"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.02)
    for path in cut.root.rglob("frames.npy"):
        os.truncate(path, 200)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2, said
    *warned, last = said.splitlines()
    assert all(line.startswith("warning: --weights random") for line in warned)
    assert last.startswith("error: step ") and "frames.npy was cut short" in last and "--continue" in last
    again = subprocess.run(options(data, cut, "--continue"), stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert read_checkpoint(cut.model).digest == read_checkpoint(undisturbed.model).digest
