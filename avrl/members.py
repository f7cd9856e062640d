"""Some members of a zip: chosen by task and number, fetched by their ranges, packed into a zip of their own.

A member that lies in the scratch folder is done if its size and CRC are those of the zip's directory as it is now; a
killed call fetches again at most one member a worker.
"""

from __future__ import annotations

import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from avrl import zips
from avrl.remotezip import SUFFIX, RemoteZip

if TYPE_CHECKING:
    from collections.abc import Callable


CHUNK_BYTES = 2**20


def directory(place: str | Path) -> list[zipfile.ZipInfo]:
    """The checked members of a zip at an address or in a file."""
    return RemoteZip(place).members if isinstance(place, str) else zips.check(place)


def extract(
    place: str | Path,
    names: list[str],
    target: Path,
    scratch: Path,
    *,
    workers: int = 4,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Make a zip of some members of another.

    Args:
        place: Address or file of the other zip.
        names: Members wanted.
        target: The new zip; its name appears when it is whole.
        scratch: Folder for members on their way; what an interrupted call left there is kept.
        workers: Members fetched side by side.
        progress: Called with bytes gained.

    Raises:
        IntegrityError: a member is missing or damaged where it lies.
        TemporaryError: the server fails.
    """
    own = threading.local()  # a zip a thread: reading one seeks in it

    def fetch(name: str) -> int:
        done, one = scratch / name, wanted[name]
        if not (done.exists() and done.stat().st_size == one.file_size and _crc32(done) == one.CRC):
            done.parent.mkdir(parents=True, exist_ok=True)
            temporary = done.with_name(done.name + ".tmp")
            if not hasattr(own, "zip"):
                own.zip = RemoteZip.recall(scratch / target.name) if far else zipfile.ZipFile(place)
            own.zip.copy(name, temporary) if far else zips.copy_member(own.zip, name, temporary)
            temporary.rename(done)
        return done.stat().st_size

    scratch.mkdir(parents=True, exist_ok=True)
    far = RemoteZip(place) if isinstance(place, str) else None
    if far:
        far.save(scratch / target.name)
    wanted = {one.filename: one for one in (far.members if far else zips.check(Path(place)))}
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(fetch, name) for name in names]
        try:
            for future in as_completed(futures):
                progress(future.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    zips.pack(scratch, names, target)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def tally(path: Path) -> dict[str, int]:
    """Files, bytes and clips of a file or a folder that has arrived; a zip is checked for wholeness and harm."""
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    n_bytes, names = sum(one.stat().st_size for one in files), [one.name for one in files]
    if path.suffix == ".zip":
        names = [one.filename for one in zips.check(path)]
    elif path.suffix == SUFFIX:  # what will come through, though it is not here
        members = RemoteZip.recall(path.with_suffix("")).members
        n_bytes, names = sum(one.compress_size for one in members), [one.filename for one in members]
    return {"files": len(files), "bytes": n_bytes, "clips": sum(name.endswith(".mp4") for name in names)}
