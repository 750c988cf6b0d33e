"""Atomic writes: whole files or none, strict JSON, locked folders."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmsam2_cli.errors import LockError, OutputError
from slmsam2_cli.io import atomic, strict_json
from slmsam2_cli.io.atomic import ArrayError, JsonError
from slmsam2_cli.io.files import sha256_of


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_written_bytes_text_and_json_are_read_back(tmp_path: Path) -> None:
    value = {"name": "Müller 患者", "numbers": [1, 2.5, None, True], "labels": {"1": "PZ"}}
    atomic.write_json(tmp_path / "a.json", value)
    assert atomic.read_json(tmp_path / "a.json", "a") == value
    assert (tmp_path / "a.json").read_text("utf-8").startswith('{\n  "name": "Müller')


def test_a_name_that_is_not_utf8_survives_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe")
    atomic.write_json(tmp_path / "a.json", [name])
    assert atomic.read_json(tmp_path / "a.json", "a") == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_nan_and_types_that_json_lacks_are_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(OutputError, match="a.json"):
        atomic.write_json(tmp_path / "a.json", {"x": value})
    assert names(tmp_path) == []


def test_a_fault_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic.write_json(target, "old")
    failures = 0
    for step in range(1, 50):
        atomic.write_json(target, "old")
        try:
            with atomic.fail_at(step):
                atomic.write_json(target, "new" * 1000)
        except OutputError as error:
            failures += 1
            assert "a.json" in str(error)
            assert atomic.read_json(target, "a") in ("old", "new" * 1000)
            assert names(tmp_path) == ["a.json"]
        else:
            break
    assert failures == 7
    assert atomic.read_json(target, "a") == "new" * 1000


def test_a_write_that_silently_stores_half_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="differs from what was written"), atomic.fail_at(3):
        atomic.write_bytes(tmp_path / "a.bin", b"x" * 1000)
    with pytest.raises(OutputError, match="damaged"), atomic.fail_at(3):
        atomic.write_npy(tmp_path / "a.npy", np.arange(1000))
    assert names(tmp_path) == []


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_the_earlier_result_stays(tmp_path: Path) -> None:
    atomic.write_npy(tmp_path / "a.npy", np.zeros(3))
    with file_size_limit(4096), pytest.raises(OutputError, match=r"a\.npy"):
        atomic.write_npy(tmp_path / "a.npy", np.ones(100_000))
    assert atomic.open_npy(tmp_path / "a.npy").tolist() == [0, 0, 0]
    assert names(tmp_path) == ["a.npy"]


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 248 + ".nii.gz")
    atomic.write_bytes(target, b"1")
    assert target.read_bytes() == b"1"


def test_the_temporary_is_hidden_and_keeps_the_ending(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "case.nii.gz") as temporary:
        temporary.write_bytes(b"1")
    assert temporary.name.startswith(".")
    assert temporary.name.endswith(".nii.gz")
    assert names(tmp_path) == ["case.nii.gz"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic.replacing(tmp_path / "a.bin") as temporary:
        interrupted(temporary)
    assert names(tmp_path) == []


def test_the_error_names_a_folder_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match=r"a\.json: could not be written"):
        atomic.write_json(tmp_path / "a.json", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_the_error_names_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission"):
        atomic.write_json(tmp_path / "a.json", 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b'{"a": 0,}', "line 1"),
        (b'{"a": 1,\n "a": 2}', 'duplicate key "a"'),
        (b'{\n"a": NaN}', "line 2: NaN"),
        (b"[1, -Infinity]", "Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" * 101 + b"]" * 101, "nested"),
        (b"[" * 200_000, "nested"),
        (b"[\n" + b"9" * 200_000 + b"]", "line 2: a number of 200000 digits"),
        ('{"a": "é"}'.encode("latin-1"), "UTF-8"),
        (b"\xff\xfe[\x001\x00]\x00", "UTF-8"),
        (b'"' + b"x" * 20_000_001 + b'"', "20 MB"),
    ],
)
def test_json_out_of_bounds_is_rejected_with_line_or_key(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "dataset.json").write_bytes(data)
    with pytest.raises(JsonError, match="^dataset.json: .*" + message):
        atomic.read_json(tmp_path / "dataset.json", "dataset.json")


def test_json_within_bounds_is_read(tmp_path: Path) -> None:
    cases = [
        (b"\xef\xbb\xbf[1]", [1]),
        (b'["NaN", "[[", "\\"}"]', ["NaN", "[[", '"}']),
        (b"[" * 100 + b"]" * 100, None),
        (b"9" * 100, None),
    ]
    for data, value in cases:
        (tmp_path / "a.json").write_bytes(data)
        found = atomic.read_json(tmp_path / "a.json", "a")
        assert value is None or found == value


@given(st.binary(max_size=200) | st.text('[]{}",:0123456789.eENaInfty\\ \n-', max_size=200).map(str.encode))
def test_any_bytes_are_parsed_as_json_or_rejected(data: bytes) -> None:
    try:
        strict_json.parse(data)
    except strict_json.JsonRejected as refused:
        assert "\n" not in str(refused)[:20]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists
    )
)
def test_json_values_survive_writing_and_reading(value: object) -> None:
    assert strict_json.parse(atomic.to_json(value)) == value


@settings(max_examples=200)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_in_dataset_json_gives_json_or_a_clean_error(position: int, byte: int) -> None:
    text = json.dumps({"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT"}, "numTraining": 2, "file_ending": ".nii.gz"})
    data = bytearray(text.encode())
    data[position % len(data)] = byte
    try:
        strict_json.parse(bytes(data))
    except strict_json.JsonRejected:
        pass


def test_a_pipe_is_rejected_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(JsonError, match=r"plan\.json \(plan\): not a regular file"):
        atomic.read_json(tmp_path / "plan.json", "plan")


@pytest.mark.parametrize(
    "array", [np.arange(24, dtype=np.float16).reshape(2, 3, 4), np.zeros((0, 3)), np.array(5.0), np.array([np.nan, 1])]
)
def test_arrays_come_back_bit_by_bit(tmp_path: Path, array: np.ndarray) -> None:
    atomic.write_npy(tmp_path / "a.npy", array)
    found = atomic.open_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


def test_damaged_arrays_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    atomic.write_npy(path, np.arange(100))
    whole = path.read_bytes()
    for data in (whole[:-8], whole + b"x", whole[:20], b"", b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(ArrayError, match=r"a\.npy"):
            atomic.open_npy(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ArrayError, match=r"a\.npy"):
        atomic.open_npy(path)


def test_the_digest_of_an_empty_file_is_the_well_known_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_digest_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"1")
    before = sha256_of(folder)
    (folder / ".DS_Store").write_bytes(b"junk")
    assert sha256_of(folder) == before
    (folder / "1.dcm").write_bytes(b"2")
    assert sha256_of(folder) != before


def test_the_lock_error_names_the_process_that_holds_the_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from slmsam2_cli.io.atomic import lock_folder\nwith lock_folder(Path(sys.argv[1])): pass"
    with atomic.lock_folder(tmp_path):
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()}, started 20" in second.stderr
        assert "LockError" in second.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_parallel_parts_share_a_folder_but_not_with_a_writer_of_the_whole(tmp_path: Path) -> None:
    with atomic.lock_folder(tmp_path, "0-of-2"), atomic.lock_folder(tmp_path, "1-of-2"):
        with pytest.raises(LockError), atomic.lock_folder(tmp_path):
            pass
        with pytest.raises(LockError), atomic.lock_folder(tmp_path, "1-of-2"):
            pass
    with atomic.lock_folder(tmp_path), pytest.raises(LockError), atomic.lock_folder(tmp_path, "0-of-2"):
        pass


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / ".slmsam2-tmp-1-abc.npy").write_bytes(b"half")
    with atomic.lock_folder(tmp_path):
        assert names(tmp_path / "case") == []


def test_an_output_folder_that_is_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OutputError, match="is a file, not a directory"), atomic.lock_folder(folder):
            pass


def test_a_second_process_waits_until_the_lock_is_released(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with atomic.wait_for_lock(tmp_path / "turn"):
            order.append("second")

    with atomic.wait_for_lock(tmp_path / "turn"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]
