"""What every test may rely on: a console as the program starts with it, and no verdict that depends on how busy the machine is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from hypothesis import settings

from slmsam2_cli import console

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several at a time: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def console_as_it_was() -> Iterator[None]:
    """Options such as --quiet set the console for the whole process; no test leaves them behind."""
    before = asdict(console.settings)
    yield
    for name, value in before.items():
        setattr(console.settings, name, value)
