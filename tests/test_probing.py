import json
import tracemalloc
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from made import features_of, frame_store, labels_of
from sklearn.metrics import r2_score, roc_auc_score

from avrl import encoders, features, intervals, labels, outcome, splits
from avrl.encoders import timm_image
from avrl.errors import ConfigError
from avrl.outcome import auc
from avrl.probes import Given, Task, Who
from avrl.probes.ridge import fits
from avrl.probing import Floor, score
from avrl.splits import require_split

LENGTHS = [12] * 30
SPLITS = ["train"] * 20 + ["val"] * 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("probing")
    frames = frame_store(root / "frames", LENGTHS, splits=SPLITS)
    where, table = labels_of(frames, root / "labels")
    return frames, where, labels.pairs(table, 1, "reached")


def run(data, out, vectors, *, paired=True, gap=1, **changed):
    frames, where, *_ = data
    episodes = pl.read_parquet(frames / "episodes.parquet")
    (out / "features").mkdir(parents=True)
    table, _ = features.rows_of(episodes, gap if paired else 0)
    made = features_of(out / "features", table, {"cls": vectors(table)}, paired=paired)
    options = {"probe": "bridge", "gap": gap, "target": "reached", "readouts": (), "seed": 0, "resamples": 200}
    options |= {"data_digests": ("l", "f")}
    score(out, Who("planted", "", "trained"), Task(**{**options, **changed}), Given(frames, where, made))
    scores = pl.read_parquet(out / "scores.parquet")
    return scores.filter(pl.col("pairing") != "antisymmetric") if paired else scores


def planted(data, signal=100):
    """Features of pairs that hold the target, linearly mixed with noise."""
    y = data[2].y_NK
    known = dict(zip(data[2].rows.iter_rows(), y, strict=True))

    def vectors(table):
        rng = np.random.default_rng(0)
        mix = rng.normal(size=(7, 16))
        clean = np.stack(
            [known.get(key, np.zeros(7)) for key in table.select("episode_index", "frame_index").iter_rows()]
        )
        return signal * (clean / y.std(0)) @ mix + rng.normal(size=(len(clean), 16))

    return vectors


def one(scores, dimension, metric="r2", split="val", train="all"):
    return scores.filter(dimension=dimension, metric=metric, split=split, train=train).row(0, named=True)


def test_a_planted_signal_is_found_in_every_dimension(data, tmp_path):
    scores = run(data, tmp_path, planted(data))
    for dimension in ("x", "y", "z", "roll", "pitch", "yaw"):
        assert one(scores, dimension)["value"] > 0.999
    assert one(scores, "gripper", "auc")["value"] > 0.99
    assert one(scores, "gripper", "accuracy")["value"] > 0.95
    position = scores.filter(group="position", dimension="mean", split="val", metric="r2", train="all")["value"][0]
    assert position == pytest.approx(np.mean([one(scores, d)["value"] for d in "xyz"]))


def test_noise_scores_about_nothing_and_its_interval_says_so(data, tmp_path):
    scores = run(data, tmp_path, lambda table: np.random.default_rng(1).normal(size=(len(table), 16)))
    for dimension in ("x", "y", "z", "roll", "pitch", "yaw"):
        row = one(scores, dimension)
        assert row["low"] <= row["value"] <= row["high"]
        assert (
            row["low"] <= 0 <= row["high"] + 1e-3
        )  # all that is left is the mean of train: never above 0, by a hair below
        assert row["value"] < 0.1


def test_the_known_order_comes_out(data, tmp_path):
    """Oracle > features that hold much of the motion > features that hold a little > the mean."""
    floors = {}
    for name in ("oracle", "mean"):
        (tmp_path / name).mkdir()
        task = Task("bridge", 1, "reached", (), 0, 200, ("l", "f"))
        score(tmp_path / name, Who(name, "", "none"), task, Given(data[0], data[1]))
        floors[name] = pl.read_parquet(tmp_path / name / "scores.parquet")
    trained, twin = (run(data, tmp_path / str(signal), planted(data, signal)) for signal in (1, 0.4))
    rows = [one(each, "x") for each in (floors["oracle"], trained, twin, floors["mean"])]
    assert rows[0]["value"] > 0.999
    for above, below in pairwise(rows):
        assert above["low"] > below["value"]
    assert rows[3]["value"] <= 0


