"""Temporal order: planted truth, controls at a coin's, exact balance, static pairs out."""

import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import polars as pl
import pytest
import torch
import zarr
from made import features_of, frame_store

from avrl import order, splits, subsets
from avrl.errors import ConfigError
from avrl.features import SWAPPED, extract, rows_of
from avrl.order import PASS, Shown, score, verdict
from avrl.probes import Given, Task, Who
from avrl.probes.ridge import fits
from avrl.sources import SAMPLE, egodex
from avrl.stillness import STILL, changes
from avrl.store import FrameStore
from avrl.subsets import evenly
from avrl.vectors import places

LENGTHS = [12] * 18
SPLITS = ["train"] * 12 + ["val"] * 6
STATIC = (3, 14)
TASK = Task(probe="order", gap=1, target="", readouts=(), seed=0, resamples=100, data_digests=("f",))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("order") / "frames", LENGTHS, splits=SPLITS, seed=6, still=STATIC)


def run(frames, out, vectors, *, paired, raw=None):
    """Scores of one readout; of a pair encoder the first half of a vector turns round with the order."""
    table, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), int(paired))
    (out / "features").mkdir(parents=True)
    made = features_of(out / "features", table, {"cls": vectors(table)}, paired=paired)
    facts = score(out, Who("planted", "", "trained"), TASK, Given(frames, features=made, raw=raw))
    return pl.read_parquet(out / "scores.parquet"), facts


def value(scores, dimension="order", metric="accuracy", **where):
    where = {"train": "all", "split": "val", "dimension": dimension, "metric": metric, **where}
    return scores.filter(**where)["value"].to_list()


def noise(table, dims=6, seed=0):
    return np.random.default_rng(seed).normal(size=(len(table), dims))


def in_order(table):
    """Pairs whose first half says which way round they are."""
    return np.concatenate([1 + 0.1 * noise(table, 3), noise(table, 3, 1)], 1)


def test_order_that_features_hold_is_found_and_passes(frames, tmp_path):
    scores, _ = run(frames, tmp_path, in_order, paired=True)
    assert value(scores) == [1]
    assert value(scores, metric="auc") == [1]
    assert value(scores, train="unseen tasks") == [1]
    head = scores.filter(dimension="order", metric="accuracy", split="val", train="all").row(0, named=True)
    assert (head["pairing"], head["verdict"], head["probe"], head["target"]) == ("pair", PASS, "order", "")
    assert set(scores.filter(pl.col("verdict") != "")["dimension"]) == {"order"}


def test_an_image_encoder_that_sees_time_pass_knows_the_order_in_both_pairings(frames, tmp_path):
    scores, _ = run(
        frames, tmp_path, lambda table: table["frame_index"].to_numpy()[:, None] + 0.1 * noise(table), paired=False
    )
    assert scores["pairing"].unique(maintain_order=True).to_list() == ["concat", "diff"]
    assert value(scores) == [1, 1]
    assert scores["dims"].unique(maintain_order=True).to_list() == [12, 6]


def test_features_without_order_are_a_coin(frames, tmp_path):
    def of_scene(table):
        return np.random.default_rng(0).normal(size=(len(LENGTHS), 4))[table["episode_index"].to_numpy()]

    scores, _ = run(frames, tmp_path / "image", of_scene, paired=False)
    assert value(scores) == [0.5, 0.5]
    symmetric, _ = run(
        frames, tmp_path / "pair", lambda t: np.concatenate([np.zeros((len(t), 3)), noise(t, 3)], 1), paired=True
    )
    assert value(symmetric) == [0.5]
    random, _ = run(frames, tmp_path / "noise", noise, paired=False)
    assert np.abs(np.array(value(random)) - 0.5).max() < 0.2


@pytest.mark.parametrize("paired", [True, False])
def test_controls_are_a_coin_where_the_order_is_known(frames, tmp_path, paired):
    vectors = in_order if paired else lambda table: table["frame_index"].to_numpy()[:, None] + 0.1 * noise(table)
    scores, _ = run(frames, tmp_path, vectors, paired=paired)
    assert set(value(scores)) == {1}
    assert set(value(scores, "same frame")) == {0.5}  # exactly
    assert np.abs(np.array(value(scores, "shuffled labels")) - 0.5).max() < 0.15
    assert set(scores.filter(group="control")["dimension"]) == {"same frame", "shuffled labels"}


