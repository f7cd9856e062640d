"""Some tensors of a checkpoint that stays where it is: its headers are read by range, then only those tensors.

The vision tower of a policy of 15 GB has 1.5 GB. A safetensors file begins with the length of its header (8 bytes,
little endian) and the header (JSON: name -> dtype, shape, first and last byte), so it tells where every tensor lies:
https://huggingface.co/docs/safetensors. The tensors wanted are written as one safetensors file of their own, by
`avrl.http.download`: resumed after a kill, every part with its checksum, its name only when it is whole.

What nobody publishes is a checksum of such a part: between two ends, the bytes are as good as the connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from avrl import http
from avrl.errors import IntegrityError
from avrl.server import OVER, Origin, Patience, Published, Server, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Bytes an element, of the types that weights are published in.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MAX_HEADER = 10**8  # the format's own bound
WHOLE = "fetch the whole checkpoint, and pass its folder as --weights"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: type, shape, and where its bytes lie, from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def header(data: bytes, n_bytes: int, file: str) -> list[Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Args:
        data: Its header.
        n_bytes: How many bytes follow the header.
        file: Its name, for errors.

    Raises:
        IntegrityError: no such header, or one that lies: types and shapes do not give the bytes, or the tensors do
            not lie one behind the other from the header to the end of the file.
    """
    try:
        told = json.loads(data)
        told.pop("__metadata__", None)
        found = [_stored(name, **one) for name, one in told.items()]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        words = str(error) if type(error) is ValueError else "it is not in the format"
        raise IntegrityError(f"{file} is no safetensors file, by its header: {words}", WHOLE) from None
    found.sort(key=lambda one: (one.start, one.n_bytes))
    end = 0
    for one in found:
        if one.start != end:
            raise IntegrityError(f"{file}: the bytes of {one.name!r} begin at {one.start} instead of {end}", WHOLE)
        end += one.n_bytes
    if end != n_bytes:
        raise IntegrityError(f"{file}: its header tells of {end} bytes, {n_bytes} follow it", WHOLE)
    return found


