"""Which episodes fit a probe, which choose its strength, which test it. One rule for all probes and encoders.

A row is a pair or a frame; it goes where its episode goes. Test episodes are those that the source does not call
``train``. A source that publishes none has a fifth of the episodes of each task held out, the same ones for every seed;
where most instructions are of one episode each, a fifth of these as well.

Legend: N rows, E episodes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from avrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from avrl.artifact import Artifact

VALIDATION_SHARE = 0.2  # of the training episodes
HELD_OUT = 5  # one in so many episodes of a task, where the source holds out none
FOLDS = 5  # of tasks
FEW = {"1%": 0.01, "10%": 0.1}  # of the training episodes
FEWEST = 5  # episodes that a probe can be fitted on: one in five chooses its strength
MEND = {  # source -> what else to prep, where all that it publishes is of one kind
    "bridge": "prep a copy with both (avrl fetch bridge --part train,val; some are train only)",
    "egodex": "prep a copy with both (avrl fetch --part 1,test)",
    "lerobot": "prep a data set whose meta/info.json names splits of both kinds, or none",
}
ALL, SEEN, UNSEEN = "all", "seen tasks", "unseen tasks"


@dataclass(frozen=True)
class Split:
    """Masks over rows. ``fit`` and ``validate`` part the training rows.

    Attributes:
        fit_N: Fitted on.
        validate_N: Chooses the strength.
        test_N: Looked at once.
        seen_N: The task of its episode is one of training.
        episode_N: ``episode_index``.
    """

    fit_N: np.ndarray
    validate_N: np.ndarray
    test_N: np.ndarray
    seen_N: np.ndarray
    episode_N: np.ndarray

    @property
    def train_N(self) -> np.ndarray:  # noqa: N802
        """Fitted on in the end."""
        return np.asarray(self.fit_N | self.validate_N)


@dataclass(frozen=True)
class Part:
    """A smaller training set, and the test rows that what is fitted on it predicts. Masks over all rows."""

    train: str
    fit_N: np.ndarray
    validate_N: np.ndarray
    test_N: np.ndarray


def is_test(episodes: pl.DataFrame) -> np.ndarray:
    """Which episodes (E,) test: those that are published so, else a fifth of each task (at least one of two).

    Where that is less than a fifth of all, those that are alone of their task count as one task: they test as unseen.
    """
    published = (episodes["split"] != "train").to_numpy()
    if published.any():
        return np.asarray(published)
    chosen, rng = np.zeros(len(episodes), bool), np.random.default_rng(0)
    _, task_E = np.unique(episodes["task"].to_numpy(), return_inverse=True)
    groups = np.split(np.argsort(task_E, kind="stable"), np.cumsum(np.bincount(task_E))[:-1])

    def hold_out(group: np.ndarray) -> None:
        chosen[rng.permutation(group)[: max(len(group) // HELD_OUT, int(len(group) > 1))]] = True

    for group in groups:
        hold_out(group)
    if chosen.sum() * HELD_OUT < len(episodes):
        hold_out(np.concatenate([np.zeros(0, int), *(one for one in groups if len(one) == 1)]))
    return chosen


def split(rows: pl.DataFrame, episodes: pl.DataFrame, seed: int) -> Split:
    """Rows (column ``episode_index``) by episode; a fifth of the training episodes chooses the strength."""
    index, test = episodes["episode_index"].to_numpy(), is_test(episodes)
    tasks = episodes["task"].to_numpy()
    known = set(tasks[~test])
    chosen = _share(np.sort(index[~test]), VALIDATION_SHARE, seed)
    episode_N = rows["episode_index"].to_numpy()
    in_train, validate = np.isin(episode_N, index[~test]), np.isin(episode_N, chosen)
    seen = np.isin(episode_N, index[[task in known for task in tasks]])
    return Split(in_train & ~validate, validate, ~in_train, seen, episode_N)


def few(parts: Split, seed: int) -> Iterator[Part]:
    """Each share of the training episodes that is enough to fit on, the smaller within the larger."""
    order = np.random.default_rng([seed, 1]).permutation(np.unique(parts.episode_N[parts.train_N]))
    for name, share in FEW.items():
        kept = order[: round(share * len(order))]
        if len(kept) >= FEWEST:
            validate = np.isin(parts.episode_N, _share(np.sort(kept), VALIDATION_SHARE, seed))
            yield Part(name, np.isin(parts.episode_N, kept) & ~validate, validate, parts.test_N)


def folds(parts: Split, episodes: pl.DataFrame, seed: int) -> list[tuple[Part, Part]]:
    """What a task costs that was never seen: tasks are left out of training in turn, each as often.

    Each pair predicts the same test rows, those of the tasks left out: the first from other tasks, the second from as
    many rows, of episodes left out at random instead, but of each task that is tested one stays. Their difference is
    the cost of the task being new and nothing else. Empty where training has fewer than two tasks.
    """
    index, tasks = episodes["episode_index"].to_numpy(), episodes["task"].to_numpy()
    trained, n_E = np.unique(parts.episode_N[parts.train_N], return_counts=True)
    task_of = dict(zip(index, tasks, strict=True))
    names = sorted({task_of[one] for one in trained})
    if len(names) < 2:
        return []
    rng = np.random.default_rng([seed, 2])
    groups = np.array_split(rng.permutation(np.array(names, dtype=object)), min(FOLDS, len(names)))
    group_of = {task: number for number, group in enumerate(groups) for task in group}
    group_E = np.array([group_of.get(task, -1) for task in tasks])
    found, lengths = [], dict(zip(trained, n_E, strict=True))
    for number in range(len(groups)):
        of_group = np.isin(parts.episode_N, index[group_E == number])
        tested = {task_of[one] for one in np.unique(parts.episode_N[of_group & parts.test_N])}
        rows = int((of_group & parts.train_N).sum())
        shuffled = [(one, lengths[one], task_of[one]) for one in rng.permutation(trained)]
        random = np.isin(parts.episode_N, _drawn(shuffled, rows, tested))
        pair = [
            Part(name, parts.fit_N & ~left_out, parts.validate_N & ~left_out, parts.test_N & of_group)
            for name, left_out in ((UNSEEN, of_group), (SEEN, random))
        ]
        if all(one.fit_N.any() and one.validate_N.any() for one in pair) and pair[0].test_N.any():
            found.append((pair[0], pair[1]))
    return found


def _drawn(episodes: list[tuple[int, int, str]], rows: int, tested: set[str]) -> list[int]:
    """The first of (episode, its rows, its task) that come to so many rows, or less by fewer than the next would add.

    The last of a task that is tested is passed over: without it the task would be as new as where all are left out.
    """
    left, found = Counter(task for *_, task in episodes), []
    for episode, n, task in episodes:
        if n <= rows and (task not in tested or left[task] > 1):
            found.append(episode)
            rows -= n
            left[task] -= 1
    return found


def _share(episodes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """At least one of these episodes, drawn."""
    return np.random.default_rng(seed).permutation(episodes)[: max(1, round(share * len(episodes)))]


def require_split(store: Artifact, gaps: tuple[int, ...]) -> None:
    """Refuse a frame store that cannot be scored, before features are made of it.

    Raises:
        ConfigError: fewer than two training episodes, or none held out, are longer than a gap.
    """
    import polars as pl

    episodes = pl.read_parquet(store.root / "episodes.parquet", columns=["length", "split", "task"])
    more = "prep more episodes: a fifth is held out, for the data names none that test"
    if (episodes["split"] != "train").any():
        more = MEND.get(store.ref.partition("-")[0], MEND["bridge"])
    for gap in gaps:
        test = is_test(episodes)[(episodes["length"] > gap).to_numpy()]
        n_test = int(test.sum())
        if len(test) - n_test < 2 or not n_test:
            raise ConfigError(
                f"{store.ref} has {len(test) - n_test} training and {n_test} held-out episodes of more than {gap} "
                "frames, at least 2 and 1 are needed",
                f"{more}, or a smaller --gap",
            )
