"""Prep: raw -> frame store. Episodes are decoded by workers and packed, in order, into shards (`avrl.packing`).

Bytes depend neither on the number of workers, nor on how the work was shared out between machines, nor on where a run
was killed, nor on where the cache lies. The last done-record, ``episodes.parquet``, says that all is in place.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from avrl import store
from avrl.episodes import Dropped, Episode, table, write_dropped
from avrl.errors import IntegrityError, MismatchError
from avrl.packing import Packer, blob_of, episodes_of, load, record_of, unit_of, write
from avrl.progress import bar
from avrl.sources import source
from avrl.workers import in_order

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from avrl.artifact import Artifact
    from avrl.episodes import View


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to make an episode's chunks.

    Attributes:
        source: Source that knows the layout.
        raw: Root of the raw artifact.
        scratch: Where chunks wait to be packed.
        view: Size, crop and rate of the frames.
        quality: JPEG quality, 1..100.
        drop: List damaged episodes in ``dropped.parquet`` instead of failing on the first.
    """

    source: str
    raw: Path
    scratch: Path
    view: View
    quality: int
    drop: bool


@dataclass(frozen=True)
class Share:
    """The part of the units that one machine makes: every n-th, from the i-th on; ``Share()`` is all of them."""

    i: int = 1
    n: int = 1

    def has(self, episode: Episode) -> bool:
        """Whether an episode's unit is in this share."""
        return unit_of(episode.episode_index) % self.n == self.i - 1


def prepare(
    job: Job,
    out: Path,
    *,
    workers: int = 0,
    engine: str = "processes",
    share: Share = Share(),
    partials: Sequence[Artifact] = (),
) -> dict[str, Any]:
    """Decode every episode of a raw artifact into ``out/frames.zarr``, ``episodes.parquet``, ``dropped.parquet``.

    Args:
        job: What to decode, and how; its scratch lies in ``out``.
        out: Directory to fill; what an interrupted call left there is kept.
        workers: Decoders at a time; 0 means one a core.
        engine: See `avrl.workers`.
        share: Units to make.
        partials: Stores of other shares of the same request; units that are there are linked, not decoded.

    Returns:
        Counts for the manifest.

    Raises:
        IntegrityError: a damaged episode and not ``drop``, or no episode at all.
        TemporaryError: a worker died.
    """
    done = out / "episodes.parquet"
    job.scratch.mkdir(parents=True, exist_ok=True)
    if done.exists():  # only its publishing was cut short
        return _facts(job.source, out)
    episodes, unusable = source(job.source).survey(job.raw)
    if unusable and not job.drop:
        raise IntegrityError(
            f"{job.raw}: {unusable[0].episode_id} {unusable[0].reason}"
            + (f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""),
            "fetch it again, or list such episodes as dropped with --on-error drop",
        )
    packer = Packer(out)
    mine = [one for one in episodes if share.has(one)]
    _fill(packer, job, [one for one in mine if one.episode_index >= packer.next], partials, workers, engine)
    if not packer.rows and share.n == 1:
        raise IntegrityError(f"{job.raw} has no usable episode", "fetch it again")
    write_dropped(unusable + packer.dropped, out / "dropped.parquet")
    store.create(out / "frames.zarr", packer.shards, job.view.image_size, job.quality)
    table(packer.rows).write_parquet(job.scratch / done.name)
    (job.scratch / done.name).rename(done)
    return _facts(job.source, out)


def _fill(
    packer: Packer, job: Job, episodes: list[Episode], partials: Sequence[Artifact], workers: int, engine: str
) -> None:
    """Bring episodes into the store, unit by unit: linked where a partial store has the unit, else decoded."""
    made = made_units(partials)
    begun = unit_of(packer.next)
    if packer.next != episodes_of(begun).start:  # its first shards are in place, and joined to no others
        made.pop(begun, None)
    todo = [one for one in episodes if unit_of(one.episode_index) not in made]
    with (
        closing(in_order(encode_episode, ((job, one) for one in todo), workers, engine)) as records,
        bar("prep", len(episodes), "episode") as shown,
    ):
        for unit, group in groupby(episodes, key=lambda one: unit_of(one.episode_index)):
            n_episodes = len(list(group))
            if unit in made:
                packer.adopt(unit, *made[unit])
                shown.update(n_episodes)
                continue
            for record in islice(records, n_episodes):
                packer.add(record)
                shown.update()
        packer.flush()


def made_units(partials: Sequence[Artifact]) -> dict[int, tuple[Artifact, list[dict[str, Any]], list[Dropped]]]:
    """Unit -> the partial store that has it, its rows there, and what was dropped of it."""
    import polars as pl

    made: dict[int, tuple[Artifact, list[dict[str, Any]], list[Dropped]]] = {}
    for one in partials:
        own: dict[int, tuple[Artifact, list[dict[str, Any]], list[Dropped]]] = {}
        for row in pl.read_parquet(one.root / "episodes.parquet").iter_rows(named=True):
            own.setdefault(unit_of(row["episode_index"]), (one, [], []))[1].append(row)
        for drop in pl.read_parquet(one.root / "dropped.parquet").iter_rows(named=True):
            if drop["episode_index"] >= 0:  # else the survey knows of it
                own.setdefault(unit_of(drop["episode_index"]), (one, [], []))[2].append(Dropped(**drop))
        made |= own
    return made


def _facts(name: str, out: Path) -> dict[str, Any]:
    """Counts of a finished store; the names behind them are in its two tables."""
    import polars as pl

    placed, dropped = pl.read_parquet(out / "episodes.parquet"), pl.read_parquet(out / "dropped.parquet")
    notes = placed["note"].str.split(", ").explode().value_counts().filter(pl.col("note") != "")
    return {
        "source": name,
        "episodes": len(placed),
        "frames": int(placed["length"].sum()),
        "dropped": len(dropped),
        "dropped_by_kind": dict(sorted(dropped["kind"].value_counts().iter_rows())),
        "noted": dict(sorted(notes.iter_rows())),
        "shards": -(-int(placed["dataset_to_index"].max() or 0) // store.SHARD),  # type: ignore[arg-type]
        "tasks": placed["task"].n_unique(),
        "fps": sorted({round(fps, 3) for fps in placed["fps"].to_list()}),
        "episodes_by_split": dict(sorted(placed["split"].value_counts().iter_rows())),
    }


def encode_episode(job: Job, episode: Episode) -> dict[str, Any]:
    """Decode one episode into sealed JPEG chunks in the scratch folder; runs in a worker.

    Returns:
        The done-record: ``episode``, ``lengths`` of its chunks in bytes, or ``dropped`` with the reason.
    """
    from avrl.codec import encode

    path = record_of(job.scratch, episode.episode_index)
    done = load(path)
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
        write(blob_of(job.scratch, episode.episode_index), blob)
        record |= {"episode": asdict(episode), "lengths": lengths}
    except IntegrityError as error:
        if not job.drop:
            raise
        reason = error.cause.replace(f"{job.raw}/", "")
        kind = "mismatch" if isinstance(error, MismatchError) else "damaged"
        record |= {"dropped": asdict(Dropped(episode.episode_id, reason, kind, episode.episode_index))}
    write(path, json.dumps(record).encode())
    return record
