"""Scores with their intervals where test episodes are few, of few tasks, or still."""

import numpy as np
import polars as pl
import pytest

from avrl import intervals
from avrl.intervals import FEWEST
from avrl.labels import Target
from avrl.outcome import Test as Outcome
from avrl.splits import Split

E, N = 12, 20  # test episodes, samples of each


def rows(unseen, still=0, error=0.02):
    """Scores by (split, dimension, metric), of a prediction that is nearly right; the first episodes are of new tasks.

    The gripper is told without an error. In the first `still` episodes nothing moves.
    """
    rng = np.random.default_rng(0)
    episode_N = np.repeat(np.arange(E + 20), N)
    test, gripper = episode_N < E, (rng.random(len(episode_N)) < 0.5).astype(float)
    xyz = rng.normal(size=(len(episode_N), 3)) * (episode_N >= still)[:, None]
    y = np.column_stack([xyz, gripper])
    parts = Split(episode_N >= E + 2, (episode_N >= E) & (episode_N < E + 2), test, episode_N >= unseen, episode_N)
    groups = {"position": ("x", "y", "z"), "gripper": ("gripper",)}
    target = Target(pl.DataFrame({"episode_index": episode_N}), y, y, y, groups, ("gripper",))
    predicted = y[test] + error * rng.normal(size=y[test].shape)
    made = Outcome(target, parts, np.flatnonzero(test), predicted, {"n_train": 1, "episodes_train": 1}, (1000, 0))
    return {(row["split"], row["dimension"], row["metric"]): row for row in made.rows(None, "all", apart=True)}


@pytest.mark.parametrize("unseen", [5, 6])
def test_a_resample_without_an_episode_of_new_tasks_counts_for_nothing(unseen):
    """It counted as no right answer and as no error: accuracy 1 [0, 1], NMSE .0005 [0, .0005]."""
    found = rows(unseen)
    accuracy = found["val-unseen", "gripper", "accuracy"]
    assert accuracy["value"] == accuracy["low"] == accuracy["high"] == 1
    for dimension, metric in (("x", "bin-accuracy"), ("mean", "bin-accuracy"), ("mean", "nmse")):
        row = found["val-unseen", dimension, metric]
        assert 0 < row["value"] / 2 < row["low"] < row["value"] < row["high"] < 1
    r2, nmse = found["val-unseen", "mean", "r2"], found["val-unseen", "mean", "nmse"]
    assert [nmse["low"], nmse["high"]] == pytest.approx([1 - r2["high"], 1 - r2["low"]], rel=0.2)


def test_a_resample_in_which_nothing_moves_has_no_nmse():
    """One divided the error by 1e-300: an interval up to 4e297."""
    row = rows(0, still=9, error=0.5)["val", "mean", "nmse"]
    assert row["low"] < row["value"] < row["high"] < 100


@pytest.mark.parametrize("unseen", [1, FEWEST - 1])
def test_of_a_few_episodes_there_is_a_value_and_no_interval(unseen):
    """All resamples of one are the same: it had an interval of no width, which decided everything."""
    found = [row for (split, *_), row in rows(unseen).items() if split == "val-unseen"]
    assert {row["metric"] for row in found} == {"r2", "nmse", "bin-accuracy", "accuracy", "auc"}
    assert {(row["episodes_test"], row["low"], row["high"]) for row in found} == {(unseen, None, None)}
    assert all(row["value"] is not None for row in found)


def test_nmse_is_one_less_r2_where_dimensions_move_alike():
    y = np.random.default_rng(0).normal(size=(50, 1))
    one = intervals.Sums(np.ones(50), 0.3 * y**2, y, y**2)
    drawn = intervals.weights(50, 20)
    assert intervals.nmse(one) == pytest.approx(1 - intervals.r2(*one))
    assert intervals.nmse(one, drawn) == pytest.approx(1 - intervals.r2(*one, drawn)[:, 0])


def test_the_mean_of_nothing_is_not_zero():
    found = intervals.mean(np.array([[3.0], [8.0]]), np.array([0.0, 4.0]), np.array([[1.0, 1.0], [2.0, 0.0]]))
    assert found[0] == 11 / 4
    assert np.isnan(found[1])
