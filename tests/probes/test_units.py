"""Floors of a robot's own numbers, each of which has a unit of its own: the ceiling is 1 whatever the units are."""

import numpy as np
import polars as pl
import pytest

from avrl import lerobot_motion, probing, splits
from avrl.probes import Task
from avrl.ridge import ALPHAS

E, T = 24, 40
STEPS = {"x": 0.002, "y": 0.002, "z": 0.002, "roll": 0.01, "pitch": 0.01, "yaw": 0.01, "gripper": 0.05}
TASK = Task("lerobot", 1, "reached", (), 0, 50, ("x",))


def judged(name, sizes, *, locked=None, noise=0.0):
    """R2 of each dimension and the rank's note, of a floor or the ceiling; `locked` moves in one test episode alone."""
    rng, tables = np.random.default_rng(0), []
    for e in range(E):
        walks = {one: np.cumsum(step * rng.normal(size=T)) + 20 * step * rng.normal() for one, step in STEPS.items()}
        if locked and e < E - 1:
            walks[locked] = noise * rng.normal(size=T)
        columns = {f"state_{one}": walks[one] * sizes.get(one, 1) for one in STEPS}
        tables.append(pl.DataFrame(columns).with_columns(episode_index=e, frame_index=pl.int_range(T)))
    labels = pl.concat(tables).with_columns(pl.col("^state_.*$").cast(pl.Float32))
    (target,) = lerobot_motion.targets(labels, 1, "reached")
    target.y_NK[:] += 0.5 * target.y_NK.std(0) * rng.normal(size=target.y_NK.shape) * (locked is not None)
    episodes = pl.DataFrame({"episode_index": range(E), "task": ["a", "b"] * (E // 2)})
    episodes = episodes.with_columns(split=pl.Series(["train"] * (E - 6) + ["val"] * 6))
    (floor,) = probing._inputs(name, target, None, TASK)
    rows, _ = probing._judge(floor, target, splits.split(target.rows, episodes, 0), episodes, TASK)
    whole = [row for row in rows if row["train"] == "all" and row["split"] == "val"]
    r2 = {row["dimension"]: row["value"] for row in whole if row["metric"] == "r2" and row["dimension"] != "mean"}
    return r2, next(row["note"] for row in whole if row["metric"] == "effective-rank")


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"gripper": 1000}, id="m, rad, gripper to 1000"),
        pytest.param({**dict.fromkeys("xyz", 1000), "gripper": 850}, id="mm, rad, gripper to 850"),
        pytest.param({"x": 1e-3, "gripper": 4096}, id="km and ticks"),
    ],
)
def test_the_ceiling_is_one_in_any_units(sizes):
    """A large unit silenced the others: .07 for metres beside a gripper of 0 to 1000."""
    r2, note = judged("oracle", sizes)
    assert list(r2) == list(STEPS)
    assert min(r2.values()) > 0.999
    assert note == f"oracle: strength {ALPHAS[0]:g}, the smallest of its grid, for {', '.join(STEPS)}"


@pytest.mark.parametrize("noise", [1e-6, 1e-3])
@pytest.mark.parametrize(("name", "least"), [("state", -0.1), ("oracle", 0.7)])
def test_a_joint_that_is_still_in_training_is_not_magnified_where_it_moves(name, least, noise):
    """It took R2 of the other dimensions to -834 (noise 1e-4); divided by its spread and no more, below a million."""
    r2, _ = judged(name, {"gripper": 1000}, locked="pitch", noise=noise)
    assert min(value for dimension, value in r2.items() if dimension != "pitch") > least


def test_a_column_is_told_from_its_training_rows_alone():
    z = np.random.default_rng(0).normal(size=(100, 3)) * [1e3, 1e-3, 0] + [0, 5, 7]
    train_N = np.arange(100) < 80
    known = probing.Floor("state", z).evened(train_N).z_ND
    assert known[train_N, :2].std(0) == pytest.approx([1, 1])
    far = np.where(train_N[:, None], z, z + 1e9)
    moved = probing.Floor("state", far).evened(train_N).z_ND
    assert np.array_equal(moved[train_N], known[train_N])
    assert (np.ptp(moved, 0)[:2] < probing.FAR * np.ptp(known[train_N], 0)[:2]).all()
    assert np.ptp(moved, 0)[2] == 0
