"""An artifact on S3: data objects first, the manifest last. Readers trust only what a manifest lists.

An object counts as sent when S3 tells its size, the SHA-256 that we gave it and, where it keeps one, the CRC32 of the
bytes that it holds. A killed upload goes on at the file it was at.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import threading
import zlib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from avrl.artifact import MANIFEST, File, sha256_of, spoilt
from avrl.errors import IntegrityError, NotFoundError, TemporaryError
from avrl.http import download
from avrl.s3 import Object, connect, told
from avrl.server import LATER, Patience, RetryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

SHA256, CRC32 = "avrl-sha256", "avrl-crc32"  # metadata of our objects: hex, and base64 as S3 tells it
PART_BYTES = 16 * 2**20
TRIES_OF_A_PART = 3  # boto3's own, within one try of ours: a failed part must not send a whole file again
WORKERS = 8
LOOK_S = 0.2  # between looks at whether to stop


def upload(
    files: list[File],
    root: Path,
    url: str,
    *,
    progress: Callable[[int], object] = lambda _: None,
    patience: Patience | None = None,
    part_bytes: int = PART_BYTES,
    stopped: threading.Event | None = None,
) -> str:
    """Mirror a finished artifact to ``<url>/<its name>/``, the manifest last; what is there already is not sent again.

    The credentials need s3:GetObject, PutObject, DeleteObject, AbortMultipartUpload on the objects, and s3:ListBucket,
    ListBucketMultipartUploads on the bucket: without ListBucket, S3 says of a missing object that access is refused.

    Args:
        files: All of its files, as its manifest lists them; links are sent by content.
        root: Its directory.
        url: ``s3://bucket/prefix``.
        progress: Called with bytes gained, the manifest's too (fewer than none when a file is sent again).
        patience: Tries, pauses and time-outs.
        part_bytes: Files above this size are sent in parts of it; S3 takes none below 5 MiB.
        stopped: Set from another thread to end it, with a `TemporaryError`, within a time-out of `patience`.

    Returns:
        Address of the mirrored directory.

    Raises:
        NotFoundError: no such bucket, access refused, or no finished artifact.
        IntegrityError: a file here, or an object there, is not what the manifest says.
        TemporaryError: the server failed more often than `patience` bears.
    """
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    if not (root / MANIFEST).is_file():
        raise NotFoundError(f"{root} has no {MANIFEST}: it is no finished artifact", "run its verb again")
    last = File(MANIFEST, (root / MANIFEST).stat().st_size, sha256_of(root / MANIFEST))
    there, patience = f"{url.rstrip('/')}/{root.name}", patience or Patience()
    client = connect(there, 2 * WORKERS, patience, tries=TRIES_OF_A_PART)
    settings = TransferConfig(part_bytes, WORKERS, part_bytes, preferred_transfer_client="classic")
    # On a failure the transfers are cancelled first, then the threads that wait for them end.
    with (
        contextlib.closing(client),
        ThreadPoolExecutor(WORKERS) as threads,
        create_transfer_manager(client, settings) as transfers,
    ):
        mirror = _Mirror(root, there, client, transfers, progress, patience)
        try:
            abort_leftovers(mirror.object(""))
            for some in (files, [last]):
                for act in (mirror.send, mirror.check):
                    mirror.finish({threads.submit(act, file) for file in some}, stopped)
        except BaseException:
            mirror.stopped.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return there


class _Mirror:
    """One directory on its way to S3."""

    def __init__(
        self, root: Path, url: str, client: Any, transfers: Any, progress: Callable[[int], object], patience: Patience
    ) -> None:
        self.root, self.url, self.client, self.transfers = root, url, client, transfers
        self.progress, self.patience = progress, patience
        self.stopped, self.lock, self.vouched = threading.Event(), threading.Lock(), True

    def finish(self, pending: set[Future[None]], stopped: threading.Event | None) -> None:
        """Wait for the threads, unless one fails or the caller wants no more."""
        while pending:
            done, pending = wait(pending, LOOK_S, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if stopped and stopped.is_set():
                raise TemporaryError(f"{self.url}: stopped on the way", LATER)

    def object(self, path: str) -> Object:
        one = Object(f"{self.url}/{path}", 1, self.patience, self.client)
        one.stopped = self.stopped
        return one

    def send(self, file: File) -> None:
        """Send a file unless it is there."""
        path, there = self.root / file.path, self.object(file.path)
        sums = functools.cache(lambda: _sums(self.root, file))

        def attempt() -> None:
            if _is(there.head(), file):
                self.progress(file.bytes)
                return
            if self.stopped.is_set():
                raise RetryError("stopped")
            sha256, crc32 = sums()
            if file.path != MANIFEST:
                self.withdraw_manifest()
            self.put(path, there, sha256, crc32)

        there.patiently(attempt)

    def put(self, path: Path, there: Object, sha256: str, crc32: str) -> None:
        from boto3.s3.transfer import ProgressCallbackInvoker

        extra: dict[str, Any] = {"Metadata": {SHA256: sha256, CRC32: crc32}}
        if self.client.meta.config.request_checksum_calculation != "when_required":
            extra["ChecksumCRC32"] = crc32  # S3 itself refuses other bytes than these
        gained = 0

        def gain(n_bytes: int) -> None:
            nonlocal gained
            with self.lock:
                gained += n_bytes
                self.progress(n_bytes)

        try:
            with told(there.shown):
                where = (there.where["Bucket"], there.where["Key"])
                self.transfers.upload(str(path), *where, extra, [ProgressCallbackInvoker(gain)]).result()
        except BaseException:
            gain(-gained)
            raise

    def withdraw_manifest(self) -> None:
        """Remove an earlier manifest before the first object below it changes."""
        manifest = self.object(MANIFEST)
        with self.lock:
            if self.vouched and manifest.head():
                with told(manifest.shown):
                    self.client.delete_object(**manifest.where)
            self.vouched = False

    def check(self, file: File) -> None:
        """Believe only what S3 says of the object itself; it may need a while to say anything."""
        there = self.object(file.path)

        def attempt() -> dict[str, Any]:
            found = there.head()
            if not found:
                raise RetryError("it was sent, but is not there")
            return found

        if not _is(there.patiently(attempt), file):
            raise IntegrityError(f"{there.shown} is not what was sent", "run the same command again: it is sent anew")


def abort_leftovers(folder: Object) -> None:
    """End the multipart uploads that a kill has left below an address: unseen by a listing, they are paid for."""

    def abort() -> None:
        with told(folder.shown):
            pages = folder.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=folder.where["Bucket"], Prefix=folder.where["Key"]):
                for one in page.get("Uploads", []):
                    which = {"Bucket": folder.where["Bucket"], "Key": one["Key"], "UploadId": one["UploadId"]}
                    with contextlib.suppress(folder.client.exceptions.NoSuchUpload):  # an old listing
                        folder.client.abort_multipart_upload(**which)

    folder.patiently(abort)


def bring(source: Object, target: Path, sha256: str, owner: str) -> None:
    """Fetch one file of a mirrored artifact, unless it is here and good.

    Its name appears when its checksum was compared; until then it bears its owner's.

    Raises:
        IntegrityError: it is not what its manifest lists.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return
    arriving = target.with_name(f"{target.name}.{owner}.arriving")
    download(source.shown, arriving, origin=source)
    if sha256_of(arriving) != sha256:
        arriving.unlink()
        raise IntegrityError(f"{source.shown} is not what its manifest lists", "mirror the artifact again")
    arriving.replace(target)


