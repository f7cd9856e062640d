"""Bridge V2 in every form: the contract, and that the same trajectories give the same labels in all."""

from __future__ import annotations

import clips
import forms
import numpy as np
import polars as pl
import pytest
from contracts.source import SourceContract

from avrl import labels
from avrl.episodes import View, table
from avrl.errors import ConfigError, IntegrityError, MismatchError, NotFoundError
from avrl.sources import bridge, bridge_raw

BOTH = ("train", "val")
SPLITS = {"train": "0:3", "val": "3:4"}


class TestLerobot2(SourceContract):
    module, parts = bridge, BOTH

    def make(self, folder):
        return forms.lerobot2(folder, forms.trajectories(), splits=SPLITS)

    def damage(self, raw):
        clips.broken(raw / f"lerobot/train-val/videos/chunk-000/{forms.CAMERA}/episode_000000.mp4")


class TestLerobot3(SourceContract):
    module, parts = bridge, BOTH

    def make(self, folder):
        return forms.lerobot3(folder, forms.trajectories(), splits=SPLITS)

    def damage(self, raw):
        clips.broken(raw / f"lerobot/train-val/videos/{forms.CAMERA}/chunk-000/file-000.mp4")


class TestRaw(SourceContract):
    module, parts = bridge, BOTH

    def make(self, folder):
        return forms.raw(folder, forms.trajectories())

    def damage(self, raw):
        member = f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj0/images0/im_3.jpg"
        clips.damage(raw / "raw/train-val/demos_8_17.zip", member, at=99)


class TestUnpacked(TestRaw):
    def make(self, folder):
        return forms.raw(folder, forms.trajectories(), name="")

    def damage(self, raw):
        path = f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj0/images0/im_3.jpg"
        (raw / "raw/train-val/unpacked" / path).write_bytes(b"\xff\xd8\xff")


# The same labels.


def opened(module, copy, folder, parts=BOTH, view=None):
    """The raw artifact of a copy, its episodes as prep opens them, and the labels of all."""
    raw, frames = forms.linked(module, copy, folder / "raw", parts), folder / "frames"
    frames.mkdir(parents=True)
    episodes, dropped = module.survey(raw)
    assert not dropped
    found = []
    for episode in episodes:
        one, pictures = module.frames(raw, episode, view or View(48), folder)
        assert len(list(pictures)) == one.length
        found.append(one)
    starts = np.cumsum([0, *(one.length for one in found)])
    table(
        [{**one.__dict__, "dataset_from_index": int(at)} for one, at in zip(found, starts, strict=False)]
    ).write_parquet(frames / "episodes.parquet")
    labels.extract(raw, frames, folder)
    return raw, found, pl.read_parquet(folder / "labels.parquet")


WRITERS = {
    "rlds": lambda folder, those: forms.rlds(folder, those[:3], those[3:]),
    "v2.0": lambda folder, those: forms.lerobot2(folder, those, version="v2.0", splits=SPLITS),
    "v2.1": lambda folder, those: forms.lerobot2(folder, those, splits=SPLITS, options=forms.AV1),
    "v3.0": lambda folder, those: forms.lerobot3(folder, those, splits=SPLITS),
    "v3.0-images": lambda folder, those: forms.lerobot3(folder, those, splits=SPLITS, kind="image"),
    "raw": lambda folder, those: forms.raw(folder, those),
    "raw-bare": lambda folder, those: forms.raw(folder, those, bare=True, old=True, protocol=2),
    "unpacked": lambda folder, those: forms.raw(folder, those, name="", protocol=5),
}


@pytest.fixture(scope="module")
def those():
    return forms.trajectories()


@pytest.fixture(scope="module")
def published(tmp_path_factory, those):
    folder = tmp_path_factory.mktemp("rlds")
    return opened(bridge, WRITERS["rlds"](folder / "copy", those), folder)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "rlds"])
