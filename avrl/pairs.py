"""Frame pairs (t, t+gap), or clips of more frames, as batches: the only road from the frame store into training.

The order is a function of (seed, epoch), every draw one of (seed, epoch, index), and the position is the global
step. Nothing else is state, so a run that is stopped anywhere goes on with exactly the batches that it would
have seen, on any number of ranks. No label can enter here: a batch is frames, gap and a seed.

Legend: B samples, T=2 frames (t, t+gap) or more a gap apart each, H W pixels, C=3 RGB, N indices of an epoch, K gaps.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import polars as pl
    from torch import Tensor

    from avrl.store import FrameStore

GAP_DRAW, START_DRAW, MASK_DRAW = 1, 2, 3  # independent streams of random numbers
HELD_OUT = 20  # one episode in so many is held out, but no more than
MOST_HELD_OUT = 64  # as more would only take data away from training
LEAST_HELD_OUT = 2  # a store that gives fewer holds none out


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        frames_BTHWC: uint8 0..255.
        gap_B: int64, frames of the store from one to the next.
        seed_B: int64, the sample's own source of randomness (masks, augmentation); the same on any number of ranks.
    """

    frames_BTHWC: Tensor
    gap_B: Tensor
    seed_B: Tensor

    def parts(self, count: int) -> list[Batch]:
        """The batch in so many equal parts, in order; count divides B."""
        split = (one.chunk(count) for one in (self.frames_BTHWC, self.gap_B, self.seed_B))
        return [Batch(*one) for one in zip(*split, strict=True)]


