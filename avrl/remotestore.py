"""A frame store in a bucket: shards come to this disk while training runs, and what is not here yet is read from afar.

A batch of random pairs touches as many shards as it has frames, so waiting for whole shards would stall the first
steps for the whole store, and a cache that is smaller than the store would be of no use if it threw shards away.
Hence: a shard that is here is read here; any other gives single frames by their ranges, checked by the same crc32c.
Shards are fetched beside the training and verified by the manifest's SHA-256, until all are here or the cap is reached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import queue
import re
import shutil
import threading
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from avrl.artifact import MANIFEST, Artifact, load, write_durably
from avrl.errors import AvrlError, ConfigError, IntegrityError, NotFoundError, StaleError
from avrl.mirror import bring, require_inside
from avrl.s3 import Object, connect, read_manifest
from avrl.server import Patience
from avrl.store import CRC, EMPTY, ORIGIN, SLOT, FrameStore, Shard, index_of, intact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.artifact import File
    from avrl.cache import Cache
    from avrl.server import Published

log = logging.getLogger(__name__)

SPARE_BYTES = 10**9  # left free on the disk, whatever the cap
CONNECTIONS = 16
FAR_SHARDS = 1024  # far indexes kept, 64 KB each
PATIENCE = Patience(attempts=9, timeout_s=15.0)  # as long as usual, but no wait for an answer delays an exit by more
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def mirrored(url: str, cache: Cache, cap_bytes: int) -> Artifact:
    """The frames artifact that lies below an address, with everything here but its shards.

    Its folder is named by its digest, so that what another content has left is never taken for its own, and within
    by its own name, which is what a checkpoint made from it tells.

    Args:
        url: ``s3://bucket/prefix/<artifact>``, as ``--mirror`` has told it.
        cache: Where shards will lie, in a folder of its own; the tables are written there even for a dry run.
        cap_bytes: Disk that they may take; 0 means all but 1 GB of what is free.

    Raises:
        ConfigError: it is no address of S3, or no frame store is there.
        NotFoundError: there is no finished artifact.
        IntegrityError: a file is not what the manifest lists.
    """
    url = url.rstrip("/")
    values = read_manifest(url)
    if values is None:
        raise NotFoundError(f"{url} holds no manifest.json: no finished artifact is there", "mirror it with --mirror")
    if values.get("stage") != "frames":
        raise ConfigError(f"{url} holds no frame store: {values.get('stage')}", "name one: avrl prep --mirror tells it")
    name, digest = url.rpartition("/")[2], str(values.get("digest"))
    if name in (".", "..") or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise IntegrityError(f"{url}/{MANIFEST} has no good name or digest", "mirror the artifact again")
    root = cache.root / "frames" / f".s3-{digest[:12]}" / name
    with _locked(root.parent / ".lock") as owner, contextlib.closing(_client(url)) as client:
        root.mkdir(exist_ok=True)
        write_durably(root / MANIFEST, json.dumps(values, indent=1, sort_keys=True).encode())
        found = load(root)
        for file in found.manifest.files:
            require_inside(file.path, url)
            if "/c/" not in file.path:
                bring(_object(url, file.path, client), root / file.path, file.sha256, owner)
        write_durably(root / ORIGIN, json.dumps({"url": url, "cap_bytes": cap_bytes}).encode())
    return found


def _client(url: str) -> Any:
    return connect(url, CONNECTIONS, PATIENCE, tries=1)


def _object(url: str, name: str, client: Any) -> Object:
    return Object(f"{url}/{name}", CONNECTIONS, PATIENCE, client)


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[str]:
    """Keep other ranks out; a name for our unfinished files, which is empty if another rank holds the lock.

    Machines never share a name, as some file systems lock within each; where there are no locks, nobody does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        owner = os.uname().nodename
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | flags)
        except BlockingIOError:
            owner = ""
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            owner += f"-{uuid4().hex}"
        yield owner


