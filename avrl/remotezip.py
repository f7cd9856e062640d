"""A zip that stays where it is: its directory of members is read once, each member by one range.

The directory is at the end of a zip and tells where every member lies, so ten clips of a part of 322 GB cost ten clips.
A worker that decodes members as they arrive keeps one of them at a time, and nobody ever keeps the zip.
"""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from avrl import zips
from avrl.errors import IntegrityError, StaleError
from avrl.http import connect
from avrl.server import Patience, Published

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from avrl.server import Origin

TAIL_BYTES = 2**16  # of the first read: the end record and its longest comment
MAX_DIRECTORY = 2**28  # 256 MB: some two million members; a lie beyond it is not followed
HEADER_BYTES = 30 + 2 * 2**16 + 24  # of a local header with its longest name and extra field, and a data descriptor
SUFFIX, DIRECTORY = ".remote", ".directory"  # what is kept of a zip: where and which it is, and its last bytes


class _Window(io.RawIOBase):
    """The remote file as `zipfile` wants it: seekable, but only its end and the span that is held can be read."""

    def __init__(self, name: str, remote: Origin, file: Published, tail: bytes = b"") -> None:
        self.name = name  # `zipfile` takes it for the archive's, and errors show it
        self._remote, self._file, self.length = remote, file, file.length or 0
        self._at, self.tail, self._sealed = 0, tail, bool(tail)
        self._held: tuple[int, bytes] = (0, b"")

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.length)[whence]
        if self._at < 0:
            raise ValueError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        if self._held[0] <= self._at < self._held[0] + len(self._held[1]):
            start, data = self._held
        else:
            if self._at < self.length - len(self.tail):
                self._reach(self._at)
            start, data = self.length - len(self.tail), self.tail
        piece = data[self._at - start : self._at - start + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seal(self, start: int) -> None:
        """The directory begins here: nothing before it is read any more unless it is held."""
        self.tail, self._sealed = self.tail[start - self.length :], True

    def hold(self, start: int, n_bytes: int) -> None:
        """Fetch a span and serve reads from it; the one held before is forgotten."""
        self._held = start, self._fetch(start, n_bytes)

    def _reach(self, start: int) -> None:
        """Extend what is known of the end downwards: the directory lies there."""
        start = max(0, min(start, self.length - TAIL_BYTES))
        if self._sealed or self.length - start > MAX_DIRECTORY:
            raise EOFError("points outside its own bytes")
        self.tail = self._fetch(start, self.length - len(self.tail) - start) + self.tail

    def _fetch(self, start: int, n_bytes: int) -> bytes:
        try:
            data = self._remote.read(self._file, start, n_bytes)
        except IntegrityError as error:  # of the server, not of a member: no reason to drop one
            folder = Path(self.name).parent
            step = f"rm -r {folder} and" if self._sealed and folder.is_dir() else ""
            raise StaleError(error.cause, f"{step} run the same command again".strip()) from None
        if len(data) != n_bytes:
            raise StaleError(f"{self._remote.shown}: {len(data)} of {n_bytes} bytes came", "run the same command again")
        return data


class RemoteZip:
    """A zip at an address.

    Attributes:
        name: Its address, as it may be shown, or the path that it was recalled by.
        members: Its directory, checked (`avrl.zips`).

    Raises:
        IntegrityError: no zip, or a hostile one.
        TemporaryError: the server does not answer; NotFoundError: it is not there, or access is refused.
    """

    def __init__(self, url: str, *, patience: Patience | None = None) -> None:
        remote = connect(url, 1, patience or Patience())
        published = remote.patiently(remote.ask)
        if not published.ranged:
            raise IntegrityError(f"{remote.shown} does not serve parts of a file", "fetch it whole: avrl fetch")
        self._begin(url, remote.shown, remote, published)

    def _begin(self, url: str, name: str, remote: Origin, published: Published, tail: bytes = b"") -> None:
        self._url, self._published = url, published
        self.name, self._window = name, _Window(name, remote, published, tail)
        with zips.damage_named(self.name):
            self._archive = zipfile.ZipFile(self._window)
        self._window.seal(self._archive.start_dir)
        self.members = zips.checked(self._archive, self.name)
        ends = sorted([*(one.header_offset for one in self.members), self._archive.start_dir])
        self._next = dict(itertools.pairwise(ends))

    def save(self, path: Path, wanted: list[str] | None = None) -> None:
        """Write ``<path>.remote`` and ``<path>.directory``, from which `recall` opens the zip without asking for it.

        Args:
            path: Where the zip itself would lie.
            wanted: Members to be seen by those who open it; all of them if not given.
        """
        told = {"url": self._url, **asdict(self._published), "members": wanted}
        path.with_name(path.name + DIRECTORY).write_bytes(self._window.tail)
        path.with_name(path.name + SUFFIX).write_text(json.dumps(told, indent=1))

    @classmethod
    def recall(cls, path: Path, *, patience: Patience | None = None) -> RemoteZip:
        """Open a zip that `save` has told of; it is still the same one, or reading a member raises `StaleError`."""
        told = json.loads(path.with_name(path.name + SUFFIX).read_text())
        url, wanted = told.pop("url"), told.pop("members")
        remote, zipped = connect(url, 1, patience or Patience()), cls.__new__(cls)
        tail = path.with_name(path.name + DIRECTORY).read_bytes()
        zipped._begin(url, str(path), remote, Published(url=remote.shown, **told), tail)
        if wanted is not None:
            names = set(wanted)
            zipped.members = [one for one in zipped.members if one.filename in names]
        return zipped

    def copy(self, name: str, target: Path) -> None:
        """Fetch one member to a file, comparing its CRC and its length; what came damaged is asked for once more.

        Raises:
            IntegrityError: the member is missing, or damaged where it lies; no file is left behind.
            StaleError: the zip is another one now. TemporaryError: the server fails.
        """
        try:
            self._copy(name, target)
        except IntegrityError:
            self._copy(name, target)

    def _copy(self, name: str, target: Path) -> None:
        one = self._archive.NameToInfo.get(name)
        if one:
            end = min(self._next[one.header_offset], one.header_offset + one.compress_size + HEADER_BYTES)
            self._window.hold(one.header_offset, end - one.header_offset)
        zips.copy_member(self._archive, name, target)
