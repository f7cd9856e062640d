"""Bounded subsets of pairs: what is enough to judge by, however large the store. The same for every encoder.

Frames of one episode are nearly the same picture, so a subset takes few of each and spreads them over the episode.

Legend: N rows, M those that are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from avrl.episodes import NO_LANGUAGE

if TYPE_CHECKING:
    import polars as pl

PAIRS = 50_000  # of order, or one of each episode: enough for any interval
TASKS = 200  # the ones with most episodes: all of EgoDex's, and of Bridge's thousands of sentences the common ones
VECTORS = 4000  # a distance between each two is 128 MB
PER_EPISODE = 12


def chosen(which: str, rows: pl.DataFrame, episodes: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Those rows of all pairs that a probe looks at: ``all``, or by the rule of ``order`` or of ``clusters``."""
    if which == "order":
        return rows[evenly(rows, max(1, PAIRS // len(episodes)))]
    return rows[balanced(rows, episodes, seed)] if which == "clusters" else rows


def evenly(rows: pl.DataFrame, n: int) -> np.ndarray:
    """Numbers (M,) of at most n rows of each episode (column ``episode_index``, in runs), evenly spaced in time."""
    _, first, counts = np.unique(rows["episode_index"].to_numpy(), return_index=True, return_counts=True)
    parts = [at + _spread(count, min(n, count)) for at, count in zip(first, counts, strict=True)]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def balanced(rows: pl.DataFrame, episodes: pl.DataFrame, seed: int) -> np.ndarray:
    """Numbers (M,) of at most `VECTORS` rows: as many of each task, and of a task as many of each episode.

    Only tasks of two episodes and more (one alone has nothing to be found by), and at most `TASKS` of them. Episodes
    without an instruction have no task.
    """
    there = episodes.filter(episodes["episode_index"].is_in(rows["episode_index"].unique().implode()))
    of_task: dict[str, list[int]] = {}
    for index, task in there.select("episode_index", "task").iter_rows():
        of_task.setdefault(task, []).append(index)
    of_task.pop(NO_LANGUAGE, None)
    names = sorted((one for one in of_task if len(of_task[one]) > 1), key=lambda one: (-len(of_task[one]), one))[:TASKS]
    rng, episode_N, taken = np.random.default_rng(seed), rows["episode_index"].to_numpy(), []
    for name in names:
        quota = max(2, VECTORS // len(names))
        chosen = np.sort(rng.permutation(of_task[name])[:quota])
        for index in chosen:
            low, high = np.searchsorted(episode_N, [index, index + 1])
            taken.append(low + _spread(high - low, min(PER_EPISODE, quota // len(chosen), high - low)))
    return np.sort(np.concatenate(taken)) if taken else np.zeros(0, np.int64)


def _spread(length: int, n: int) -> np.ndarray:
    """Some of so many places, each in the middle of an equal stretch."""
    return ((np.arange(n) + 0.5) * length / max(n, 1)).astype(np.int64)
