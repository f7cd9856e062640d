"""A fake of EC2's metadata service (IMDSv2) on loopback."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTICE = b'{"action": "terminate", "time": "2026-11-22T08:22:00Z"}'


class Service(http.server.ThreadingHTTPServer):
    """Gives tokens and, once `notice` is set, says so; a token is good for as many questions as `uses` says.

    Attributes:
        asked: Method, path and status of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.notice, self.uses, self.left = b"", 10**6, 0
        self.asked: list[tuple[str, str, int]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *_: object) -> None: ...

    def say(self, status: int, data: bytes = b"") -> None:
        self.server.asked.append((self.command, self.path, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token" or not self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            return self.say(400)
        self.server.left = self.server.uses
        return self.say(200, b"token")

    def do_GET(self) -> None:
        self.server.left -= 1
        if self.headers["X-aws-ec2-metadata-token"] != "token" or self.server.left < 0:
            return self.say(401)
        if self.path != "/latest/meta-data/spot/instance-action" or not self.server.notice:
            return self.say(404)
        return self.say(200, self.server.notice)


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    server = Service()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
