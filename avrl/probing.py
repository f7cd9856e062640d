"""Probing: features + labels -> scores. The one rule for all encoders, and the only code that touches splits.

Fit on training episodes, choose lambda on validation episodes *of train*, refit on all of train, look at test
once. Every number is a row: a target dimension, a readout, a split. Nothing is pooled but the mean of a group.

Legend: N pairs, D feature dimensions, K = 7 target dimensions, E test episodes, R resamples.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avrl import intervals, labels
from avrl.labels import DIMENSIONS, GROUPS
from avrl.probes.ridge import Ridge, choose_alpha

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

log = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2  # of the training episodes
LARGEST = 8192  # dimensions of a readout; beyond, and with more pairs than that, an eigendecomposition takes hours
RANK_ROWS = 4096  # test pairs that the effective rank is taken of
PROTOCOL = 1  # bump when numbers of the same samples would change


@dataclass(frozen=True)
class Split:
    """Masks over pairs, and the episode of each pair. ``fit`` and ``validate`` part the training episodes."""

    fit_N: np.ndarray
    validate_N: np.ndarray
    test_N: np.ndarray
    seen_N: np.ndarray
    episode_N: np.ndarray


@dataclass(frozen=True)
class Who:
    """Whose features are scored: the columns that name a row."""

    encoder: str
    checkpoint: str
    init: str


def split(rows: pl.DataFrame, episodes: pl.DataFrame, seed: int) -> Split:
    """By episode, as the source publishes it: ``train`` and ``val``. A fifth of train chooses lambda."""
    index = episodes["episode_index"].to_numpy()
    is_train = (episodes["split"] == "train").to_numpy()
    tasks = episodes["task"].to_numpy()
    seen_task = set(tasks[is_train])
    train = np.sort(index[is_train])
    shuffled = np.random.default_rng(seed).permutation(train)
    chosen = set(shuffled[: max(1, round(VALIDATION_SHARE * len(train)))].tolist())
    row_episode = rows["episode_index"].to_numpy()
    in_train = np.isin(row_episode, train)
    validate = np.isin(row_episode, sorted(chosen))
    seen = np.isin(row_episode, index[[task in seen_task for task in tasks]])
    return Split(in_train & ~validate, validate, ~in_train, seen, row_episode)


def score(
    out: Path,
    who: Who,
    labels_root: Path,
    frames_root: Path,
    features_root: Path | None,
    *,
    gap: int,
    target: str,
    readouts: tuple[str, ...],
    seed: int,
    resamples: int,
    data_digest: str,
) -> dict[str, Any]:
    """Write ``scores.parquet`` and ``episodes.parquet`` (per-episode sums, for paired differences later).

    Args:
        out: Directory to write into.
        who: Names of the encoder.
        labels_root: Root of the ``labels`` artifact.
        frames_root: Root of the frame store, for splits and tasks.
        features_root: Root of the ``features`` artifact; None for the floors ``mean`` and ``state``.
        gap: Frames between the two of a pair.
        target: One of `avrl.labels.TARGETS`.
        readouts: Which to score; empty for all.
        seed: Of the validation episodes and the bootstrap.
        resamples: Of the bootstrap over test episodes.
        data_digest: Digest of the labels, for the fingerprint.

    Returns:
        Facts for the manifest.
    """
    import polars as pl

    episodes = pl.read_parquet(frames_root / "episodes.parquet")
    rows, y_NK, state_NK = labels.pairs(pl.read_parquet(labels_root / "labels.parquet"), gap, target)
    parts = split(rows, episodes, seed)
    shared = {
        "probe": "bridge",
        "encoder": who.encoder,
        "checkpoint": who.checkpoint,
        "init": who.init,
        "gap": gap,
        "gap_s": gap / float(episodes["fps"][0]),
        "target": target,
        "fingerprint": fingerprint(rows, parts, gap, target, seed, data_digest),
    }
    scores: list[dict[str, Any]] = []
    sums: list[pl.DataFrame] = []
    for readout, pairing, z_ND in _inputs(who.encoder, state_NK, rows, features_root, gap, readouts):
        named = {**shared, "readout": readout, "pairing": pairing, "dims": z_ND.shape[1]}
        predicted, alpha = _fit(z_ND, y_NK, parts)
        test = _Test(y_NK[parts.test_N], predicted, parts, resamples, seed)
        scores += [{**named, **row} for row in test.rows(alpha)]
        scores.append({**named, **_rank(z_ND[parts.test_N], test)})
        sums.append(test.sums(named))
    pl.DataFrame(scores, infer_schema_length=None).write_parquet(out / "scores.parquet")
    pl.concat(sums).write_parquet(out / "episodes.parquet")
    first = scores[0]
    counts = {name: first[name] for name in ("n_train", "n_test", "episodes_train", "episodes_test", "fingerprint")}
    return {
        **counts,
        "encoder": who.encoder,
        "init": who.init,
        "checkpoint": who.checkpoint,
        "gap": gap,
        "target": target,
    }


def fingerprint(rows: pl.DataFrame, parts: Split, gap: int, target: str, seed: int, data_digest: str) -> str:
    """12 hex digits of the protocol: rows of tables may stand together only where these agree."""
    samples = hashlib.sha256(rows.to_numpy().tobytes())
    for mask in (parts.fit_N, parts.validate_N, parts.test_N):
        samples.update(mask.tobytes())
    asked = [PROTOCOL, data_digest, samples.hexdigest(), gap, target, seed, "ridge"]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _inputs(
    encoder: str,
    state_NK: np.ndarray,
    rows: pl.DataFrame,
    features_root: Path | None,
    gap: int,
    readouts: tuple[str, ...],
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(readout, pairing, vectors (N, D) of the pairs). Image encoders give two: concatenation and difference."""
    from avrl import features

    if features_root is None:
        yield encoder, "none", state_NK if encoder == "state" else np.zeros((len(state_NK), 1))
        return
    facts = json.loads((features_root / "manifest.json").read_bytes())["facts"]
    for readout in readouts or facts["readouts"]:
        if readout not in facts["readouts"]:
            log.warning("%s has no readout %s; it has %s", encoder, readout, ", ".join(facts["readouts"]))
            continue
        if 2 * facts["readouts"][readout] > LARGEST and len(rows) > LARGEST:
            log.warning("readout %s of %s is too wide for a closed form and is left out", readout, encoder)
            continue
        table, z_ND = features.read(features_root, readout)
        place = {key: n for n, key in enumerate(table.select("episode_index", "frame_index").iter_rows())}
        first = np.array([place[key] for key in rows.iter_rows()])
        if facts["paired"]:
            yield readout, "pair", z_ND[first]
            continue
        # Concatenation keeps where things are (state, gripper), the difference keeps what moved: two rows, not one.
        yield readout, "concat", np.concatenate([z_ND[first], z_ND[first + gap]], 1)
        yield readout, "diff", z_ND[first + gap] - z_ND[first]


