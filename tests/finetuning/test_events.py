"""What TensorBoard is told: every number of every step, once; nothing where it is not installed."""

import pytest

from slmsam2_cli.finetuning import events as module
from slmsam2_cli.finetuning.events import events


def rows(steps):
    return [{"step": step, "seconds": 1.0, "total": 1.0 / step, "learning_rate": 1e-4} for step in steps]


def told(folder, from_step, steps):
    with events(folder, from_step) as record:
        for row in rows(steps):
            record(row)


def test_every_number_of_every_step_is_there_and_a_resumed_run_replaces_what_came_after(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    told(tmp_path, 0, [1, 2, 3])
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


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    told(tmp_path / "folder", 0, [1])
    assert not (tmp_path / "folder").exists()
