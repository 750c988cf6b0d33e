"""Download one file over HTTP, resume an interrupted download, and verify the file before it gets its final name.

Received bytes are kept in a hidden partial file next to the final name, with a note of URL and ETag. If the file on the server is
unchanged (If-Range; RFC 9110, section 14), only the rest is sent, otherwise the whole file. Proxies come from the environment,
certificates are verified, and a redirect from https to http is refused. No other module of the package opens a connection.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from slmsam2_cli.errors import OutputError, SlmSam2Error
from slmsam2_cli.io import atomic
from slmsam2_cli.io.files import error_reason, sha256_of
from slmsam2_cli.version import VERSION

TIMEOUT_S = 30.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0)
MAX_BYTES = 4 * 2**30
_BLOCK = 1 << 18
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class DownloadError(SlmSam2Error):
    """A failed download; received data are kept so that it can be resumed."""


class DigestError(SlmSam2Error):
    """A downloaded file with the wrong size or digest; it was removed."""


class _ConnectionLost(Exception):
    """A temporary connection error; the download is retried."""


@dataclass(frozen=True)
class DownloadTarget:
    """A file to download: URL, path, and its published size in bytes and SHA-256 (None: unknown)."""

    url: str
    path: Path
    bytes: int | None = None
    sha256: str | None = None

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def note(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part.json")


Report = Callable[[int, "int | None"], None]


def fetch(target: DownloadTarget, report: Report = lambda have, total: None, log: Callable[[str], None] = lambda line: None) -> str:
    """Download a file, verify it and return its SHA-256; `target.path` exists only once length and digest are right.

    report(received bytes, total bytes or None) is called for every block; log(line) reports retries.

    Raises: DownloadError or OutputError when it fails (received data are kept for resuming); DigestError when the file is not the
    published one (nothing is kept).
    """
    parts = urlsplit(target.url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise DownloadError(f"{target.url}: not an http or https address")
    if "@" in parts.netloc:
        raise DownloadError(f"{parts.hostname}: an address with a password in it is not used. Fetch the file by hand")
    failures, have = 0, _bytes_of(target.partial)
    while True:
        try:
            _receive(target, report, log)
            return _finish(target)
        except _ConnectionLost as cut:
            now = _bytes_of(target.partial)
            failures, have = (0 if now > have else failures + 1), max(now, have)
            if failures > len(PAUSES_S):
                raise DownloadError(f"{cut}, {failures} times in a row") from None
            pause = PAUSES_S[max(failures - 1, 0)]
            log(f"{cut}; retrying in {pause:g} s, {now / 1e6:.1f} MB received")
            time.sleep(pause)


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _receive(target: DownloadTarget, report: Report, log: Callable[[str], None]) -> None:
    """Append to the partial file until it is complete.

    Raises: _ConnectionLost when the download may be retried.
    """
    have, headers = _request_headers(target)
    opener = urllib.request.build_opener(_StayOnHttps)
    try:
        with opener.open(urllib.request.Request(target.url, headers=headers), timeout=TIMEOUT_S) as response:
            start, total = _offset_and_total(response, have)
            if have and not start:
                log("the server cannot resume; starting from the beginning")
            _check_length(target, total, start)
            _save_note(target, response.headers, total)
            _copy(response, target, start, total, report)
    except urllib.error.HTTPError as error:
        _handle_http_error(target, error, have)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _translate_error(target.url, error) from None


def _request_headers(target: DownloadTarget) -> tuple[int, dict[str, str]]:
    """Return the number of bytes that can be kept, and the request headers for the rest."""
    headers = {"User-Agent": f"slmsam2/{VERSION}", "Accept-Encoding": "identity"}
    have, note = _bytes_of(target.partial), _read_note(target)
    validator = note.get("validator") if note.get("url") == target.url else None
    if not have or not (validator or target.sha256):
        return 0, headers
    headers["Range"] = f"bytes={have}-"
    return have, headers | ({"If-Range": validator} if validator else {})


def _read_note(target: DownloadTarget) -> dict[str, Any]:
    with suppress(atomic.JsonError):
        note = atomic.read_json(target.note, "the note of a download")
        if isinstance(note, dict):
            return note
    return {}


def _save_note(target: DownloadTarget, headers: Message, total: int | None) -> None:
    """Save which version of the file the partial file belongs to: its strong ETag, else its date of modification."""
    etag = headers.get("ETag", "")
    validator = etag if etag.startswith('"') else headers.get("Last-Modified")
    note = {"url": target.url, "validator": validator, "bytes": total}
    if note != _read_note(target):
        atomic.write_json(target.note, note)


class _StayOnHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"{urlsplit(req.full_url).hostname}: the server leads away from https, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _offset_and_total(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Return the offset in the file of the first byte of the response, and the file's length in bytes, None when the server sends none.

    Raises: DownloadError when the response begins elsewhere than after the `have` bytes that were received before.
    """
    start, found = 0, None
    if response.status == 206:
        start, found = have, _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or found[1] is None or int(found[1]) != have:
            raise DownloadError("the server sends another part of the file than it was asked for. Delete the partial file and try again")
    if start and found is not None and found[2].isdecimal():
        return start, int(found[2])
    length = response.headers.get("Content-Length", "")
    return start, start + int(length) if length.isdecimal() else None


