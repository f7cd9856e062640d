"""`avrl.labels`: known trajectories give known numbers; pairs stay within an episode."""

from __future__ import annotations

import clips
import numpy as np
import polars as pl
import pytest

from avrl import labels
from avrl.episodes import View, table
from avrl.errors import ConfigError, IntegrityError
from avrl.sources import bridge


def rows(index, state, action):
    """A piece of ``labels.parquet``."""
    columns = {"episode_index": [index] * len(state), "frame_index": range(len(state))}
    columns |= {f"state_{name}": np.asarray(state)[:, i] for i, name in enumerate(labels.DIMENSIONS)}
    columns |= {f"action_{name}": np.asarray(action)[:, i] for i, name in enumerate(labels.DIMENSIONS)}
    return pl.DataFrame(columns)


def walk(n, seed):
    """A random walk of the state, and commands that it never quite follows."""
    rng = np.random.default_rng(seed)
    state, action = rng.normal(0, 0.1, (2, n, 7)).cumsum(1)
    action[0] = 0
    action[:, 6] = rng.integers(0, 2, n)
    return state, action


def parted(target):
    return target.rows, target.y_NK, target.state_NS


def prepared(folder, records, **survey):
    """Raw artifact and the ``episodes.parquet`` that prep would write for it."""
    raw, frames = clips.bridge(folder / "raw", records), folder / "frames"
    frames.mkdir()
    episodes, dropped = bridge.survey(raw)
    assert not dropped
    opened = [bridge.frames(raw, one, View(16), folder)[0] for one in episodes if one.split == "train"]
    starts = np.cumsum([0, *(one.length for one in opened)])
    placed = [{**one.__dict__, "dataset_from_index": int(at)} for one, at in zip(opened, starts, strict=False)]
    table(placed).write_parquet(frames / "episodes.parquet")
    return raw, frames


# Numbers.


def test_reached_is_the_difference_of_states():
    state, action = walk(9, 0)
    found, y, at_t = parted(labels.pairs(rows(4, state, action), 3, "reached"))
    assert found["episode_index"].to_list() == [4] * 5
    assert found["frame_index"].to_list() == [1, 2, 3, 4, 5]  # not 0: its action is a recording artefact
    np.testing.assert_allclose(y[:, :6], [state[t + 3, :6] - state[t, :6] for t in range(1, 6)], atol=1e-12)
    np.testing.assert_allclose(at_t, state[1:6], atol=1e-12)
    assert y.dtype == at_t.dtype == np.float64


def test_commanded_is_the_sum_of_the_actions_between():
    state, action = walk(9, 1)
    y = labels.pairs(rows(0, state, action), 3, "commanded").y_NK
    want = [action[t, :6] + action[t + 1, :6] + action[t + 2, :6] for t in range(1, 6)]
    np.testing.assert_allclose(y[:, :6], want, atol=1e-12)


def test_the_first_action_is_in_no_target():
    state, action = walk(9, 2)
    wild = action.copy()
    wild[0, :6] = 1e6
    for target in labels.TARGETS:
        for gap in (1, 3, 7):
            a = labels.pairs(rows(0, state, action), gap, target).y_NK
            b = labels.pairs(rows(0, state, wild), gap, target).y_NK
            assert np.abs(a - b)[:, :6].max() < 1e-8


def test_angles_are_differences_on_the_circle():
    state = np.zeros((4, 7))
    state[:, 3] = [0, 3.1, -3.1, 3.0]  # across pi, and back
    state[:, 4] = [0, -3.0, 3.0, 3.0]
    state[:, 0] = [0, 5, -5, 0]  # a position is no angle
    y = labels.pairs(rows(0, state, np.zeros((4, 7))), 1, "reached").y_NK
    np.testing.assert_allclose(y[:, 3], [2 * np.pi - 6.2, 6.1 - 2 * np.pi], atol=1e-12)
    np.testing.assert_allclose(y[:, 4], [6 - 2 * np.pi, 0], atol=1e-12)
    np.testing.assert_allclose(y[:, 0], [-10, 5], atol=1e-12)
    angles = np.linspace(-20, 20, 999)
    assert (np.abs(labels.wrapped(angles)) <= np.pi).all()
    np.testing.assert_allclose(np.exp(1j * labels.wrapped(angles)), np.exp(1j * angles), atol=1e-9)


@pytest.mark.parametrize(
    ("command", "want"),
    [
        ([1, 1, 0, 0, 1], [1, 1, 0, 0, 1]),
        ([1, 0.5, 0.3, 0, 0], [1, 0, 0, 0, 0]),  # in between: as the next definite one
        ([0, 0.5, 0.7, 1, 0.5, 0], [0, 1, 1, 1, 0, 0]),
        ([1, 0.96, 0.95, 0.05, 0.04], [1, 1, 0, 0, 0]),  # the bounds themselves are in between
        ([0, 1, 0.6, 0.7], [0, 1, 1, 1]),  # a tail in between takes the nearer
        ([0, 1, 0.6, 0.4], [0, 1, 0, 0]),
        ([0.5], [0]),
        ([0.51], [1]),
    ],
)
def test_the_gripper_is_scanned_backwards(command, want):
    assert labels.binarised(np.array(command, float)).tolist() == want


def test_the_gripper_of_a_pair_is_the_last_command_before_its_end():
    state, action = np.zeros((6, 7)), np.zeros((6, 7))
    action[:, 6] = [0, 1, 1, 0, 0, 1]
    for target in labels.TARGETS:
        assert labels.pairs(rows(0, state, action), 1, target).y_NK[:, 6].tolist() == [1, 1, 0, 0]
        assert labels.pairs(rows(0, state, action), 2, target).y_NK[:, 6].tolist() == [1, 0, 0]