@pytest.mark.parametrize("dims", [16, 400])  # fewer and more than training pairs: sums, and rows in memory
def test_units_change_neither_the_strength_nor_what_is_predicted(data, dims):
    frames, _, target = data
    episodes = pl.read_parquet(frames / "episodes.parquet")
    parts = splits.split(target.rows, episodes, 0)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(target.y_NK), dims)) + target.y_NK @ rng.normal(size=(7, dims)) / target.y_NK.std()
    plain = list(fits(Floor("z", z), target.y_NK, parts, episodes, 0))
    for features_by, targets_by in ((1e4, 1), (1, 1e-3)):
        other = fits(Floor("z", features_by * z), targets_by * target.y_NK, parts, episodes, 0)
        for (_, fit, alpha), (_, scaled, same) in zip(plain, other, strict=True):
            assert np.array_equal(alpha, same)
            found = scaled.predict(torch.from_numpy(features_by * z)) / targets_by
            torch.testing.assert_close(found, fit.predict(torch.from_numpy(z)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dims", [8, 400])  # fewer and more than training pairs: sums, and rows in memory
def test_the_test_split_is_never_fitted_on(data, dims):
    """Targets and features of test episodes are replaced: neither the fit nor alpha may move by a bit."""
    frames, _, target = data
    episodes = pl.read_parquet(frames / "episodes.parquet")
    parts = splits.split(target.rows, episodes, 0)
    z = np.random.default_rng(0).normal(size=(len(target.y_NK), dims)) + target.y_NK[:, :1] * 50
    before = list(fits(Floor("z", z), target.y_NK, parts, episodes, 0))
    spoiled, wild = target.y_NK.copy(), z.copy()
    spoiled[parts.test_N], wild[parts.test_N] = 1e6, -1e6
    after = list(fits(Floor("z", wild), spoiled, parts, episodes, 0))
    assert len(before) == len(after) == (1 if dims == 400 else 1 + 2 * 3)
    for (_, fit, alpha), (_, other, other_alpha) in zip(before, after, strict=True):
        assert torch.equal(fit.weight_DK, other.weight_DK)
        assert torch.equal(fit.mean_D, other.mean_D)
        assert np.array_equal(alpha, other_alpha)


def test_lambda_is_chosen_on_training_episodes_that_are_not_fitted_on(data):
    frames, _, target = data
    parts = splits.split(target.rows, pl.read_parquet(frames / "episodes.parquet"), 0)
    sets = [set(parts.episode_N[mask]) for mask in (parts.fit_N, parts.validate_N, parts.test_N)]
    assert [len(one) for one in sets] == [16, 4, 10]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert sets[2] == set(range(20, 30))


def test_numbers_equal_scikit_learns(data, tmp_path):
    frames, _, target = data
    scores = run(data, tmp_path, planted(data))
    parts = splits.split(target.rows, pl.read_parquet(frames / "episodes.parquet"), 0)
    sums = pl.read_parquet(tmp_path / "episodes.parquet").filter(dimension="x", pairing="pair")
    assert sums["n"].sum() == parts.test_N.sum()
    truth = target.y_NK[parts.test_N, 0]
    implied = truth + np.sqrt(sums["sse"].sum() / len(truth))  # any prediction with this squared error
    assert one(scores, "x")["value"] == pytest.approx(r2_score(truth, implied))


def test_image_encoders_give_concatenation_and_difference_from_frames_encoded_once(data, tmp_path):
    where = data[1]

    def vectors(table):  # a frame's vector is the sum of all motion so far: the difference is the target
        table_of = pl.read_parquet(where / "labels.parquet").select(f"state_{d}" for d in labels.DIMENSIONS)
        return table_of.to_numpy()

    scores = run(data, tmp_path, vectors, paired=False)
    for pairing, dims in (("concat", 14), ("diff", 7)):
        found = scores.filter(pairing=pairing)
        assert one(found, "x")["value"] > 0.99
        assert found["dims"][0] == dims


def test_pair_encoders_give_their_features_and_the_antisymmetric_part(data, tmp_path):
    """Half of the made features are the same for (t, t+gap) and (t+gap, t): the antisymmetric row must not see them."""
    known = dict(zip(data[2].rows.iter_rows(), data[2].y_NK, strict=True))

    def vectors(table):
        noise = np.random.default_rng(0).normal(size=(len(table), 7))
        keys = table.select("episode_index", "frame_index").iter_rows()
        return np.concatenate([noise, np.stack([known.get(key, np.zeros(7)) for key in keys])], 1)

    run(data, tmp_path, vectors)
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert one(scores.filter(pairing="pair"), "x")["value"] > 0.99
    assert one(scores.filter(pairing="antisymmetric"), "x")["value"] < 0.1


def test_floors_need_no_features(data, tmp_path):
    frames, where, *_ = data
    options = {"probe": "bridge", "gap": 1, "target": "reached", "readouts": (), "seed": 0, "resamples": 200}
    options |= {"data_digests": ("l", "f")}
    for name in ("mean", "state"):
        (tmp_path / name).mkdir()
        score(tmp_path / name, Who(name, "", "none"), Task(**options), Given(frames, where))
    mean = pl.read_parquet(tmp_path / "mean/scores.parquet")
    assert -0.2 < one(mean, "x")["value"] <= 0
    assert one(mean, "gripper", "auc")["value"] == pytest.approx(0.5)


def timm_at_32(name, **settings):
    """A tiny random network of timm at the side of the made frames."""
    network = timm_image.build(name, **settings)
    return timm_image.ImageEncoder(network, timm_image.data_config(network) | {"input_size": (3, 32, 32)})


def attend(data, out, name, encoder=None, init="none"):
    task = Task("bridge", 1, "reached", (), 0, 200, ("l", "f"), "attentive", 384)
    out.mkdir()
    score(out, Who(name, "", init), task, Given(data[0], data[1], encoder=encoder))
    return pl.read_parquet(out / "scores.parquet")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("transformer", lambda: timm_at_32("test_vit", img_size=32)),
        ("convnet", lambda: timm_at_32("resnet18")),  # most of its last channels are silent
        ("pixels-8", lambda: encoders.load("pixels-8", init="pretrained")),
    ],
)
def test_an_attentive_probe_of_any_encoder_is_finite_and_no_worse_than_a_bad_guess(data, tmp_path, name, make):
    scores = attend(data, tmp_path / "a", name, make(), "random")
    r2 = scores.filter(metric="r2")
    assert len(r2) >= 7 + 2
    assert r2["value"].is_between(-1, 1).all()
    assert scores["readout"].unique().to_list() == ["patches"]


