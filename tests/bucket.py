"""A real S3 server (moto) on loopback, and a place in front of it where every answer can go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
from typing import TYPE_CHECKING, Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Forward = Callable[[], Response]
    Fault = Callable[["Call", Forward], Response | None]

NAME = "lab"
BACKEND = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


class Call(Request):
    """One request, with the name that S3 gives to it."""

    @property
    def key(self) -> str:
        return self.path.removeprefix(f"/{NAME}").lstrip("/")

    @property
    def operation(self) -> str:
        upload = "uploads" in self.args or "uploadId" in self.args
        names = {
            "GET": ("ListObjectsV2" if "list-type" in self.args else "GetObject", "ListMultipartUploads"),
            "HEAD": ("HeadObject", ""),
            "PUT": ("PutObject", "UploadPart"),
            "POST": ("", "CreateMultipartUpload" if "uploads" in self.args else "CompleteMultipartUpload"),
            "DELETE": ("DeleteObject", "AbortMultipartUpload"),
        }
        return names[self.method][upload]


class Handler(MotoRequestHandler):
    def log(self, *_: object) -> None: ...


class Store:
    """The WSGI middleware: a `fault` may answer in moto's place, before or after moto has acted.

    Attributes:
        asked: (operation, key) of every request.
        broken: Requests after which a manifest stood over a missing or a changed object.
    """

    def __init__(self) -> None:
        self.app = create_backend_app("s3")
        self.lock = threading.RLock()
        self.begin()

    def begin(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.broken: list[tuple[str, str]] = []
        self.fault: Fault | None = None
        BACKEND.reset()
        BACKEND.create_bucket(NAME, "us-east-1")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        call = Call(environ)
        body = call.get_data()  # or a client that still sends meets a closed door
        self.asked.append((call.operation, call.key))

        def forward() -> Response:
            with self.lock:
                answer = Response.from_app(self.app, {**environ, "wsgi.input": io.BytesIO(body)}, buffered=True)
                if call.method not in ("GET", "HEAD") and not self.sound():
                    self.broken.append((call.operation, call.key))
            return answer

        answer = self.fault(call, forward) if self.fault else None
        return (answer or forward())(environ, start_response)

    @property
    def keys(self) -> dict[str, Any]:
        """What moto holds, past every fault."""
        with self.lock:  # a key may go while they are listed
            bucket = BACKEND.buckets.get(NAME)
            return {name: bucket.keys[name] for name in bucket.keys} if bucket else {}

    @property
    def uploads(self) -> dict[str, Any]:
        return BACKEND.buckets[NAME].multiparts

    def sent(self, *operations: str) -> list[str]:
        return [key for operation, key in self.asked if operation in operations]

    def sound(self) -> bool:
        """Every object that a manifest lists is there, byte by byte."""
        keys = self.keys
        for name in keys:
            folder, _, last = name.rpartition("/")
            for file in json.loads(keys[name].value)["files"] if last == "manifest.json" else []:
                held = keys.get(f"{folder}/{file['path']}")
                if not held or hashlib.sha256(held.value).hexdigest() != file["sha256"]:
                    return False
        return True


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """The address of the server."""
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refuse(status: int, code: str, **headers: str) -> Response:
    """An error in S3's own words."""
    more = "".join(f"<{name}>{value}</{name}>" for name, value in headers.items() if name == "Region")
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>canary in the message</Message>{more}</Error>'
    named = {name.replace("_", "-"): value for name, value in headers.items() if name != "Region"}
    return Response(text, status, named, mimetype="application/xml")
