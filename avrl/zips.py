"""Reading zips of strangers: a name is rejected, not repaired, and nothing is ever extracted as a whole.

`check` reads only the central directory, so 92,000 members take seconds; a member's CRC is compared when it
is read. Python's own ``extractall`` renames ``../x`` silently and follows links that were there before.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from avrl.cache import size
from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MAX_MEMBERS = 20_000_000  # Bridge V2's raw zip: a picture a member, several cameras
MAX_BYTES = 10**12
MAX_RATIO = 200  # deflate reaches 1,032 on zeros; video and HDF5 stay below 10
CHUNK_BYTES = 2**20
AGAIN = "fetch it again; if it stays so, do not use it"

# What zipfile raises on bytes that were tampered with; bz2 and lzma are refused, as they would add more.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    ValueError,
    OverflowError,
    NotImplementedError,
)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check(path: Path, *, max_members: int = MAX_MEMBERS, max_bytes: int = MAX_BYTES) -> list[zipfile.ZipInfo]:
    """The members of a zip, once every name and size in its central directory has proved harmless.

    Raises:
        IntegrityError: not a whole zip, or a member is hostile; the message names zip and member.
    """
    with damage_named(str(path), path), zipfile.ZipFile(path) as archive:
        return checked(archive, str(path), max_members=max_members, max_bytes=max_bytes)


@contextlib.contextmanager
def damage_named(name: str, path: Path | None = None) -> Iterator[None]:
    """Turn what `zipfile` raises while it opens an archive into an error that names it.

    Raises:
        IntegrityError: it is not a whole zip.
    """
    try:
        yield
    except DAMAGE as error:
        what = "is cut short or damaged: its directory of members, at the end, is not readable"
        if path:
            with path.open("rb") as handle:
                what = what if handle.read(2) == b"PK" else "is not a zip"
        raise IntegrityError(f"{name} {what} ({error})", AGAIN) from error
    except OSError as error:
        if error.filename is not None:  # the file itself; a directory that points nowhere gives a bare EINVAL
            raise
        raise IntegrityError(f"{name} is damaged ({error})", AGAIN) from error


def checked(
    archive: zipfile.ZipFile, path: str, *, max_members: int = MAX_MEMBERS, max_bytes: int = MAX_BYTES
) -> list[zipfile.ZipInfo]:
    """The members of an open zip; see `check`."""
    members = archive.infolist()
    total = sum(one.file_size for one in members)
    if len(members) > max_members or total > max_bytes:
        raise IntegrityError(f"{path} claims {len(members)} members of {size(total)} in all", AGAIN)
    for one in members:
        fault = fault_of_name(one.orig_filename) or _fault_of_entry(one)
        if fault:
            raise IntegrityError(f"{path}: member {one.orig_filename!r} {fault}", AGAIN)
    _refuse_collisions(path, members)
    _refuse_overlaps(path, members, archive.start_dir)
    return members


def fault_of_name(name: str) -> str:
    """What is wrong with a name as the zip spells it (zipfile cuts it at a NUL); empty if nothing is."""
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "has a control character in its name"
    if "\\" in name:
        return "has a backslash in its name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute name"
    if any(part in ("", ".", "..") for part in name.removesuffix("/").split("/")):
        return "has a name that leaves its folder, or an empty part in it"
    return ""


def _fault_of_entry(member: zipfile.ZipInfo) -> str:
    """What is wrong with a member's type or sizes; empty if nothing is."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 0x1:
        return "is encrypted"
    if member.compress_type not in METHODS:
        return f"is compressed by method {member.compress_type}; only stored and deflated ones are read"
    stored = member.compress_type == zipfile.ZIP_STORED
    if stored and member.file_size != member.compress_size:
        return "has two different sizes"
    if not stored and member.file_size > MAX_RATIO * max(1, member.compress_size):
        return f"unpacks to more than {MAX_RATIO} times its size"
    return ""


def _refuse_collisions(path: str, members: Sequence[zipfile.ZipInfo]) -> None:
    """Two names that one disk or another takes for the same: readers would disagree on what is there."""
    seen: dict[str, str] = {}
    for one in members:
        folded = unicodedata.normalize("NFC", one.filename).casefold().rstrip("/")
        if folded in seen:
            raise IntegrityError(f"{path}: members {seen[folded]!r} and {one.filename!r} collide", AGAIN)
        seen[folded] = one.filename


def _refuse_overlaps(path: str, members: Sequence[zipfile.ZipInfo], end: int) -> None:
    """Members that share bytes are how a small zip unpacks to petabytes without a high ratio anywhere."""
    free_from = 0
    for one in sorted(members, key=lambda one: one.header_offset):
        if not free_from <= one.header_offset <= end - one.compress_size:
            raise IntegrityError(f"{path}: member {one.filename!r} overlaps another, or the directory", AGAIN)
        free_from = one.header_offset + one.compress_size


def copy_member(archive: zipfile.ZipFile | Path, name: str, target: Path) -> None:
    """Copy one member of a checked zip to a file, comparing its CRC and its length.

    Raises:
        IntegrityError: the member is missing or damaged; no file is left behind.
    """
    if isinstance(archive, Path):
        with zipfile.ZipFile(archive) as opened:
            return copy_member(opened, name, target)
    where = f"{archive.filename}:{name}"
    try:
        with archive.open(name) as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK_BYTES)
            copied, promised = writer.tell(), archive.getinfo(name).file_size
        if copied != promised:
            raise EOFError(f"{copied} of {promised} bytes")
    except KeyError:
        raise IntegrityError(f"{where} is not there", AGAIN) from None
    except (*DAMAGE, RuntimeError) as error:  # RuntimeError: encrypted
        target.unlink(missing_ok=True)
        raise IntegrityError(f"{where} is damaged ({error})", AGAIN) from error
    return None


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member of a checked zip in memory, its CRC and its length compared.

    Raises:
        IntegrityError: the member is missing, damaged or larger than the limit in bytes.
    """
    where = f"{archive.filename}:{name}"
    try:
        promised = archive.getinfo(name).file_size
        if promised > limit:
            raise ValueError(f"{promised} bytes, where {limit} are many")
        with archive.open(name) as reader:
            data = reader.read(limit + 1)
        if len(data) != promised:
            raise EOFError(f"{len(data)} of {promised} bytes")
        return data
    except KeyError:
        raise IntegrityError(f"{where} is not there", AGAIN) from None
    except (*DAMAGE, RuntimeError) as error:  # RuntimeError: encrypted
        raise IntegrityError(f"{where} is damaged ({error})", AGAIN) from error


def pack(folder: Path, names: Iterable[str], target: Path) -> None:
    """Put files below a folder into a zip, stored, dated 1980: the same files give the same bytes.

    The name shows nothing until the whole zip is there.
    """
    temporary = target.with_name(target.name + ".tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(names):
            entry = archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)
            with (folder / name).open("rb") as reader, entry as into:
                shutil.copyfileobj(reader, into, CHUNK_BYTES)
    temporary.rename(target)