def test_floors_and_the_ceiling_stand_in_an_attentive_protocol(data, tmp_path):
    found = {name: attend(data, tmp_path / name, name) for name in ("mean", "state", "oracle")}
    pixels = attend(data, tmp_path / "p", "pixels-8", encoders.load("pixels-8", init="pretrained"))
    assert {each["fingerprint"][0] for each in found.values()} == {pixels["fingerprint"][0]}
    assert {each["solver"][0] for each in found.values()} == {"ridge"}  # which is how they were fitted
    assert pixels["solver"][0] == "attentive"
    assert one(found["oracle"], "x")["value"] > 0.999 > 0.2 > one(found["mean"], "x")["value"]
    with pytest.raises(ValueError, match="needs an encoder"):  # and is not taken for a floor
        attend(data, tmp_path / "d", "dinov2", init="pretrained")


def test_seen_and_unseen_tasks_are_told_apart(tmp_path):
    frames = frame_store(tmp_path / "frames", [10] * 12, splits=["train"] * 6 + ["val"] * 6)
    episodes = pl.read_parquet(frames / "episodes.parquet")
    episodes = episodes.with_columns(
        task=pl.when(pl.col("episode_index") >= 10).then(pl.lit("new")).otherwise(pl.col("task"))
    )
    episodes.write_parquet(frames / "episodes.parquet")
    where, table = labels_of(frames, tmp_path / "labels")
    data = frames, where, labels.pairs(table, 1, "reached")
    scores = run(data, tmp_path / "out", lambda rows: np.random.default_rng(0).normal(size=(len(rows), 4)))
    counts = {name: one(scores, "x", split=name)["episodes_test"] for name in ("val", "val-seen", "val-unseen")}
    assert counts == {"val": 6, "val-seen": 4, "val-unseen": 2}


def test_a_constant_target_has_no_score_and_says_why(data, tmp_path):
    frames, where, *_ = data
    table = pl.read_parquet(where / "labels.parquet").with_columns(state_yaw=pl.lit(0.5, pl.Float32))
    (tmp_path / "labels").mkdir()
    table.write_parquet(tmp_path / "labels/labels.parquet")
    changed = frames, tmp_path / "labels", labels.pairs(table, 1, "reached")
    scores = run(changed, tmp_path / "out", lambda rows: np.random.default_rng(0).normal(size=(len(rows), 4)))
    assert one(scores, "yaw")["value"] is None
    assert one(scores, "yaw")["note"] == "constant target"
    rotation = scores.filter(group="rotation", dimension="mean", split="val", metric="r2", train="all").row(
        0, named=True
    )
    assert rotation["note"] == "mean over roll, pitch"