def test_the_same_trajectories_give_the_same_labels_in_every_form(tmp_path, those, published, name):
    """To the last bit: states and actions are float32 in every form (raw pickles hold float64 of the same numbers).

    Frames are alike only: each form compresses them in its own way.
    """
    _, episodes, found = opened(bridge, WRITERS[name](tmp_path / "copy", those), tmp_path)
    raw, given, want = published
    assert [one.length for one in episodes] == [one.length for one in given]
    assert [(one.task, one.language, one.fps) for one in episodes] == [(g.task, g.language, g.fps) for g in given]
    for gap in (1, 3):
        for target in labels.TARGETS:
            a, b = labels.pairs(found, gap, target), labels.pairs(want, gap, target)
            assert a.rows.equals(b.rows)
            for array in ("y_NK", "state_NS", "motion_NS"):
                assert np.array_equal(getattr(a, array), getattr(b, array))
    for one, other in zip(episodes, given, strict=True):
        mine = list(bridge.frames(tmp_path / "raw", one, View(48), tmp_path)[1])
        theirs = list(bridge.frames(raw, other, View(48), tmp_path)[1])
        assert min(clips.psnr(clips.rgb(a), clips.rgb(b)) for a, b in zip(mine, theirs, strict=True)) > 25


def test_labels_of_the_published_form_are_what_they_were(published):
    assert labels.RELABELLED not in published[2].columns


@pytest.mark.parametrize("writer", [forms.lerobot2, forms.lerobot3])
def test_rules_that_were_applied_upstream_are_not_applied_again(tmp_path, those, published, writer):
    """The copy most people have: first and last step gone, actions relabelled, grippers binarised, states padded."""
    copy = writer(tmp_path / "copy", [forms.openvla(t) for t in those], splits=SPLITS)
    _, episodes, found = opened(bridge, copy, tmp_path)
    assert found[labels.RELABELLED].all()
    assert [one.length for one in episodes] == [len(t.state) - 2 for t in those]
    theirs, ours = labels.pairs(published[2], 2, "reached"), labels.pairs(found, 2, "reached")
    want, got = theirs.rows, ours.rows
    # Its frame 0 is frame 1 of the published form; the last pair of each trajectory went with the last step.
    last = want.with_columns(last=pl.col("frame_index").max().over("episode_index"))
    kept = (last["frame_index"] < last["last"]).to_numpy()
    assert got["frame_index"].to_list() == (want["frame_index"] - 1).to_numpy()[kept].tolist()
    assert got["frame_index"][0] == 0
    assert np.array_equal(ours.y_NK, theirs.y_NK[kept])
    assert np.array_equal(ours.state_NS, theirs.state_NS[kept])
    with pytest.raises(ConfigError, match="relabelled as the motion that happened"):
        labels.pairs(found, 1, "commanded")


def test_a_relabelled_copy_that_does_not_say_so_is_refused(tmp_path, those):
    moved = [forms.openvla(t) for t in those]
    for one in moved:
        one.state = np.delete(one.state, 6, axis=1)
    with pytest.raises(IntegrityError, match=r"copy/.*its actions are the differences of its states, and nothing says"):
        opened(bridge, forms.lerobot2(tmp_path / "copy", moved, splits=SPLITS), tmp_path)


def test_a_padded_copy_that_was_not_relabelled_is_refused(tmp_path, those):
    padded = [forms.Trajectory(np.insert(t.state, 6, 0, axis=1), t.action, t.frames) for t in those]
    with pytest.raises(IntegrityError, match=r"is padded as by OpenVLA's transform, but its actions are not"):
        opened(bridge, forms.lerobot2(tmp_path / "copy", padded, splits=SPLITS), tmp_path)


