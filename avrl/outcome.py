"""The one look at test: errors by episode, and every score with its interval, as rows.

Legend: N pairs, K = 7 target dimensions, E test episodes, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from avrl import intervals
from avrl.labels import DIMENSIONS, GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

RANK_ROWS = 4096  # test pairs that the effective rank is taken of


@dataclass(frozen=True)
class Split:
    """Masks over pairs, and the episode of each pair. ``fit`` and ``validate`` part the training episodes."""

    fit_N: np.ndarray
    validate_N: np.ndarray
    test_N: np.ndarray
    seen_N: np.ndarray
    episode_N: np.ndarray


class Test:
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


def rank(z_ND: np.ndarray, test: Test) -> dict[str, Any]:
    """Effective rank of the features: a collapsed code says so here (RankMe, Garrido et al. 2023)."""
    z_ND = z_ND[:RANK_ROWS]
    centred = z_ND.astype(np.float64) - z_ND.mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred  # the smaller of the two
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    share = values / max(values.sum(), 1e-300)
    found = float(np.exp(-(share * np.log(share + 1e-12)).sum())) if values.sum() > 0 else 1.0
    row = {"group": "features", "dimension": "all", "metric": "effective-rank", "alpha": None, "split": "val"}
    return {**row, "value": found, "low": None, "high": None, **test.counts(), "note": ""}