def test_the_fingerprint_moves_with_everything_that_makes_rows_incomparable(data, tmp_path):
    vectors = planted(data)
    noise = lambda rows: np.random.default_rng(1).normal(size=(len(rows), 16))  # noqa: E731
    prints = {
        name: run(data, tmp_path / name, noise, **options)["fingerprint"][0]
        for name, options in {
            "plain": {},
            "gap": {"gap": 2},
            "target": {"target": "commanded"},
            "seed": {"seed": 1},
            "labels": {"data_digests": ("m", "f")},
            "frames": {"data_digests": ("l", "g")},  # other pixels of the same labels
        }.items()
    }
    assert len(set(prints.values())) == 6
    other = run(data, tmp_path / "other", vectors)
    assert other["fingerprint"][0] == prints["plain"]  # another encoder is the same protocol


def test_per_episode_sums_give_the_scores_back(data, tmp_path):
    scores = run(data, tmp_path, planted(data))
    rows = pl.read_parquet(tmp_path / "episodes.parquet").filter(dimension="z", pairing="pair").sort("episode_index")
    sums = intervals.Sums(rows["n"].to_numpy(), *(rows[c].to_numpy()[:, None] for c in ("sse", "sum_y", "sum_yy")))
    assert intervals.r2(*sums)[0] == pytest.approx(one(scores, "z")["value"])


def test_auc_equals_scikit_learn_with_and_without_weights():
    rng = np.random.default_rng(0)
    score_n, label = rng.normal(size=200).round(1), rng.integers(0, 2, 200)  # rounded: with ties
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    ours = auc(score_n, label, weights)
    for row, value in zip(weights, ours, strict=True):
        assert value == pytest.approx(roc_auc_score(label, score_n, sample_weight=row))
    assert np.isnan(auc(score_n, np.ones(200), weights)).all()


def test_the_auc_of_many_resamples_takes_no_more_memory_than_one():
    """All of them at once were 904 MiB at 60,000 test pairs."""
    episode_N = np.repeat(np.arange(100), 100)
    y_NK = np.random.default_rng(0).integers(0, 2, (10_000, 1)).astype(float)
    every = np.ones(10_000, bool)
    parts = splits.Split(every, every, every, every, episode_N)
    target = labels.Target(pl.DataFrame({"episode_index": episode_N}), *[y_NK] * 3, {"g": ("g",)}, ("g",))
    test = outcome.Test(target, parts, np.arange(10_000), y_NK, {}, (300, 0))
    tracemalloc.start()
    found = [row for row in test.rows(None, "all") if row["metric"] == "auc"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0]["value"] == found[0]["low"] == found[0]["high"] == 1
    assert peak < 20 * y_NK.nbytes  # 1.6 MB; 300 times it was 48


def test_the_effective_rank_is_of_all_test_episodes(data, tmp_path, monkeypatch):
    """Of the first pairs in the order of the store it was that of a few episodes: two of ten here."""
    monkeypatch.setattr("avrl.probing.RANK_ROWS", 20)
    monkeypatch.setattr("avrl.outcome.RANK_ROWS", 20)
    scores = run(data, tmp_path, lambda table: np.eye(30)[table["episode_index"].to_numpy()])
    assert scores.filter(metric="effective-rank")["value"][0] == pytest.approx(9, abs=0.1)  # ten, less their mean


def test_a_collapsed_code_has_rank_one(data, tmp_path):
    scores = run(data, tmp_path, lambda rows: np.outer(np.arange(len(rows)), np.ones(16)))
    assert scores.filter(metric="effective-rank")["value"][0] == pytest.approx(1, abs=0.01)
    assert json.dumps(scores.columns)


@pytest.mark.parametrize(
    ("called", "gap"),
    [(["val"] * 6, 1), (["train", "val", "val"], 1), (["train", "train", "val"], 8)],
)
def test_a_store_that_cannot_be_scored_is_refused_before_features_are_made(tmp_path, called, gap):
    frames = frame_store(tmp_path / "frames", [8] * len(called), splits=called)
    with pytest.raises(ConfigError, match=r"frames-x has \d training and \d held-out episodes .* --part train,val"):
        require_split(SimpleNamespace(root=frames, ref="frames-x"), (gap,))
    require_split(
        SimpleNamespace(root=frame_store(tmp_path / "b", [8] * 3, ["train", "train", "val"]), ref="b"), (1, 7)
    )


def test_scores_without_a_held_out_pair_are_refused(tmp_path):
    frames = frame_store(tmp_path / "frames", [8] * 6, splits=["val"] * 6)
    where, table = labels_of(frames, tmp_path / "labels")
    data = frames, where, labels.pairs(table, 1, "reached")
    with pytest.raises(ConfigError, match="two training episodes and a held-out one"):
        run(data, tmp_path / "out", lambda rows: np.zeros((len(rows), 4)))
