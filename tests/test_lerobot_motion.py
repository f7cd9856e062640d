"""`avrl.lerobot_motion`: state and action by the data set's own names, as they were recorded."""

from __future__ import annotations

import forms
import numpy as np
import polars as pl
import pytest

from avrl import frames, labels
from avrl.cache import Cache
from avrl.episodes import View, table
from avrl.errors import ConfigError, IntegrityError
from avrl.sources import lerobot as source
from avrl_cli.output import Session
from avrl_cli.probe import _linked

JOINTS = ["shoulder.pos", "elbow.pos", "wrist_a", "wrist_b", "wrist_c", "wrist_d", "gripper.pos"]


def extracted(folder, those, *, names=JOINTS, writer=forms.lerobot3, fps=0.0, **changed):
    copy = writer(folder / "copy", those, names=names, **changed)
    raw = forms.linked(source, copy, folder / "raw", ("all",))
    (folder / "frames").mkdir()
    opened = [source.frames(raw, one, View(48, fps=fps), folder)[0] for one in source.survey(raw)[0]]
    table([{**one.__dict__, "dataset_from_index": 0} for one in opened]).write_parquet(
        folder / "frames/episodes.parquet"
    )
    facts = labels.extract(raw, folder / "frames", folder, "lerobot")
    return pl.read_parquet(folder / "labels.parquet"), facts


def only(found, gap, target="reached"):
    (one,) = labels.targets(found, gap, target, "lerobot")
    return one


@pytest.fixture(scope="module")
def those():
    return forms.trajectories(lengths=(12, 9))


@pytest.fixture(scope="module")
def both(tmp_path_factory, those):
    return extracted(tmp_path_factory.mktemp("joints"), those)


@pytest.mark.parametrize("writer", [forms.lerobot2, forms.lerobot3])
def test_names_are_the_data_sets_own(tmp_path, those, writer):
    found, facts = extracted(tmp_path, those, writer=writer)
    assert facts == {"episodes": 2, "frames": 21, "state": JOINTS, "action": JOINTS}
    one = only(found, 1)
    assert one.dimensions == tuple(JOINTS)
    assert one.groups == {"motion": tuple(JOINTS)}  # the state's gripper has many values
    assert one.binary == ()


def test_reached_is_the_difference_of_states(both, those):
    one = only(both[0], 3)
    assert one.rows.rows() == [(k, t) for k, n in enumerate((12, 9)) for t in range(n - 3)]
    want = np.concatenate([t.state[3:].astype(float) - t.state[:-3] for t in those])
    np.testing.assert_allclose(one.y_NK, want, atol=1e-12)
    np.testing.assert_allclose(one.motion_NS, want, atol=1e-12)
    np.testing.assert_allclose(one.state_NS, np.concatenate([t.state[:-3] for t in those]))


def test_commanded_is_the_mean_of_the_actions_between_as_recorded(both, those):
    one = only(both[0], 3, "commanded")
    want = np.concatenate([[t.action[i : i + 3].mean(0) for i in range(len(t.action) - 3)] for t in those])
    np.testing.assert_allclose(one.y_NK, want, atol=1e-6)
    assert one.state_NS.shape[1] == 7


def test_a_gripper_of_two_values_is_a_class_and_the_larger_is_one(tmp_path):
    those = forms.trajectories(lengths=(12, 9))
    for one in those:
        one.action[:, 6] = np.where(one.action[:, 6] > 0.5, 1, -1)
        one.state[:, 6] = np.where(np.arange(len(one.state)) % 3 == 0, 0.08, 0.0)
    found, _ = extracted(tmp_path, those)
    told, held = only(found, 2, "commanded"), only(found, 2)
    for one in (told, held):
        assert one.groups == {"motion": tuple(JOINTS[:6]), "gripper": ("gripper.pos",)}
        assert one.binary == ("gripper.pos",)
    assert told.y_NK[:10, 6].tolist() == (those[0].action[1:11, 6] > 0).tolist()  # the last command before t+gap
    assert held.y_NK[:10, 6].tolist() == (those[0].state[2:12, 6] > 0).tolist()  # what it is at t+gap


def test_position_and_rotation_are_known_by_name_and_angles_go_round(tmp_path):
    those = forms.trajectories(lengths=(6, 5))
    for one in those:
        one.state[:, 3] = np.resize([3.1, -3.1], len(one.state))
        one.state[:, 4] = np.resize([170.0, -170.0], len(one.state))  # degrees: nothing says so but their size
    found, _ = extracted(tmp_path, those, names=["x", "y", "z", "roll", "pitch", "yaw", "lift"])
    one = only(found, 1)
    assert one.groups == {"position": ("x", "y", "z"), "rotation": ("roll", "pitch", "yaw"), "motion": ("lift",)}
    np.testing.assert_allclose(np.abs(one.y_NK[:, 3]), 2 * np.pi - 6.2, atol=1e-5)
    np.testing.assert_allclose(np.abs(one.y_NK[:, 4]), 340, atol=1e-4)