def _check_length(target: DownloadTarget, total: int | None, start: int) -> None:
    """Check, before anything is written, that the length is the published one and fits on the disk."""
    if total is not None and target.bytes is not None and total != target.bytes:
        _forget(target)
        raise DigestError(f"{target.url}: holds {total} bytes, not the {target.bytes} that were published: another file, refused")
    expected = total or target.bytes or 0
    if expected > MAX_BYTES:
        raise DigestError(f"{target.url}: {expected} bytes are too many for weights of ours, refused")
    folder = next(parent for parent in target.path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if expected - start > free:
        raise OutputError(f"{target.path.parent}: {(expected - start) / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


def _copy(response: http.client.HTTPResponse, target: DownloadTarget, start: int, total: int | None, report: Report) -> None:
    whole = total if total is not None else target.bytes
    limit = MAX_BYTES if whole is None else whole
    try:
        file = atomic.open_partial(target.partial)
        file.truncate(start)
    except OSError as error:
        raise OutputError(f"{target.partial}: could not be written: {error_reason(error)}") from None
    with file:
        have = start
        report(have, total)
        while block := response.read(_BLOCK):
            have += len(block)
            if have > limit:
                _forget(target)
                raise DigestError(f"{target.url}: the server sends more than the {limit} bytes there should be, refused")
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                what = f"{target.partial}: could not be written: {error_reason(error)}"
                raise OutputError(f"{what}. Received data is kept; free some space and run the same command again") from None
            report(have, total)
    if whole is not None and have < whole:
        raise _ConnectionLost(f"{urlsplit(target.url).hostname}: the connection was cut")


def _handle_http_error(target: DownloadTarget, error: urllib.error.HTTPError, have: int) -> None:
    """Return when an HTTP error means that the file is complete already; raise the matching error otherwise."""
    host = urlsplit(target.url).hostname
    with error:
        if error.code == 416:
            found = _RANGE.fullmatch(error.headers.get("Content-Range", ""))
            if found is not None and found[2] == str(have):
                return
            _forget(target)
            raise _ConnectionLost(f"{host}: the partial file is no beginning of the file there and was removed")
        what = f"{host}: HTTP {error.code} {error.reason}".rstrip()
        raise _ConnectionLost(what) if error.code in _TRY_AGAIN else DownloadError(what)


def _translate_error(url: str, error: Exception) -> Exception:
    """Convert a connection error to _ConnectionLost if it may be temporary, else to DownloadError."""
    host = urlsplit(url).hostname
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DownloadError(f"{host}: its certificate could not be verified ({reason.verify_message})")
    if isinstance(reason, socket.gaierror):
        return DownloadError(f"{host}: no such host, or no network")
    if isinstance(reason, TimeoutError):
        return _ConnectionLost(f"{host}: no answer within {TIMEOUT_S:g} s")
    if isinstance(reason, OSError) and reason.strerror:
        return _ConnectionLost(f"{host}: {reason.strerror.lower()}")
    return _ConnectionLost(f"{host}: the connection was cut" if isinstance(reason, http.client.IncompleteRead) else f"{host}: {reason}")


def _finish(target: DownloadTarget) -> str:
    """Verify the complete file, rename it to its final name and return its SHA-256."""
    found = ""

    def verify(partial: Path) -> None:
        nonlocal found
        found = sha256_of(partial)
        if target.sha256 is not None and found != target.sha256:
            raise DigestError(
                f"{target.url}: refused: its SHA-256 is {found}, not {target.sha256}. What arrived was removed; "
                "the file was changed on its way, or another one lies there now"
            )

    try:
        atomic.commit_partial(target.partial, target.path, verify)
    except DigestError:
        _forget(target)
        raise
    with suppress(OSError):
        os.unlink(target.note)
    return found


def _forget(target: DownloadTarget) -> None:
    for path in (target.partial, target.note):
        with suppress(OSError):
            os.unlink(path)
