"""Prep: raw -> frame store. Episodes are decoded by worker processes and packed, in order, into shards.

Three kinds of done-record make any kill harmless, and each is written after what it vouches for:
``scratch/<episode>.json`` (its chunks lie in ``<episode>.blob``), ``scratch/shards-<n>.json`` (so many shards are
in place, these episodes are in the last) and ``episodes.parquet`` (all is in place). Bytes depend neither on the
number of workers, nor on where a run was killed, nor on where the cache lies.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import count, islice
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from avrl import store
from avrl.artifact import SCRATCH
from avrl.episodes import Dropped, Episode, table, write_dropped
from avrl.errors import IntegrityError, MismatchError, TemporaryError
from avrl.progress import bar
from avrl.sources import source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.episodes import View

log = logging.getLogger(__name__)

AHEAD = 4  # episodes in flight a worker: enough to ride out a long clip, few enough to keep scratch small


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to make an episode's chunks."""

    source: str
    raw: Path
    scratch: Path
    view: View
    quality: int
    drop: bool


class Packer:
    """Packs episodes into shards in order, and goes on where an earlier one was killed.

    Attributes:
        shards: Shards written.
        rows: One dict an episode placed: its fields and ``dataset_from_index``.
        dropped: Episodes that could not be decoded.
        next: Index of the first episode that no shard record vouches for.
    """

    def __init__(self, out: Path) -> None:
        self.zarr, self.scratch = out / "frames.zarr", out / SCRATCH
        self.shards = self.next = 0
        self.rows: list[dict[str, Any]] = []
        self.dropped: list[Dropped] = []
        self._waiting: list[tuple[int, int, list[int]]] = []  # episode, first byte in its blob, chunk lengths
        self._told = (0, 0)  # rows and drops that records on disk already list
        for self._records in count():
            record = _load(self._shards_record(self._records))
            if record is None:  # a later one would vouch for nothing: it lists only what came after this
                break
            self.shards, self.next = record["shards"], record["next"]
            self.rows += record["rows"]
            self.dropped += [Dropped(**one) for one in record["dropped"]]
            self._told = len(self.rows), len(self.dropped)

    def add(self, record: dict[str, Any]) -> None:
        """Place an episode behind the others; start a new shard rather than let it straddle two."""
        index: int = record["episode_index"]
        if "dropped" in record:
            self.dropped.append(Dropped(**record["dropped"]))
            log.warning("dropped %s: %s", record["dropped"]["episode_id"], record["dropped"]["reason"])
            self.next = index + 1
            return
        lengths: list[int] = record["lengths"]
        if self._waiting and len(lengths) > store.SHARD - self._filled():
            self.flush()
        first = self.shards * store.SHARD + self._filled()
        self.rows.append({**record["episode"], "dataset_from_index": first})
        for start in range(0, len(lengths), store.SHARD):
            if start:  # an episode longer than a shard: there is no point inside it to go on from
                self.flush(record=False)
            self._waiting.append((index, sum(lengths[:start]), lengths[start : start + store.SHARD]))
        self.next = index + 1

    def flush(self, *, record: bool = True) -> None:
        """Write the waiting chunks as the next shard, then its record, then forget their blobs."""
        if not self._waiting:
            return
        store.write_shard(store.shard_path(self.zarr, self.shards), self._pieces())
        self.shards += 1
        done, self._waiting = self._waiting, []
        if not record:
            return
        rows, drops = self._told
        state = {
            "shards": self.shards,
            "next": self.next,
            "rows": self.rows[rows:],
            "dropped": [asdict(one) for one in self.dropped[drops:]],
        }
        _write(self._shards_record(self._records), json.dumps(state).encode())
        self._records += 1
        self._told = len(self.rows), len(self.dropped)
        for index, _, _ in done:
            _record(self.scratch, index).unlink(missing_ok=True)
            _blob(self.scratch, index).unlink(missing_ok=True)

    def _shards_record(self, number: int) -> Path:
        return self.scratch / f"shards-{number:06d}.json"

    def _filled(self) -> int:
        return sum(len(lengths) for _, _, lengths in self._waiting)

    def _pieces(self) -> Iterator[tuple[bytes, list[int]]]:
        for index, at, lengths in self._waiting:
            with _blob(self.scratch, index).open("rb") as handle:
                handle.seek(at)
                blob = handle.read(sum(lengths))
            store.check_chunks(blob, lengths, _blob(self.scratch, index))
            yield blob, lengths


def _blob(scratch: Path, episode_index: int) -> Path:
    return scratch / f"{episode_index:07d}.blob"


def _record(scratch: Path, episode_index: int) -> Path:
    return scratch / f"{episode_index:07d}.json"


