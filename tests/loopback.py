"""A real file server on loopback with Range and ETag, and one small class for each way it can misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import math
import re
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

Span = tuple[int, int]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; records the ranges `asked` and the number of bytes `sent`, and waits where they are `hold_at`."""

    daemon_threads = True

    def __init__(self, handler: type[Files], files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files, self.asked, self.sent, self.hold_at = files, [], 0, math.inf
        self.busy = threading.Semaphore(1)
        self.whole = threading.Event()  # set by a test that wants a fault to end
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed break their connections: no news."""


@contextlib.contextmanager
def serving(handler: type[Files], files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(handler, files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("no_proxy", "127.0.0.1")
            yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Files(http.server.BaseHTTPRequestHandler):
    """The honest server. A fault overrides `answer`, or one of the small methods that it calls."""

    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 5
    disable_nagle_algorithm = True
    slice_bytes = 1 << 16
    pause_s = 0.0
    kind = "application/octet-stream"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        data = self.server.files.get(unquote(urlsplit(self.path).path).lstrip("/"))
        if data is None:
            self.refuse(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(found[1]), min(int(found[2]) + 1, len(data))) if found else None
        condition = self.headers.get("If-Range")
        if condition and condition not in (self.etag(data), self.modified(data)):
            span = None
        self.server.asked.append(span)
        self.answer(data, span)

    @property
    def probing(self) -> bool:
        """The first request of a download."""
        return self.headers.get("Range") == "bytes=0-63"

    def answer(self, data: bytes, span: Span | None) -> None:
        self.send(206 if span else 200, data, span or (0, len(data)))

    def etag(self, data: bytes) -> str:
        return f'"{hashlib.md5(data).hexdigest()}"'

    def modified(self, data: bytes) -> str:
        return ""

    def content_range(self, data: bytes, span: Span) -> str:
        return f"bytes {span[0]}-{span[1] - 1}/{len(data)}"

    def length(self, data: bytes, span: Span) -> int | None:
        return span[1] - span[0]

    def send(self, status: int, data: bytes, span: Span, **more: str) -> None:
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", self.content_range(data, span))
        headers = {
            "Content-Type": self.kind,
            "ETag": self.etag(data),
            "Last-Modified": self.modified(data),
            **more,
        }
        for name, value in headers.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        length = self.length(data, span)
        if length is None:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.body(data[span[0] : span[1]])

    def body(self, data: bytes) -> None:
        for start in range(0, len(data), self.slice_bytes):
            while self.server.sent >= self.server.hold_at:
                time.sleep(0.002)
            self.server.sent += len(data[start : start + self.slice_bytes])  # before: then the other side is done
            self.wfile.write(data[start : start + self.slice_bytes])
            if self.pause_s:
                time.sleep(self.pause_s)

    def refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()


class NoRange(Files):
    def answer(self, data: bytes, span: Span | None) -> None:
        self.send(200, data, (0, len(data)))
