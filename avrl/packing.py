"""Packing: episodes' chunks into the shards of a frame store, in order, whatever is killed and when.

A **unit** is so many consecutive episodes of the source. A unit begins a shard, so its shards are the same files
wherever they are made: `avrl prep --shard i/n` shares the work out, and a later `prep` puts it together by links,
without a byte copied. An empty slot of a shard costs 16 bytes, so the ends of units cost nothing to speak of.

Two kinds of done-record are written here, each after what it vouches for: ``scratch/<episode>.json`` (its chunks lie
in ``<episode>.blob``) and ``scratch/shards-<n>.json`` (so many shards are in place, these episodes are in the last).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

from avrl import store
from avrl.artifact import SCRATCH, sha256_of
from avrl.episodes import Dropped, Episode
from avrl.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from avrl.artifact import Artifact

log = logging.getLogger(__name__)

UNIT = 64  # episodes: some 6 shards of EgoDex or one of Bridge; what a lost machine of a cluster can lose


def unit_of(episode_index: int) -> int:
    """Number of the unit that an episode is in."""
    return episode_index // UNIT


def episodes_of(unit: int) -> range:
    """Indices of the episodes of a unit."""
    return range(unit * UNIT, (unit + 1) * UNIT)


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
            record = load(self._shards_record(self._records))
            if record is None:  # a later one would vouch for nothing: it lists only what came after this
                break
            self.shards, self.next = record["shards"], record["next"]
            self.rows += record["rows"]
            self.dropped += [Dropped(**one) for one in record["dropped"]]
            self._told = len(self.rows), len(self.dropped)

    def add(self, record: dict[str, Any]) -> None:
        """Place an episode behind the others; start a new shard with a new unit, or rather than straddle two."""
        index: int = record["episode_index"]
        if self._waiting and unit_of(index) != unit_of(self._waiting[0][0]):
            self.flush()
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

    def adopt(self, unit: int, partial: Artifact, rows: list[dict[str, Any]], dropped: list[Dropped]) -> None:
        """Take a unit's shards out of a partial store, by links where the disk has them.

        Args:
            unit: Its number.
            partial: The finished store that has it.
            rows: The unit's rows of that store's ``episodes.parquet``.
            dropped: What was dropped of the unit there.

        Raises:
            IntegrityError: a shard is not what the partial store's manifest says.
        """
        self.flush()
        sums = {file.path: file.sha256 for file in partial.manifest.files}
        first = rows[0]["dataset_from_index"] // store.SHARD if rows else 0
        end = -(-(rows[-1]["dataset_from_index"] + rows[-1]["length"]) // store.SHARD) if rows else 0
        for old in range(first, end):
            source = store.shard_path(partial.root / "frames.zarr", old)
            if not source.is_file() or sha256_of(source) != sums[source.relative_to(partial.root).as_posix()]:
                raise IntegrityError(f"{source} is damaged", f"rm -r {partial.root} and make that shard again")
            _link(source, store.shard_path(self.zarr, self.shards + old - first))
        moved = (self.shards - first) * store.SHARD
        fields = list(Episode.__dataclass_fields__)
        for row in rows:
            own = {name: row[name] for name in fields}
            self.rows.append({**own, "dataset_from_index": row["dataset_from_index"] + moved})
        self.dropped += dropped
        self.shards += end - first
        self.next = (unit + 1) * UNIT
        self._vouch()

    def flush(self, *, record: bool = True) -> None:
        """Write the waiting chunks as the next shard, then its record, then forget their blobs."""
        if not self._waiting:
            return
        store.write_shard(store.shard_path(self.zarr, self.shards), self._pieces())
        self.shards += 1
        done, self._waiting = self._waiting, []
        if not record:
            return
        self._vouch()
        for index, _, _ in done:
            record_of(self.scratch, index).unlink(missing_ok=True)
            blob_of(self.scratch, index).unlink(missing_ok=True)

    def _vouch(self) -> None:
        """Record that all shards so far are in place, and what is new in them."""
        rows, drops = self._told
        state = {
            "shards": self.shards,
            "next": self.next,
            "rows": self.rows[rows:],
            "dropped": [asdict(one) for one in self.dropped[drops:]],
        }
        write(self._shards_record(self._records), json.dumps(state).encode())
        self._records += 1
        self._told = len(self.rows), len(self.dropped)

    def _shards_record(self, number: int) -> Path:
        return self.scratch / f"shards-{number:06d}.json"

    def _filled(self) -> int:
        return sum(len(lengths) for _, _, lengths in self._waiting)

    def _pieces(self) -> Iterator[tuple[bytes, list[int]]]:
        for index, at, lengths in self._waiting:
            with blob_of(self.scratch, index).open("rb") as handle:
                handle.seek(at)
                blob = handle.read(sum(lengths))
            store.check_chunks(blob, lengths, blob_of(self.scratch, index))
            yield blob, lengths


def _link(source: Path, target: Path) -> None:
    """Give a finished file a second name; copy it where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(target.name + ".tmp")
        with source.open("rb") as reader, temporary.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**20)
            writer.flush()
            os.fsync(writer.fileno())  # it is vouched for next
        temporary.rename(target)


def blob_of(scratch: Path, episode_index: int) -> Path:
    """Where an episode's sealed chunks wait, end to end."""
    return scratch / f"{episode_index:07d}.blob"


def record_of(scratch: Path, episode_index: int) -> Path:
    """An episode's done-record."""
    return scratch / f"{episode_index:07d}.json"


def load(path: Path) -> dict[str, Any] | None:
    """A done-record; None if there is none, or a power cut has emptied it."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record


def write(path: Path, data: bytes | bytearray) -> None:
    """Whole or not at all after a kill. No fsync: after a power cut the checksums are compared (see `Packer.flush`)."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.rename(path)
