"""B beside A: differences are paired, only same protocols meet, and nothing is left out unsaid."""

import numpy as np
import polars as pl
import pytest
from scored import FLOORS, Row, score, sums

from avrl import contrast
from avrl.cache import Cache
from avrl.errors import ConfigError, NotFoundError
from avrl.intervals import Sums, difference, weights
from avrl.verdicts import ABOVE, BELOW

A = Row(checkpoint="run-a-111111", noise=0.8, readouts=("cls", "grid"))
B = Row(checkpoint="run-b-222222", noise=0.5, encoder="single-stream")


@pytest.fixture
def caches(tmp_path):
    return Cache(tmp_path / "a"), Cache(tmp_path / "b")


def beside(caches, *, every=True):
    one, two = (contrast.side(caches[0], str(cache.root)) for cache in caches)
    return contrast.contrast(one, two, 300, every=every)


def test_two_runs_are_subtracted_as_by_hand(caches):
    cache = caches[0]
    score(cache, A, B, *FLOORS)
    one, two = (contrast.side(cache, name) for name in ("run-a-111111", "run-b"))
    assert (one.run, two.name) == (True, "run-b-222222")
    found = contrast.contrast(one, two, 300, every=True)
    got = found.table.numbers.filter(group="position", dimension="mean", split="val").row(0, named=True)
    parts = (
        Sums(dims[0].n, *(np.hstack([one[i] for one in dims]) for i in (1, 2, 3)))
        for dims in ([sums(row, "cls", dimension) for dimension in "xyz"] for row in (B, A))
    )
    expected = [float(one) for one in difference(*parts, weights(24, 300), mean=True)]
    assert [got[name] for name in ("difference", "difference_low", "difference_high")] == pytest.approx(expected)
    assert got["difference"] == pytest.approx(got["value_b"] - got["value"])
    assert (got["verdict"], got["encoder"], got["encoder_b"]) == (ABOVE, "two-stream", "single-stream")
    x = found.table.numbers.filter(dimension="x", split="val-unseen").row(0, named=True)
    assert x["difference_low"] < x["value_b"] - x["value"] < x["difference_high"]
    gripper = found.table.numbers.filter(metric="auc").row(0, named=True)
    assert (gripper["verdict"], gripper["difference_low"]) == ("without interval", None)
    assert gripper["difference"] == pytest.approx(0.06)
    assert found.said[1:] == ["In A only (25 numbers): bridge: grid."]


def test_the_headline_comes_first_and_alone_on_a_screen(caches):
    for cache, noise in zip(caches, (0.6, 0.4), strict=True):
        score(cache, Row(noise=noise, checkpoint="same"), *FLOORS)
    every = beside(caches).table.numbers
    few = beside(caches, every=False)
    assert every["dimension"][: few.table.view.height].to_list() == few.table.numbers["dimension"].to_list()
    assert set(few.table.numbers["dimension"]) == {"mean", "gripper"}
    assert set(few.table.numbers["split"]) == {"val"}
    assert few.table.view.row(0)[0] == "two-stream · cls"
    assert few.table.view.row(0)[-1].endswith(f"] {ABOVE}")
    text = contrast.screen(few)
    assert len(text.splitlines()) < 40
    assert "15 equal" not in text  # of those shown, not of all
    assert "12 equal" in text
    assert "4 scores artifacts are the same in A and B" in text


def test_other_protocols_are_told_apart_not_subtracted(caches):
    score(caches[0], Row(), Row(encoder="data"), Row(encoder="gone"), Row(encoder="slow"))
    score(caches[1], Row(noise=0.51), Row(encoder="data", fingerprint="b" * 12), Row(encoder="new"))
    score(caches[1], Row(encoder="slow", gap=5, fingerprint="c" * 12))
    found = beside(caches)
    assert set(found.table.numbers["encoder"]) == {"two-stream"}
    assert found.table.numbers.filter(dimension="mean", split="val", group="position")["verdict"].item() == BELOW
    assert found.said[1:] == [
        "Not comparable (25 numbers of A, 25 of B): other data, samples or solver.",
        "Not comparable (25 numbers of A, 25 of B): gap 3 in A, 5 in B.",
        "In A only (25 numbers): bridge: gone · cls.",
        "In B only (25 numbers): bridge: new · cls.",
    ]


def test_several_checkpoints_meet_only_themselves(caches):
    score(caches[0], Row(checkpoint="one", noise=0.4), Row(checkpoint="two", noise=0.7))
    score(caches[1], Row(checkpoint="two", noise=0.71))
    found = beside(caches)
    assert found.table.numbers.select("checkpoint", "checkpoint_b").unique().rows() == [("two", "two")]
    assert found.said[1:] == ["Not comparable (25 numbers of A, 0 of B): the other side has fewer answers to it."]


def test_the_very_same_artifacts_are_equal(caches):
    for cache in caches:
        score(cache, A, *FLOORS)
    found = beside(caches)
    assert set(found.table.numbers["verdict"]) == {"equal"}
    assert set(found.table.numbers["difference"]) == {0.0}
    assert found.said[1] == "5 scores artifacts are the same in A and B (same digest)."
    assert len(found.said) == 2


def test_an_interval_is_never_that_of_another_number(caches):
    _, (two,) = score(caches[0], Row()), score(caches[1], Row(noise=0.7))
    path = two.root / "episodes.parquet"
    pl.read_parquet(path).with_columns(sse=pl.col("sse") / 2).write_parquet(path)
    rows = beside(caches).table.numbers.filter(metric="r2")
    assert set(rows["verdict"]) == {"without interval"}
    frame = pl.read_parquet(path).filter(pl.col("episode_index") > 0)
    frame.write_parquet(path)
    rows = beside(caches).table.numbers.filter(metric="r2", split="val")
    assert set(rows["note"]) == {"scored on other episodes"}


def test_what_is_neither_cache_nor_run_is_refused(caches):
    score(caches[0], A, B)
    with pytest.raises(NotFoundError, match="known: run-a-111111, run-b-222222"):
        contrast.side(caches[0], "nope")
    with pytest.raises(NotFoundError, match="2 runs fit"):
        contrast.side(caches[0], "run-")
    sides = contrast.side(caches[0], "run-a"), contrast.side(caches[1], str(caches[0].root))
    with pytest.raises(ConfigError, match="name two caches or two runs"):
        contrast.contrast(*sides, 300, every=True)
