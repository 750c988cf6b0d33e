"""Cases parallel_map over processes: none is lost, whatever becomes of the process that holds it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from slmsam2_cli import parallel
from slmsam2_cli.errors import CaseError
from slmsam2_cli.parallel import MemoryLimit, fork_map, parallel_map

SLEEPING = (
    "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored where the tests run in the background
    "from slmsam2_cli.parallel import parallel_map; parallel_map(time.sleep, {'a': 60, 'b': 60}, 2)"
)


def shell(folder, *scripts):
    """Cases a, b, c, ... : shell scripts run in a folder by the process that holds the case, and its id is $PPID."""
    return {chr(97 + place): ["sh", "-c", f"cd '{folder}'; {script}"] for place, script in enumerate(scripts)}


def processes_of(group):
    """How many processes of a group there are; zombies do not count."""
    listed = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True, check=True).stdout.split("\n")[1:]
    return sum(line.split()[0] == str(group) and line.split()[1][0] != "Z" for line in listed if line)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_come_in_the_order_of_the_cases(count):
    told = []
    assert parallel_map(str.upper, {"c": "x", "a": "y", "b": "z"}, count, advance=lambda steps, case: told.append(case)) == ["X", "Y", "Z"]
    assert sorted(told) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_process_is_reported_with_its_case_and_the_others_go_on(count):
    first, killed, last = parallel_map(signal.raise_signal, {"first": 0, "killed": signal.SIGKILL, "last": 0}, count)
    assert (first, last) == (None, None)
    assert isinstance(killed, CaseError)
    assert str(killed).startswith("case killed: the worker process was killed")


def test_a_case_whose_process_died_beside_others_is_tried_once_more_alone(tmp_path):
    dies_once = "if mkdir died; then kill -9 $PPID; else test ! -e busy; fi"
    beside = "mkdir busy; while ! test -e died; do sleep 0.02; done; sleep 0.3; rmdir busy"
    assert parallel_map(subprocess.call, shell(tmp_path, beside, dies_once), 2) == [0, 0]
    assert (tmp_path / "died").exists()


def test_cases_whose_processes_die_together_are_each_tried_once_more(tmp_path):
    meet = "test -e {0} && exit 0; touch {0}; while ! test -e {1}; do sleep 0.02; done; kill -9 $PPID"
    assert parallel_map(subprocess.call, shell(tmp_path, meet.format("one", "two"), meet.format("two", "one")), 2) == [0, 0]


def test_cases_too_large_to_run_together_run_one_after_the_other(tmp_path):
    one = "mkdir busy || exit 1; sleep 0.1; rmdir busy"
    assert parallel_map(subprocess.call, shell(tmp_path, one, one, one), 3, limit=MemoryLimit(lambda job: 6, 10)) == [0, 0, 0]


def test_cases_that_fit_together_run_together(tmp_path):
    meet = "touch {}; for i in $(seq 500); do test -e {} && exit 0; sleep 0.02; done; exit 1"
    jobs = shell(tmp_path, meet.format("one", "two"), meet.format("two", "one"))
    assert parallel_map(subprocess.call, jobs, 2, limit=MemoryLimit(lambda job: 5, 10)) == [0, 0]


def test_a_case_larger_than_all_memory_is_tried_alone(tmp_path):
    one = "mkdir busy || exit 1; sleep 0.1; rmdir busy"
    assert parallel_map(subprocess.call, shell(tmp_path, one, one), 2, limit=MemoryLimit(lambda job: 11, 10)) == [0, 0]


def test_without_worker_processes_this_process_runs_all_jobs(monkeypatch):
    monkeypatch.setattr(parallel, "START_METHOD", "a method that no system has")
    assert parallel_map(str.upper, {"a": "x", "b": "y"}, 2) == ["X", "Y"]


def test_an_unexpected_error_in_a_process_is_raised_here():
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        parallel_map(int, {"a": "1", "b": "one"}, 2)


def begun(script):
    """A Python in a process group of its own, when its two workers sleep."""
    program = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(200):
        if processes_of(program.pid) >= 5:  # it, the tracker of resources, the server and two workers
            break
        time.sleep(0.1)
    time.sleep(0.5)
    return program


def ends(group):
    """Whether all processes of a group end within five seconds."""
    for _ in range(50):
        if not processes_of(group):
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_ends_the_workers_quickly_and_without_output():
    program = begun(SLEEPING)
    os.killpg(program.pid, signal.SIGINT)
    said = program.communicate(timeout=10)[1]
    assert ends(program.pid)
    assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")


def test_workers_end_with_a_parent_that_is_killed():
    program = begun(SLEEPING)
    os.kill(program.pid, signal.SIGKILL)
    assert ends(program.pid)
    program.communicate(timeout=10)


def children_of_this_process():
    """The ids of the child processes of this one, but for the ps that lists them."""
    listed = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.split()[1] != "ps"]


def test_copies_of_this_process_share_jobs_and_report_their_steps():
    inputs, steps = np.arange(12).reshape(6, 2), []

    def work(row, advance):
        advance(2)
        return inputs[row].sum(), os.getpid()

    found = fork_map(work, range(6), 3, steps.append)
    assert [total for total, _ in found] == [1, 5, 9, 13, 17, 21]
    assert sum(steps) == 12 and os.getpid() not in {process for _, process in found}


def test_the_error_of_a_copy_is_raised_here_and_the_others_are_ended():
    def work(job, advance):
        if job == 1:
            raise ValueError("job 1")
        time.sleep(60)

    started, before = time.monotonic(), children_of_this_process()
    with pytest.raises(ValueError, match="job 1"):
        fork_map(work, range(3), 3, print)
    assert time.monotonic() - started < 30
    assert children_of_this_process() == before


def test_copies_send_more_tensors_than_a_process_may_open_files():
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, allowed[1]), allowed[1]))
    try:
        found = fork_map(lambda job, advance: [torch.full((2,), job + number) for number in range(1000)], range(2), 2, print)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert [sum(int(one[0]) for one in answer) for answer in found] == [499500, 500500]


def test_where_no_process_can_be_copied_the_jobs_run_here_and_signals_arrive_as_before(monkeypatch):
    def refuse():
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert fork_map(lambda job, advance: (job, os.getpid()), range(3), 2, print) == [(job, os.getpid()) for job in range(3)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_preparing_workers_is_no_error_on_a_system_without_their_start_method(monkeypatch):
    monkeypatch.setattr(parallel, "START_METHOD", "a method that no system has")
    parallel.prepare(["json"])


def test_an_error_that_cannot_be_sent_is_raised_as_text():
    def work(job, advance):
        raise type("Local", (Exception,), {})("of this function")

    with pytest.raises(RuntimeError, match="Local: of this function"):
        fork_map(work, range(2), 2, print)


def test_a_killed_copy_means_that_memory_ran_out():
    def work(job, advance):
        if job == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    with pytest.raises(MemoryError, match="killed"):
        fork_map(work, range(3), 2, print)
