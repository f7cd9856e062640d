"""A file server over HTTP: every answer is checked before a byte of it is believed.

An answer is 200 or 206, neither encoded nor a web page; a range is exactly the one asked for, of exactly the
version that the first answer named. Query strings and passwords of URLs are never shown, logged or written.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError

from avrl import __version__
from avrl.errors import IntegrityError, NotFoundError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

log = logging.getLogger(__name__)
logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show whole URLs, signatures and all

CHUNK_BYTES = 2**20
HEAD_BYTES = 64  # asked of the first answer: enough to know a web page by its beginning
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_S = 300.0  # a server's Retry-After beyond this is better served by a later run
LATER = "run the same command later: it goes on from here"
OVER = "run the same command again: this file starts over"
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server: tries of a range, pause after the first (doubling), silence allowed."""

    attempts: int = 6
    backoff_s: float = 1.0
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Published:
    """What the first answer says the file is.

    Attributes:
        url: As it may be shown.
        etag: Its version; empty if the server does not tell.
        modified: Its date, which stands in for a missing ETag.
        length: In bytes; None if the server does not tell.
        ranged: Whether parts of it can be asked for.
    """

    url: str
    etag: str
    modified: str
    length: int | None
    ranged: bool

    @property
    def if_range(self) -> dict[str, str]:
        """The header that makes a server refuse to mix two versions; a weak ETag is not allowed in it."""
        version = self.etag or self.modified
        return {"If-Range": version} if version and not version.startswith("W/") else {}


class Body(Protocol):
    """The bytes of an answer."""

    def stream(self, amt: int, /) -> Iterator[bytes]:
        """Chunks of at most so many bytes, as they arrive."""
        ...


class RetryError(Exception):
    """A failure that another try may cure, and the seconds that the server asks to wait."""

    def __init__(self, words: str, wait_s: float | None = None) -> None:
        super().__init__(words)
        self.words, self.wait_s = words, wait_s