def sent(one: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device. To a GPU by way of pinned memory: from any other, a copy waits for all work before it."""
    far = device.type == "cuda" and one.device.type == "cpu"
    return one.pin_memory().to(device, non_blocking=True) if far else one.to(device)


@dataclass(frozen=True)
class Sampling:
    """How pairs are drawn.

    Attributes:
        seed: Of order and draws.
        max_gap: Largest gap, frames.
        sample_decay: Ratio of ``gaps="ratio"``, (0, 1].
        pairs_per_episode: Pairs of each episode in one epoch.
        gaps: Shape of p(gap), see `shares`.
        num_frames: Frames of a sample, each a gap after the one before it.
    """

    seed: int
    max_gap: int
    sample_decay: float
    pairs_per_episode: int
    gaps: str = "ratio"
    num_frames: int = 2

    def shares(self) -> np.ndarray:
        """What p(gap) is proportional to for gaps 1..max_gap (K,), among those that fit an episode.

        ``ratio``: sample_decay^(gap-1), the plan's. ``uniform``: 1. ``triangular``: its peak is c = max_gap / 2,
        max(1 - |gap - c| / c, .01), so that the largest gap is still seen. Source: the public attempt's last choice
        (its centre 30 of 60), facts/accidents.md, section 2.
        """
        gap = np.arange(1, self.max_gap + 1)
        if self.gaps == "uniform":
            return np.ones(self.max_gap)
        shares: np.ndarray = self.sample_decay ** (gap - 1)
        if self.gaps == "triangular":
            shares = np.maximum(1 - np.abs(2 * gap / self.max_gap - 1), 0.01)
        return shares


class Pairs:
    """The endless, addressable sequence of batches.

    Args:
        store: Frames to draw from; episodes that are shorter than a sample at gap 1 are left out.
        sampling: How.
        batch_size: Global batch, over all ranks.
        episodes: Rows of the store's episodes to draw from; if not given, all that are not held out.

    Attributes:
        waited_s: Seconds that `stream` has kept its reader waiting for frames.

    Raises:
        ConfigError: fewer pairs in an epoch than one batch takes, or no episode long enough for one.
    """

    def __init__(
        self, store: FrameStore, sampling: Sampling, batch_size: int, episodes: pl.DataFrame | None = None
    ) -> None:
        episodes = parted(store.episodes)[0] if episodes is None else episodes
        usable = episodes.filter(episodes["length"] >= sampling.num_frames)
        if not len(usable):
            raise ConfigError(f"no episode has {sampling.num_frames} frames, which is one sample", "see avrl prep")
        self.store, self.sampling, self.batch_size, self.waited_s = store, sampling, batch_size, 0.0
        self._steps = sampling.num_frames - 1  # gaps from the first frame of a sample to its last
        self._sums = np.cumsum(sampling.shares())
        self._first = usable["dataset_from_index"].to_numpy()
        self._length = usable["length"].to_numpy()
        self.indices = len(usable) * sampling.pairs_per_episode
        self.steps_per_epoch = self.indices // batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"an epoch of {self.indices} pairs is less than one batch of {batch_size}",
                "lower --batch-size or raise --pairs-per-episode",
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of frame t, gaps and sample seeds of a global batch: three int64 arrays of the batch's length."""
        epoch, within = divmod(step, self.steps_per_epoch)
        index = self._epoch(epoch)[within * self.batch_size : (within + 1) * self.batch_size].astype(np.int64)
        episode = index // self.sampling.pairs_per_episode
        length = self._length[episode]
        seed = self.sampling.seed
        gap = self._gap(uniform(seed, epoch, index, GAP_DRAW), length)
        start = np.floor(uniform(seed, epoch, index, START_DRAW) * (length - self._steps * gap)).astype(np.int64)
        sample_seed = (hashed(seed, epoch, index, MASK_DRAW) >> np.uint64(1)).astype(np.int64)
        return self._first[episode] + start, gap, sample_seed

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.sampling.seed, epoch]))
            order = np.arange(self.indices, dtype=np.min_scalar_type(self.indices))  # 19 MB for part 1, not 37
            generator.shuffle(order)
            self._order = epoch, order
        return self._order[1]

    def _gap(self, u_B: np.ndarray, length_B: np.ndarray) -> np.ndarray:
        """Inverse of the distribution's sum, cut at the longest gap that fits each episode."""
        longest = np.minimum(self.sampling.max_gap, (length_B - 1) // self._steps)
        target = u_B * self._sums[longest - 1]
        gap: np.ndarray = np.minimum(np.searchsorted(self._sums, target, side="right") + 1, longest)
        return gap.astype(np.int64)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's share of the batch of a global step.

        Raises:
            IntegrityError: a frame is damaged; the message names file and row.
        """
        return self._read(*self._share(step, rank, world), self.store.threads)

    def _share(self, step: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One rank's part of what `draw` gives."""
        share = self.batch_size // world
        mine = slice(rank * share, (rank + 1) * share)
        row, gap, seed = self.draw(step)
        return row[mine], gap[mine], seed[mine]

    def _read(self, row_B: np.ndarray, gap_B: np.ndarray, seed_B: np.ndarray, threads: int) -> Batch:
        row_BT = row_B[:, None] + gap_B[:, None] * np.arange(self.sampling.num_frames)
        frames = self.store.read(row_BT.ravel(), threads=threads)
        shape = (*row_BT.shape, *frames.shape[1:])
        return Batch(torch.from_numpy(frames).view(shape), torch.from_numpy(gap_B), torch.from_numpy(seed_B))

    def stream(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of the steps [start, stop); while one is in use, each thread decodes a later one by itself.

        A batch that threads share ends with all waiting for the last: 1.04 to 1.12 times slower on two. Draws are made
        here, in order, as the order of an epoch is made once. A store of 0 threads decodes here too, when asked.
        """
        with ThreadPoolExecutor(max(1, self.store.threads)) as decoder:

            def begin(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Callable[[], Batch]:
                read = partial(self._read, *drawn, 1)
                return decoder.submit(read).result if self.store.threads else read

            drawn = (self._share(step, rank, world) for step in range(start, stop))
            jobs = map(begin, drawn)
            ahead = deque(itertools.islice(jobs, self.store.threads + 1))
            while ahead:
                asked = time.monotonic()
                current = ahead.popleft()()
                self.waited_s += time.monotonic() - asked
                ahead.extend(itertools.islice(jobs, 1))
                yield current


def parted(episodes: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The episodes to train on, and the few held out: one in `HELD_OUT`, at most `MOST_HELD_OUT`, in the store's order.

    Which ones hangs on their names alone, so every objective, seed and size is looked at on the same episodes, and
    none of them has ever drawn these. A store of fewer than 40 episodes holds none out.
    """
    number = min(len(episodes) // HELD_OUT, MOST_HELD_OUT)
    names = episodes["episode_id"].to_list()
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    chosen = set(sorted(digests)[: number if number >= LEAST_HELD_OUT else 0])
    aside = [digest in chosen for digest in digests]
    return episodes.filter([not one for one in aside]), episodes.filter(aside)


def hashed(seed: int, epoch: int, index_N: np.ndarray, stream: int) -> np.ndarray:
    """A uint64 a index that depends on nothing else: two rounds of splitmix64 over all four numbers.

    Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators" (its finaliser).
    """
    base = np.array([seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + stream & (1 << 64) - 1], np.uint64)
    return _mix(_mix(base) ^ _mix(index_N.astype(np.uint64)))


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = x ^ (x >> np.uint64(31))
        return mixed


def uniform(seed: int, epoch: int, index_N: np.ndarray, stream: int) -> np.ndarray:
    """Float64 in [0, 1), one an index; see `hashed`."""
    return (hashed(seed, epoch, index_N, stream) >> np.uint64(11)) * 2.0**-53