def test_pairs_never_cross_episodes():
    lengths = {7: 12, 3: 2, 5: 6, 9: 5}  # 2 is too short for a gap of 3
    walks = {index: walk(n, index) for index, n in lengths.items()}
    both = pl.concat([rows(index, *one) for index, one in walks.items()])
    for gap in (1, 3, 4):
        found, y, at_t = parted(labels.pairs(both, gap, "reached"))
        counts = {index: max(0, n - 1 - gap) for index, n in lengths.items()}
        assert found["episode_index"].to_list() == [index for index, n in counts.items() for _ in range(n)]
        assert len(found) == len(y) == len(at_t) == sum(counts.values())
        for (index, t), target in zip(found.iter_rows(), y, strict=True):
            state = walks[index][0]
            np.testing.assert_allclose(target[:3], state[t + gap, :3] - state[t, :3], atol=1e-12)


def test_a_gap_longer_than_every_episode_is_a_plain_error():
    with pytest.raises(ConfigError, match=r"no episode has two frames that are 9 apart; try a smaller --gap"):
        labels.pairs(rows(0, *walk(10, 0)), 9, "reached")
    assert len(labels.pairs(rows(0, *walk(10, 0)), 8, "reached").rows) == 1


# From records.


def test_a_planted_trajectory_comes_out_as_it_was_planted(tmp_path):
    planted = {}
    for index, n in enumerate((5, 8)):
        state = np.arange(n * 7).reshape(n, 7) / 64 + index  # exact in float32
        action = -np.arange(n * 7).reshape(n, 7) / 32
        action[0] = 0
        planted[index] = state, action
    records = [clips.framed(clips.example(clips.trajectory(*one))) for one in planted.values()]
    raw, frames = prepared(tmp_path, records)
    facts = labels.extract(raw, frames, tmp_path)
    assert facts == {"episodes": 2, "frames": 13}
    found = pl.read_parquet(tmp_path / "labels.parquet")
    assert found.columns == ["episode_index", "frame_index"] + [
        f"{kind}_{name}" for kind in ("state", "action") for name in labels.DIMENSIONS
    ]
    for index, (state, action) in planted.items():
        mine = found.filter(pl.col("episode_index") == index)
        assert mine["frame_index"].to_list() == list(range(len(state)))
        np.testing.assert_array_equal(mine[:, 2:9].to_numpy(), state)
        np.testing.assert_array_equal(mine[:, 9:16].to_numpy(), action)
    y = labels.pairs(found, 2, "reached").y_NK
    np.testing.assert_allclose(y[:, :3], 14 / 64)
    assert len(y) == 2 + 5


def test_what_was_dropped_has_no_label(tmp_path):
    records = [clips.framed(clips.example(clips.still(n))) for n in (4, 5, 6)]
    raw, frames = prepared(tmp_path, records)
    placed = pl.read_parquet(frames / "episodes.parquet")
    placed.filter(pl.col("episode_index") != 1).write_parquet(frames / "episodes.parquet")
    assert labels.extract(raw, frames, tmp_path) == {"episodes": 2, "frames": 10}
    assert pl.read_parquet(tmp_path / "labels.parquet")["episode_index"].unique().sort().to_list() == [0, 2]


def test_states_and_frames_that_differ_in_number_are_refused(tmp_path):
    raw, frames = prepared(tmp_path, [clips.framed(clips.example(clips.still(4)))])
    placed = pl.read_parquet(frames / "episodes.parquet").with_columns(length=pl.lit(3, pl.Int64))
    placed.write_parquet(frames / "episodes.parquet")
    with pytest.raises(IntegrityError, match=r"#0: 4 states, 3 frames"):
        labels.extract(raw, frames, tmp_path)


def test_a_killed_run_goes_on_with_the_next_part(tmp_path, monkeypatch):
    """What is done is not read again, and however the parts are cut, the file is that of a run in one piece."""
    raw, frames = prepared(tmp_path, [clips.framed(clips.example(clips.trajectory(*walk(n, n)))) for n in range(3, 10)])
    (tmp_path / "whole").mkdir()
    facts = labels.extract(raw, frames, tmp_path / "whole")
    read, seen = labels._columns, []

    def columns(raw, episode, scratch):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(episode.episode_index)
        return read(raw, episode, scratch)

    monkeypatch.setattr(labels, "_columns", columns)
    monkeypatch.setattr(labels, "EPISODES", 2)
    limit = 5
    with pytest.raises(KeyboardInterrupt):
        labels.extract(raw, frames, tmp_path)
    assert not (tmp_path / "labels.parquet").exists()
    limit = None
    assert labels.extract(raw, frames, tmp_path) == facts
    assert seen == [0, 1, 2, 3, 4, 4, 5, 6]  # the third part was not whole
    assert (tmp_path / "labels.parquet").read_bytes() == (tmp_path / "whole/labels.parquet").read_bytes()


def test_the_sample_has_labels_for_every_frame(tmp_path):
    records = clips.sample_bridge("train", 3)
    raw, frames = prepared(tmp_path, records)
    facts = labels.extract(raw, frames, tmp_path)
    assert facts["frames"] == int(pl.read_parquet(frames / "episodes.parquet")["length"].sum())
    found = pl.read_parquet(tmp_path / "labels.parquet")
    first = found.filter(pl.col("frame_index") == 0)[:, 9:16].to_numpy()
    assert (first == 0).all()
    y = labels.pairs(found, 1, "reached").y_NK
    assert np.isfinite(y).all()
    assert 0 < np.abs(y[:, :3]).mean() < 0.2
