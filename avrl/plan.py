"""The plan of a prep: frames, bytes, time and money of a whole source from a few of its clips, before the first byte.

Clips are taken at even distances along the sizes of all, and what they come to is scaled by source bytes (a ratio
estimate: Cochran 1977, "Sampling Techniques", chapter 6): long clips weigh as much as they will. More are taken until
the standard error is small.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from avrl import store
from avrl.cache import counted, hours, size
from avrl.errors import IntegrityError
from avrl.frames import Job, Share, encode_episode
from avrl.packing import load, unit_of
from avrl.sources import source
from avrl.workers import count, in_order

if TYPE_CHECKING:
    from collections.abc import Container

    from avrl.episodes import Episode

FEWEST, MOST = 16, 128  # clips
ERROR = 0.025  # relative standard error of the store's size that is good enough


@dataclass(frozen=True)
class Plan:
    """What a prep will come to.

    Attributes:
        episodes: Of the source, or of the share of it.
        frames: In the store.
        bytes: Of the store.
        seconds: With so many decoders on this machine.
        error: Relative standard error of ``bytes``.
        sampled: Episodes that were decoded to know.
        decoders: At a time.
    """

    episodes: int
    frames: int
    bytes: int
    seconds: float
    error: float
    sampled: int
    decoders: int

    def words(self, price: float) -> str:
        """For the terminal; `price` of the machine in $/h, 0 if nobody asked."""
        if not self.episodes:
            return "nothing is left to decode"
        money = f", ${self.seconds / 3600 * price:,.2f} at ${price:g}/h" if price else ""
        return (
            f"{counted(self.episodes, 'episode')}, {counted(self.frames, 'frame')}; a store of {size(self.bytes)}"
            f" (+-{2 * self.error:.0%}, {counted(self.sampled, 'episode')} decoded to know);"
            f" {hours(self.seconds)} with {counted(self.decoders, 'decoder')}{money}"
        )

    def as_json(self, price: float) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "dollars": round(self.seconds / 3600 * price, 2)}


def estimate(
    job: Job,
    *,
    workers: int = 0,
    engine: str = "processes",
    share: Share = Share(),  # noqa: B008  frozen
    done: Container[int] = (),
) -> Plan:
    """Decode a few episodes of a source and tell what all that are left will come to.

    What is decoded stays in the job's scratch, so a build that follows there has it already.

    Args:
        job: What to decode, and how.
        workers: Decoders at a time; 0 means one a core.
        engine: See `avrl.workers`.
        share: Units to plan.
        done: ``episode_index`` of episodes that are in place, or will be linked.

    Raises:
        IntegrityError: no episode can be decoded, or one is damaged and not to be dropped.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    there = source(job.source).survey(job.raw)[0]
    if not there:
        raise IntegrityError(f"{job.raw} has no usable episode", "fetch it again")
    episodes = [one for one in there if share.has(one) and one.episode_index not in done]
    if not episodes:
        return Plan(0, 0, 0, 0.0, 0.0, 0, 0)
    decoders = min(len(episodes), count(workers, engine))
    known: dict[int, Measured] = {}
    wanted = min(len(episodes), max(FEWEST, 2 * decoders))
    by_size = sorted(episodes, key=lambda one: one.bytes)
    while True:
        picks = np.unique(np.linspace(0, len(by_size) - 1, wanted).round().astype(int))
        fresh = [by_size[i] for i in picks if by_size[i].episode_index not in known]
        with closing(in_order(measured, ((job, one) for one in fresh), workers, engine)) as results:
            known |= {one.episode_index: result for one, result in zip(fresh, results, strict=True)}
        plan = _plan(by_size, known, decoders)
        if not plan.frames:
            records = [load(path) or {} for path in sorted(job.scratch.glob("0*.json"))]
            why = next((one["dropped"]["reason"] for one in records if "dropped" in one), "")
            raise IntegrityError(
                f"{job.raw}: of {counted(plan.sampled, 'episode')} none decodes: {why}", "fetch it again"
            )
        if plan.error <= ERROR or wanted >= min(len(episodes), MOST):
            return plan
        wanted = min(len(episodes), MOST, 2 * wanted)


class Measured(NamedTuple):
    """What one episode came to, and in which worker."""

    frames: int
    bytes: int
    seconds: float
    worker: int


def measured(job: Job, episode: Episode) -> Measured:
    """Decode one episode; runs in a worker."""
    begun = time.perf_counter()
    lengths = encode_episode(job, episode).get("lengths", ())
    return Measured(len(lengths), sum(lengths), time.perf_counter() - begun, os.getpid())


def _plan(episodes: list[Episode], known: dict[int, Measured], decoders: int) -> Plan:
    """Scale what is known by source bytes."""
    sampled = [one for one in episodes if one.episode_index in known]
    sizes = np.array([max(1, one.bytes) for one in sampled], np.float64)
    found = np.array([known[one.episode_index][:3] for one in sampled], np.float64)
    whole = float(sum(max(1, one.bytes) for one in episodes))
    frames, n_bytes, _ = found.sum(0) / sizes.sum() * whole
    # A worker's first episode also pays for its imports, which a run of hours does not notice.
    first = {one.worker: index for index, one in reversed(known.items())}.values()
    warm = np.array([one.episode_index not in first for one in sampled])
    warm |= not warm.any()
    seconds = found[warm, 2].sum() / sizes[warm].sum() * whole
    n, rest = len(sizes), 1 - len(sizes) / len(episodes)
    spread = found[:, 1] - sizes * found[:, 1].sum() / sizes.sum()
    error = float(np.sqrt(rest * (spread**2).sum() / max(1, n - 1) / n) * len(episodes) / max(1.0, n_bytes))
    units = len({unit_of(one.episode_index) for one in episodes})
    n_bytes += units * -(-frames / units // store.SHARD) * store.INDEX_BYTES
    return Plan(len(episodes), round(frames), round(n_bytes), float(seconds) / decoders, error, n, decoders)
