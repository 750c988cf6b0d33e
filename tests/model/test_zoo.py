"""The list of published weights, and where weights are looked for."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest

from slmsam2_cli.errors import WeightsError
from slmsam2_cli.model import zoo
from slmsam2_cli.model.zoo import ENTRIES, Entry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    zoo.folder().mkdir(parents=True)
    return zoo.folder()


def entry_for(content: bytes, monkeypatch: pytest.MonkeyPatch, sha256: str | None = "") -> Entry:
    """Published weights called `small-one` that are these bytes."""
    digest = hashlib.sha256(content).hexdigest() if sha256 == "" else sha256
    entry = Entry("small-one", "tiny", "SAM 2.1", "https://example.org/one.pt", len(content), digest, "a test")
    monkeypatch.setattr(zoo, "ENTRIES", (*ENTRIES, entry))
    return entry


# The list


def test_names_files_and_digests_are_unique() -> None:
    for values in ([e.name for e in ENTRIES], [e.url for e in ENTRIES], [e.file for e in ENTRIES], [e.sha256 for e in ENTRIES if e.sha256]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_well_formed(entry: Entry) -> None:
    assert zoo.NAME.fullmatch(entry.name) and entry.name not in zoo.RESERVED
    assert entry.url.startswith("https://") and entry.file.endswith(".pt")
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert (entry.sha256 is None) == (entry.source == ""), "a digest needs a source, and none has no source"
    assert entry.licence


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_every_size_of_sam_2_is_listed(version: str) -> None:
    assert [entry.size for entry in ENTRIES if entry.family == f"SAM {version}" and entry.licence == "Apache-2.0"] == [
        "tiny",
        "small",
        "base_plus",
        "large",
    ]


def test_a_file_of_sam_2_1_is_larger_than_that_of_2_0_by_its_three_tensors() -> None:
    """16,640 further numbers: 64 + 64 x 256 + 64 are 66,048 bytes; the rest is what torch writes around them."""
    for size in ("tiny", "small", "base-plus", "large"):
        newer, older = zoo.find(f"sam2.1-{size}"), zoo.find(f"sam2.0-{size}")
        assert newer and older and newer.bytes and older.bytes
        assert 66_048 <= newer.bytes - older.bytes < 66_048 + 70_000


# Stored files


def test_weights_are_kept_below_xdg_cache_home_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert zoo.folder() == tmp_path / "elsewhere" / "slmsam2" / "weights"


@pytest.mark.parametrize("named", [None, "", "relative"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have another folder of caches")
def test_without_an_absolute_xdg_cache_home_weights_are_kept_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert zoo.folder() == tmp_path / ".cache" / "slmsam2" / "weights"


def test_the_error_for_published_weights_that_are_absent_names_the_command(cache: Path) -> None:
    with pytest.raises(WeightsError, match="sam2.1-tiny: not on this computer. Run slmsam2 weights get sam2.1-tiny"):
        zoo.locate("sam2.1-tiny")


def test_downloaded_weights_are_found_by_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_for(b"weights", monkeypatch)
    (cache / entry.file).write_bytes(b"weights")
    assert zoo.locate("small-one") == cache / "one.pt"


def test_changed_weights_are_rejected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_for(b"weights", monkeypatch)
    (cache / entry.file).write_bytes(b"weightz")
    with pytest.raises(WeightsError, match="one.pt: corrupt or changed: .* run slmsam2 weights get small-one"):
        zoo.locate("small-one")


def test_without_a_published_digest_the_recorded_one_is_verified(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_for(b"weights", monkeypatch, sha256=None)
    path = cache / entry.file
    path.write_bytes(b"weights")
    assert zoo.verify_digest(path, entry) is None
    (cache / "one.pt.sha256").write_text(f"{hashlib.sha256(b'weights').hexdigest()}  one.pt\n")
    assert zoo.verify_digest(path, entry) == hashlib.sha256(b"weights").hexdigest()
    path.write_bytes(b"weightz")
    with pytest.raises(WeightsError, match="corrupt or changed"):
        zoo.locate("small-one")


@pytest.mark.parametrize("note", [b"", b"no digest\n", b"\xff\xfe", b"0" * 63])
def test_a_recorded_digest_that_is_none_is_ignored(cache: Path, note: bytes) -> None:
    (cache / "one.pt.sha256").write_bytes(note)
    assert zoo.recorded_digest(cache / "one.pt") is None


def test_imported_weights_are_found_by_name(cache: Path) -> None:
    (cache / "knee.safetensors").write_bytes(b"")
    (cache / ".slmsam2-tmp-1.safetensors").write_bytes(b"")
    assert zoo.imported() == ["knee"]
    assert zoo.locate("knee") == cache / "knee.safetensors"


@pytest.mark.parametrize("name", ["model.pt", "folder/model.safetensors", "../model.pt", "/nowhere/model.pt"])
def test_a_path_is_returned_as_it_is(cache: Path, name: str) -> None:
    assert zoo.locate(name) == Path(name)


def test_an_unknown_name_is_an_error_that_names_weights_list(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="kneee: no such file, and no weights of that name. Run slmsam2 weights list"):
        zoo.locate("kneee")


def test_published_weights_are_found_by_their_digest() -> None:
    assert all(zoo.find_by_digest(entry.sha256) == entry for entry in ENTRIES if entry.sha256)
    assert zoo.find_by_digest("0" * 64) is None