@pytest.mark.parametrize("name", ["rlds", "v2.0", "v3.0", "raw"])
def test_labels_follow_the_stride_of_the_store(tmp_path, those, name):
    """At 2.5 Hz: state at the kept frame, motions summed up to the next, the gripper's last command between."""
    _, episodes, found = opened(bridge, WRITERS[name](tmp_path / "copy", those), tmp_path, view=View(48, fps=2.5))
    assert {(one.stride, one.fps) for one in episodes} == {(2, 2.5)}
    for one, t in zip(episodes, those, strict=True):
        mine = found.filter(pl.col("episode_index") == one.episode_index)
        assert mine["frame_index"].to_list() == list(range(one.length))
        assert np.array_equal(mine[:, 2:9].to_numpy(), t.state[::2])
        padded = np.concatenate([t.action, np.zeros((1, 7), np.float32)]) if len(t.action) % 2 else t.action
        summed = padded[:, :6].reshape(-1, 2, 6).astype(np.float64).sum(1)
        np.testing.assert_allclose(mine[:, 9:15].to_numpy(), summed, rtol=1e-6, atol=1e-7)
        gripper = labels.binarised(t.action[:, 6])
        ends = [min(2 * k + 1, len(gripper) - 1) for k in range(one.length)]
        assert mine[:, 15].to_list() == gripper[ends].tolist()
    y = labels.pairs(found, 1, "commanded").y_NK
    first = those[0].action[2:4, :6].astype(np.float64).sum(0)  # pairs begin at frame 1 of the store: step 2
    np.testing.assert_allclose(y[0, :6], first, rtol=1e-5, atol=1e-7)


# Parts and places.


def test_a_split_that_a_copy_does_not_have_is_named(tmp_path, those):
    copy = forms.lerobot2(tmp_path, those)
    assert list(bridge.local_files(copy, ("train",))) == ["lerobot/train"]
    tested = forms.lerobot2(tmp_path / "tested", those, splits={"train": "0:2", "test": "2:4"})
    with pytest.raises(NotFoundError, match=r"names test, train; try --part train$"):  # test cannot be typed
        bridge.local_files(tested, BOTH)
    alone = forms.lerobot2(tmp_path / "alone", those, splits={"test": "0:4"})
    with pytest.raises(NotFoundError, match=r"names test; its frames are: avrl fetch lerobot$"):
        bridge.local_files(alone, BOTH)
    with pytest.raises(NotFoundError, match=r"has no val episodes: its meta/info.json names train; try --part train"):
        bridge.local_files(copy, BOTH)


def test_only_the_splits_asked_for_are_listed(tmp_path, those):
    for name, writer in (("a", WRITERS["v2.0"]), ("b", WRITERS["v3.0"]), ("c", WRITERS["raw"])):
        copy = writer(tmp_path / name, those)
        each = [bridge.survey(forms.linked(bridge, copy, tmp_path / f"{name}-{part}", (part,)))[0] for part in BOTH]
        assert [{one.split for one in some} <= {part} for some, part in zip(each, BOTH, strict=True)] == [True, True]
        assert sum(map(len, each)) == len(those)


def test_the_split_of_the_raw_form_hangs_on_the_trajectory_alone(tmp_path):
    stems = [f"{forms.TASK}/2022-01-02_03-04-05/raw/traj_group0/traj{k}" for k in range(2000)]
    share = np.mean([bridge_raw._split(one) == "val" for one in stems])
    assert 0.07 < share < 0.13
    assert [bridge_raw._split(one) for one in stems] == [bridge_raw._split(f"other/{one}") for one in stems]


# What can be wrong with numbers.

