"""A training run as it lies on S3, and how it comes back to any machine.

Below ``s3://bucket/prefix`` lies what a cache has: ``.partial-<slug>-<key>/step-<n>/`` for each snapshot, and in the
end ``<slug>-<key>/``. In each folder ``manifest.json`` came last, and only what it lists is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from typing import TYPE_CHECKING

from avrl.artifact import LOOKS, MANIFEST, SCRATCH, File, load, publish, seal, write_durably
from avrl.errors import AvrlError, IntegrityError, SyncError, TemporaryError
from avrl.mirror import abort_leftovers, bring, require_inside
from avrl.s3 import MissingObjectError, Object, connect, read_manifest, told
from avrl.server import CHUNK_BYTES, Patience

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.artifact import Artifact

log = logging.getLogger(__name__)

PATIENCE = Patience(attempts=4, timeout_s=10.0)  # no silence of S3 delays the end of a run by much more than this
CONNECTIONS = 4
SNAPSHOTS = f"{SCRATCH}/snapshots"  # below a partial directory, as training writes them


class Snapshots:
    """The snapshots of one run on S3.

    Attributes:
        place: Their address, ``s3://bucket/prefix/.partial-<slug>-<key>``.
        refused: Steps of those that came back damaged.
    """

    def __init__(self, place: str, key: str) -> None:
        self.place, self.key = place, key
        self.refused: set[int] = set()

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Object]:
        with contextlib.closing(connect(self.place, CONNECTIONS, PATIENCE, tries=1)) as client:
            yield Object(f"{self.place}/", 1, PATIENCE, client)

    def bring(self, here: Path) -> None:
        """Bring the newest good one, if it is newer than those here; what is damaged is told and passed over.

        The pictures that came with it go where the run draws them.

        Raises:
            NotFoundError: no such bucket, or access refused.
            TemporaryError: S3 fails, and there is nothing here to go on from.
            IntegrityError: none on S3 is good, and there is nothing here to go on from.
        """
        newest = max(steps(here), default=-1)
        with _bearing(here):
            with self._folder() as folder:
                there = sorted((step for step in _sealed(_keys(folder)) if step > newest), reverse=True)
            for step in there:
                source, arriving = f"{self.place}/{name_of(step)}", here / f".{name_of(step)}.arriving"
                try:
                    values = read_manifest(source, PATIENCE) or {}
                    if values.get("key") != self.key:
                        raise IntegrityError("its manifest is of another request")
                    _bring_files(source, [File(**one) for one in values["files"]], arriving)
                except (IntegrityError, MissingObjectError, KeyError, TypeError) as error:
                    log.warning("snapshot %s is damaged (%s); trying the one before it", source, error)
                    self.refused.add(step)
                    shutil.rmtree(arriving, ignore_errors=True)
                    continue
                if (arriving / LOOKS).is_dir():
                    shutil.copytree(arriving / LOOKS, here.parents[1] / LOOKS, dirs_exist_ok=True)
                    shutil.rmtree(arriving / LOOKS)
                arriving.rename(here / name_of(step))
                log.info("brought %s", source)
                return
            if there and newest < 0:
                raise IntegrityError(
                    f"no snapshot in {self.place} verifies",
                    f"aws s3 rm --recursive {self.place} and run the same command: it starts over",
                )

    def remove(self, step: int) -> None:
        """Remove one, and what a kill has left of it."""
        with self._folder() as folder:
            _remove(folder, [key for key in _keys(folder) if key.startswith(f"{name_of(step)}/")])

    def retire(self, sent: int, kept: int) -> None:
        """Remove what is older than the newest good ones up to that which was just sent; never a newer one."""
        with self._folder() as folder:
            keys = _keys(folder)
            good = sorted(step for step in _sealed(keys) if step <= sent and step not in self.refused)[-kept:]
            stay = tuple(f"{name_of(step)}/" for step in good)
            old = [key for key in keys if key < name_of(sent) and not key.startswith(stay)]
            _remove(folder, old)
            abort_leftovers(folder)

    def forget(self) -> None:
        """Remove all of them, for the checkpoint is on S3; what stays there does no harm."""
        try:
            with self._folder() as folder:
                _remove(folder, _keys(folder))
                abort_leftovers(folder)
        except AvrlError as error:
            log.warning("%s stays: %s", self.place, error)


def steps(snapshots: Path) -> list[int]:
    """Steps of the snapshots in a folder of this machine, the newest first."""
    return sorted((int(path.name.partition("-")[2]) for path in snapshots.glob("step-*")), reverse=True)


def name_of(step: int) -> str:
    """A snapshot's folder, as `avrl.checkpoint` names it."""
    return f"step-{step:09d}"


