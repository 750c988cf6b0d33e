"""Fetching a file from a server on this computer: whole and verified, or resumable, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from weights_server import Site, served

from slmsam2_cli.errors import OutputError
from slmsam2_cli.io import atomic, download
from slmsam2_cli.io.download import DigestError, DownloadError, DownloadTarget, fetch

CONTENT = random.Random(0).randbytes(3 * 2**20 + 7)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "PAUSES_S", (0.0, 0.0))
    with served({"/a.pt": CONTENT}) as running:
        yield running


def wanted(site: Site, folder: Path, sha256: str | None = DIGEST, size: int | None = len(CONTENT), name: str = "a.pt") -> DownloadTarget:
    return DownloadTarget(f"{site.url}/{name}", folder / "a.pt", size, sha256)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(site: Site, at: int, folder: Path, sha256: str | None = DIGEST) -> DownloadTarget:
    """A download of which `at` bytes are here."""
    site.cut_at, site.errors = [at], []
    what = wanted(site, folder, sha256)

    def stop(have: int, total: int | None) -> None:
        if have >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(what, stop)
    site.cut_at, site.requests = [], []
    return what


def test_a_complete_download_leaves_only_the_file_itself(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert fetch(wanted(site, tmp_path / "new" / "folder"), lambda have, total: seen.append((have, total))) == DIGEST
    assert (tmp_path / "new" / "folder" / "a.pt").read_bytes() == CONTENT
    assert names_in(tmp_path / "new" / "folder") == ["a.pt"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_without_a_published_digest_that_of_the_file_is_returned(site: Site, tmp_path: Path) -> None:
    assert fetch(wanted(site, tmp_path, sha256=None, size=None)) == DIGEST


def test_a_cut_connection_is_resumed_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    site.cut_at = [10_000, 2_000_000]
    told: list[str] = []
    assert fetch(wanted(site, tmp_path), log=told.append) == DIGEST
    assert [asked for _, asked in site.requests] == [None, "bytes=10000-", "bytes=2000000-"]
    assert len(told) == 2 and "the connection was cut; retrying" in told[0]


def test_after_ctrl_c_the_next_run_requests_only_the_rest(site: Site, tmp_path: Path) -> None:
    what = interrupted(site, 1_000_000, tmp_path)
    assert names_in(tmp_path) == [".a.pt.part", ".a.pt.part.json"]
    assert (tmp_path / ".a.pt.part").read_bytes() == CONTENT[:1_000_000]
    assert fetch(what) == DIGEST
    assert site.requests == [("/a.pt", "bytes=1000000-")]
    assert names_in(tmp_path) == ["a.pt"]


def test_without_range_support_the_download_starts_again(site: Site, tmp_path: Path) -> None:
    what = interrupted(site, 1_000_000, tmp_path)
    site.ranges = False
    told: list[str] = []
    assert fetch(what, log=told.append) == DIGEST
    assert told == ["the server cannot resume; starting from the beginning"]


def test_a_file_that_changed_on_the_server_is_downloaded_from_the_start(site: Site, tmp_path: Path) -> None:
    what = interrupted(site, 1_000_000, tmp_path, sha256=None)
    other = os.urandom(len(CONTENT))
    site.files["/a.pt"], site.etag = other, '"two"'
    assert fetch(what) == hashlib.sha256(other).hexdigest()
    assert (tmp_path / "a.pt").read_bytes() == other


@pytest.mark.parametrize("sha256", [DIGEST, None])
def test_without_an_etag_a_download_is_resumed_only_if_the_digest_is_known(site: Site, tmp_path: Path, sha256: str | None) -> None:
    site.etag = None
    what = interrupted(site, 1_000_000, tmp_path, sha256)
    assert fetch(what) == DIGEST
    assert site.requests == [("/a.pt", "bytes=1000000-" if sha256 else None)]


def test_a_partial_file_that_is_complete_is_renamed_without_download(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".a.pt.part").write_bytes(CONTENT)
    assert fetch(wanted(site, tmp_path)) == DIGEST
    assert names_in(tmp_path) == ["a.pt"]


def test_a_partial_file_that_is_too_long_is_discarded(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".a.pt.part").write_bytes(CONTENT + b"x")
    assert fetch(wanted(site, tmp_path)) == DIGEST
    assert [asked for _, asked in site.requests] == [f"bytes={len(CONTENT) + 1}-", None]


def test_a_partial_file_of_another_file_fails_its_digest_and_is_removed(site: Site, tmp_path: Path) -> None:
    (tmp_path / ".a.pt.part").write_bytes(b"something else")
    with pytest.raises(DigestError, match="refused: its SHA-256 is"):
        fetch(wanted(site, tmp_path))
    assert names_in(tmp_path) == []


def test_a_wrong_digest_is_rejected_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DigestError, match=f"its SHA-256 is {DIGEST}, not {'0' * 64}"):
        fetch(wanted(site, tmp_path, sha256="0" * 64))
    assert names_in(tmp_path) == []


def test_a_wrong_digest_leaves_an_earlier_file_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"earlier")
    with pytest.raises(DigestError):
        fetch(wanted(site, tmp_path, sha256="0" * 64))
    assert (tmp_path / "a.pt").read_bytes() == b"earlier"


def test_a_length_other_than_published_is_rejected_before_writing(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DigestError, match=rf"holds {len(CONTENT)} bytes, not the 5"):
        fetch(wanted(site, tmp_path, size=5))
    assert names_in(tmp_path) == []


def test_a_stream_without_an_end_is_stopped(site: Site, tmp_path: Path) -> None:
    site.lengths = False
    with pytest.raises(DigestError, match="sends more than the 1000 bytes"):
        fetch(wanted(site, tmp_path, size=1000))
    assert names_in(tmp_path) == []


def test_without_a_content_length_a_right_digest_is_enough(site: Site, tmp_path: Path) -> None:
    site.lengths = False
    assert fetch(wanted(site, tmp_path, size=None)) == DIGEST


@pytest.mark.parametrize("code", [404, 403, 401, 410])
def test_permanent_http_errors_are_not_retried(site: Site, tmp_path: Path, code: int) -> None:
    site.errors = [code] * 9
    with pytest.raises(DownloadError, match=rf"127.0.0.1: HTTP {code}"):
        fetch(wanted(site, tmp_path))
    assert len(site.requests) == 1


@pytest.mark.parametrize("codes", [[500], [503, 429]])
def test_temporary_http_errors_are_retried(site: Site, tmp_path: Path, codes: list[int]) -> None:
    site.errors = codes
    assert fetch(wanted(site, tmp_path)) == DIGEST


def test_retries_are_limited(site: Site, tmp_path: Path) -> None:
    site.errors = [500] * 9
    with pytest.raises(DownloadError, match="HTTP 500 Internal Server Error, 3 times in a row"):
        fetch(wanted(site, tmp_path))
    assert len(site.requests) == 3


def test_progress_resets_the_number_of_retries(site: Site, tmp_path: Path) -> None:
    site.cut_at = list(range(100_000, 1_000_000, 100_000))
    assert fetch(wanted(site, tmp_path)) == DIGEST
    assert len(site.requests) == 10


def test_redirects_are_followed_and_ranges_with_them(site: Site, tmp_path: Path) -> None:
    site.redirects["/old.pt"] = f"{site.url}/a.pt"
    site.cut_at = [1000]
    assert fetch(wanted(site, tmp_path, name="old.pt")) == DIGEST
    assert site.requests == [("/old.pt", None), ("/a.pt", None), ("/old.pt", "bytes=1000-"), ("/a.pt", "bytes=1000-")]


def test_a_redirect_away_from_https_is_not_followed() -> None:
    import urllib.request
    from email.message import Message

    asked = urllib.request.Request("https://example.org/a.pt")
    with pytest.raises(DownloadError, match="leads away from https"):
        download._StayOnHttps().redirect_request(asked, None, 302, "", Message(), "http://example.org/a.pt")  # type: ignore[arg-type]


def test_a_response_with_another_range_than_requested_is_rejected(site: Site, tmp_path: Path) -> None:
    what = interrupted(site, 1_000_000, tmp_path)
    site.wrong_range = True
    with pytest.raises(DownloadError, match="another part of the file"):
        fetch(what)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/hostname", "not an http or https address"),
        ("ftp://example.org/a", "not an http or https address"),
        ("a.pt", "not an http or https address"),
        ("https://me:secret@example.org/a", "^example.org: an address with a password"),
    ],
)
def test_addresses_other_than_http_and_https_are_rejected(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        fetch(DownloadTarget(url, tmp_path / "a.pt"))
    assert names_in(tmp_path) == []


def test_a_refused_connection_is_reported_after_some_retries(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="127.0.0.1: connection refused, 3 times in a row"):
        fetch(DownloadTarget("http://127.0.0.1:1/a.pt", tmp_path / "a.pt"))


def test_a_host_that_cannot_be_resolved_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_knows(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_knows)
    with pytest.raises(DownloadError, match="no.such.host.invalid: no such host, or no network"):
        fetch(DownloadTarget("https://no.such.host.invalid/a.pt", tmp_path / "a.pt"))


def test_a_proxy_is_taken_from_the_environment(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", site.url)
    site.files["http://weights.invalid/a.pt"] = CONTENT
    assert fetch(DownloadTarget("http://weights.invalid/a.pt", tmp_path / "a.pt", sha256=DIGEST)) == DIGEST


@pytest.mark.parametrize("sha256", [DIGEST, None])
def test_a_response_shorter_than_announced_is_requested_again(site: Site, tmp_path: Path, sha256: str | None) -> None:
    what = interrupted(site, 1_000_000, tmp_path, sha256)
    site.portion = 900_000
    assert fetch(what) == DIGEST
    assert [asked for _, asked in site.requests] == ["bytes=1000000-", "bytes=1900000-", "bytes=2800000-"]


# The disk


def test_a_full_disk_is_reported_in_one_line_and_received_data_is_kept(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, path: Path) -> None:
            self.file, self.left = path.open("ab"), 1_000_000

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, block: bytes) -> None:
            if len(block) > self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= self.file.write(block)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "open_partial", Full)
        with pytest.raises(OutputError, match=r"no space left on the device. Received data is kept; free some space") as full:
            fetch(wanted(site, tmp_path))
    assert "\n" not in str(full.value)
    assert not (tmp_path / "a.pt").exists()
    assert fetch(wanted(site, tmp_path)) == DIGEST
    assert site.requests[-1][1] is not None


def test_too_little_free_space_is_reported_before_the_download(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="3 MB are needed and 0 MB are free"):
        fetch(wanted(site, tmp_path))
    assert names_in(tmp_path) == []


def test_a_fault_at_any_step_leaves_no_file_under_the_name(site: Site, tmp_path: Path) -> None:
    for step in range(1, 20):
        folder = tmp_path / str(step)
        folder.mkdir()
        try:
            with atomic.fail_at(step):
                fetch(wanted(site, folder))
            assert step > 5
            return
        except OutputError:
            named = folder / "a.pt"
            assert not named.exists() or named.read_bytes() == CONTENT
            assert fetch(wanted(site, folder)) == DIGEST
    pytest.fail("every step failed")


def test_a_link_in_place_of_the_partial_file_is_not_followed(site: Site, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".a.pt.part").symlink_to(victim)
    with pytest.raises(OutputError):
        fetch(wanted(site, tmp_path))
    assert victim.read_bytes() == b"mine"


def test_a_download_killed_at_any_moment_leaves_no_file_and_can_be_resumed(tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
from slmsam2_cli.io.download import DownloadTarget, fetch
fetch(DownloadTarget(sys.argv[1], Path(sys.argv[2])), lambda have, total: print(have, flush=True))
"""
    with served({"/a.pt": os.urandom(64 * 2**20)}) as site:
        with subprocess.Popen(
            [sys.executable, "-c", source, f"{site.url}/a.pt", str(tmp_path / "a.pt")], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            while int(process.stdout.readline()) < 2**20:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "a.pt").exists()
        assert fetch(DownloadTarget(f"{site.url}/a.pt", tmp_path / "a.pt")) == hashlib.sha256(site.files["/a.pt"]).hexdigest()
        assert site.requests[-1][1] is not None
