"""Share of right answers, or the mean of what each sample says, with its interval over episodes."""

from __future__ import annotations

import numpy as np

from avrl import intervals
from avrl.outcome import numbers


def share(right_N: np.ndarray, episode_N: np.ndarray, resamples: int, seed: int) -> dict[str, float | None]:
    """``value``, ``low`` and ``high`` of the mean of `right_N` (0..1, or any score), bootstrapped over episodes."""
    episodes, of = np.unique(episode_N, return_inverse=True)
    n_E, right_E = np.bincount(of).astype(np.float64), np.bincount(of, right_N)
    drawn = intervals.weights(len(episodes), resamples, seed)
    return numbers(intervals.interval(right_E.sum() / n_E.sum(), (drawn @ right_E) / (drawn @ n_E), len(episodes)))