def test_static_pairs_are_left_out_by_pixels_alone(frames, tmp_path):
    scores, facts = run(frames, tmp_path, noise, paired=False)
    assert facts["static"] == pytest.approx(2 / 18, abs=1e-4)
    assert facts["still_below"] == STILL
    row = scores.filter(split="val", train="all", dimension="order").row(0, named=True)
    assert (row["n_train"], row["n_test"], row["episodes_train"], row["episodes_test"]) == (
        2 * 11 * 11,
        2 * 5 * 11,
        11,
        5,
    )
    assert "11.1% of pairs are static (luma changes by less than 0.5 of 255)" in row["note"]
    assert "which tasks are reversible is not known" in row["note"]
    assert facts["reversible_tasks"] == "not known"
    other, _ = run(frames, tmp_path / "b", in_order, paired=True)
    assert set(other["fingerprint"]) == set(scores["fingerprint"])


def test_a_store_in_which_nothing_moves_is_refused(tmp_path):
    frames = frame_store(tmp_path / "frames", [6] * 6, splits=["train"] * 4 + ["val"] * 2, still=range(6))
    with pytest.raises(ConfigError, match="100% are static"):
        run(frames, tmp_path / "out", noise, paired=False)


def test_every_pair_is_shown_in_both_orders_in_the_same_part(frames):
    episodes = pl.read_parquet(frames / "episodes.parquet")
    target = order._target(rows_of(episodes, 1)[0])
    parts = splits.split(target.rows, episodes, 0)
    for mask in (parts.fit_N, parts.validate_N, parts.test_N):
        assert target.y_NK[mask].mean() == 0.5
        assert (mask[0::2] == mask[1::2]).all()
    assert (target.y_NK[0::2] == 1).all()
    assert target.rows[0::2].equals(target.rows[1::2])
    for seed in range(3):
        shuffled = order._shuffled(target.y_NK, seed)
        assert (shuffled[0::2] + shuffled[1::2] == 1).all()
        assert 0.4 < shuffled[0::2].mean() < 0.6


def test_vectors_are_those_of_the_order_shown(frames, tmp_path):
    table, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)
    z = noise(table, 4)
    (tmp_path / "pair").mkdir()
    pair = features_of(tmp_path / "pair", table, {"cls": z}, paired=True)
    twin = zarr.open_array(str(pair / "features.zarr" / f"cls{SWAPPED}"))[:]
    at, asked = np.stack([np.arange(len(table)), np.arange(len(table)) + 1], 1), np.array([2, 3, 8, 9, 11])
    number, shown = map(np.concatenate, zip(*Shown(pair, "cls", "pair", at).blocks(asked), strict=True))
    assert number.tolist() == asked.tolist()
    np.testing.assert_array_equal(shown, np.stack([z[1].astype("f"), twin[1], z[4].astype("f"), twin[4], twin[5]]))
    (tmp_path / "image").mkdir()
    image = features_of(tmp_path / "image", table, {"cls": z}, paired=False)
    ((_, both),) = Shown(image, "cls", "concat", at).blocks(np.array([0, 1]))
    np.testing.assert_allclose(both, [[*z[0], *z[1]], [*z[1], *z[0]]], rtol=1e-6)
    ((_, both),) = Shown(image, "cls", "diff", at).blocks(np.array([0, 1]))
    np.testing.assert_allclose(both, [z[1] - z[0], z[0] - z[1]], rtol=1e-5, atol=1e-6)
    ((_, both),) = Shown(image, "cls", "concat", at, same=True).blocks(np.array([0, 1]))
    np.testing.assert_allclose(both, [[*z[0], *z[0]]] * 2, rtol=1e-6)


def test_features_of_the_pairs_that_are_looked_at_score_as_those_of_all(frames, tmp_path, monkeypatch):
    """An encoder of frames, whose pairs lie in two places; and one pair in four is looked at."""
    monkeypatch.setattr(subsets, "PAIRS", 3 * len(LENGTHS))
    mean = SimpleNamespace(paired=False, readouts={"mean": 3})
    mean.encode = lambda pixels_BTHWC: {"mean": pixels_BTHWC[:, 0].float().mean((1, 2))}
    found = []
    for which in ("all", "order"):
        root = tmp_path / which
        facts = extract(mean, frames, root, gap=2 * (which != "all"), batch_size=50, device="cpu", rows=which)
        (root / "manifest.json").write_text(json.dumps({"facts": facts}))
        score(root, Who("mean", "", "none"), replace(TASK, gap=2), Given(frames, features=root))
        found.append((facts["rows"], pl.read_parquet(root / "scores.parquet")))
    assert found[0][1].equals(found[1][1])
    assert found[0][0] == 12 * 18
    assert found[1][0] <= 2 * 3 * 18