def prepare(name: str, raw: Path, out: Path, *, view: View, quality: int, drop: bool, workers: int) -> dict[str, Any]:
    """Decode every episode of a raw artifact into ``out/frames.zarr``, ``episodes.parquet``, ``dropped.parquet``.

    Args:
        name: Source that knows the layout.
        raw: Root of the raw artifact.
        out: Directory to fill; what an interrupted call left there is kept.
        view: Size, crop and rate of the frames.
        quality: JPEG quality, 1..100.
        drop: List damaged episodes in ``dropped.parquet`` instead of failing on the first.
        workers: Decoder processes.

    Returns:
        Counts for the manifest.

    Raises:
        IntegrityError: a damaged episode and not ``drop``, or no episode at all.
        TemporaryError: a worker died.
    """
    scratch, done = out / SCRATCH, out / "episodes.parquet"
    scratch.mkdir(parents=True, exist_ok=True)
    if done.exists():  # only its publishing was cut short
        return _facts(name, out)
    episodes, unusable = source(name).survey(raw)
    if unusable and not drop:
        raise IntegrityError(
            f"{raw}: {unusable[0].episode_id} {unusable[0].reason}"
            + (f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""),
            "fetch it again, or list such episodes as dropped with --on-error drop",
        )
    packer = Packer(out)
    job = Job(name, raw, scratch, view, quality, drop)
    for record in _decoded(job, episodes, packer.next, workers):
        packer.add(record)
    packer.flush()
    if not packer.rows:
        raise IntegrityError(f"{raw} has no usable episode", "look at what was dropped, or fetch again")
    write_dropped(unusable + packer.dropped, out / "dropped.parquet")
    store.create(out / "frames.zarr", packer.shards, view.image_size, quality)
    table(packer.rows).write_parquet(scratch / done.name)
    (scratch / done.name).rename(done)
    return _facts(name, out)


def _facts(name: str, out: Path) -> dict[str, Any]:
    """Counts of a finished store."""
    import polars as pl

    placed = pl.read_parquet(out / "episodes.parquet")
    return {
        "source": name,
        "episodes": len(placed),
        "frames": int(placed["length"].sum()),
        "dropped": len(pl.read_parquet(out / "dropped.parquet")),
        "shards": placed["dataset_to_index"][-1] // -store.SHARD * -1,  # rounded up
        "tasks": placed["task"].n_unique(),
        "fps": sorted({round(fps, 3) for fps in placed["fps"].to_list()}),
        "episodes_by_split": dict(sorted(placed["split"].value_counts().iter_rows())),
    }


def _decoded(job: Job, episodes: list[Episode], begun: int, workers: int) -> Iterator[dict[str, Any]]:
    """Done-records of the episodes from ``begun`` on, in order, made by worker processes."""
    todo = iter(episodes[begun:])
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_attend) as pool,
        bar("prep", len(episodes), "episode", initial=begun) as shown,
    ):
        flying: list[Future[dict[str, Any]]] = []
        try:
            flying += [pool.submit(encode_episode, job, one) for one in islice(todo, AHEAD * workers)]
            while flying:
                yield flying.pop(0).result()
                flying += [pool.submit(encode_episode, job, one) for one in islice(todo, 1)]
                shown.update()
        except BrokenProcessPool:
            raise TemporaryError("a decoder process was killed", "run the same command: it goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)  # the pool's own way: it trips over a future that others cancelled


def _attend() -> None:
    """Begin a worker: signals to the group are for the parent to answer; without it a worker would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def encode_episode(job: Job, episode: Episode) -> dict[str, Any]:
    """Decode one episode into sealed JPEG chunks in the scratch folder; runs in a worker process.

    Returns:
        The done-record: ``episode``, ``lengths`` of its chunks in bytes, or ``dropped`` with the reason.
    """
    from avrl.codec import encode

    path = _record(job.scratch, episode.episode_index)
    done = _load(path)
    if done is not None:
        return done
    record: dict[str, Any] = {"episode_index": episode.episode_index}
    try:
        episode, frames = source(job.source).frames(job.raw, episode, job.view, job.scratch)
        blob, lengths = bytearray(), []  # grown, not joined: a clip's chunks are in memory once
        for frame in frames:
            chunk = store.seal(encode(frame, job.quality))
            blob += chunk
            lengths.append(len(chunk))
        _write(_blob(job.scratch, episode.episode_index), blob)
        record |= {"episode": asdict(episode), "lengths": lengths}
    except IntegrityError as error:
        if not job.drop:
            raise
        reason = error.cause.replace(f"{job.raw}/", "")
        kind = "mismatch" if isinstance(error, MismatchError) else "damaged"
        record |= {"dropped": asdict(Dropped(episode.episode_id, reason, kind, episode.episode_index))}
    _write(path, json.dumps(record).encode())
    return record


def _load(path: Path) -> dict[str, Any] | None:
    """A done-record; None if there is none, or a power cut has emptied it."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record


def _write(path: Path, data: bytes | bytearray) -> None:
    """Whole or not at all after a kill. No fsync: after a power cut the checksums are compared (see `Packer.flush`)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.rename(path)
