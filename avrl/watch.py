"""Watching a run: each row of the log, as it comes, to the disk, to a tracker, and past the alarms.

``scratch/log.jsonl`` in the run's partial directory has a line a row, while the run goes on and after it was killed.
A run that goes on cuts it back to the rows of its snapshot; in the end `avrl.curve` writes the same rows for good.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from avrl import trackers
from avrl.alarms import Alarms
from avrl.artifact import SCRATCH
from avrl.averaging import adopted
from avrl.looks import Looks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from torch.optim import Optimizer

    from avrl.curve import Curve, Row
    from avrl.objectives import Objective
    from avrl.pairs import Pairs
    from avrl.training import Recipe

log = logging.getLogger(__name__)

LOOKS = 20  # of a run, unless asked for otherwise, and those before the first of them
APART = 250  # steps between them at least: a look costs as much as some ten steps of batch 8, and three of batch 24
NAME = "log.jsonl"


class Watch:
    """What the first rank does with a row of the log; on other ranks, nothing.

    Args:
        out: The run's partial directory.
        recipe: The run.
        pairs: What it trains on.
        objective: What it trains.
        optimizer: With the running mean of the weights, where that is what will be published: looks are at it.
        curve: Its log, with the rows of an earlier call.
        first: Step at which it goes on.
        warmup: Steps of the warm-up, in which little is learned.
        rank: Of this process.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        pairs: Pairs,
        objective: Objective,
        optimizer: Optimizer,
        curve: Curve,
        first: int,
        warmup: int,
        rank: int,
    ) -> None:
        self.first_rank, self.total, self.optimizer = rank == 0, curve.total, optimizer
        if not self.first_rank:
            return
        self.looks = Looks(pairs.store, recipe.sampling, objective, out)
        self.looks.cut_back(first)
        self.look_every, self.probe_every = recipe.look_every, recipe.probe_every
        self.before = int(curve.rows[-1]["step"] or 0) if curve.rows else 0
        self.alarms = Alarms(warmup)
        for row in curve.rows:
            self.alarms.heard(row)
        path = out / SCRATCH / NAME
        path.parent.mkdir(exist_ok=True)
        self.file = path.open("w", encoding="utf-8", buffering=1)  # a line at a time
        self.file.writelines(map(line, curve.rows))
        self.file.flush()
        log.info("the log grows in %s", path)
        run = out.name.removeprefix(".partial-")
        place = out.parent.parent / recipe.tracker  # beside the stages: what it holds has times in it
        self.sink = trackers.opened(recipe.tracker, place, run, first, asdict(recipe))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.first_rank:
            self.file.close()
            if self.sink:
                self.sink.close()

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The weights that will be published; and nothing is compiled for the few passes of a look."""
        with adopted(self.optimizer), torch.compiler.set_stance("force_eager"):
            yield

    def see(self, row: Row | None) -> None:
        """Look at the run if it is time to, write the row down, pass it on, and warn if it says so.

        Args:
            row: A finished row, which gets what a look finds; None between rows.
        """
        if not self.first_rank or row is None:
            return
        before, step = self.before, int(row["step"] or 0)
        self.before = step
        last, batches = step == self.total, bool(self.looks.batches)
        fresh = looks_until(step, self.total, self.look_every) > looks_until(before, self.total, self.look_every)
        if batches and (last or fresh):
            with self._at_rest():
                row |= self.looks.look(step)
        if batches and self.probe_every and (last or step // self.probe_every > before // self.probe_every):
            with self._at_rest():
                row["probe_r2"] = self.looks.probe()
        self.file.write(line(row))
        if self.sink:
            self.sink.put(row)
        for words in self.alarms.heard(row):
            log.warning("%s", words)


def looks_until(step: int, total: int, asked: int = 0) -> int:
    """How many looks are due up to a step: what a look finds stands in the first row that ends there or later.

    Args:
        step: Steps done.
        total: Of the run.
        asked: Steps between looks. 0: after 250, 500, 1000, ... steps, and `LOOKS` times over the whole run.
    """
    if asked:
        return step // asked
    every = max(APART, total // LOOKS)
    return (min(step, every - 1) // APART).bit_length() + step // every


def line(row: Row) -> str:
    """A row as JSON, for which a number that is not finite is none."""
    shown: dict[str, Any] = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(shown) + "\n"