def test_the_test_split_is_never_fitted_on(frames, tmp_path):
    episodes = pl.read_parquet(frames / "episodes.parquet")
    table, _ = rows_of(episodes, 1)
    target, found = order._target(table), []
    parts = splits.split(target.rows, episodes, 0)
    for spoil in (0, 1e6):
        z = in_order(table) + spoil * parts.test_N[0::2, None]
        (tmp_path / str(spoil)).mkdir()
        root = features_of(tmp_path / str(spoil), table, {"cls": z}, paired=True)
        shown = Shown(root, "cls", "pair", places(root, table, 1))
        found.append(list(fits(shown, np.where(parts.test_N[:, None], spoil, target.y_NK), parts, episodes, 0)))
    for (_, one, alpha), (_, other, other_alpha) in zip(*found, strict=True):
        assert torch.equal(one.weight_DK, other.weight_DK)
        assert np.array_equal(alpha, other_alpha)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.9, 0.95, "pass"), (0.85, 0.95, "undecided"), (0.5, 0.899, "fail"), (None, None, "")]
)
def test_a_verdict_is_decided_by_the_whole_interval(low, high, said):
    row = {"metric": "accuracy", "dimension": "order", "train": "all", "low": low, "high": high}
    assert verdict(row) == said
    assert verdict({**row, "dimension": "shuffled labels"}) == verdict({**row, "metric": "auc"}) == ""


def test_what_changes_is_the_mean_of_decoded_blocks(frames):
    store = FrameStore(frames)
    rows, at = rows_of(store.episodes, 2)
    grey = np.array([0.299, 0.587, 0.114])
    cells = [(store.read(one).astype(float) @ grey).reshape(-1, 4, 8, 4, 8).mean((2, 4)) for one in (at, at + 2)]
    oracle = np.abs(cells[1] - cells[0]).mean((1, 2))
    np.testing.assert_allclose(changes(store, rows, 2), oracle, atol=0.6)  # bytes are rounded
    still = rows["episode_index"].is_in(STATIC).to_numpy()
    assert changes(store, rows, 2)[still].max() == 0
    assert changes(store, rows, 2)[~still].min() > STILL


def test_few_pairs_of_an_episode_are_spread_over_it():
    rows = pl.DataFrame({"episode_index": [0] * 10 + [5] * 3 + [7]})
    assert evenly(rows, 2).tolist() == [2, 7, 10, 12, 13]
    assert evenly(rows, 99).tolist() == list(range(14))


def test_reversible_tasks_stand_apart_where_the_raw_data_say_so(frames, tmp_path):
    """Task 0 is known in order, the others are not: 0 is reversible, 1 is not, and of 2 nothing is known."""
    episodes = pl.read_parquet(frames / "episodes.parquet")
    kinds = {"task 0": "reversible", "task 1": "reset"}
    for index, task in episodes.select("episode_index", "task").iter_rows():
        path = tmp_path / "raw/made" / f"{index}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file.attrs.update({"llm_type": kinds[task]} if task in kinds else {})
    copy = frame_store(tmp_path / "frames", LENGTHS, splits=SPLITS, seed=6, still=STATIC)
    members = pl.format("made/{}.mp4", "episode_index")
    episodes.with_columns(file=pl.lit("made"), member=members).write_parquet(copy / "episodes.parquet")
    (copy / "manifest.json").write_text(json.dumps({"facts": {"source": "egodex"}}))

    def vectors(table):
        return in_order(table) * (table["episode_index"].to_numpy() % 3 == 0)[:, None]

    scores, facts = run(copy, tmp_path / "out", vectors, paired=True, raw=tmp_path / "raw")
    assert facts["reversible_tasks"] == 1
    assert value(scores, "reversible tasks") == [1]
    assert value(scores, "other tasks") == [0.5]
    counts = scores.filter(metric="accuracy", train="all", split="val")
    assert counts.filter(dimension="other tasks")["episodes_test"].item() == 2
    assert "reversible is not known" not in scores["note"][0]


def test_egodexs_word_for_a_task_comes_out_of_zips_and_is_empty_where_there_is_none(tmp_path):
    raw = SAMPLE / "egodex"
    found = {one.task: egodex.kind_of_task(raw, vars(one)) for one in egodex.survey(raw)[0]}
    assert set(found.values()) == {"reversible", "reset"}
    assert found["open_close_drawer"] == "reversible"
    row = {"file": "gone.zip", "member": "gone/a/0.mp4"}
    assert egodex.kind_of_task(tmp_path, row) == egodex.kind_of_task(tmp_path, {**row, "file": "gone"}) == ""
