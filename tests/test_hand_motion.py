"""`avrl.hand_motion`: known poses give known numbers; what is not sure is in no pair; each hand is a target."""

from __future__ import annotations

import io
import tracemalloc

import clips
import h5py
import numpy as np
import polars as pl
import pytest
from made import features_of, frame_store

from avrl import features, hand_motion, labels, outcome, probing, scratch
from avrl.episodes import Episode, table
from avrl.errors import ConfigError, IntegrityError
from avrl.probes import Given, Task, Who
from avrl.probing import score

# Columns are the camera's axes in the world: x points to the world's y, y to its z, z to its x.
TURNED = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], float)
STRAIGHT = np.eye(3)
RIGHT = [name for name in hand_motion.NAMES if name.startswith("right")]


def poses(n, *, at=None, turn=STRAIGHT, eye=(0, 0, 0), sure=None, lacks=()):
    """A pose file: where joints are, at (1, 2, 3) if not said, and how sure, 1 if not said; None: no confidences."""
    at, buffer = at or {}, io.BytesIO()
    with h5py.File(buffer, "w") as file:
        camera = np.tile(np.eye(4), (n, 1, 1))
        camera[:, :3, :3], camera[:, :3, 3] = turn, eye
        file["transforms/camera"] = camera
        for name in hand_motion.NAMES:
            pose = np.tile(np.eye(4), (n, 1, 1))
            pose[:, :3, 3] = at.get(name, (1, 2, 3))
            if name not in lacks:
                file[f"transforms/{name}"] = pose
            if sure is not None:
                file[f"confidences/{name}"] = np.broadcast_to(sure.get(name, 1.0), n)
    return buffer.getvalue()


def extracted(folder, files, lengths, stride=1):
    """``labels.parquet`` of an artifact with these pose files, and the facts."""
    raw = clips.egodex(folder / "raw", {f"fold/{k}": (b"", one) for k, one in enumerate(files)})
    rows = [
        {
            **Episode(k, f"part1/fold/{k}", "fold", "", "train", n, 30.0, "part1.zip", f"part1/fold/{k}.mp4").__dict__,
            "stride": stride,
            "dataset_from_index": 0,
        }
        for k, n in enumerate(lengths)
    ]
    (folder / "frames").mkdir()
    table(rows).write_parquet(folder / "frames/episodes.parquet")
    facts = labels.extract(raw, folder / "frames", folder, "egodex")
    return pl.read_parquet(folder / "labels.parquet"), facts


def hands(found, gap=1):
    return {one.name: one for one in labels.targets(found, gap, "reached", "egodex")}


def column(target, name, values="y_NK"):
    return getattr(target, values)[:, target.dimensions.index(name)]


# Numbers.


def test_motion_is_along_the_axes_of_the_first_frames_camera(tmp_path):
    path = np.array([[0, 0, 0], [3, 1, 2], [3, 1, 7]], float)
    turns = np.stack([TURNED, np.eye(3), TURNED])
    found, _ = extracted(tmp_path, [poses(3, at={"rightHand": path}, turn=turns, eye=(1, 0, 0), sure={})], [3])
    right = hands(found)["right hand"]
    assert right.rows.rows() == [(0, 0), (0, 1)]
    # World (3, 1, 2) is y 1, z 2, x 3: the turned camera's x, y, z. The second frame's camera is not turned.
    moved = np.stack([column(right, f"right wrist {axis}") for axis in "xyz"], 1)
    np.testing.assert_allclose(moved, [[1, 2, 3], [0, 0, 5]], atol=1e-6)
    seen = np.stack([column(right, f"right wrist {axis}", "state_NS") for axis in "xyz"], 1)
    np.testing.assert_allclose(seen, [[0, 0, -1], [2, 1, 2]], atol=1e-6)
    np.testing.assert_array_equal(right.motion_NS, right.y_NK)
    assert list(right.groups) == ["right wrist", "right fingertips"]
    assert [len(one) for one in right.groups.values()] == [3, 15]
    assert np.abs(right.y_NK[:, 3:]).max() == 0  # the fingertips lie still