def _stored(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    start, end = data_offsets
    if not all(type(one) is int and one >= 0 for one in (start, end, *shape)):
        raise ValueError(f"{name!r} has a number that is none")
    if end - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{name!r} ({dtype} {shape}) has {end - start} bytes")
    return Stored(name, dtype, tuple(shape), start, end - start)


@dataclass(frozen=True)
class _Piece:
    """Bytes of a remote file that are consecutive there and here."""

    server: Server
    published: Published
    start: int
    n_bytes: int


class Selection(Origin):
    """Some tensors of remote safetensors files, as if they were a file of their own that serves ranges.

    Args:
        url: Address of the checkpoint's folder.
        files: File there -> the tensors wanted of it, or a part of their names.
        told: Metadata of the new file.

    Raises:
        IntegrityError: a file without ranges, without such tensors, or with a header that lies.
        NotFoundError, TemporaryError: as `Server`.
    """

    def __init__(
        self, url: str, files: dict[str, set[str] | str], told: dict[str, str], connections: int, patience: Patience
    ) -> None:
        super().__init__(shown(url), patience)
        self._servers: list[Server] = []
        self._pieces: list[_Piece] = []
        self._versions: list[str] = []
        head: dict[str, Any] = {"__metadata__": told}
        at = 0
        for file, wanted in files.items():
            server = Server(f"{url}/{quote(file)}", connections, patience)
            self._servers.append(server)
            published, begin, tensors = _open(server)
            chosen = [one for one in tensors if (wanted in one.name if isinstance(wanted, str) else one.name in wanted)]
            absent = wanted - {one.name for one in chosen} if isinstance(wanted, set) else set()
            if absent or not chosen:
                raise IntegrityError(f"{server.shown} has no {min(absent, default=wanted)!r}", WHOLE)
            self._versions.append(published.etag or published.modified)
            for one in chosen:
                head[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [at, at + one.n_bytes]}
                at += one.n_bytes
                self._add(_Piece(server, published, begin + one.start, one.n_bytes))
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format wants it
        self._head = len(text).to_bytes(8, "little") + text
        self.length = len(self._head) + at

    def _add(self, piece: _Piece) -> None:
        """Neighbours there are fetched at once."""
        last = self._pieces[-1] if self._pieces else None
        if last and last.server is piece.server and last.start + last.n_bytes == piece.start:
            self._pieces[-1] = _Piece(last.server, last.published, last.start, last.n_bytes + piece.n_bytes)
        else:
            self._pieces.append(piece)

    def ask(self) -> Published:
        """Length and version, which is that of all files together and of what is taken out of them."""
        version = hashlib.sha256(repr((self._versions, self._head)).encode()).hexdigest()
        known = all(self._versions)  # without a version, a killed fetch starts over
        return Published(self.shown, version if known else "", "", self.length, ranged=True)

    @contextlib.contextmanager
    def range(self, file: Published, start: int, n_bytes: int) -> Iterator[_Stretch]:
        """See `Origin`."""
        yield _Stretch(self._head[start : start + n_bytes], self._between(start, n_bytes))

    def _between(self, start: int, n_bytes: int) -> Iterator[_Piece]:
        """The bytes from `start` on, without those of the header."""
        at = len(self._head)
        for one in self._pieces:
            first, last = max(start, at), min(start + n_bytes, at + one.n_bytes)
            if first < last:
                yield _Piece(one.server, one.published, one.start + first - at, last - first)
            at += one.n_bytes

    def close(self) -> None:
        """Give connections back."""
        for one in self._servers:
            one.close()


class _Stretch:
    """The body of an answer that is put together: the header's bytes, then those of the pieces."""

    def __init__(self, head: bytes, pieces: Iterator[_Piece]) -> None:
        self._head, self._pieces = head, pieces

    def stream(self, amt: int, /) -> Iterator[bytes]:
        if self._head:
            yield self._head
        for one in self._pieces:
            got = 0
            with one.server.range(one.published, one.start, one.n_bytes) as body:
                for chunk in body.stream(amt):
                    got += len(chunk)
                    if got > one.n_bytes:
                        break
                    yield chunk
            if got != one.n_bytes:  # here and not at the end: the next piece would lie in the wrong place
                raise IntegrityError(f"{one.server.shown}: {got} of {one.n_bytes} bytes came", OVER)


def _open(server: Server) -> tuple[Published, int, list[Stored]]:
    """What is published at an address, where its tensors' bytes begin, and the tensors."""
    published = server.patiently(server.ask)
    if not published.ranged or published.length is None:
        raise IntegrityError(f"{server.shown} does not serve parts of a file", WHOLE)
    size = int.from_bytes(_read(server, published, 0, 8), "little")
    if not 2 <= size <= min(MAX_HEADER, published.length - 8):
        raise IntegrityError(f"{server.shown} is no safetensors file: a header of {size} bytes", WHOLE)
    data = _read(server, published, 8, size)
    return published, 8 + size, header(data, published.length - 8 - size, server.shown)


def _read(server: Server, published: Published, start: int, n_bytes: int) -> bytes:
    data = server.read(published, start, n_bytes)
    if len(data) != n_bytes:
        raise IntegrityError(f"{server.shown}: {len(data)} of {n_bytes} bytes came", OVER)
    return data


def fetch(
    url: str,
    files: dict[str, set[str] | str],
    target: Path,
    told: dict[str, str],
    *,
    progress: http.Progress = lambda _: None,
    patience: Patience | None = None,
    workers: int = 4,
) -> None:
    """Write some tensors of remote files to one safetensors file; a killed call goes on where it stopped.

    Args:
        url: Address of the folder with the files.
        files: File there -> the tensors wanted of it, or a part of their names.
        target: Its name appears only when the file is whole.
        told: Metadata of the new file.
        progress: Called with bytes gained.
        patience: Tries, pauses and time-outs.
        workers: Ranges fetched side by side.

    Raises:
        NotFoundError: 404, or access refused.
        IntegrityError: a server without Range, a header that lies, a file that changed, a body too short or long.
        TemporaryError: the server failed more often than `patience` bears.
        DiskFullError: it does not fit.
    """
    with contextlib.closing(Selection(url, files, told, workers, patience or Patience())) as origin:
        http.download(url, target, workers=workers, progress=progress, origin=origin)
