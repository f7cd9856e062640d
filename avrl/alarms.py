"""Alarms: a run that diverges or collapses says so while it runs, once a kind. They stop nothing."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SPAN = 20  # rows that are averaged: a row of a short run is one batch, whose gaps alone move its loss threefold
RISE = 2.0  # times the best span's loss
# What healthy runs of the tiny size never came near, from the first steps on: rank 9 of CLS (of 64 at most), 40 of
# patches (of 512); std .022 of CLS and .09 of patches. 1 and 0 are a code that is dead.
# No alarm on a rank that falls: that is what learning looks like. Beside a held-out skill that rises all the while, CLS
# falls to .3 of its rank at the first look and patches to .5 on the sample; in other runs to .04 (94 to 4).
FLAT_RANK = 1.5
FLAT_STD = 0.01
# The plan's loss weights in a small budget (tests/benchmarks/RESULTS.md): held-out skill of .00 while all else is well.
NO_SKILL = 0.01
PATIENT = 3  # looks in a row after the warm-up


class Alarms:
    """What to warn of, row by row of the log; a kind that was told is not told again.

    Args:
        warmup: Steps of the warm-up.
    """

    def __init__(self, warmup: int = 0) -> None:
        self._warmup, self._idle = warmup, 0
        self._losses: deque[float] = deque(maxlen=SPAN)
        self._best = math.inf
        self._told: set[str] = set()

    def heard(self, row: Mapping[str, Any]) -> list[str]:
        """Take in a row; return the warnings that it is the first to call for."""
        found = {kind: words for kind, words in self._all(row).items() if kind not in self._told}
        self._told |= set(found)
        return [f"step {row['step']}: {words}" for words in found.values()]

    def _all(self, row: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        self._losses.append(row["loss"])
        mean = sum(self._losses) / len(self._losses)
        if len(self._losses) == SPAN:
            self._best = min(self._best, mean)
        if mean > RISE * self._best:
            found["loss"] = f"the loss rose to {mean:.4g} from {self._best:.4g}; a lower --lr may cure it"
        skill = row["held_out_skill"]
        if skill is not None and row["step"] > self._warmup:
            self._idle = self._idle + 1 if skill < NO_SKILL else 0
            if self._idle >= PATIENT:
                found["skill"] = (
                    f"held-out skill is {skill:.3f}, no better than its baseline so far; another --lr, --loss-decay "
                    "or --sample-decay may cure it"
                )
        for code in ("cls", "patches"):
            rank, std = row[f"rank_{code}"], row[f"std_{code}"]
            if std is not None and std < FLAT_STD:
                found[f"std {code}"] = f"{code} collapses: it is the same for all pictures (std {std:.2g})"
            elif rank is not None and rank < FLAT_RANK:
                found[f"rank {code}"] = f"{code} collapses: its effective rank is {rank:.2f}"
        return found