def require_inside(path: str, url: str) -> None:
    """Refuse a path of a stranger's manifest that would leave its folder.

    Raises:
        IntegrityError: it would.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise IntegrityError(f"{url}: its manifest lists {path!r}, which leaves its folder", "do not use it")


def _is(head: dict[str, Any] | None, file: File) -> bool:
    """Whether this is the object of a file: size, our checksums, and S3's own of the bytes that it holds."""
    if not head:
        return False
    said = {name.lower(): value for name, value in head["Metadata"].items()}  # some stores write Avrl-Sha256
    stored = head.get("ChecksumCRC32", "-")
    return (
        head["ContentLength"] == file.bytes
        and said.get(SHA256) == file.sha256
        and ("-" in stored or stored == said.get(CRC32))  # with a dash: of the parts' checksums, or none
    )


def _sums(root: Path, file: File) -> tuple[str, str]:
    """SHA-256 in hex and CRC32 in base64 of a file that must be what its manifest says."""
    path, sha256, crc32 = root / file.path, hashlib.sha256(), 0
    rotten = spoilt(path, root)
    if not path.is_file():
        raise rotten
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            sha256.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    if sha256.hexdigest() != file.sha256:
        raise rotten
    return file.sha256, base64.b64encode(crc32.to_bytes(4, "big")).decode()
