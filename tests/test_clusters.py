"""Clusters, and the picture against the motion: planted ones are found, chance is chance, scikit-learn as oracle."""

import numpy as np
import polars as pl
import pytest
from made import features_of, frame_store
from sklearn.neighbors import KNeighborsClassifier

from avrl import clusters, splits
from avrl.clusters import NEIGHBOURS, neighbours, score
from avrl.episodes import NO_LANGUAGE
from avrl.errors import ConfigError
from avrl.features import rows_of
from avrl.probes import Given, Task, Who
from avrl.subsets import PER_EPISODE, VECTORS, balanced

LENGTHS = [9] * 30
SPLITS = ["train"] * 18 + ["val"] * 12
TASK = Task(probe="clusters", gap=1, target="", readouts=(), seed=0, resamples=100, data_digests=("f",))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return frame_store(tmp_path_factory.mktemp("clusters") / "frames", LENGTHS, splits=SPLITS)


def run(frames, out, vectors, *, paired=False, **changed):
    table, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), int(paired))
    (out / "features").mkdir(parents=True)
    z = vectors(table)
    made = features_of(out / "features", table, z if isinstance(z, dict) else {"cls": z}, paired=paired)
    given = Given(frames, features=made, stills=made if paired else None)
    facts = score(out, Who("planted", "", "trained"), Task(**{**vars(TASK), **changed}), given)
    return pl.read_parquet(out / "scores.parquet"), facts


def value(scores, metric, dimension="task"):
    return scores.filter(metric=metric, dimension=dimension)["value"].item()


def of_task(table):
    """Directions that only the task chooses (episode i is of task i % 3)."""
    noise = 0.02 * np.random.default_rng(0).normal(size=(len(table), 8))
    return np.eye(8)[table["episode_index"].to_numpy() % 3] + noise


def noise(table):
    return np.random.default_rng(0).normal(size=(len(table), 8))


def test_planted_clusters_are_found_by_every_measure(frames, tmp_path):
    scores, facts = run(frames, tmp_path, of_task)
    for metric in ("knn-accuracy", "nmi", "ari", "identity-accuracy"):
        assert value(scores, metric) == pytest.approx(1), metric
    assert value(scores, "silhouette") > 0.9
    assert 1 < value(scores, "effective-rank") < 8
    assert (facts["tasks"], facts["episodes"], facts["vectors"]) == (3, 30, 30 * 8)
    assert scores.filter(metric="knn-accuracy", dimension="task")["note"].item() == "k = 20"
    head = scores.row(0, named=True)
    assert (head["probe"], head["split"], head["pairing"], head["n_test"]) == ("clusters", "all", "frame", 240)


def test_noise_is_chance_and_chance_is_beside_it(frames, tmp_path):
    scores, _ = run(frames, tmp_path, noise)
    assert value(scores, "knn-accuracy", "largest task") == pytest.approx(1 / 3)
    for dimension in ("task", "shuffled tasks"):
        assert value(scores, "knn-accuracy", dimension) == pytest.approx(1 / 3, abs=0.12)
    assert value(scores, "nmi") < 0.1
    assert value(scores, "ari") == pytest.approx(0, abs=0.05)
    assert value(scores, "silhouette") == pytest.approx(0, abs=0.05)
    for metric in ("knn-accuracy", "nmi", "ari", "silhouette"):
        row = scores.filter(metric=metric, dimension="task").row(0, named=True)
        assert row["low"] < row["value"] < row["high"], metric


def test_an_episode_is_no_neighbour_of_itself(frames, tmp_path):
    """Vectors that know the episode and nothing of the task: with its own frames as neighbours, k-NN would be right."""
    scene = np.random.default_rng(3).normal(size=(len(LENGTHS), 64))
    scores, _ = run(frames, tmp_path, lambda table: scene[table["episode_index"].to_numpy()])
    assert value(scores, "knn-accuracy") < 0.6
    assert value(scores, "identity-accuracy") < 0.7


def test_neighbours_vote_as_scikit_learns(frames):
    rng = np.random.default_rng(0)
    z, label, episode = rng.normal(size=(60, 5)), rng.integers(0, 3, 60), np.repeat(np.arange(20), 3)
    z[np.arange(60), label] += 1
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    for k in (1, 7):
        ours = clusters._nearest(unit, episode, k)
        votes = clusters._vote(ours, label)
        for index in np.unique(episode):
            rest, here = episode != index, np.flatnonzero(episode == index)
            model = KNeighborsClassifier(k, metric="cosine").fit(z[rest], label[rest])
            found = model.kneighbors(z[here], return_distance=False)
            np.testing.assert_array_equal(np.flatnonzero(rest)[found], ours[here])
            counts = np.array([np.bincount(label[row], minlength=3) for row in ours[here]])
            clear = np.sort(counts, 1)[:, -1] > np.sort(counts, 1)[:, -2]  # of a tie scikit-learn takes the first label
            np.testing.assert_array_equal(votes[here][clear], model.predict(z[here])[clear])


def test_of_a_tie_the_nearest_decides_and_few_vectors_have_few_neighbours():
    assert clusters._vote(np.array([[2, 0, 1, 3]]), np.array([0, 0, 1, 1])).tolist() == [1]
    assert neighbours(np.zeros(100), np.arange(100)) == NEIGHBOURS
    assert neighbours(np.array([0] * 100 + [1] * 5), np.array([*range(100), 100, 100, 100, 101, 102])) == 2