def test_a_hand_that_lies_still_does_not_move_however_the_camera_does(tmp_path):
    rng = np.random.default_rng(0)
    turns = np.linalg.qr(rng.normal(size=(9, 3, 3)))[0]
    found, _ = extracted(tmp_path, [poses(9, turn=turns, eye=rng.normal(size=(9, 3)), sure={})], [9])
    for one in hands(found, 3).values():
        assert np.abs(one.y_NK).max() < 1e-6
        assert one.state_NS.std(0).min() > 0.1


def test_numbers_do_not_depend_on_how_many_pairs_are_worked_off_at_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    at = {name: rng.normal(size=(40, 3)) for name in hand_motion.NAMES}
    turns = np.linalg.qr(rng.normal(size=(40, 3, 3)))[0]
    found, _ = extracted(tmp_path, [poses(40, at=at, turn=turns, eye=rng.normal(size=(40, 3)), sure={})], [40])
    whole = hands(found, 3)
    monkeypatch.setattr(hand_motion, "BLOCK", 7)
    for name, one in hands(found, 3).items():
        np.testing.assert_array_equal(one.y_NK, whole[name].y_NK)
        np.testing.assert_array_equal(one.state_NS, whole[name].state_NS)


def test_memory_does_not_grow_with_the_pairs(tmp_path, monkeypatch):
    """It was 1.6 kB a pair: part 1 is 12 million pairs."""
    n, length, rng = 20_000, 100, np.random.default_rng(0)
    names = [*hand_motion.TURN, *hand_motion.EYE, *(f"{one}_{axis}" for one in hand_motion.NAMES for axis in "xyz")]
    columns = {name: rng.random(n, np.float32) for name in names}
    columns |= {f"{name}_confidence": np.ones(n, np.float32) for name in hand_motion.NAMES}
    keys = {"episode_index": np.repeat(np.arange(n // length), length), "frame_index": np.tile(np.arange(length), 200)}
    pl.DataFrame({**keys, **columns}).write_parquet(tmp_path / "labels.parquet")
    names = [f"task {k % 3}" for k in range(200)]
    told = {"episode_index": range(200), "task": names, "split": "train", "fps": 30.0}
    pl.DataFrame(told).write_parquet(tmp_path / "episodes.parquet")
    del columns
    for module in (hand_motion, outcome, probing, scratch):
        monkeypatch.setattr(module, "BLOCK", 1000)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    score(
        tmp_path / "out",
        Who("state", "", "none"),
        Task("egodex", 1, "reached", (), 0, 100, ()),
        Given(tmp_path, tmp_path),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * n


def test_pairs_never_cross_episodes(tmp_path):
    walks = [np.arange(n)[:, None] * [1.0, 0, 0] + 100 * k for k, n in enumerate((5, 2, 4))]
    files = [poses(len(one), at={"leftHand": one}, sure={}) for one in walks]
    found, facts = extracted(tmp_path, files, [5, 2, 4])
    left = hands(found, 2)["left hand"]
    assert left.rows.rows() == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    np.testing.assert_allclose(column(left, "left wrist x"), 2)
    assert facts["frames"] == 11
    with pytest.raises(ConfigError, match=r"no episode has two frames that are 5 apart; try a smaller --gap"):
        hands(found, 5)


def test_a_store_that_keeps_every_third_frame_has_its_poses(tmp_path):
    path = np.arange(10)[:, None] * [1.0, 0, 0]
    found, _ = extracted(tmp_path, [poses(10, at={"rightThumbTip": path}, sure={})], [4], stride=3)
    assert found["rightThumbTip_x"].to_list() == [0, 3, 6, 9]
    np.testing.assert_allclose(column(hands(found)["right hand"], "right thumb x"), 3)


# Sureness.


def test_a_pair_needs_every_joint_of_its_hand_sure_at_both_frames_and_no_other_hands(tmp_path):
    unsure = np.array([1, 1, 1, 0.29, 1, 1, 0.3])
    found, facts = extracted(tmp_path, [poses(7, sure={"rightRingFingerTip": unsure})], [7])
    both = hands(found, 2)
    assert both["right hand"].rows["frame_index"].to_list() == [0, 2, 4]
    assert both["left hand"].rows["frame_index"].to_list() == [0, 1, 2, 3, 4]
    assert facts["sure"]["rightRingFingerTip"] == pytest.approx(6 / 7, abs=1e-4)


def test_episodes_that_do_not_say_how_sure_they_are_stay_and_are_counted(tmp_path):
    found, facts = extracted(tmp_path, [poses(4, sure={"leftHand": 0.1}), poses(4)], [4, 4])
    assert facts["without_confidences"] == 1
    assert hands(found)["right hand"].rows["episode_index"].to_list() == [0, 0, 0, 1, 1, 1]


def test_a_joint_that_the_data_is_never_sure_of_is_left_out(tmp_path):
    never = {"rightRingFingerTip": 0.0, "rightLittleFingerTip": 0.2} | dict.fromkeys(hand_motion.NAMES[:6], 0.0)
    found, _ = extracted(tmp_path, [poses(4, sure=never), poses(4)], [4, 4])
    (right,) = hands(found).values()
    assert right.name == "right hand"
    assert [len(one) for one in right.groups.values()] == [3, 9]


def test_without_a_sure_hand_there_is_nothing_to_probe(tmp_path):
    found, _ = extracted(tmp_path, [poses(4, sure=dict.fromkeys(hand_motion.NAMES, 0.1))], [4])
    with pytest.raises(ConfigError, match=r"no pair of frames 1 apart has a hand that the poses are sure of"):
        hands(found)


def test_a_pose_that_is_no_number_is_not_sure(tmp_path):
    path = np.zeros((6, 3))
    path[2] = np.nan
    eyes = np.zeros((6, 3))
    eyes[5] = np.inf
    found, _ = extracted(tmp_path, [poses(6, at={"rightHand": path}, eye=eyes)], [6])
    both = hands(found)
    assert both["right hand"].rows["frame_index"].to_list() == [0, 3]
    assert both["left hand"].rows["frame_index"].to_list() == [0, 1, 2, 3]
    assert all(np.isfinite(one.y_NK).all() for one in both.values())


def test_scores_do_not_depend_on_how_many_pairs_are_worked_off_at_once(walked, tmp_path, monkeypatch):
    found = []
    for name, block in (("whole", scratch.BLOCK), ("parts", 7)):
        for module in (hand_motion, outcome, scratch):
            monkeypatch.setattr(module, "BLOCK", block)
        scored(walked, tmp_path / name, "oracle")
        found.append([pl.read_parquet(tmp_path / name / f"{one}.parquet") for one in ("scores", "episodes")])
    for one, other in zip(*found, strict=True):
        assert one.equals(other)


# What is refused.


def test_a_missing_joint_is_named_with_its_file(tmp_path):
    with pytest.raises(IntegrityError, match=r"part1\.zip:part1/fold/1\.hdf5 has no transforms/rightLittleFingerTip"):
        extracted(tmp_path, [poses(4), poses(4, lacks={"rightLittleFingerTip"})], [4, 4])


def test_a_joint_of_another_length_than_the_camera_is_refused(tmp_path):
    buffer = io.BytesIO(poses(4, sure={}, lacks={"leftHand"}))
    with h5py.File(buffer, "a") as file:
        file["transforms/leftHand"] = np.tile(np.eye(4), (3, 1, 1))
    with pytest.raises(IntegrityError, match=r"0\.hdf5 has \(3, 4, 4\) numbers, not \(4, 4, 4\), in transforms/left"):
        extracted(tmp_path, [buffer.getvalue()], [4])


def test_poses_and_frames_that_differ_in_number_are_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"part1/fold/0: 4 states, 5 frames"):
        extracted(tmp_path, [poses(4)], [5])


def test_nobody_commanded_a_hand(tmp_path):
    found, _ = extracted(tmp_path, [poses(4)], [4])
    with pytest.raises(ConfigError, match=r"EgoDex has motion that happened and no other; --target reached"):
        labels.targets(found, 1, "commanded", "egodex")


# Through the probe.


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Labels of 15 episodes in which both hands wander before a turning camera; the left is sure in two of them."""
    root, rng, n = tmp_path_factory.mktemp("hands"), np.random.default_rng(0), 12
    files = []
    for k in range(15):
        at = {name: rng.normal(0, 0.02, (n, 3)).cumsum(0) for name in hand_motion.NAMES}
        turn = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
        sure = {} if k < 2 else {name: 0.0 for name in hand_motion.NAMES if name not in RIGHT}
        files.append(poses(n, at=at, turn=turn, sure=sure))
    found, _ = extracted(root, files, [n] * 15)
    return frame_store(root / "store", [n] * 15), root, found


def scored(walked, out, who, vectors=None):
    frames, where, _ = walked
    out.mkdir()
    made = None
    if vectors:
        rows, _ = features.rows_of(pl.read_parquet(frames / "episodes.parquet"), 1)
        made = features_of(out, rows, {"cls": vectors(rows)}, paired=True)
    task = Task("egodex", 1, "reached", (), 0, 200, ("l", "f"))
    facts = score(out, Who(who, "", "trained"), task, Given(frames, where, made))
    found = pl.read_parquet(out / "scores.parquet").filter(dimension="mean", metric="r2", split="val", train="all")
    return found, facts


def test_a_planted_motion_is_found_and_the_ceiling_is_one(walked, tmp_path):
    right = hands(walked[2])["right hand"]
    known = dict(zip(right.rows.iter_rows(), right.y_NK, strict=True))

    def vectors(rows):
        keys = rows.select("episode_index", "frame_index").iter_rows()
        clean = np.stack([known[key] for key in keys]) @ np.random.default_rng(1).normal(size=(18, 18))
        return np.concatenate([np.random.default_rng(2).normal(size=clean.shape), clean], 1)

    found, facts = scored(walked, tmp_path / "planted", "planted", vectors)
    values = found.filter(pairing="pair", target="reached right hand")
    assert values["group"].to_list() == ["right wrist", "right fingertips"]
    assert values["value"].min() > 0.999
    assert facts["tested"] == "a fifth of each task"
    assert facts["target"] == "reached right hand"
    oracle, _ = scored(walked, tmp_path / "oracle", "oracle")
    assert oracle["value"].min() > 0.999
    mean, _ = scored(walked, tmp_path / "mean", "mean")
    assert mean["value"].max() <= 0


def test_a_hand_in_too_few_episodes_is_left_out_with_a_word(walked, tmp_path, caplog):
    found, _ = scored(walked, tmp_path / "mean", "mean")
    assert found["target"].unique().to_list() == ["reached right hand"]
    assert "too few episodes have pairs 1 apart to probe left hand" in caplog.text


def test_two_hands_are_two_protocols_even_over_the_same_pairs(walked, tmp_path):
    frames, _, found = walked
    sure = found.with_columns(pl.col("^left.*_confidence$") * 0 + 1)
    sure.write_parquet(tmp_path / "labels.parquet")
    both, facts = scored((frames, tmp_path, sure), tmp_path / "out", "mean")
    prints = both.group_by("target").agg(pl.col("fingerprint").unique()).sort("target")
    assert prints["target"].to_list() == ["reached left hand", "reached right hand"]
    assert len(set(prints["fingerprint"].explode())) == 2
    assert [one["target"] for one in facts["targets"]] == ["reached left hand", "reached right hand"]
    assert set(pl.read_parquet(tmp_path / "out/episodes.parquet")["target"]) == set(prints["target"])