def test_a_store_that_keeps_every_other_frame_has_the_mean_action_until_the_next(tmp_path, those):
    found, _ = extracted(tmp_path, those, fps=2.5)
    first = found.filter(episode_index=1)  # 9 frames: 0, 2, 4, 6, 8
    np.testing.assert_array_equal(first["state_elbow.pos"], those[1].state[::2, 1])
    pairs = [those[1].action[t : t + 2] for t in range(0, 9, 2)]
    np.testing.assert_allclose(first["action_elbow.pos"], [one[:, 1].mean() for one in pairs], atol=1e-6)
    np.testing.assert_array_equal(first["action_gripper.pos"], [one[-1, 6] for one in pairs])


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (None, list("0123456")),
        (["state"], list("0123456")),  # one word for all of them
        (["x", "y", "z", "a", "b", "gripper", "gripper"], ["x", "y", "z", "a", "b", "gripper 5", "gripper 6"]),
    ],
)
def test_numbers_without_names_of_their_own_go_by_place(tmp_path, those, names, want):
    assert extracted(tmp_path, those, names=names)[1]["state"] == want


def test_a_data_set_without_actions_has_no_commands(tmp_path, those, both):
    found = both[0].drop(name for name in both[0].columns if name.startswith("action_"))
    assert len(only(found, 1).rows) == 19
    with pytest.raises(ConfigError, match="this data set has no actions; --target reached"):
        only(found, 1, "commanded")


def test_more_numbers_than_promised_are_refused(tmp_path, those):
    said = {"dtype": "float32", "shape": [6], "names": JOINTS[:6]}
    copy = forms.lerobot3(tmp_path / "copy", those)
    features = forms.info("v3.0", those)["features"] | {"action": said}
    forms.write(copy / "meta/info.json", forms.info("v3.0", those, features=features))
    raw = forms.linked(source, copy, tmp_path / "raw", ("all",))
    episode = source.survey(raw)[0][0]
    from avrl import lerobot_motion

    with pytest.raises(IntegrityError, match=r"file-000\.parquet: action has 7 numbers, 6 are promised"):
        lerobot_motion.columns(raw, episode, tmp_path)


def test_an_episode_with_a_number_that_is_none_can_be_dropped_and_the_others_have_labels(tmp_path):
    those = forms.trajectories(lengths=(6, 5, 7))
    those[1].state[2, 4], those[2].action[3, 1] = np.nan, np.inf
    raw = forms.linked(source, forms.lerobot3(tmp_path / "copy", those, kind="image"), tmp_path / "raw", ("all",))
    with pytest.raises(
        IntegrityError, match=r"file-000\.parquet: observation\.state of episode 1 is no finite vectors"
    ):
        source.frames(raw, source.survey(raw)[0][1], View(16), tmp_path)
    job = frames.Job("lerobot", raw, tmp_path, View(16), 90, drop=True)
    first, *records = [frames.encode_episode(job, one) for one in source.survey(raw)[0]]
    assert "action of episode 2 is no finite vectors" in records[1]["dropped"]["reason"]
    assert [one["dropped"]["episode_id"] for one in records] == ["episode 1", "episode 2"]
    (tmp_path / "out").mkdir()
    table([{**first["episode"], "dataset_from_index": 0}]).write_parquet(tmp_path / "episodes.parquet")
    assert labels.extract(raw, tmp_path, tmp_path / "out", "lerobot")["frames"] == 6


def test_one_number_that_is_no_list_is_a_vector_of_one(tmp_path):
    those = forms.trajectories(lengths=(6,))
    copy = forms.lerobot3(tmp_path / "copy", those, kind="image")
    said = {"dtype": "float32", "shape": [1], "names": None}
    info = forms.info("v3.0", those, kind="image")
    forms.write(copy / "meta/info.json", info | {"features": info["features"] | {"action": said}})
    path = copy / "data/chunk-000/file-000.parquet"
    pl.read_parquet(path).with_columns(pl.col("action").list.first()).write_parquet(path)
    raw = forms.linked(source, copy, tmp_path / "raw", ("all",))
    episode = source.frames(raw, source.survey(raw)[0][0], View(16), tmp_path)[0]
    np.testing.assert_array_equal(source.dataset(raw, episode).numbers(0, "action"), those[0].action[:, :1])


def test_probe_from_a_folder_links_and_prepares_it_once(tmp_path, those):
    copy = forms.lerobot3(tmp_path / "copy", those)
    cache = Cache(tmp_path / "cache")
    plan = Session("probe", cache.root, dry_run=True, quiet=True)
    assert _linked(plan, "lerobot", str(copy)) is None
    assert not cache.root.exists()
    first = Session("probe", cache.root, quiet=True)
    raw = _linked(first, "lerobot", str(copy))
    assert [(one["stage"], one["hit"]) for one in first.artifacts] == [("raw", False), ("frames", False)]
    again = Session("probe", cache.root, quiet=True)
    assert _linked(again, "lerobot", str(copy)).digest == raw.digest
    assert [(one["stage"], one["hit"]) for one in again.artifacts] == [("raw", True)]
    assert len(cache.artifacts("frames")) == 1