TURNED = ["gripper", "x", "y", "z", "roll", "pitch", "yaw"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "c", "d", "e", "f", "g"], r"observation.state is \(a, b, c, d, e, f, g\), not x, y, z"),
        (["x", "y", "z", "roll", "pitch", "yaw", "yaw"], "not x, y, z, roll, pitch, yaw, gripper"),
        ([[["gripper", "x", "y", "z", "roll", "pitch", "yaw"]]], "not x, y, z"),  # nested too deep
        ({"arm": {"x": 0, "y": 1}, "hand": ["gripper"]}, "not x, y, z"),
        ({"gripper": 1, "x": 1, "y": 2, "z": 3, "roll": 4, "pitch": 5, "yaw": 6}, "not x, y, z"),  # two in one place
        ("x y z roll pitch yaw gripper", "not x, y, z"),
        (["motor_0", "motor_1"], "not x, y, z"),
        ([f"motor_{6 - k}" for k in range(7)], "not x, y, z"),  # in another order than their places
    ],
)
def test_numbers_of_unknown_meaning_are_refused(tmp_path, those, names, words):
    raw = forms.linked(bridge, forms.lerobot2(tmp_path / "copy", those, names=names), tmp_path / "raw", ("train",))
    with pytest.raises(IntegrityError, match=words):
        bridge.frames(raw, bridge.survey(raw)[0][0], View(16), tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        TURNED,
        [TURNED],
        dict(zip(reversed(TURNED), reversed(range(7)), strict=True)),
        {"hand": ["gripper"], "arm": TURNED[1:]},
        [TURNED[:1], TURNED[1:]],
        [f"motor_{k}" for k in range(7)],
        {"axes": [f"axis_{k}" for k in range(7)]},
        ["state"],
        None,
    ],
    ids=str,
)
def test_numbers_are_found_by_name_or_by_place(tmp_path, those, names):
    turned = "gripper" in str(names)
    mine = [forms.Trajectory(np.roll(t.state, turned, 1), np.roll(t.action, turned, 1), t.frames) for t in those]
    copy = forms.lerobot2(tmp_path / "copy", mine, names=names)
    raw = forms.linked(bridge, copy, tmp_path / "raw", ("train",))
    state, action = bridge.robot(raw, bridge.survey(raw)[0][0])
    assert np.array_equal(state, those[0].state)
    assert np.array_equal(action, those[0].action)


def test_columns_that_are_not_what_is_promised_are_refused(tmp_path, those):
    copy = forms.lerobot2(tmp_path / "copy", those)
    path = copy / "data/chunk-000/episode_000000.parquet"
    raw = forms.linked(bridge, copy, tmp_path / "raw", ("train",))
    first, second = bridge.survey(raw)[0][:2]
    clean = pl.read_parquet(path)
    n = len(clean)
    for column, values in (
        ("action", [[0.0] * 6] * n),
        ("action", [[0.0] * 7] * (n - 1) + [[0.0] * 6]),
        ("action", [[float("nan")] * 7] * n),
        ("observation.state", ["x"] * n),
    ):
        from avrl import lerobot

        lerobot._numbers.cache_clear()
        clean.with_columns(pl.Series(column, values, strict=False)).write_parquet(path)
        with pytest.raises(IntegrityError, match=f"{path.name}.*{column}.*; fetch the data set again"):
            bridge.frames(raw, first, View(16), tmp_path)
        assert bridge.frames(raw, second, View(16), tmp_path)[0].length == len(those[1].state)


# Raw: dates, numbers, odd items.


def test_old_data_lags_by_a_step(tmp_path, those):
    copy = forms.raw(tmp_path / "copy", those, date="2021-07-22_23-59-59")
    raw, episodes, found = opened(bridge, copy, tmp_path)
    for one, t in zip(episodes, those, strict=True):
        mine = found.filter(pl.col("episode_index") == one.episode_index)
        assert one.length == len(t.state) - 1
        assert np.array_equal(mine[:, 2:9].to_numpy(), t.state[1:])
        assert np.array_equal(mine[:-1, 9:16].to_numpy(), t.action[:-2])
        assert mine[-1, 9:16].to_numpy().ravel().tolist() == [0] * 7
    pictures = list(bridge.frames(raw, episodes[0], View(48), tmp_path)[1])
    assert clips.psnr(pictures[0], those[0].frames[1]) > clips.psnr(pictures[0], those[0].frames[0])


