"""Probing: features + labels -> scores. The one rule for all encoders, and the only code that fits one on a target.

Fit on training episodes, choose lambda on validation episodes *of train*, refit on all of train, look at test
once. Every number is a row: a target dimension, a readout, a split, a training set. Nothing is pooled but the mean of a
group.

Legend: N pairs, D feature dimensions, K target dimensions, M a part of the pairs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from avrl import labels, splits
from avrl.artifact import SCRATCH
from avrl.errors import ConfigError
from avrl.outcome import RANK_ROWS, WHOLE, Test, effective_rank
from avrl.probes import attentive
from avrl.probes.ridge import fits
from avrl.ridge import ALPHAS
from avrl.scratch import BLOCK, array, joined
from avrl.splits import ALL, SEEN, UNSEEN
from avrl.vectors import STRETCH, Vectors, offers, places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path as File

    import polars as pl

    from avrl.labels import Target
    from avrl.probes import Given, Inputs, Task, Who
    from avrl.ridge import Fit
    from avrl.splits import Part, Split

log = logging.getLogger(__name__)

PROTOCOL = 5  # bump when numbers of the same samples would change
FAR = 3  # half ranges of training from their middle


@dataclass(frozen=True)
class Floor:
    """Vectors that need no network: nothing, the state at t, or (a ceiling) the state before and after."""

    readout: str
    z_ND: np.ndarray
    pairing: str = "none"

    @property
    def dims(self) -> int:
        """D."""
        return int(self.z_ND.shape[1])

    def blocks(self, index_M: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `Inputs`; as far as a stretch of features goes at once."""
        for part in np.split(index_M, np.flatnonzero(np.diff(index_M // STRETCH)) + 1):
            yield part, self.z_ND[part]

    def evened(self, train_N: np.ndarray, scratch: File | None = None) -> Floor:
        """Each column by its spread in training, for each has a unit of its own: m, rad, a gripper from 0 to 1000.

        The ridge's cap on magnifying is for features of one unit, and would silence the metres. What that cap is for, a
        column that is all but still in training and moves in test, is kept within `FAR` times what training shows.
        """
        cuts = [slice(at, at + BLOCK) for at in range(0, len(self.z_ND), BLOCK)]  # the whole may be gigabytes
        trained = [cut for cut in cuts if train_N[cut].any()]

        def over(take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            return np.stack([take(self.z_ND[cut][train_N[cut]]) for cut in trained])

        low, high = over(lambda z: z.min(0)).min(0), over(lambda z: z.max(0)).max(0)
        mean = over(lambda z: z.sum(0)).sum(0) / train_N.sum()
        std = np.sqrt(over(lambda z: ((z - mean) ** 2).sum(0)).sum(0) / train_N.sum())
        middle, reach, found = (low + high) / 2, FAR * (high - low) / 2, array(self.z_ND.shape, scratch)
        for cut in cuts:
            found[cut] = np.clip(self.z_ND[cut], middle - reach, middle + reach) / np.where(high > low, std, 1)
        return replace(self, z_ND=found)


def score(out: File, who: Who, task: Task, given: Given) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` (per-episode sums, for paired differences later).

    Args:
        out: Directory to write into.
        who: Names of the encoder.
        task: What is predicted, and how it is scored.
        given: Frames, labels and, but for ``mean``, ``state`` and ``oracle``, features.

    Returns:
        Facts for the manifest.

    Raises:
        ConfigError: no pair is left to fit, to choose lambda or to test on.
    """
    import polars as pl

    episodes = pl.read_parquet(given.frames / "episodes.parquet")
    table = pl.scan_parquet(cast("File", given.labels) / "labels.parquet")
    given = replace(given, scratch=out / SCRATCH)
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    facts: list[dict[str, Any]] = []
    for target in labels.targets(table, task.gap, task.target, task.probe, given.scratch):
        found = _scored(who, task, given, target, episodes)
        del target  # before the next is made
        if found:
            scores += found[0]
            sums += found[1]
            facts.append(found[2])
    if not facts:
        raise ConfigError(
            f"{given.frames}: two training episodes and a held-out one with frames {task.gap} apart are needed",
            "try a smaller --gap, or prep more episodes, of training and held out",
        )
    pl.DataFrame(scores, infer_schema_length=None).write_parquet(out / "scores.parquet")
    pl.concat(sums).write_parquet(out / "episodes.parquet")
    return facts[0] if len(facts) == 1 else {"targets": facts}


def _scored(
    who: Who, task: Task, given: Given, target: Target, episodes: pl.DataFrame
) -> tuple[list[dict[str, Any]], list[pl.DataFrame], dict[str, Any]] | None:
    """Scores, sums and facts of one target; None, with a word, if its pairs are in too few episodes."""
    tested = ", ".join(sorted(set(episodes["split"]) - {"train"})) or "a fifth of each task"
    parts = splits.split(target.rows, episodes, task.seed)
    if not all(mask.any() for mask in (parts.fit_N, parts.validate_N, parts.test_N)):
        log.warning("too few episodes have pairs %d apart to probe %s", task.gap, target.name or "them")
        return None
    asked = replace(task, target=f"{task.target} {target.name}".strip())
    shared = {
        "probe": task.probe,
        **asdict(who),
        "gap": task.gap,
        "gap_s": task.gap / float(episodes["fps"][0]),
        "target": asked.target,
        "solver": task.solver,
        "fingerprint": fingerprint(target.rows, parts, asked),
    }
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    for named, rows, whole in _judged(who, asked, given, target, parts, episodes):
        scores += [{**shared, **named, **row} for row in rows]
        sums.append(whole.sums({**shared, **named}))
    if not scores:
        raise ConfigError(f"{who.encoder} has none of the readouts asked for", "leave out --readout")
    counts = {name: scores[0][name] for name in ("n_train", "n_test", "episodes_train", "episodes_test")}
    facts = {**counts, **shared, "tested": tested, "left_out": _offers(given.features, target, task)[1]}
    return scores, sums, facts


def fingerprint(rows: pl.DataFrame, parts: Split, task: Task) -> str:
    """12 hex digits of the protocol: rows of tables may stand together only where these agree."""
    samples = hashlib.sha256()
    for some in rows.iter_slices(STRETCH):
        samples.update(some.to_numpy().tobytes())
    for mask in (parts.fit_N, parts.validate_N, parts.test_N):
        samples.update(mask.tobytes())
    asked = [PROTOCOL, task.probe, task.data_digests, samples.hexdigest(), task.gap, task.target, task.seed]
    asked += [task.solver, task.samples]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _inputs(
    encoder: str, target: Target, features_root: File | None, task: Task, scratch: File | None = None
) -> Iterator[Inputs]:
    """Each readout in both ways that two frames become one vector."""
    if features_root is None:
        known = {"state": [target.state_NS], "oracle": [target.state_NS, target.motion_NS]}.get(encoder)
        yield Floor(encoder, joined(known, scratch) if known else np.zeros((len(target.rows), 1)))
        return
    place_N2 = places(features_root, target.rows, task.gap)
    found, left_out = _offers(features_root, target, task)
    for name, why in left_out.items():
        log.warning("%s: readout %s is left out: %s", encoder, name, why)
    for readout, pairing in found:
        # A pixel difference is antisymmetric as it stands.
        if (readout, pairing) != ("difference", "antisymmetric"):
            yield Vectors(features_root, readout, pairing, place_N2)


def _offers(root: File | None, target: Target, task: Task) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """See `avrl.vectors.offers`; a floor has none."""
    return offers(root, task.readouts, ("pair", "antisymmetric"), len(target.rows)) if root else ([], {})


def _judged(
    who: Who, task: Task, given: Given, target: Target, parts: Split, episodes: pl.DataFrame
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], Test]]:
    """What names a readout, all its rows, and the test of what was trained on everything."""
    if task.solver == "attentive" and (given.encoder is not None or who.init != "none"):
        predicted_MK, rate, dims = attentive.predict(given, target, parts, task)
        size = (int(parts.fit_N.sum()), len(np.unique(parts.episode_N[parts.fit_N])))
        test = Tried(predicted_MK, [], [size]).test(target, parts, (task.resamples, task.seed))
        told = f"rate {rate:g} of {who.encoder}" + " (untrained)" * (who.init == "random")
        rows = [{**row, "note": row["note"] or told} for row in test.rows(None, ALL, apart=True)]
        yield {"readout": "patches", "pairing": "attentive", "dims": dims}, rows, test
        return
    # An attentive protocol too has floors and a ceiling by the ridge: they see no patches.
    for vectors in _inputs(who.encoder, target, given.features, task, given.scratch):
        rows, test = _judge(vectors, target, parts, episodes, task, given.scratch)
        named = {"readout": vectors.readout, "pairing": vectors.pairing, "dims": vectors.dims, "solver": "ridge"}
        yield named, rows, test


@dataclass
class Tried:
    """What one way of training predicts of the test pairs, and on how much it was trained.

    Attributes:
        predicted_MK: In the order of the test pairs; NaN where it predicts nothing.
        alphas: (K,) of each fit.
        sizes: Pairs and episodes of each fit.
    """

    predicted_MK: np.ndarray
    alphas: list[np.ndarray]
    sizes: list[tuple[int, int]]

    def test(self, target: Target, parts: Split, draws: tuple[int, int]) -> Test:
        """The errors."""
        known_M = np.isfinite(self.predicted_MK[:, 0])
        tested_N = np.flatnonzero(parts.test_N)[known_M]
        predicted_MK = self.predicted_MK if known_M.all() else self.predicted_MK[known_M]
        n, e = (round(one) for one in np.mean(self.sizes, 0))
        return Test(target, parts, tested_N, predicted_MK, {"n_train": n, "episodes_train": e}, draws)


def _judge(
    vectors: Inputs, target: Target, parts: Split, episodes: pl.DataFrame, task: Task, scratch: File | None = None
) -> tuple[list[dict[str, Any]], Test]:
    """All rows of one readout, and the test of what was trained on everything."""
    vectors = vectors.evened(parts.train_N, scratch) if isinstance(vectors, Floor) else vectors
    fitted = list(fits(vectors, target.y_NK, parts, episodes, task.seed))
    tried, some_z = predictions(vectors, parts, fitted, scratch)
    draws = (task.resamples, task.seed)
    tests = {name: one.test(target, parts, draws) for name, one in tried.items()}
    rows: list[dict[str, Any]] = []
    for name, one in tried.items():
        rows += tests[name].rows(np.exp(np.mean(np.log(one.alphas), 0)), name, apart=name == ALL)
    whole = tests[ALL]
    least = [name for name, alpha in zip(target.dimensions, tried[ALL].alphas[0], strict=True) if alpha == ALPHAS[0]]
    note = (
        f"{vectors.readout}: strength {ALPHAS[0]:g}, the smallest of its grid, for {', '.join(least)}" if least else ""
    )
    shared = {"train": ALL, "split": WHOLE, "alpha": None, "note": "", **whole.counts()}
    rank = {"group": "features", "dimension": "all", "metric": "effective-rank", "low": None, "high": None}
    rows.append({**shared, **rank, "value": effective_rank(some_z), "note": note})
    for group in target.groups:
        if UNSEEN in tests and group not in target.binary:
            row = {"group": group, "dimension": "mean", "metric": "r2", "train": f"{SEEN} minus {UNSEEN}"}
            rows.append({**shared, **tests[UNSEEN].counts(), **row, **tests[SEEN].minus(tests[UNSEEN], group)})
    return rows, whole


def predictions(
    vectors: Inputs, parts: Split, fitted: list[tuple[Part, Fit, np.ndarray]], scratch: File | None = None
) -> tuple[dict[str, Tried], np.ndarray]:
    """Each fit's predictions of its test pairs, in one pass over them; and the features of some from all over them."""
    at, k = np.flatnonzero(parts.test_N), len(fitted[0][2])
    ranked = at[np.linspace(0, len(at) - 1, min(RANK_ROWS, len(at))).astype(int)]  # the first are a few episodes
    tried: dict[str, Tried] = {}
    for part, _, alpha_K in fitted:
        if part.train not in tried:
            tried[part.train] = Tried(array((len(at), k), scratch, np.nan), [], [])
        one = tried[part.train]
        train_N = part.fit_N | part.validate_N
        one.alphas.append(alpha_K)
        one.sizes.append((int(train_N.sum()), len(np.unique(parts.episode_N[train_N]))))
    some: list[np.ndarray] = []
    for index, z in vectors.blocks(at):
        some.append(z[np.isin(index, ranked)])
        for part, fit, _ in fitted:
            here = part.test_N[index]
            if here.any():
                place = np.searchsorted(at, index[here])
                tried[part.train].predicted_MK[place] = fit.predict(torch.from_numpy(z[here])).numpy()
    return tried, np.concatenate(some)
