"""A frame store in a bucket: shards come to this disk while training runs, and what is not here yet is read from afar.

A batch of random pairs touches as many shards as it has frames, so waiting for whole shards would stall the first
steps for the whole store, and a cache that is smaller than the store would be of no use if it threw shards away.
Hence: a shard that is here is read here; any other gives single frames by their ranges, checked by the same crc32c.
Shards are fetched beside the training and verified by the manifest's SHA-256, until all are here or the cap is reached.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import queue
import shutil
import threading
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl.artifact import MANIFEST, Artifact, load, sha256_of, write_durably
from avrl.errors import AvrlError, IntegrityError, NotFoundError, StaleError
from avrl.http import download
from avrl.s3 import Object, read_manifest
from avrl.server import Patience
from avrl.store import CRC, EMPTY, ORIGIN, SLOT, FrameStore, Shard, intact

if TYPE_CHECKING:
    from pathlib import Path

    from avrl.cache import Cache
    from avrl.server import Published

log = logging.getLogger(__name__)

SPARE_BYTES = 10**9  # left free on the disk, whatever the cap
CHUNK_BYTES = 2**20
CONNECTIONS = 16


def mirrored(url: str, cache: Cache, cap_bytes: int) -> Artifact:
    """The frames artifact that lies below an address, with everything here but its shards.

    Args:
        url: ``s3://bucket/prefix/<artifact>``, as ``--mirror`` has told it.
        cache: Where shards will lie, in a folder of its own.
        cap_bytes: Disk that they may take; 0 means all but 1 GB of what is free.

    Raises:
        NotFoundError: there is no finished artifact.
        IntegrityError: a file is not what the manifest lists.
    """
    values = read_manifest(url)
    if values is None:
        raise NotFoundError(f"{url} holds no manifest.json: no finished artifact is there", "mirror it with --mirror")
    root = cache.root / "frames" / f".s3-{url.rstrip('/').rpartition('/')[2]}"
    root.mkdir(parents=True, exist_ok=True)
    write_durably(root / MANIFEST, json.dumps(values, indent=1, sort_keys=True).encode())
    found = load(root)
    for file in found.manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise IntegrityError(f"{url}: its manifest lists {file.path!r}, which leaves its folder", "do not use it")
        if "/c/" not in file.path:
            _bring(url, root, file.path, file.sha256)
    write_durably(root / ORIGIN, json.dumps({"url": url, "cap_bytes": cap_bytes}).encode())
    return found


def _bring(url: str, root: Path, name: str, sha256: str) -> None:
    """Fetch one file of the artifact, unless it is here and good; its name appears when its checksum was compared."""
    target = root / name
    if target.is_file() and sha256_of(target) == sha256:
        return
    arriving = target.with_name(target.name + ".arriving")
    download(f"{url.rstrip('/')}/{name}", arriving)
    if sha256_of(arriving) != sha256:
        arriving.unlink()
        raise IntegrityError(f"{url}/{name} is not what its manifest lists", "mirror the artifact again")
    arriving.replace(target)


class _FarShard:
    """A shard in the bucket: its index is read once, each chunk by its range."""

    def __init__(self, source: Object, n_bytes: int, slots: int) -> None:
        self._source = source
        self._file: Published = source.patiently(source.ask)
        if self._file.length != n_bytes:
            raise StaleError(f"{source.shown} is not what its manifest lists", "mirror the artifact again")
        length = slots * SLOT.size + CRC.size
        sealed = self._span(n_bytes - length, length)
        if not intact(sealed):
            raise ValueError("is damaged: its index has another crc32c")
        self._index = np.frombuffer(sealed[: -CRC.size], "<u8").reshape(slots, 2)

    def _span(self, start: int, n_bytes: int) -> bytes:
        def attempt() -> bytes:
            with self._source.range(self._file, start, n_bytes) as body:
                return b"".join(body.stream(CHUNK_BYTES))

        return self._source.patiently(attempt)

    def chunk(self, slot: int) -> bytes | None:
        """A sealed chunk, or None if the slot is empty."""
        offset, length = map(int, self._index[slot])
        return None if offset == EMPTY else self._span(offset, length)


class RemoteStore(FrameStore):
    """A frame store whose shards arrive while it is read; see the module.

    Raises:
        TemporaryError: the bucket fails; StaleError: it holds something else now.
    """

    def __init__(self, root: Path, threads: int = 2) -> None:
        super().__init__(root, threads)
        told: dict[str, Any] = json.loads((root / ORIGIN).read_text())
        self._url, self._cap = told["url"].rstrip("/"), int(told["cap_bytes"])
        self._files = {file.path: file for file in load(root).manifest.files}
        self._far: dict[int, _FarShard] = {}
        self._client = Object(f"{self._url}/{MANIFEST}", CONNECTIONS, Patience()).client
        self._asked: set[int] = set()
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        # A daemon: whatever it has not fetched when training ends is not worth waiting for.
        threading.Thread(target=self._fetch, daemon=True).start()

    def _open(self, number: int) -> Shard | _FarShard:  # type: ignore[override]
        path = self._path(number)
        if path.exists():
            self._far.pop(number, None)
            return super()._open(number)
        if number not in self._asked:
            self._asked.add(number)
            self._queue.put(number)
        if number not in self._far:
            file = self._files[path.relative_to(self.root).as_posix()]
            source = Object(f"{self._url}/{file.path}", CONNECTIONS, Patience(), self._client)
            self._far.setdefault(number, _FarShard(source, file.bytes, self._slots))
        return self._far[number]

    def _fetch(self) -> None:
        """Bring the shards that were asked for; what fails is told, and read from afar as before."""
        while True:
            file = self._files[self._path(self._queue.get()).relative_to(self.root).as_posix()]
            target = self.root / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(BlockingIOError), target.with_name("lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else another rank brings it
                try:
                    if self._room(file.bytes):
                        _bring(self._url, self.root, file.path, file.sha256)
                except (AvrlError, OSError) as error:
                    log.warning("%s stays where it is: %s", file.path, error)

    def _room(self, n_bytes: int) -> bool:
        """Whether a shard may still come: below the cap, and with some of the disk left free."""
        here = sum(one.stat().st_size for one in self.root.glob("frames.zarr/frames/c/*/0/0/0"))
        free = shutil.disk_usage(self.root).free - SPARE_BYTES
        return n_bytes <= free and (not self._cap or here + n_bytes <= self._cap)