def test_items_that_are_known_to_be_bad_are_listed_and_the_others_are_read(tmp_path, those):
    inside = f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0"
    all_of = forms.files(those[0])
    more = {
        f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj7.tar": b"x",
        f"raw/{forms.TASK}/lmdb/{forms.DATE}/raw/traj_group0/traj0/obs_dict.pkl": b"x",
        f"raw/{forms.TASK}/{forms.DATE}/config.json": b"{}",
        f"raw/{forms.TASK}/nodate/raw/traj_group0/traj0/obs_dict.pkl": b"x",
        f"raw/{forms.TASK}/nodate/raw/traj_group0/traj0/policy_out.pkl": b"x",
        f"raw/{forms.TASK}/nodate/raw/traj_group0/traj0/images0/im_0.jpg": b"x",
    }
    more |= {f"{inside}/traj24/{n}": data for n, data in all_of.items() if not n.endswith(".pkl")}
    more |= {f"{inside}/traj25/{n}": data for n, data in all_of.items() if n != "policy_out.pkl"}
    more |= {f"{inside}/traj26/{n}": data for n, data in all_of.items() if "images0" not in n}
    three = ("images0/im_0.jpg", "images0/im_1.jpg", "images0/im_2.jpg")
    more |= {f"{inside}/traj18/{n}": data for n, data in all_of.items() if "images0" not in n or n in three}
    raw = forms.linked(bridge, forms.raw(tmp_path / "copy", those, more=more), tmp_path / "raw", BOTH)
    episodes, dropped = bridge.survey(raw)
    assert [one.episode_id.split("/")[-1] for one in episodes] == [f"traj{k}" for k in (0, 1, 2, 3, 18)]
    reasons = {one.episode_id.split("/")[-1]: one.reason for one in dropped}
    assert reasons == {
        "traj7.tar": "is a copy of the trajectory beside it",
        "traj24": "has no obs_dict.pkl",
        "traj25": "has no policy_out.pkl",
        "traj26": "has no pictures",
        "traj0": "has no date in its path, so whether its camera lagged is not known",
    }
    with pytest.raises(MismatchError, match=r"traj18: 3 pictures, 12 states, 11 actions"):
        bridge.frames(raw, episodes[4], View(16), tmp_path)


def test_trajectories_and_pictures_are_in_the_order_of_their_numbers(tmp_path):
    many = forms.trajectories((12,) * 11, size=16)
    raw = forms.linked(bridge, forms.raw(tmp_path / "copy", many), tmp_path / "raw", BOTH)
    episodes, _ = bridge.survey(raw)
    assert [one.episode_id.split("/")[-1] for one in episodes] == [f"traj{k}" for k in range(11)]
    pictures = list(bridge.frames(raw, episodes[10], View(16), tmp_path)[1])
    blue = [float(one[..., 2].mean()) for one in pictures]
    assert blue == sorted(blue)


def test_an_unpacked_folder_is_found_however_deep_it_lies(tmp_path):
    for deep in (1, bridge_raw.DEEPEST):
        folder = tmp_path / str(deep)
        (folder.joinpath(*"abcdefgh"[:deep]) / "raw/traj_group0/traj0").mkdir(parents=True)
        assert bridge_raw.local_files(folder, BOTH)


def test_both_zips_are_read_whatever_their_depth(tmp_path, those):
    forms.raw(tmp_path / "copy", those[:2])
    scripted = "scripted_raw/sweep_12-03/2022-12-03_10-00-00/raw/traj_group0"
    more = {f"{scripted}/traj{k}/{n}": data for k in (0, 1) for n, data in forms.files(those[2]).items()}
    forms.raw(tmp_path / "copy", [], more=more, name="scripted_6_18.zip")
    raw = forms.linked(bridge, tmp_path / "copy", tmp_path / "raw", BOTH)
    episodes, dropped = bridge.survey(raw)
    assert not dropped
    assert [one.file.split("/")[-1] for one in episodes] == ["demos_8_17.zip"] * 2 + ["scripted_6_18.zip"] * 2
    for one, t in zip(episodes, (*those[:2], those[2], those[2]), strict=True):
        assert np.array_equal(bridge.robot(raw, one)[0], t.state)


