"""Clusters: whether vectors lie apart by task, and whether it is the picture that tells the task, or the motion.

Nothing is fitted for the first: k-NN looks for the task among other episodes only, k-means is given the number of
tasks, silhouette and RankMe look at the vectors as they lie. Distances are cosines. A map (t-SNE) is a picture, not
evidence. Shuffled tasks come out a little below 1 / C: an episode's own task is rarer among the others.

For the second, ridge on one-hot tasks, fitted on training episodes: from what one frame shows, and from what changes.
An image encoder has the vector of frame t and the difference of both. An encoder of pairs is shown frame t twice,
f(a, a), so that it too sees one frame alone; its antisymmetric part f(a, b) - f(b, a) is only what turns round with the
order.

Legend: N vectors, D dimensions, C tasks, E episodes, R resamples.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from avrl import intervals, splits
from avrl.comparison import EVERY, READOUTS, ranks
from avrl.correctness import share
from avrl.errors import ConfigError
from avrl.features import SWAPPED, TWICE, pairs_of
from avrl.outcome import WHOLE, effective_rank, numbers
from avrl.probes import WIDE
from avrl.probing import fingerprint
from avrl.ridge import ALPHAS, Path, best
from avrl.splits import ALL
from avrl.stills import thumbnail
from avrl.store import FrameStore
from avrl.vectors import Vectors, places

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path as File

    import polars as pl

    from avrl.probes import Given, Task, Who
    from avrl.splits import Split

log = logging.getLogger(__name__)

NEIGHBOURS = 20
STARTS = 10  # of k-means
PERPLEXITY = 30
SHOWN, SIDE = 150, 64  # frames that a map can show, px
MAPPED = ("cls", "patch-mean")  # beside the readout that comes first
SOLVER = "k-nn, k-means, ridge"
KNN, IDENTITY, MOTION = "knn-accuracy", "identity-accuracy", "motion-accuracy"


def score(out: File, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet``, ``episodes.parquet`` (right answers of k-NN) and ``points.parquet``, the map.

    Args:
        out: Directory to write into.
        who: Names of the encoder.
        task: How it is scored.
        given: Frames and features.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: fewer than two tasks have two episodes, or the encoder has none of the readouts.
    """
    import polars as pl

    episodes, root = pl.read_parquet(given.frames / "episodes.parquet"), cast("File", given.features)
    rows = pairs_of("clusters", episodes, task.gap, task.seed)
    of = episodes.select("episode_index", "task")
    labels_N = rows.join(of, on="episode_index", how="left", maintain_order="left")["task"].to_numpy()
    if len(set(labels_N)) < 2:
        raise ConfigError(f"{given.frames}: at least two tasks of two episodes each are needed")
    facts = json.loads((root / "manifest.json").read_bytes())["facts"]
    names = [one for one in task.readouts or facts["readouts"] if one in facts["readouts"]]
    names = sorted((one for one in names if one != WIDE or task.readouts), key=lambda one: ranks(READOUTS).get(one, 99))
    if not names:
        raise ConfigError(f"{who.encoder} has none of the readouts asked for", "leave out --readout")
    parts = splits.split(rows, episodes, task.seed)
    shared = {
        **{"probe": task.probe, **asdict(who), "gap": task.gap, "gap_s": task.gap / float(episodes["fps"][0])},
        **{"target": "", "solver": SOLVER, "train": ALL},
        # By the solver's name, as identity was read off f(a, b) + f(b, a) once: such rows stand in no table with these.
        **{"fingerprint": fingerprint(rows, parts, replace(task, solver=SOLVER)), "alpha": None},
        **{"pairing": "pair" if facts["paired"] else "frame"},
    }
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    maps: list[pl.DataFrame] = []
    place_N2 = places(root, rows, task.gap)
    stills = (given.stills, places(given.stills, rows, task.gap)) if given.stills else None
    for readout in names:
        vectors = _vectors((root, place_N2), stills, readout)
        named = {**shared, "readout": readout, "dims": vectors["z"].shape[1]}
        found, right = _apart(vectors["z"], labels_N, parts.episode_N, task)
        found += _told(vectors, labels_N, parts, task)
        scores += [{**named, **row} for row in found]
        sums.append(_sums(parts, right).with_columns(**{k: pl.lit(named[k]) for k in named if k != "dims"}))
        if readout in (names[0], *MAPPED):
            x_N2 = map_of(vectors["z"], task.seed)
            points = rows.select("episode_index", "frame_index")
            points = points.with_columns(task=labels_N, x=x_N2[:, 0], y=x_N2[:, 1], readout=pl.lit(readout))
            pictures = pl.lit(None, pl.Binary) if maps else _pictures(given.frames, rows)  # kept once
            maps.append(points.with_columns(picture=pictures))
    pl.DataFrame(scores, infer_schema_length=None).write_parquet(out / "scores.parquet")
    pl.concat(sums).write_parquet(out / "episodes.parquet")
    pl.concat(maps).write_parquet(out / "points.parquet")
    return {**shared, "vectors": len(rows), "tasks": len(set(labels_N)), "episodes": len(set(parts.episode_N))}


