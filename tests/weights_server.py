"""A web server on this computer that behaves as well or as badly as a test asks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server has and how it misbehaves.

    portion: the most bytes it sends when asked for a range; requests: (path, Range or None) of every one it got.
    """

    files: dict[str, bytes]
    ranges: bool = True
    etag: str | None = '"one"'
    cut_at: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    lengths: bool = True
    wrong_range: bool = False
    portion: int | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            site.requests.append((self.path, self.headers.get("Range")))
            if self.path in site.redirects:
                self.answer(302, Location=site.redirects[self.path])
            elif site.errors:
                self.answer(site.errors.pop(0))
            elif self.path not in site.files:
                self.answer(404)
            else:
                self.send_file(site.files[self.path])

        def answer(self, code: int, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_file(self, content: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            fresh = self.headers.get("If-Range") in (None, site.etag)
            start = int(asked[1]) if asked and site.ranges and fresh else 0
            if start >= len(content) > 0 and start:
                self.answer(416, Content_Range=f"bytes */{len(content)}")
                return
            end = min(len(content), start + site.portion) if start and site.portion else len(content)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {0 if site.wrong_range else start}-{end - 1}/{len(content)}")
            if site.etag:
                self.send_header("ETag", site.etag)
            if site.lengths:
                self.send_header("Content-Length", str(end - start))
            self.end_headers()
            end = site.cut_at.pop(0) if site.cut_at else end
            self.wfile.write(content[start:end])
            self.close_connection = True

    return Handler


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves early is what some tests are about."""


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[Site]:
    """A site on 127.0.0.1; its address is in `url`."""
    site = Site(files)
    server = _Server(("127.0.0.1", 0), handler_of(site))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