class _FarShard:
    """A shard in the bucket: its index is read once, each chunk by its range."""

    def __init__(self, source: Object, n_bytes: int, slots: int) -> None:
        self._source = source
        self._file: Published = source.patiently(source.ask)
        if self._file.length != n_bytes:
            raise StaleError(f"{source.shown} is not what its manifest lists", "mirror the artifact again")
        length = slots * SLOT.size + CRC.size
        self._index = index_of(self._sealed(n_bytes - length, length), slots, n_bytes - length)

    def _sealed(self, start: int, n_bytes: int) -> bytes:
        """A sealed span; what does not match its crc32c comes once more, for the way may have damaged it."""
        sealed = self._source.read(self._file, start, n_bytes)
        return sealed if intact(sealed) else self._source.read(self._file, start, n_bytes)

    def chunk(self, slot: int) -> bytes | None:
        """A sealed chunk, or None if the slot is empty."""
        offset, length = map(int, self._index[slot])
        return None if offset == EMPTY else self._sealed(offset, length)


class RemoteStore(FrameStore):
    """A frame store whose shards arrive while it is read; see the module.

    Raises:
        TemporaryError: the bucket fails; StaleError: it holds something else now.
    """

    def __init__(self, root: Path, threads: int = 2) -> None:
        super().__init__(root, threads)
        told: dict[str, Any] = json.loads((root / ORIGIN).read_text())
        self._url, self._cap = told["url"], int(told["cap_bytes"])
        self._files = {file.path: file for file in load(root).manifest.files}
        self._far = lru_cache(FAR_SHARDS)(self._far_shard)
        self._client, self._stopped = _client(self._url), threading.Event()
        self._coming: Object | None = None
        self._left, self._recount_below = 0, 1  # bytes below the cap; how few are reason to count again
        self._asked: set[int] = set()
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        _stores.add(self)
        # A daemon: whatever it has not fetched when training ends is not worth waiting for.
        threading.Thread(target=self._fetch, daemon=True).start()

    def close(self) -> None:
        """Fetch no more, and let no read wait for the bucket; done by itself when the process ends."""
        self._stopped.set()
        self._queue.put(None)
        if coming := self._coming:
            coming.stopped.set()

    def _file(self, number: int) -> File:
        return self._files[self._path(number).relative_to(self.root).as_posix()]

    def _far_shard(self, number: int) -> _FarShard:
        file = self._file(number)
        source = _object(self._url, file.path, self._client)
        source.stopped = self._stopped
        return _FarShard(source, file.bytes, self._slots)

    def _open(self, number: int) -> Shard | _FarShard:  # type: ignore[override]
        if self._path(number).exists():
            return super()._open(number)
        if number not in self._asked:
            self._asked.add(number)
            self._queue.put(number)
        return self._far(number)

    def _error(self, number: int, words: str) -> IntegrityError:
        if (path := self._path(number)).exists():
            return IntegrityError(f"{path} {words}", f"rm {path} and run the same command: it comes again")
        return IntegrityError(f"{self._url}/{self._file(number).path} {words}", "mirror the artifact again")

    def _fetch(self) -> None:
        """Bring the shards that were asked for; what fails is told, and read from afar as before."""
        while (number := self._queue.get()) is not None:
            file, path = self._file(number), self._path(number)
            try:
                with _locked(path.with_name("lock"), fcntl.LOCK_NB) as owner:
                    if not owner or path.exists() or not self._room(file.bytes):  # or another rank brings it
                        continue
                    self._coming = _object(self._url, file.path, self._client)  # its `stopped` ends it alone
                    if self._stopped.is_set():
                        return
                    bring(self._coming, path, file.sha256, owner)
                    self._left -= file.bytes
            except (AvrlError, OSError, RuntimeError) as error:  # RuntimeError: no more threads
                if self._stopped.is_set():
                    return
                log.warning("%s stays where it is: %s", file.path, error)

    def _room(self, n_bytes: int) -> bool:
        """Whether a shard may still come: below the cap, and with some of the disk left free.

        Other ranks bring shards too: what is here is counted again whenever a 16th of the room has gone to ours.
        """
        if n_bytes > shutil.disk_usage(self.root).free - SPARE_BYTES:
            return False
        if self._cap and self._left - n_bytes < self._recount_below:
            here = sum(one.stat().st_size for one in self.root.glob("frames.zarr/frames/c/*/0/0/0"))
            self._left = self._cap - here
            # Nothing here ever goes: once it is full, there is no more to count.
            self._recount_below = self._left * 15 // 16 if n_bytes <= self._left else -(2**63)
        return not self._cap or n_bytes <= self._left


_stores: weakref.WeakSet[RemoteStore] = weakref.WeakSet()


def _close_all() -> None:
    for one in list(_stores):
        one.close()


# Not `atexit`, which comes after the threads of every executor were waited for.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