@pytest.mark.parametrize(("paired", "where"), [(False, "frame t"), (True, "frame t shown twice")])
def test_what_only_the_picture_knows_is_identity_and_not_motion(frames, tmp_path, paired, where):
    """The second half of a pair's vector is the same either way round."""
    scores, _ = run(frames, tmp_path, lambda t: np.concatenate([noise(t), 3 * of_task(t)], 1), paired=paired)
    assert value(scores, "identity-accuracy") > 0.95
    assert value(scores, "motion-accuracy") < 0.6
    assert scores.filter(metric="identity-accuracy", dimension="task")["note"].item() == f"from {where}"


def test_what_only_the_motion_knows_is_motion_and_not_identity(frames, tmp_path):
    scores, _ = run(frames, tmp_path, lambda t: np.concatenate([of_task(t), noise(t)], 1), paired=True)
    assert value(scores, "identity-accuracy") < 0.6
    assert value(scores, "motion-accuracy") == 1
    assert value(scores, "identity-accuracy", "largest task") == pytest.approx(1 / 3)


def test_held_out_episodes_are_not_fitted_on(frames):
    table, _ = rows_of(pl.read_parquet(frames / "episodes.parquet"), 0)
    parts = splits.split(table, pl.read_parquet(frames / "episodes.parquet"), 0)
    z, y = of_task(table) + noise(table), np.eye(3)[table["episode_index"].to_numpy() % 3]
    before = clusters._classify(z, y, parts)
    spoiled, wild = y.copy(), z.copy()
    spoiled[parts.test_N], wild[parts.test_N] = 7, 1e6
    np.testing.assert_array_equal(clusters._classify(wild, spoiled, parts)[parts.train_N], before[parts.train_N])


def test_the_grid_is_scored_only_if_asked_for_and_a_collapsed_code_is_no_accident(frames, tmp_path):
    made = {"grid": of_task, "patch-mean": of_task, "cls": lambda table: np.ones((len(table), 4))}
    scores, _ = run(frames, tmp_path / "a", lambda table: {name: make(table) for name, make in made.items()})
    assert scores["readout"].unique(maintain_order=True).to_list() == ["cls", "patch-mean"]
    flat = scores.filter(readout="cls")
    assert value(flat, "effective-rank") == 1
    assert value(flat, "ari") == 0
    assert value(flat, "identity-accuracy") < 0.5
    named, _ = run(frames, tmp_path / "b", lambda table: {"grid": of_task(table)}, readouts=("grid",))
    assert set(named["readout"]) == {"grid"}
    with pytest.raises(ConfigError, match="none of the readouts"):
        run(frames, tmp_path / "c", of_task, readouts=("m",))


def test_the_map_has_a_point_a_vector_and_keeps_tasks_apart_that_are(frames, tmp_path):
    run(frames, tmp_path, of_task)
    points = pl.read_parquet(tmp_path / "points.parquet")
    assert points.columns == ["episode_index", "frame_index", "task", "x", "y", "readout", "picture"]
    assert len(points) == 240
    centres = points.group_by("task").agg(pl.col("x", "y").mean(), spread=pl.col("x").std() + pl.col("y").std())
    xy = centres.select("x", "y").to_numpy()
    apart = np.linalg.norm(xy[:, None] - xy, axis=2)[np.triu_indices(3, 1)].min()
    assert apart > centres["spread"].max()
    again = clusters.map_of(of_task(rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)[0]), 0)
    np.testing.assert_array_equal(
        again, clusters.map_of(of_task(rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)[0]), 0)
    )


def test_both_readouts_have_a_map_and_frames_are_kept_once(frames, tmp_path):
    made = {"change": noise, "cls": of_task, "patch-mean": noise}
    run(frames, tmp_path, lambda table: {name: make(table) for name, make in made.items()}, resamples=10)
    points = pl.read_parquet(tmp_path / "points.parquet")
    assert points["readout"].unique(maintain_order=True).to_list() == ["cls", "patch-mean"]
    assert len(points) == 2 * 240
    kept = points.filter(pl.col("picture").is_not_null())
    assert set(kept["readout"]) == {"cls"}
    assert len(kept) > 100


def test_a_subset_is_balanced_bounded_and_leaves_out_what_has_no_task():
    tasks = ["a"] * 40 + ["b"] * 3 + ["alone", NO_LANGUAGE, NO_LANGUAGE]
    episodes = pl.DataFrame({"episode_index": range(len(tasks)), "task": tasks, "length": [500] * len(tasks)})
    episodes = episodes.with_columns(dataset_from_index=pl.col("episode_index") * 500)
    rows, _ = rows_of(episodes, 1)
    taken = rows[balanced(rows, episodes, 0)]
    counts = taken.join(episodes.select("episode_index", "task"), on="episode_index")
    assert dict(counts["task"].value_counts().iter_rows()) == {"a": 40 * PER_EPISODE, "b": 3 * PER_EPISODE}
    assert taken["episode_index"].is_sorted()
    many = pl.DataFrame(
        {"episode_index": range(9000), "task": [str(i % 300) for i in range(9000)], "length": [5] * 9000}
    )
    rows, _ = rows_of(many.with_columns(dataset_from_index=pl.col("episode_index") * 5), 1)
    one, two = (rows[balanced(rows, many, seed)] for seed in (0, 1))
    assert len(one) <= VECTORS
    assert one.join(many, on="episode_index")["task"].n_unique() == 200
    assert not one.equals(two)
    assert one.equals(rows[balanced(rows, many, 0)])


def test_one_task_is_none(tmp_path):
    frames = frame_store(tmp_path / "frames", [5] * 4)
    pl.read_parquet(frames / "episodes.parquet").with_columns(task=pl.lit("x")).write_parquet(
        frames / "episodes.parquet"
    )
    with pytest.raises(ConfigError, match="two tasks of two episodes"):
        run(frames, tmp_path / "out", noise)
