"""The processes that score, where little may be relied on: the working directory, Ctrl-C, the place for temporary files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

_MADE = """
from slmsam2_cli import parallel
parallel.prepare(["colorsys", "loads"])
pool = parallel.pool(1)
print(pool and pool.submit(int, "7").result())
"""


def made(folder, **environment):
    """(what a process of the pool answers, what was said) in a program that runs in a folder."""
    done = subprocess.run([sys.executable, "-c", _MADE], cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


def test_processes_end_with_a_command_that_is_killed(tmp_path):
    killed = _MADE + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, stdout=subprocess.PIPE, timeout=20)  # until all have closed it
    assert done.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python looks there first")
def test_a_file_of_the_working_directory_is_not_taken_for_a_module(tmp_path):
    (tmp_path / "colorsys.py").write_text("raise SystemExit('imported from the working directory')")
    assert made(tmp_path) == ("7", "")


def test_an_interrupt_while_workers_load_modules_is_handled_by_the_command(tmp_path):
    (tmp_path / "loads.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    assert made(tmp_path, PYTHONPATH=str(tmp_path)) == ("7", "")


def test_without_a_folder_for_its_socket_there_is_no_pool(tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    assert made(tmp_path, TMPDIR=str(deep)) == ("None", "")
