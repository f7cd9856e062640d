"""One large file over HTTP or out of a bucket, in ranges, across kills.

A part is believed only if the journal beside the file holds its CRC32C and the bytes on disk still match it;
the target's name appears only when all is there. Nothing is appended: a part lies in its place or is missing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import google_crc32c

from avrl.cache import Cache
from avrl.errors import BusyError, DiskFullError, IntegrityError
from avrl.server import CHUNK_BYTES, LATER, OVER, Origin, Patience, Published, RetryError, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Progress = Callable[[int], object]

log = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20


def download(
    url: str,
    target: Path,
    *,
    expect_bytes: int | None = None,
    workers: int = 4,
    progress: Progress = lambda _: None,
    part_bytes: int = PART_BYTES,
    patience: Patience | None = None,
    origin: Origin | None = None,
) -> None:
    """Fetch a file to `target`; a killed call goes on where it stopped, less at most one part a worker.

    Args:
        url: http, https or s3.
        target: Its name appears only when the file is whole; a file of this name is not fetched again.
        expect_bytes: Published size.
        workers: Ranges fetched side by side.
        progress: Called with bytes gained (fewer than none when a server without Range makes us start over).
        part_bytes: Size of a range.
        patience: Tries, pauses and time-outs.
        origin: Who serves it, if connected already; left open, and ended by its `stopped`.

    Raises:
        NotFoundError: 404, or access refused.
        IntegrityError: not the published length, changed on the way, or not the file at all.
        TemporaryError: the server failed more often than `patience` bears.
        DiskFullError: it does not fit; found before the first byte where the server tells the length.
    """
    part, journal = _beside(target)
    if target.is_file() and expect_bytes in (None, target.stat().st_size):
        journal.unlink(missing_ok=True)
        progress(target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    server = origin or connect(url, workers, patience or Patience())
    with contextlib.nullcontext() if origin else contextlib.closing(server):
        file = server.patiently(server.ask)
        if expect_bytes is not None and file.length not in (None, expect_bytes):
            raise IntegrityError(
                f"{file.url} has {file.length} bytes, published are {expect_bytes}",
                "if it was published anew, correct its size in avrl/sources",
            )
        there = 0
        with contextlib.suppress(FileNotFoundError):  # a twin may finish it at any time
            there = part.stat().st_blocks * 512  # an unfinished file is sparse
        Cache(target.parent).require_space((file.length or 0) - there, target.name)
        try:
            if file.ranged:
                _by_parts(server, file, target, workers, part_bytes, progress)
            elif isinstance(server, Server):
                log.warning("%s: this server cannot resume, a kill starts the file over", file.url)
                n_bytes = expect_bytes or file.length
                server.patiently(lambda: _by_stream(server, n_bytes, target, progress))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(f"no space left for {target}", f"free some and {LATER}") from None
            raise


def connect(url: str, connections: int, patience: Patience) -> Origin:
    """Whoever serves this address: a web server, or a bucket (``s3://``)."""
    if url.startswith("s3://"):  # `avrl.s3` loads boto3, which few need
        from avrl.s3 import Object

        return Object(url, connections, patience)
    return Server(url, connections, patience)


def _by_parts(server: Origin, file: Published, target: Path, workers: int, part_bytes: int, progress: Progress) -> None:
    """Fetch the ranges that the journal lacks, or that no longer match it."""
    (part, journal), length = _beside(target), file.length or 0
    done = _recall(part, journal, {**asdict(file), "part_bytes": part_bytes})
    with _opened(part, os.O_RDWR) as fd, _opened(journal, os.O_WRONLY | os.O_APPEND) as lines:
        os.ftruncate(fd, length)

        def fetch(index: int) -> int:
            start = index * part_bytes
            n_bytes = min(part_bytes, length - start)
            if index in done and google_crc32c.value(os.pread(fd, n_bytes, start)) == done[index]:
                return n_bytes
            crc = server.patiently(lambda: _copy_range(server, file, start, n_bytes, fd))
            # After the bytes, and in one write, so that neither a kill nor a second writer can misplace it.
            os.write(lines, f"{json.dumps({'part': index, 'crc32c': crc})}\n".encode())
            return n_bytes

        with ThreadPoolExecutor(workers) as threads:
            futures = [threads.submit(fetch, index) for index in range(-(-length // part_bytes))]
            try:
                for future in as_completed(futures):
                    progress(future.result())
            except BaseException:
                server.stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        _finish(fd, target)


def _copy_range(server: Origin, file: Published, start: int, n_bytes: int, fd: int) -> int:
    """Write one range into its place and return its CRC32C."""
    crc, got = 0, 0
    with server.range(file, start, n_bytes) as response:
        for chunk in response.stream(CHUNK_BYTES):
            if server.stopped.is_set():
                raise RetryError("stopped")
            if got + len(chunk) > n_bytes:
                raise IntegrityError(f"{file.url}: more than the {n_bytes} bytes asked for came", OVER)
            _write(fd, chunk, start + got)
            crc, got = google_crc32c.extend(crc, chunk), got + len(chunk)
    if got < n_bytes:
        raise IntegrityError(f"{file.url}: {got} of {n_bytes} bytes came, and no more were promised", OVER)
    return crc


def _by_stream(server: Server, length: int | None, target: Path, progress: Progress) -> None:
    """Fetch the whole file in one answer, from zero: without Range there is nothing to go on from."""
    part, got = _beside(target)[0], 0
    part.unlink(missing_ok=True)  # a new file: a left-over writer of the old one cannot reach it
    try:
        with server.answer({}) as response, _opened(part, os.O_WRONLY) as fd:
            ends = any(name in response.headers for name in ("Content-Length", "Transfer-Encoding"))
            if length is None and not ends:
                raise IntegrityError(f"{server.shown} tells no length: a cut copy would look whole", "use a mirror")
            for chunk in response.stream(CHUNK_BYTES):
                _write(fd, chunk, got)
                got += len(chunk)
                progress(len(chunk))
            # A body cut short never comes here: urllib3 has raised.
            if length not in (None, got):
                raise IntegrityError(f"{server.shown}: {got} bytes came instead of {length}", OVER)
            _finish(fd, target)
    except RetryError:
        progress(-got)
        raise


def _recall(part: Path, journal: Path, head: dict[str, Any]) -> dict[int, int]:
    """Part -> CRC32C of what an earlier run fetched of this version; else file and journal begin anew."""
    try:
        first, *rest = journal.read_text(errors="replace").splitlines()
        told = json.loads(first)
    except (FileNotFoundError, ValueError):
        rest, told = [], None
    if told == head and (head["etag"] or head["modified"]):
        with journal.open("a") as lines:
            lines.write("\n")  # ends a line that a crash has torn: it counts as no record
        return dict(record for record in map(_record, rest) if record)
    if told is not None:
        log.warning("%s is not surely what an earlier run began to fetch: starting it over", head["url"])
    # New files, not emptied ones: a left-over writer of the old version keeps writing into the old ones.
    part.unlink(missing_ok=True)
    journal.unlink(missing_ok=True)
    journal.write_text(json.dumps(head) + "\n")
    return {}


def _record(line: str) -> tuple[int, int] | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        record = json.loads(line)
        return int(record["part"]), int(record["crc32c"])
    return None


def _finish(fd: int, target: Path) -> None:
    """Sync the file and give it its name."""
    part, journal = _beside(target)
    os.fsync(fd)
    mine = os.fstat(fd)
    with contextlib.suppress(FileNotFoundError):  # a twin was first, with our bytes
        if os.path.samestat(part.stat(), mine):
            part.replace(target)
    if not (target.exists() and os.path.samestat(target.stat(), mine)):
        raise BusyError(f"another avrl has begun {target} anew", "wait for it, or stop it")
    journal.unlink(missing_ok=True)


def _beside(target: Path) -> tuple[Path, Path]:
    """The unfinished file and its journal."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".journal")


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(fd: int, chunk: bytes, offset: int) -> None:
    """Write all of a chunk: on a filling disk a write takes less than it was given before it fails."""
    view = memoryview(chunk)
    while view:
        taken = os.pwrite(fd, view, offset)
        view, offset = view[taken:], offset + taken