def bring_artifact(url: str, partial: Path, final: Path, key: str) -> None:
    """Publish here the finished artifact of this key, if S3 has it.

    Args:
        url: ``s3://bucket/prefix``.
        partial: Where it is built.
        final: Where it belongs.
        key: Of the request.

    Raises:
        NotFoundError: no such bucket, or access refused.
        TemporaryError: S3 fails, and there is nothing here to go on from.
        IntegrityError: it is damaged there.
    """
    place, arriving = f"{url}/{final.name}", final.with_name(f".s3-{final.name}")
    with _bearing(partial / SNAPSHOTS):
        values = read_manifest(place, PATIENCE)
        if values is None:
            return
        log.info("%s is finished: bringing it", place)
        arriving.mkdir(parents=True, exist_ok=True)
        write_durably(arriving / MANIFEST, json.dumps(values, indent=1, sort_keys=True).encode())
        try:
            found = load(arriving).manifest
            if found.key != key:
                raise IntegrityError("its key is not that of this request")
            _bring_files(place, found.files, arriving)
        except (IntegrityError, MissingObjectError) as error:
            raise IntegrityError(f"{place} is damaged: {error.cause}", f"aws s3 rm --recursive {place}") from error
        if not final.exists():
            seal(arriving, found)
            publish(arriving, final)


def is_finished(url: str, name: str, partial: Path) -> bool:
    """Whether S3 has the finished artifact of this name; if it does not tell, a run that has begun here goes on."""
    with _bearing(partial / SNAPSHOTS):
        return read_manifest(f"{url}/{name}", PATIENCE) is not None
    return False


def verify(artifact: Artifact, url: str) -> None:
    """Read the mirrored artifact back, every byte of it, and compare.

    Raises:
        SyncError: a file is not there or not what its manifest says, or S3 does not tell.
    """
    place = f"{url}/{artifact.ref}"
    try:
        if read_manifest(place, PATIENCE) != json.loads((artifact.root / MANIFEST).read_bytes()):
            raise IntegrityError(f"{place}/{MANIFEST} is not the one that is here")
        with contextlib.closing(connect(place, CONNECTIONS, PATIENCE, tries=1)) as client:
            for file in artifact.manifest.files:
                source = Object(f"{place}/{file.path}", 1, PATIENCE, client)
                if source.patiently(lambda source=source: _digest(source)) != file.sha256:  # type: ignore[misc]
                    raise IntegrityError(f"{source.shown} is not what its manifest lists")
    except AvrlError as error:
        # What S3 tells of it is right, or the upload had said so: only what is not there is sent anew.
        gone = f"aws s3 rm --recursive {place} and " if isinstance(error, IntegrityError) else ""
        raise SyncError(f"shutdown withheld, {error.cause}", f"{gone}run the same command") from error


def _digest(source: Object) -> str:
    """SHA-256 (hex) of an object's bytes as they come back."""
    found = hashlib.sha256()
    with told(source.shown), contextlib.closing(source.client.get_object(**source.where)["Body"]) as body:
        for chunk in body.iter_chunks(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


@contextlib.contextmanager
def _bearing(snapshots: Path) -> Iterator[None]:
    """Bear with an S3 that fails if there is something here to go on from; else a run would start over for nothing."""
    try:
        yield
    except TemporaryError as error:
        if not steps(snapshots):
            raise
        log.warning("%s; going on from what is here", error.cause)


def _bring_files(place: str, files: list[File], folder: Path) -> None:
    """Bring what a manifest lists; what an earlier call has brought is not fetched again."""
    with contextlib.closing(connect(place, CONNECTIONS, PATIENCE, tries=1)) as client:
        for file in files:
            require_inside(file.path, place)
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            source = Object(f"{place}/{file.path}", CONNECTIONS, PATIENCE, client)
            bring(source, folder / file.path, file.sha256, os.uname().nodename)


def _keys(folder: Object) -> list[str]:
    """What lies below it, as paths from there."""
    bucket, prefix = folder.where["Bucket"], folder.where["Key"]

    def attempt() -> list[str]:
        with told(folder.shown):
            pages = folder.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [one["Key"].removeprefix(prefix) for page in pages for one in page.get("Contents", [])]

    return folder.patiently(attempt)


def _sealed(keys: list[str]) -> set[int]:
    """Steps of the snapshots that have a manifest."""
    return {int(found[1]) for key in keys if (found := re.fullmatch(rf"step-(\d+)/{re.escape(MANIFEST)}", key))}


def _remove(folder: Object, keys: list[str]) -> None:
    """Remove objects, manifests first: so none ever stands over a missing object."""

    def attempt() -> None:
        with told(folder.shown):
            for key in sorted(keys, key=lambda one: not one.endswith(f"/{MANIFEST}")):
                folder.client.delete_object(Bucket=folder.where["Bucket"], Key=folder.where["Key"] + key)

    folder.patiently(attempt)