@pytest.mark.parametrize("how", ["cut", "hostile"])
def test_a_zip_that_is_cut_or_hostile_is_refused_as_a_whole(tmp_path, those, how):
    copy = forms.raw(tmp_path / "copy", those[:1], more={"../out": b"x"} if how == "hostile" else None)
    path = copy / "demos_8_17.zip"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    raw = forms.linked(bridge, copy, tmp_path / "raw", BOTH)
    with pytest.raises(IntegrityError, match="cut short or damaged" if how == "cut" else "leaves its folder"):
        bridge.survey(raw)


@pytest.mark.parametrize("name", ["demos_8_17.zip", ""])
def test_a_copy_that_was_moved_is_named(tmp_path, those, name):
    raw = forms.linked(bridge, forms.raw(tmp_path / "copy", those[:1], name=name), tmp_path / "raw", BOTH)
    (tmp_path / "copy").rename(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match=r"copy.* is gone, or was moved; fetch --from DIR again"):
        bridge.survey(raw)


def test_annotators_confidence_is_no_instruction(tmp_path, those):
    text = b"confidence: 3\n\n  put caf\xc3\xa9 down \nconfidence: 1\nother words\n"
    inside = f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj0/lang.txt"
    for name, more, want in (("a", {inside: text}, "put café down"), ("b", {inside: b""}, "")):
        raw = forms.linked(bridge, forms.raw(tmp_path / name, those, more=more), tmp_path / f"raw{name}", BOTH)
        one, _ = bridge.frames(raw, bridge.survey(raw)[0][0], View(16), tmp_path)
        assert (one.language, one.task) == (want, want or "(none)")


# An array whose bytes never come.
HOLLOW = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("obs_dict.pkl", b"", "is no pickle of plain numbers"),
        ("obs_dict.pkl", b"cos\nsystem\n(S'false'\ntR.", "it asks for os.system"),
        ("obs_dict.pkl", "state", "full_state is not two or more vectors of 7 finite numbers"),
        ("policy_out.pkl", [{"nothing": 1}] * 11, "actions is not two or more vectors of 7 finite numbers"),
        ("policy_out.pkl", [[0.0] * 7] * 9, "12 pictures, 12 states, 9 actions"),
        ("policy_out.pkl", [[0.0] * 7] * 100_001, "not two or more vectors of 7 finite"),
        ("policy_out.pkl", [[float("inf")] * 7] * 11, "not two or more vectors of 7 finite"),
        ("policy_out.pkl", [[1e300] * 7] * 11, "not two or more vectors of 7 finite"),  # not as float32
        ("policy_out.pkl", [[10**400] * 7] * 11, "not two or more vectors of 7 finite"),
        ("policy_out.pkl", HOLLOW + b".", "not two or more vectors of 7 finite"),
        ("policy_out.pkl", b"](" + HOLLOW * 11 + b"e.", "not two or more vectors of 7 finite"),
        ("policy_out.pkl", b"\x80\x04" + b"\x8f" * 5 * 2**20 + b".", "4194304"),
    ],
)
def test_pickles_that_are_damaged_or_hold_other_things(tmp_path, those, name, data, words):
    import pickle

    inside = f"raw/{forms.TASK}/{forms.DATE}/raw/traj_group0/traj0/{name}"
    more = {inside: data if isinstance(data, bytes) else pickle.dumps(data)}
    raw = forms.linked(bridge, forms.raw(tmp_path / "copy", those, more=more), tmp_path / "raw", BOTH)
    first, second = bridge.survey(raw)[0][:2]
    with pytest.raises(IntegrityError, match=words) as caught:
        bridge.frames(raw, first, View(16), tmp_path)
    assert "traj0" in caught.value.cause
    assert len(list(bridge.frames(raw, second, View(16), tmp_path)[1])) == len(those[1].state)
