"""Monitoring: the log as CSV and JSON Lines, TensorBoard, and the plot of a log."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slmsam2_cli.training import monitoring
from slmsam2_cli.training.monitoring import COLUMNS, WINDOW, Log, draw_progress, running_mean, tensorboard_log

NAN = float("nan")

# Log


def test_every_row_is_a_line_of_csv_and_a_json_object(tmp_path):
    log = Log(tmp_path / "log.csv", from_step=0, columns=("step", "total", "prompt"))
    log.add({"step": 1, "total": 0.25})
    log.add({"step": 2, "total": NAN})
    log.write()
    assert (tmp_path / "log.csv").read_text() == "step,total,prompt\n1,0.25,\n2,nan,\n"
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "total": 0.25}, {"step": 2, "total": None}]


def test_a_resumed_run_keeps_the_rows_up_to_its_step(tmp_path):
    log = Log(tmp_path / "log.csv", from_step=0, columns=("step", "total"))
    for step in (1, 2, 3):
        log.add({"step": step, "total": step / 4})
    log.write()
    again = Log(tmp_path / "log.csv", from_step=2, columns=("step", "total"))
    assert again.rows == [["1", "0.25"], ["2", "0.5"]]


def test_the_recent_loss_is_the_mean_of_the_finite_ones():
    log = Log(Path("log.csv"), from_step=0)
    assert np.isnan(log.recent_loss())
    for total in (1.0, NAN, 3.0):
        log.add({"step": 1, "total": total})
    assert log.recent_loss() == 2.0


# Plot


def plotted(path, rows, title="spleen"):
    """The bytes of the plot of a log with these rows."""
    log = Log(path / "log.csv", from_step=0)
    for row in rows:
        log.add(row)
    draw_progress(path / "progress.png", log, title)
    return (path / "progress.png").read_bytes()


def rows_of(steps, first=1.0, last=2.0):
    return [{name: float(value) for name in COLUMNS} | {"step": n} for n, value in enumerate(np.linspace(first, last, steps), start=1)]


def test_a_running_mean_averages_the_values_before_it():
    steps = np.arange(100.0)
    means = running_mean(steps)
    assert means[0] == 0 and means[1] == 0.5 and means[4] == 2
    assert means[99] == np.mean(steps[-WINDOW:])


def test_values_that_are_not_finite_are_not_in_the_running_mean():
    assert running_mean(np.array([1.0, NAN, 3.0])).tolist() == [1.0, 1.0, 2.0]
    assert np.isnan(running_mean(np.array([NAN, NAN]))).all()


def test_the_same_values_give_the_same_picture_and_other_losses_another(tmp_path):
    first = plotted(tmp_path, rows_of(40))
    assert first == plotted(tmp_path, rows_of(40)) != plotted(tmp_path, rows_of(40, 2.0, 1.0))


def test_a_single_step_with_missing_values_is_drawn(tmp_path):
    plotted(tmp_path, [{"step": 1, "seconds": 0.5, "learning_rate": 1e-4}])
    with Image.open(tmp_path / "progress.png") as picture:
        assert picture.format == "PNG" and picture.size == (900, 900)


def test_a_dataset_may_have_any_name(tmp_path, recwarn):
    for title in ("price $5_^$", "海馬", "<b>\\frac{"):
        assert plotted(tmp_path, rows_of(3), title).startswith(b"\x89PNG")
    assert not recwarn.list


# TensorBoard


def record(folder, from_step, steps):
    with tensorboard_log(folder, from_step) as add:
        for step in steps:
            add({"step": step, "seconds": 1.0, "total": 1.0 / step, "learning_rate": 1e-4})


def test_every_number_of_every_step_is_recorded_and_a_resumed_run_replaces_later_steps(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    record(tmp_path, 0, [1, 2, 3])
    time.sleep(1.1)  # files are read in the order of the seconds in their names
    record(tmp_path, 2, [3, 4])
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
from slmsam2_cli.training.monitoring import tensorboard_log

written, write = [], gfile.LocalFileSystem._write

def until_the_disk_is_full(self, *rest):
    if len(written) >= int(sys.argv[2]):
        raise OSError(errno.ENOSPC, "No space left on device")
    written.append(None)
    return write(self, *rest)

gfile.LocalFileSystem._write = until_the_disk_is_full
with tensorboard_log(Path(sys.argv[1]), 0) as record:
    for step in range(1, 40):
        record({"step": step, "total": 1.0})
        time.sleep(0.01)  # TensorBoard writes in its own thread
"""


@pytest.mark.parametrize("after", [0, 3])
def test_where_its_files_cannot_be_written_there_is_one_warning_and_the_run_continues(tmp_path, after):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    run = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path), str(after)], capture_output=True, text=True, check=True)
    assert run.stderr.count("TensorBoard logging disabled: no space left") == 1 and "log.csv" in run.stderr
    assert "Traceback" not in run.stderr


def test_where_its_folder_cannot_be_created_the_run_continues_too(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tmp_path / "taken").write_text("a file")
    record(tmp_path / "taken", 0, [1, 2])
    assert capsys.readouterr().err.count("TensorBoard logging disabled") == 1


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "find_spec", lambda name: None)
    record(tmp_path / "folder", 0, [1])
    assert not (tmp_path / "folder").exists()
