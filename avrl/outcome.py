"""The one look at test: errors by episode, and every score with its interval, as rows.

Legend: N pairs, M those that are tested, K target dimensions, E test episodes, R resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from avrl import intervals
from avrl.scratch import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import polars as pl

    from avrl.labels import Target
    from avrl.splits import Split

RANK_ROWS = 4096  # test pairs that the effective rank is taken of
BINS = 256  # tokens of a dimension in RT-2 and OpenVLA
EDGES = (0.01, 0.99)  # quantiles of training between which OpenVLA's bins lie
WHOLE = "val"


class Test:
    """Errors of one prediction of test pairs, and every number that follows, with its interval.

    Args:
        target: Of all pairs.
        parts: Of all pairs; training only gives the edges of bins.
        tested_M: Which pairs are predicted.
        predicted_MK: What is predicted of them.
        trained: ``n_train`` and ``episodes_train``, for the rows.
        draws: Resamples and seed of the bootstrap.
    """

    def __init__(
        self,
        target: Target,
        parts: Split,
        tested_M: np.ndarray,
        predicted_MK: np.ndarray,
        trained: dict[str, int],
        draws: tuple[int, int],
    ) -> None:
        self.names, self.groups, self.binary = target.dimensions, target.groups, target.binary
        self.trained = trained
        self.episodes, self.of = np.unique(parts.episode_N[tested_M], return_inverse=True)
        self.seen = np.zeros(len(self.episodes), bool)
        self.seen[self.of] = parts.seen_N[tested_M]
        self.weights = intervals.weights(len(self.episodes), *draws)

        sse, sum_y, sum_yy, self.right = np.zeros((4, len(self.episodes), len(self.names)))
        low, high = np.stack([np.quantile(one[parts.train_N], EDGES) for one in target.y_NK.T], 1)
        is_binary = np.array([name in self.binary for name in self.names])
        for at in range(0, len(tested_M), BLOCK):  # pairs may be more than memory holds; episodes are not
            of, predicted = self.of[at : at + BLOCK], predicted_MK[at : at + BLOCK]
            y = target.y_NK[tested_M[at : at + BLOCK]]
            same = tokens(y, low, high) == tokens(predicted, low, high)
            right = np.where(is_binary, (predicted > 0.5) == (y > 0.5), same)
            for total, values in ((sse, (predicted - y) ** 2), (sum_y, y), (sum_yy, y**2), (self.right, right)):
                np.add.at(total, of, values)
        n_E = np.bincount(self.of, minlength=len(self.episodes)).astype(np.float64)
        self.stats = intervals.Sums(n_E, sse, sum_y, sum_yy)
        binary = [k for k, name in enumerate(self.names) if name in self.binary]
        self.classes = {k: (predicted_MK[:, k], target.y_NK[tested_M, k]) for k in binary}

    def rows(self, alpha_K: np.ndarray | None, train: str, *, apart: bool = False) -> Iterator[dict[str, Any]]:
        """Scores on all test episodes and, if `apart`, on those of seen tasks and on those of unseen tasks.

        `alpha_K` is the strength of the ridge for each dimension, None for another solver.
        """
        every = np.ones(len(self.episodes), bool)
        splits = {WHOLE: every, "val-seen": self.seen, "val-unseen": ~self.seen} if apart else {WHOLE: every}
        for name, chosen in splits.items():
            if chosen.any():
                shared = {"train": train, "split": name, **self._counts(chosen), "note": "", "alpha": None}
                yield from ({**shared, **row} for row in self._numbers(chosen, alpha_K))

    def _numbers(self, chosen: np.ndarray, alpha_K: np.ndarray | None) -> Iterator[dict[str, Any]]:
        sums = intervals.Sums(*(values[chosen] for values in self.stats))
        drawn = self.weights[:, chosen]
        each = intervals.r2_interval(sums, drawn)
        right_K, right_RK = (intervals.mean(self.right[chosen], sums.n, one) for one in (None, drawn))
        strength = [None] * len(self.names) if alpha_K is None else alpha_K.tolist()
        for group, dimensions in self.groups.items():
            at = [self.names.index(one) for one in dimensions]
            moving = [k for k in at if np.isfinite(each.value[k])]
            for k in at:
                row = {"group": group, "dimension": self.names[k], "alpha": strength[k]}
                note = "" if k in moving else "constant target"
                yield {**row, "metric": "r2", **numbers(each, k), "note": note}
                metric = "accuracy" if self.names[k] in self.binary else "bin-accuracy"
                yield {
                    **row,
                    "metric": metric,
                    **numbers(intervals.interval(right_K[k], right_RK[:, k], len(sums.n))),
                }
                if self.names[k] in self.binary:
                    yield {**row, **self._auc(chosen, k)}
            if len(at) > 1 and moving:
                some = ", ".join(self.names[k] for k in moving)
                row = {"group": group, "dimension": "mean", "note": "" if moving == at else f"mean over {some}"}
                part = _columns(sums, moving)
                yield {**row, "metric": "r2", **numbers(intervals.r2_interval(part, drawn, mean=True))}
                found = intervals.interval(intervals.nmse(part)[0], intervals.nmse(part, drawn), len(sums.n))
                yield {**row, "metric": "nmse", **numbers(found), "note": ""}
                found = intervals.interval(right_K[at].mean(), right_RK[:, at].mean(1), len(sums.n))
                yield {**row, "metric": "bin-accuracy", **numbers(found), "note": ""}

    def _auc(self, chosen: np.ndarray, k: int) -> dict[str, Any]:
        """Area under the ROC curve of a binary dimension."""
        here = chosen[self.of]
        of, every = self.of[here], np.ones(len(self.episodes))
        rows = (weight_E[of] for weight_E in (every, *self.weights))  # one resample at a time: all are gigabytes
        predicted_M, y_M = self.classes[k]
        curve = auc(predicted_M[here], y_M[here], rows)
        note = "" if np.isfinite(curve[0]) else "one class only"
        return {"metric": "auc", **numbers(intervals.interval(curve[0], curve[1:], int(chosen.sum()))), "note": note}

    def minus(self, other: Test, group: str) -> dict[str, Any]:
        """R2 of a group here minus that of another prediction of the same pairs, on the same draws."""
        mine, theirs = self.stats, other.stats
        at = [self.names.index(one) for one in self.groups[group]]
        moving = [k for k in at if np.isfinite(intervals.r2(*mine)[k])]
        pair = (_columns(mine, moving), _columns(theirs, moving))
        return numbers(intervals.difference(*pair, self.weights, mean=True)) if moving else numbers(UNKNOWN)

    def _counts(self, chosen: np.ndarray) -> dict[str, int]:
        return {**self.trained, "n_test": int(self.stats.n[chosen].sum()), "episodes_test": int(chosen.sum())}

    def counts(self) -> dict[str, int]:
        """Of the whole test split."""
        return self._counts(np.ones(len(self.episodes), bool))

    def sums(self, named: dict[str, Any]) -> pl.DataFrame:
        """Per-episode sums of every dimension, in long form."""
        import polars as pl

        tables = []
        for k, dimension in enumerate(self.names):
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


UNKNOWN = intervals.Interval(*(np.array(np.nan),) * 3)


def tokens(y_NK: np.ndarray, low_K: np.ndarray, high_K: np.ndarray) -> np.ndarray:
    """The bin of each number, 0 to 255: `BINS` equal ones between two quantiles of training, the ends taking the rest.

    Source: RT-2 (Brohan et al. 2023), 256 uniform bins a dimension; OpenVLA (Kim et al. 2024), between quantiles 1% and
    99%. A dimension that does not move has one bin.
    """
    width_K = np.maximum(high_K - low_K, 1e-12)
    return np.asarray(np.clip(np.floor((y_NK - low_K) / width_K * BINS), 0, BINS - 1))


def _columns(sums: intervals.Sums, at: list[int]) -> intervals.Sums:
    return intervals.Sums(sums.n, sums.sse[:, at], sums.sum_y[:, at], sums.sum_yy[:, at])


def numbers(found: intervals.Interval, k: int | None = None) -> dict[str, float | None]:
    """``value``, ``low`` and ``high``; None for what is undefined."""
    values = {name: float(value if k is None else value[k]) for name, value in found._asdict().items()}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def auc(score_N: np.ndarray, label_N: np.ndarray, weights_RN: Iterable[np.ndarray]) -> np.ndarray:
    """Area under the ROC curve for each row (N,) of sample weights: (R,); NaN where one class is missing.

    The chance that a positive scores above a negative, ties counting half (Hanley & McNeil 1982).
    """
    values, rank = np.unique(score_N, return_inverse=True)
    result = []
    for weight in weights_RN:
        positive = np.bincount(rank, weight * (label_N > 0.5), len(values))
        negative = np.bincount(rank, weight * (label_N <= 0.5), len(values))
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        result.append((positive * (below + negative / 2)).sum() / pairs if pairs else np.nan)
    return np.array(result)


def effective_rank(z_ND: np.ndarray) -> float:
    """Effective rank of features: a collapsed code says so here (RankMe, Garrido et al. 2023)."""
    centred = z_ND.astype(np.float64) - z_ND.mean(0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred  # the smaller of the two
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    share = values / max(values.sum(), 1e-300)
    return float(np.exp(-(share * np.log(share + 1e-12)).sum())) if values.sum() > 0 else 1.0