def _vectors(
    moving: tuple[File, np.ndarray], stills: tuple[File, np.ndarray] | None, readout: str
) -> dict[str, np.ndarray]:
    """``z`` of each pair (of frame t), and what tells of ``identity`` and of ``motion``: (N, D) each.

    Args:
        moving: Features, and where the pairs lie in them.
        stills: The same of frames shown twice, of an encoder of pairs.
        readout: One of them.
    """

    def read(of: tuple[File, np.ndarray], readout: str, pairing: str) -> np.ndarray:
        blocks = Vectors(of[0], readout, pairing, of[1]).blocks(np.arange(len(of[1])))
        return np.concatenate([z for _, z in blocks]).astype(np.float64)

    z = read(moving, readout, "pair")  # a row as it lies
    if not stills:
        return {"z": z, "identity": z, "motion": read(moving, readout, "diff")}
    swapped = read(moving, readout + SWAPPED, "pair")
    return {"z": z, "identity": read(stills, readout + TWICE, "pair"), "motion": z - swapped}


def _apart(
    z_ND: np.ndarray, labels_N: np.ndarray, episode_N: np.ndarray, task: Task
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """How far tasks lie apart, on all vectors, beside chance; and which the neighbours got right (N,)."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples

    unit_ND = z_ND / np.maximum(np.linalg.norm(z_ND, axis=1, keepdims=True), 1e-12)
    names, label_N = np.unique(labels_N, return_inverse=True)
    k = neighbours(label_N, episode_N)
    nearest_NK = _nearest(unit_ND, episode_N, k)
    right_N = _vote(nearest_NK, label_N) == label_N
    episodes, first = np.unique(episode_N, return_index=True)
    shuffled = dict(zip(episodes, np.random.default_rng([task.seed, 4]).permutation(label_N[first]), strict=True))
    wrong_N = np.array([shuffled[one] for one in episode_N])
    guess = int(np.bincount(label_N).argmax())
    found = _kmeans(unit_ND, len(names), task.seed)
    draws = (task.resamples, task.seed)
    lone = silhouette_samples(unit_ND, label_N, metric="cosine")
    rows = [
        _row("task", KNN, share(right_N, episode_N, *draws), note=f"k = {k}"),
        _row("task", "nmi", _agreement(normalized_mutual_info_score, label_N, found, episode_N)),
        _row("task", "ari", _agreement(adjusted_rand_score, label_N, found, episode_N)),
        _row("task", "silhouette", share(lone, episode_N, *draws)),
        _row("task", "effective-rank", {"value": effective_rank(z_ND), "low": None, "high": None}),
        _row("largest task", KNN, share(label_N == guess, episode_N, *draws), "chance"),
        _row("shuffled tasks", KNN, share(_vote(nearest_NK, wrong_N) == wrong_N, episode_N, *draws), "chance"),
    ]
    counts = {"split": EVERY, "n_train": 0, "episodes_train": 0, "n_test": len(z_ND), "episodes_test": len(episodes)}
    return [{**row, **counts} for row in rows], right_N


def neighbours(label_N: np.ndarray, episode_N: np.ndarray) -> int:
    """`NEIGHBOURS`, or as many as the vectors of a task have of it in other episodes, where that is fewer."""
    few = NEIGHBOURS
    for label in np.unique(label_N):
        counts = np.unique(episode_N[label_N == label], return_counts=True)[1]
        few = min(few, int(counts.sum() - counts.max()))
    return max(few, 1)


def _nearest(unit_ND: np.ndarray, episode_N: np.ndarray, k: int) -> np.ndarray:
    """The k nearest of other episodes, (N, k), nearest first."""
    near_NN = unit_ND @ unit_ND.T
    near_NN[episode_N[:, None] == episode_N] = -np.inf
    return np.asarray(np.argsort(-near_NN, axis=1, kind="stable")[:, :k])


def _vote(nearest_NK: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """The label that most of the nearest have; of several, that of the nearest one."""
    votes_NK = label_N[nearest_NK]
    counts_NK = (votes_NK[:, :, None] == votes_NK[:, None, :]).sum(2)
    return np.asarray(votes_NK[np.arange(len(votes_NK)), counts_NK.argmax(1)])


def _kmeans(unit_ND: np.ndarray, n: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a collapsed code has fewer points than tasks
        return np.asarray(KMeans(n, n_init=STARTS, random_state=seed).fit_predict(unit_ND))


def _agreement(
    score: Callable[[np.ndarray, np.ndarray], float], label_N: np.ndarray, found_N: np.ndarray, episode_N: np.ndarray
) -> dict[str, float | None]:
    """Of clusters with tasks, beside other episodes in the same clusters."""
    others = [episode_N != one for one in np.unique(episode_N)]
    left_out = np.array([score(label_N[keep], found_N[keep]) for keep in others])
    return numbers(intervals.jackknife(float(score(label_N, found_N)), left_out))


def _told(vectors: dict[str, np.ndarray], labels_N: np.ndarray, parts: Split, task: Task) -> list[dict[str, Any]]:
    """Whether the task of held-out episodes is known from the picture, and from the motion; only tasks of training."""
    known = set(labels_N[parts.fit_N])
    test_N = parts.test_N & np.isin(labels_N, list(known))
    if not (known and parts.validate_N.any() and test_N.any()):
        return []
    names, label_N = np.unique(labels_N, return_inverse=True)
    guess = np.bincount(label_N[parts.train_N], minlength=len(names)).argmax()
    said = {IDENTITY: "frame t shown twice", MOTION: "f(a, b) - f(b, a)"}
    if vectors["identity"] is vectors["z"]:
        said = {IDENTITY: "frame t", MOTION: "difference of the frames"}
    of, rows, draws = parts.episode_N[test_N], [], (task.resamples, task.seed)
    for metric, z_ND in ((IDENTITY, vectors["identity"]), (MOTION, vectors["motion"])):
        chosen = _classify(z_ND, np.eye(len(names))[label_N], parts)
        right = share((chosen == label_N)[test_N], of, *draws)
        rows.append(_row("task", metric, right, metric.split("-")[0], f"from {said[metric]}"))
    chance = share((label_N == guess)[test_N], of, *draws)
    rows.append(_row("largest task", IDENTITY, chance, "chance", "of motion-accuracy too"))
    train = {"n_train": int(parts.train_N.sum()), "episodes_train": len(np.unique(parts.episode_N[parts.train_N]))}
    counts = {"split": WHOLE, **train, "n_test": int(test_N.sum()), "episodes_test": len(np.unique(of))}
    return [{**row, **counts} for row in rows]


def _classify(z_ND: np.ndarray, y_NC: np.ndarray, parts: Split) -> np.ndarray:
    """The task of each vector by ridge on one-hot tasks, of one strength for all of them, or they could not compete."""
    z, y = torch.from_numpy(z_ND), torch.from_numpy(y_NC)
    fit, validate, train = (torch.from_numpy(one) for one in (parts.fit_N, parts.validate_N, parts.train_N))
    path = Path(z[fit], y[fit])
    errors = [
        (path.fit(one).predict(z[validate]) - y[validate]).square().mean(0, keepdim=True).mean(1) for one in ALPHAS
    ]
    return np.asarray(Path(z[train], y[train]).fit(best(torch.stack(errors))).predict(z).argmax(1).numpy())


def map_of(z_ND: np.ndarray, seed: int) -> np.ndarray:
    """Two coordinates of each vector by t-SNE (van der Maaten & Hinton 2008): (N, 2). A collapsed code is one place."""
    from openTSNE import TSNE

    if not z_ND.std(0).any():
        return np.zeros((len(z_ND), 2))

    perplexity = min(PERPLEXITY, max(1, (len(z_ND) - 1) // 3))
    return np.asarray(TSNE(perplexity=perplexity, metric="cosine", neighbors="exact", random_state=seed).fit(z_ND))


def _pictures(frames: File, rows: pl.DataFrame) -> pl.Series:
    """Small pictures of at most `SHOWN` vectors, evenly chosen, by the same rule for every encoder; null elsewhere."""
    import polars as pl

    store = FrameStore(frames)
    first = store.episodes.select("episode_index", "dataset_from_index")
    joined = rows.join(first, on="episode_index", how="left", maintain_order="left")
    row_N = (joined["dataset_from_index"] + joined["frame_index"]).to_numpy()
    pictures: list[bytes | None] = [None] * len(rows)
    for place in range(0, len(rows), -(-len(rows) // SHOWN)):
        pictures[place] = thumbnail(store.read(row_N[place : place + 1])[0], SIDE)
    return pl.Series(pictures, dtype=pl.Binary)


def _row(
    dimension: str, metric: str, value: dict[str, float | None], group: str = "task", note: str = ""
) -> dict[str, Any]:
    return {"group": group, "dimension": dimension, "metric": metric, **value, "note": note}


def _sums(parts: Split, right_N: np.ndarray) -> pl.DataFrame:
    """Per episode, how many neighbours' votes were wrong, in the columns that all probes write."""
    import polars as pl

    frame = pl.DataFrame({"episode_index": parts.episode_N, "seen": parts.seen_N, "wrong": ~right_N})
    every = pl.len().cast(pl.Float64)
    return frame.group_by("episode_index", "seen", maintain_order=True).agg(
        n=every, sse=pl.col("wrong").sum().cast(pl.Float64), sum_y=every, sum_yy=every, dimension=pl.lit("task").first()
    )
