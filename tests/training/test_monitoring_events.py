"""What TensorBoard is told: every number of every step, once; nothing where it is not installed."""

import subprocess
import sys
import time

import pytest

from slmsam2_cli.training import monitoring as module
from slmsam2_cli.training.monitoring import events


def rows(steps):
    return [{"step": step, "seconds": 1.0, "total": 1.0 / step, "learning_rate": 1e-4} for step in steps]


def told(folder, from_step, steps):
    with events(folder, from_step) as record:
        for row in rows(steps):
            record(row)


def test_every_number_of_every_step_is_there_and_a_resumed_run_replaces_what_came_after(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    told(tmp_path, 0, [1, 2, 3])
    time.sleep(1.1)  # files are read in the order of the seconds in their names
    told(tmp_path, 2, [3, 4])
    found = accumulators.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"train/total", "train/learning_rate"}
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("train/total")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.25),
    ]


FAILING = """
import errno, sys, time
from pathlib import Path
from tensorboard.compat.tensorflow_stub.io import gfile
from slmsam2_cli.training.monitoring import events

written, write = [], gfile.LocalFileSystem._write

def until_the_disk_is_full(self, *rest):
    if len(written) >= int(sys.argv[2]):
        raise OSError(errno.ENOSPC, "No space left on device")
    written.append(None)
    return write(self, *rest)

gfile.LocalFileSystem._write = until_the_disk_is_full
with events(Path(sys.argv[1]), 0) as record:
    for step in range(1, 40):
        record({"step": step, "total": 1.0})
        time.sleep(0.01)  # it writes in a thread of its own
"""


@pytest.mark.parametrize("after", [0, 3])
def test_where_its_files_cannot_be_written_one_warning_says_so_and_the_run_goes_on(tmp_path, after):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path), str(after)], capture_output=True, text=True, check=True)
    assert run.stderr.count("TensorBoard is told no more: no space left") == 1 and "log.csv" in run.stderr
    assert "Traceback" not in run.stderr


def test_where_its_folder_cannot_be_made_the_run_goes_on_too(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tmp_path / "taken").write_text("a file")
    told(tmp_path / "taken", 0, [1, 2])
    assert capsys.readouterr().err.count("TensorBoard is told no more") == 1


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    told(tmp_path / "folder", 0, [1])
    assert not (tmp_path / "folder").exists()
