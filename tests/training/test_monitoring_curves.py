"""The picture of a run."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from slmsam2_cli.training.monitoring import COLUMNS, SMOOTHED, draw_progress, picture, smoothed

NAN = float("nan")


def values(steps: int) -> dict[str, np.ndarray]:
    return {name: np.linspace(1.0, 2.0, steps) for name in COLUMNS} | {"step": np.arange(1.0, steps + 1)}


def test_a_running_mean_starts_with_what_there_is_and_then_looks_back_so_many_steps():
    steps = np.arange(100.0)
    means = smoothed(steps)
    assert means[0] == 0 and means[1] == 0.5 and means[4] == 2
    assert means[99] == np.mean(steps[-SMOOTHED:])


def test_steps_without_a_finite_loss_are_left_out_of_the_mean():
    assert smoothed(np.array([1.0, NAN, 3.0])).tolist() == [1.0, 1.0, 2.0]
    assert np.isnan(smoothed(np.array([NAN, NAN]))).all()


def test_the_picture_is_a_png_and_the_same_for_the_same_values():
    first, again = picture(values(40), "spleen"), picture(values(40), "spleen")
    assert Image.open(BytesIO(first)).format == "PNG" and first == again


def test_another_loss_makes_another_picture():
    other = values(40) | {"total": np.linspace(2.0, 1.0, 40)}
    assert picture(values(40), "spleen") != picture(other, "spleen")


def test_a_single_step_and_missing_values_are_drawn_too(tmp_path):
    row = ["1", "0.5", "1e-4", *[""] * (len(COLUMNS) - 3)]
    draw_progress(tmp_path / "progress.png", COLUMNS, [row], "spleen")
    assert Image.open(tmp_path / "progress.png").size[0] > 400


def test_a_data_set_may_have_any_name(recwarn):
    for title in ("price $5_^$", "海馬", "<b>\\frac{"):
        assert picture(values(3), title).startswith(b"\x89PNG")
    assert not recwarn.list
