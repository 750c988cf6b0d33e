"""predict with several processes: the masks of one process, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from slmsam2_cli import parallel
from slmsam2_cli.commands import predict as stage
from slmsam2_cli.commands.predict import predict
from slmsam2_cli.dataset.dataset import read_dataset
from slmsam2_cli.dataset.phantom import write_phantom_dataset
from slmsam2_cli.errors import OutputError

COMMAND = [sys.executable, "-c", "from slmsam2_cli.cli.app import main; main()", "predict", "--no-report"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom_dataset(folder, cases=4, test_cases=0, seed=5, shape=(8, 40, 40))
    return folder


@pytest.fixture(scope="module")
def masks_of_one_process(phantoms, tmp_path_factory):
    masks = tmp_path_factory.mktemp("alone")
    assert run(phantoms, masks, workers=1) == 0
    return contents(masks)


def run(phantoms, masks, **options):
    return predict(phantoms / "imagesTr", masks, simulate_from=phantoms / "labelsTr", device="cpu", report=False, **options)


def contents(masks):
    return {path.name: path.read_bytes() for path in masks.glob("*.nii.gz")}


def temporary_files(masks):
    return [path.name for path in masks.rglob(".slmsam2-tmp-*")]


def started(phantoms, masks):
    line = [*COMMAND, "-i", phantoms / "imagesTr", "--simulate-prompts", phantoms / "labelsTr", "-o", masks, "--workers", "2"]
    return subprocess.Popen(line, start_new_session=True, stderr=subprocess.PIPE, text=True)


def processes_of(session):
    """Process id -> id of its parent, of the processes of a session that still run."""
    listed = subprocess.run(["ps", "-eo", "sid,pid,ppid,stat"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    return {int(pid): int(parent) for sid, pid, parent, state in map(str.split, listed) if int(sid) == session and state[0] != "Z"}


def wait_for_workers(process):
    """The ids of the processes that segment cases, as soon as there are any."""
    while process.poll() is None:
        found = processes_of(process.pid)
        if workers := [pid for pid, parent in found.items() if parent in found and parent != process.pid]:
            return workers
        time.sleep(0.05)
    pytest.fail(f"no worker was started: {process.stderr.read()}")


def test_masks_and_manifest_do_not_depend_on_the_number_of_workers(phantoms, masks_of_one_process, tmp_path, capsys):
    assert run(phantoms, tmp_path / "masks", workers=3) == 0
    assert contents(tmp_path / "masks") == masks_of_one_process
    manifest = json.loads((tmp_path / "masks" / "manifest.json").read_text())
    assert list(manifest["cases"]) == [name.removesuffix(".nii.gz") for name in sorted(masks_of_one_process)]
    assert "4 masks written, 0 already there, 0 cases failed" in capsys.readouterr().err


def test_a_case_that_fails_in_a_worker_is_named_and_the_others_are_segmented(phantoms, masks_of_one_process, tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    first, *others = sorted(masks_of_one_process)
    for name in others:
        os.symlink(phantoms / "labelsTr" / name, prompts / name)
    assert predict(phantoms / "imagesTr", tmp_path / "masks", simulate_from=prompts, device="cpu", report=False, workers=2) == 1
    assert f"error: case {first.removesuffix('.nii.gz')}: no annotated slice" in capsys.readouterr().err
    assert contents(tmp_path / "masks") == {name: masks_of_one_process[name] for name in others}


def test_a_worker_that_cannot_write_ends_the_run_in_one_line(phantoms, tmp_path):
    masks = tmp_path / "masks"
    run(phantoms, masks, workers=1)
    for path in masks.glob("*.nii.gz"):
        path.unlink()
        path.mkdir()  # nothing can be written under this name
    with pytest.raises(OutputError, match=r"phantom_00\d.nii.gz: could not be written"):
        run(phantoms, masks, workers=2)


def test_workers_wait_for_each_other_where_memory_does_not_suffice_for_all(phantoms, masks_of_one_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "free_bytes", lambda: 1 << 30)
    assert run(phantoms, tmp_path / "masks", workers=2) == 0
    assert "memory for 1 of 2 cases at a time: 0.8 GB are free" in capsys.readouterr().err
    assert contents(tmp_path / "masks") == masks_of_one_process


def test_a_killed_worker_costs_no_other_case_than_its_own(phantoms, masks_of_one_process, tmp_path):
    process = started(phantoms, tmp_path / "masks")
    os.kill(wait_for_workers(process)[0], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode in (0, 1), said
    missing = set(masks_of_one_process) - set(contents(tmp_path / "masks"))
    assert len(missing) == process.returncode and all(f"case {name.removesuffix('.nii.gz')}: the worker" in said for name in missing)
    assert run(phantoms, tmp_path / "masks", workers=1) == 0
    assert contents(tmp_path / "masks") == masks_of_one_process


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_process_and_continues(phantoms, masks_of_one_process, tmp_path, blow):
    process = started(phantoms, tmp_path / "masks")
    wait_for_workers(process)
    if blow == signal.SIGINT:
        os.killpg(process.pid, blow)  # as a terminal does
    else:
        process.kill()
    said = process.communicate()[1]
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(process.pid) == {} and "Traceback" not in said
    assert run(phantoms, tmp_path / "masks", workers=1) == 0
    assert contents(tmp_path / "masks") == masks_of_one_process and temporary_files(tmp_path / "masks") == []


def test_time_limits_of_control_groups_count_as_fewer_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "_CONTROL_GROUPS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    for quota, expected in (("-1", len(os.sched_getaffinity(0))), ("150000", 1), ("50000", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert parallel.available_cpus() == expected


@pytest.mark.parametrize(("threads", "processes"), [(1, 4), (2, 1)])
def test_a_case_is_shared_among_processes_only_where_torch_has_one_thread(phantoms, threads, processes):
    """A copy of a process in which torch has started several threads would wait for them for ever."""
    runner = SimpleNamespace(workers=4, workers_by_default=False, threads=threads, processes=None)
    workers, _, _ = stage._share_out(runner, read_dataset(phantoms).training[:1])
    assert workers == 0 and runner.processes == processes
