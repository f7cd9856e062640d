"""Spread over seeds: which runs are of one family, and what a reader is told of them."""

from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Annotated

import pytest
from scored import CHECKPOINTS, SCORES, Row, Training

from avrl.cache import Cache
from avrl.comparison import comparable, read
from avrl.config import Opt
from avrl.spread import spread
from avrl.stage import run


@dataclass(frozen=True, kw_only=True)
class Seeded(Row):
    """A row of a probe with a seed; what a real one finds is no part of what it was asked."""

    seed: Annotated[int, Opt("Of the probe")] = 0
    noise: Annotated[float, Opt("Error", runtime=True)] = 0.5
    fingerprint: Annotated[str, Opt("Protocol", runtime=True)] = "aaaaaaaaaaaa"


@dataclass(frozen=True, kw_only=True)
class Trained(Training):
    """A checkpoint with a seed."""

    seed: Annotated[int, Opt("Of pretraining")] = 0


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


def probed(cache, *rows):
    return [run(replace(SCORES, config=Seeded), one, {}, cache)[0] for one in rows]


def trained(cache, *trainings):
    return [run(replace(CHECKPOINTS, config=Trained), one, {}, cache)[0] for one in trainings]


def of(scores, checkpoints=()):
    return spread(comparable(*read(scores)), scores, checkpoints)


def values(scores):
    found = read(scores)[0].filter(group="position", dimension="mean", metric="r2", split="val")
    return found["value"].to_list()


def test_seeds_of_pretraining(cache):
    checkpoints = trained(cache, *(Trained(seed=seed) for seed in (0, 1, 2)), Trained(steps=300, seed=3))
    rows = [Seeded(checkpoint=one.ref, noise=0.5 + place / 10) for place, one in enumerate(checkpoints)]
    scores = probed(cache, *rows, Seeded(encoder="pixels-16", init="none", pairing="none"))
    table = of(scores, checkpoints)
    (row,) = table.numbers.to_dicts()  # neither the run of fewer steps, nor the floor, is of the family
    of_three = values(scores[:3])
    assert (row["pretraining_seeds"], row["probe_seeds"]) == (3, 1)
    assert row["mean"] == pytest.approx(mean(of_three))
    assert row["sd"] == pytest.approx(stdev(of_three))
    assert (row["least"], row["most"]) == (min(of_three), max(of_three))
    assert sorted(row["runs"].split()) == sorted(one.ref for one in checkpoints[:3])
    assert table.view.row(0)[:2] == ("two-stream · cls", "trained")


def test_seeds_of_the_probe(cache):
    rows = [Seeded(encoder=name, init="pretrained", pairing="diff") for name in ("clip", "r3m")]
    again = [replace(one, seed=1, fingerprint="bbbbbbbbbbbb") for one in rows]
    other = replace(rows[0], seed=2, fingerprint="cccccccccccc", gap=1)
    scores = probed(cache, *rows, *again, other)
    table = of(scores)
    assert [(one["encoder"], one["probe_seeds"]) for one in table.numbers.to_dicts()] == [("clip", 2), ("r3m", 2)]
    assert table.numbers["pretraining_seeds"].to_list() == [1, 1]


def test_what_was_run_once_has_no_spread(cache):
    checkpoints = trained(cache, Trained(), Trained(seed=1))
    scores = probed(cache, *(Seeded(checkpoint=one.ref) for one in checkpoints))
    assert of(scores, checkpoints) is not None
    assert of(scores, checkpoints[:1]) is None  # the recipe of one is not known any more
    assert of(scores[:1], checkpoints) is None