def _fit(z_ND: np.ndarray, y_NK: np.ndarray, parts: Split) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for the test pairs and the alpha chosen for each dimension; test targets are not looked at."""
    z, y = torch.from_numpy(z_ND), torch.from_numpy(y_NK)
    fit, validate, test = (torch.from_numpy(mask) for mask in (parts.fit_N, parts.validate_N, parts.test_N))
    alpha = choose_alpha(z[fit], y[fit], z[validate], y[validate])
    train = fit | validate
    predicted = Ridge(alpha).fit(z[train], y[train]).predict(z[test])
    return predicted.numpy(), alpha.numpy()


class _Test:
    """The one look at test: errors by episode, and every number with its interval."""

    def __init__(self, y_NK: np.ndarray, predicted_NK: np.ndarray, parts: Split, resamples: int, seed: int) -> None:
        self.y, self.predicted, self.parts = y_NK, predicted_NK, parts
        self.episodes, self.of = np.unique(parts.episode_N[parts.test_N], return_inverse=True)
        seen_pairs = parts.seen_N[parts.test_N]
        self.seen = np.array([seen_pairs[self.of == e][0] for e in range(len(self.episodes))])
        self.weights = intervals.weights(len(self.episodes), resamples, seed)

        def by_episode(values: np.ndarray) -> np.ndarray:
            total = np.zeros((len(self.episodes), *values.shape[1:]))
            np.add.at(total, self.of, values)
            return total

        error = predicted_NK - y_NK
        self.stats = intervals.Sums(
            by_episode(np.ones(len(y_NK))), by_episode(error**2), by_episode(y_NK), by_episode(y_NK**2)
        )
        self.right = by_episode((predicted_NK[:, 6] > 0.5) == (y_NK[:, 6] > 0.5))

    def rows(self, alpha_K: np.ndarray) -> Iterator[dict[str, Any]]:
        """Scores on all test episodes, on those of seen tasks, and on those of unseen tasks."""
        every = np.ones(len(self.episodes), bool)
        for name, chosen in (("val", every), ("val-seen", self.seen), ("val-unseen", ~self.seen)):
            if not chosen.any():
                continue
            counts = self._counts(chosen)
            weights = self.weights * chosen
            sums = intervals.Sums(*(values[chosen] for values in self.stats))
            drawn = weights[:, chosen]
            each = intervals.r2_interval(sums, drawn)
            for group, dimensions in GROUPS.items():
                at = [DIMENSIONS.index(one) for one in dimensions]
                for k in at:
                    note = "" if np.isfinite(each.value[k]) else "constant target"
                    row = {"group": group, "dimension": DIMENSIONS[k], "metric": "r2", "alpha": float(alpha_K[k])}
                    yield {**row, "split": name, **_numbers(each, k), **counts, "note": note}
                moving = [k for k in at if np.isfinite(each.value[k])]
                if group == "gripper" or not moving:
                    continue
                mean = intervals.r2_interval(_columns(sums, moving), drawn, mean=True)
                note = "" if moving == at else "mean over " + ", ".join(DIMENSIONS[k] for k in moving)
                row = {"group": group, "dimension": "mean", "metric": "r2", "alpha": None}
                yield {**row, "split": name, **_numbers(mean), **counts, "note": note}
            yield from self._gripper(chosen, weights, name, counts, float(alpha_K[6]))

    def _gripper(
        self, chosen: np.ndarray, weights: np.ndarray, name: str, counts: dict[str, int], alpha: float
    ) -> Iterator[dict[str, Any]]:
        """Accuracy at 0.5 and area under the ROC curve of the gripper command."""
        n, right = self.stats.n, self.right
        drawn = (weights @ right) / np.maximum(weights @ n, 1)
        value = np.array(right[chosen].sum() / n[chosen].sum())
        row = {"group": "gripper", "dimension": "gripper", "split": name, "alpha": alpha, **counts, "note": ""}
        yield {**row, "metric": "accuracy", **_numbers(intervals.interval(value, drawn))}
        here = chosen[self.of]
        curve = auc(
            self.predicted[here, 6],
            self.y[here, 6],
            np.concatenate([np.ones((1, here.sum())), weights[:, self.of[here]]]),
        )
        note = "" if np.isfinite(curve[0]) else "one class only"
        yield {**row, "metric": "auc", **_numbers(intervals.interval(curve[0], curve[1:])), "note": note}

    def _counts(self, chosen: np.ndarray) -> dict[str, int]:
        train = self.parts.fit_N | self.parts.validate_N
        return {
            "n_train": int(train.sum()),
            "n_test": int(self.stats.n[chosen].sum()),
            "episodes_train": len(np.unique(self.parts.episode_N[train])),
            "episodes_test": int(chosen.sum()),
        }

    def counts(self) -> dict[str, int]:
        """Of the whole test split."""
        return self._counts(np.ones(len(self.episodes), bool))

    def sums(self, named: dict[str, Any]) -> pl.DataFrame:
        """Per-episode sums of every dimension, in long form."""
        import polars as pl

        tables = []
        for k, dimension in enumerate(DIMENSIONS):
            columns = {
                "episode_index": self.episodes,
                "seen": self.seen,
                "n": self.stats.n,
                "sse": self.stats.sse[:, k],
                "sum_y": self.stats.sum_y[:, k],
                "sum_yy": self.stats.sum_yy[:, k],
            }
            tables.append(pl.DataFrame(columns).with_columns(dimension=pl.lit(dimension)))
        return pl.concat(tables).with_columns(
            **{name: pl.lit(value) for name, value in named.items() if name != "dims"}
        )


def _columns(sums: intervals.Sums, at: list[int]) -> intervals.Sums:
    return intervals.Sums(sums.n, sums.sse[:, at], sums.sum_y[:, at], sums.sum_yy[:, at])


def _numbers(found: intervals.Interval, k: int | None = None) -> dict[str, float | None]:
    values = {name: float(value if k is None else value[k]) for name, value in found._asdict().items()}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def auc(score_N: np.ndarray, label_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of sample weights: (R,); NaN where one class is missing.

    The chance that a positive scores above a negative, ties counting half (Hanley & McNeil 1982).
    """
    values, rank = np.unique(score_N, return_inverse=True)
    result = np.empty(len(weights_RN))
    for r, weight in enumerate(weights_RN):
        positive = np.bincount(rank, weight * (label_N > 0.5), len(values))
        negative = np.bincount(rank, weight * (label_N <= 0.5), len(values))
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        result[r] = (positive * (below + negative / 2)).sum() / pairs if pairs else np.nan
    return result


def _rank(z_ND: np.ndarray, test: _Test) -> dict[str, Any]:
    """Effective rank of the features: a collapsed code says so here (RankMe, Garrido et al. 2023)."""
    z_ND = z_ND[:RANK_ROWS]
    values = np.linalg.svd(z_ND.astype(np.float64) - z_ND.mean(0), compute_uv=False)
    share = values / max(values.sum(), 1e-300)
    rank = float(np.exp(-(share * np.log(share + 1e-12)).sum())) if values.sum() > 0 else 1.0
    row = {"group": "features", "dimension": "all", "metric": "effective-rank", "alpha": None, "split": "val"}
    return {**row, "value": rank, "low": None, "high": None, **test.counts(), "note": ""}