class Origin(ABC):
    """Where one file comes from: a web server or a bucket.

    Attributes:
        shown: Its URL as it may be shown.
        stopped: Set to end all pauses and transfers.
    """

    def __init__(self, shown: str, patience: Patience) -> None:
        self.shown, self.patience, self.stopped = shown, patience, threading.Event()

    @abstractmethod
    def ask(self) -> Published:
        """The first answer: version, length, and whether ranges are served."""

    @abstractmethod
    def range(self, file: Published, start: int, n_bytes: int) -> AbstractContextManager[Body]:
        """An open answer with exactly these bytes of exactly this version."""

    @abstractmethod
    def close(self) -> None:
        """Give connections back."""

    def read(self, file: Published, start: int, n_bytes: int) -> bytes:
        """These bytes of this version, tried as often as is borne; a body that ends early without an error is short.

        Raises:
            IntegrityError: see `range`.
            TemporaryError: see `patiently`.
        """

        def attempt() -> bytes:
            with self.range(file, start, n_bytes) as body:
                return b"".join(body.stream(CHUNK_BYTES))

        return self.patiently(attempt)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Try, and try again after a pause that doubles, or that the server asks for.

        Raises:
            TemporaryError: it failed more often than is borne.
        """
        words = ""
        for index in range(self.patience.attempts):
            try:
                return attempt()
            except RetryError as error:
                words, wait_s = error.words, error.wait_s
            pause_s = self.patience.backoff_s * 2**index if wait_s is None else wait_s
            last = index + 1 == self.patience.attempts or pause_s > LONGEST_WAIT_S
            if last or self.stopped.wait(pause_s):
                break
        raise TemporaryError(f"{self.shown}: {words}", LATER)


class Server(Origin):
    """A web server."""

    def __init__(self, url: str, connections: int, patience: Patience) -> None:
        super().__init__(shown(url), patience)
        self.url, self.pool = url, _pool(url, connections, patience)

    def close(self) -> None:
        """Close idle connections."""
        self.pool.clear()

    def ask(self) -> Published:
        """The first answer: version, length, and whether ranges are served.

        Raises:
            IntegrityError: an empty file, a web page, or another range than asked.
        """
        with self.answer({"Range": f"bytes=0-{HEAD_BYTES - 1}"}) as response:
            etag = response.headers.get("ETag", "")
            modified = "" if etag else response.headers.get("Last-Modified", "")
            total = response.headers.get("Content-Length")
            if response.status == 206:
                match = re.fullmatch(r"bytes 0-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
                if not match:
                    raise IntegrityError(f"{self.shown} answers another range than asked", "use a mirror")
                total = match[1]
            head = response.read(HEAD_BYTES).lstrip().lower()
            if head.startswith((b"<!doctype html", b"<html")):
                raise self._web_page()
        length = int(total) if total and total.isdigit() else None
        if length == 0:
            raise IntegrityError(f"{self.shown} is empty", "use a mirror")
        return Published(self.shown, etag, modified, length, response.status == 206 and length is not None)

    @contextlib.contextmanager
    def range(self, file: Published, start: int, n_bytes: int) -> Iterator[urllib3.BaseHTTPResponse]:
        """An open answer with exactly these bytes of exactly this version.

        Raises:
            IntegrityError: the file changed, or another range came.
        """
        wanted = f"{start}-{start + n_bytes - 1}"
        with self.answer({"Range": f"bytes={wanted}", **file.if_range}) as response:
            changed = any(
                told and response.headers.get(name, told) != told
                for name, told in (("ETag", file.etag), ("Last-Modified", file.modified))
            )
            if changed or response.status != 206:
                raise IntegrityError(f"{self.shown} changed at the server while it was fetched", OVER)
            told = response.headers.get("Content-Range", "none")
            if told != f"bytes {wanted}/{file.length}":
                raise IntegrityError(f"{self.shown}: asked for bytes {wanted}, told {told!r}", OVER)
            yield response

    @contextlib.contextmanager
    def answer(self, headers: dict[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """An open answer to one GET.

        Raises:
            NotFoundError: not there, refused, or a circle of redirects.
            IntegrityError: an answer that cannot be the file.
        """
        try:
            response = self.pool.request("GET", self.url, headers=headers, preload_content=False, decode_content=False)
            try:
                self._accept(response)
                yield response
            finally:
                response.close()
        except HTTPError as error:
            # Its own text holds the URL with the signature, hence the bare kind, and no chained traceback.
            reason = error.reason if isinstance(error, MaxRetryError) else error
            if isinstance(reason, ResponseError):
                raise NotFoundError(f"{self.shown} redirects without end", "check the address") from None
            raise RetryError(f"the connection fails ({type(reason).__name__})") from None

    def _accept(self, response: urllib3.BaseHTTPResponse) -> None:
        status, headers = response.status, response.headers
        if status in TEMPORARY:
            raise RetryError(f"the server answers {status}", _retry_after_s(headers.get("Retry-After", "")))
        if status in (401, 403):
            raise NotFoundError(f"{self.shown}: access refused ({status})", "signed links expire; get a new one")
        if status in (404, 410):
            raise NotFoundError(f"{self.shown} is not there ({status})", "check the address, or use a mirror (--from)")
        if status not in (200, 206):
            raise IntegrityError(f"{self.shown}: answered {status}, not the bytes asked for", OVER)
        if headers.get("Content-Encoding", "identity") != "identity":
            raise IntegrityError(f"{self.shown} comes encoded though that was not asked for", "use a mirror")
        if headers.get("Content-Type", "").startswith("text/html"):
            raise self._web_page()

    def _web_page(self) -> IntegrityError:
        return IntegrityError(f"{self.shown} is a web page, not the file", "it may want a login; use a mirror")


def shown(url: str) -> str:
    """A URL as it may be shown: without query, fragment, user and password."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _retry_after_s(text: str) -> float | None:
    """``Retry-After`` is seconds or a date."""
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _pool(url: str, connections: int, patience: Patience) -> urllib3.PoolManager:
    """Connections that follow redirects and the environment's proxy, and leave every other retry to us."""
    settings: dict[str, Any] = {
        "maxsize": connections,
        "timeout": urllib3.Timeout(connect=patience.timeout_s, read=patience.timeout_s),
        "retries": urllib3.Retry(total=None, connect=0, read=0, redirect=5, status=0, other=0),
        "headers": {"Accept-Encoding": "identity", "User-Agent": f"avrl/{__version__}"},
    }
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, **settings)
    return urllib3.PoolManager(**settings)
