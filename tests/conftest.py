"""What every test may rely on: a console as the program starts with it, and no verdict that depends on how busy the machine is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache

import pytest
from hypothesis import settings

from slmsam2_cli import console, parallel

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several at a time: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Runs save their state all the time and wait until it is on the disk: in memory, if there is enough, this takes no time.
MEMORY_DISK, ROOM = "/dev/shm", 10 << 30
with suppress(OSError):
    if shutil.disk_usage(MEMORY_DISK).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY_DISK)

# Files that take longest: their tests are started first, so that all workers end at about the same time.
SLOW_FIRST = (
    "test_finetune_side_by_side.py",
    "test_predict_workers.py",
    "test_finetune.py",
    "test_finetune_validated.py",
    "test_predict.py",
    "test_parity.py",
    "test_distributed.py",
    "test_finetune_killed.py",
    "test_predict_together.py",
    "test_trainer.py",
    "test_pretrain.py",
    "test_smoke.py",
    "test_background.py",
    "test_finetune_cut_short.py",
    "test_pipeline.py",
    "test_monitoring.py",
    "test_slmsam2.py",
    "test_browser.py",
    "test_convert.py",
    "test_dataloader.py",
    "test_real_volumes.py",
    "test_app.py",
)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of slow files to the start; Makefile says that workers take files in this order."""
    place = {name: number for number, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True, scope="session")
def speed_measured_once() -> Iterator[None]:
    """Every plan measures the speed of the machine, which takes seconds and does not change."""
    from slmsam2_cli.model import speed  # torch takes seconds to load, too

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "seconds_per_slice", lru_cache(speed.seconds_per_slice))
        yield


NARROW = 16  # channels of a label U-Net at full resolution, half of the usual


@pytest.fixture(autouse=True, scope="session")
def narrow_label_unets() -> Iterator[None]:
    """A label U-Net that is trained in this process is narrow: a step of it takes a third of the time, and no test is about its width."""
    from slmsam2_cli.training import label_unet

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(label_unet, "LABEL_UNET_WIDTH", NARROW)
        yield


@pytest.fixture(autouse=True, scope="session")
def modules_imported_once() -> None:
    """Worker processes of all tests are forked from a process that has imported what any of them needs."""
    parallel.prepare(("slmsam2_cli.commands.finetune", "slmsam2_cli.commands.predict", *parallel.SCORING_MODULES))


@pytest.fixture(autouse=True)
def console_as_it_was() -> Iterator[None]:
    """Options such as --quiet set the console for the whole process; no test leaves them behind."""
    before = asdict(console.settings)
    yield
    for name, value in before.items():
        setattr(console.settings, name, value)
