"""`avrl.frames`: every frame of every good episode, in its place, whatever is damaged and whenever it is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import av
import clips
import numpy as np
import polars as pl
import pytest
import zarr
from PIL import Image

from avrl import frames, packing, store
from avrl.artifact import SCRATCH, digest_of, hash_files
from avrl.cache import Cache
from avrl.episodes import View
from avrl.errors import DecodeError, IntegrityError
from avrl.sources import bridge, bridge_rlds, egodex
from avrl.stage import run
from avrl.stages import fetch
from avrl.store import FrameStore

SIZE = 32
COLUMNS = [
    *("episode_index", "episode_id", "task", "language", "split", "length", "fps", "file", "member", "offset"),
    *("bytes", "stride", "note"),
    *("dataset_from_index", "dataset_to_index"),
]


def prepare(name, raw, out, *, drop=False, workers=1, size=SIZE):
    job = frames.Job(name, raw, out / SCRATCH, View(size), 90, drop)
    return frames.prepare(job, out, workers=workers)


def digest(out):
    """What the artifact's digest would be."""
    return digest_of([file for file in hash_files(out) if not file.path.startswith(SCRATCH)])


def rows(out):
    return pl.read_parquet(out / "episodes.parquet")


def dropped(out):
    return dict(pl.read_parquet(out / "dropped.parquet")[["episode_id", "reason"]].iter_rows())


def fit(image, size):
    """The central square of a picture, by Pillow."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX, box))


def is_a_good_store(out, shard):
    """Episodes lie end to end, none across two shards unless it is longer than one, and every row has its frame."""
    placed = rows(out)
    at = 0
    for one in placed.iter_rows(named=True):
        first, last = one["dataset_from_index"], one["dataset_to_index"] - 1
        assert last - first + 1 == one["length"]
        assert first == at or first == -(-at // shard) * shard
        assert first // shard == last // shard or (first % shard == 0 and one["length"] > shard)
        at = last + 1
    index = np.concatenate([np.arange(a, b) for a, b in placed[["dataset_from_index", "dataset_to_index"]].iter_rows()])
    got = FrameStore(out).read(index)
    array = zarr.open_array(out / "frames.zarr" / "frames", mode="r")
    assert array.shape[0] % shard == 0
    assert array.shape[0] >= at > array.shape[0] - shard
    assert all(np.array_equal(array[row], frame) for row, frame in zip(index[::7].tolist(), got[::7], strict=True))
    return got


# Two sources, whole.


@pytest.fixture(scope="module")
def ego(tmp_path_factory):
    """Two tasks of three episodes of the sample, in shards that hold two episodes each."""
    folder = tmp_path_factory.mktemp("ego")
    raw = clips.egodex(folder / "raw", clips.sample_egodex(), part="sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD", 130)
        facts = prepare("egodex", raw, folder / "out", workers=2, size=72)
    return raw, folder / "out", facts


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robot")
    raw = clips.bridge(folder / "raw", clips.sample_bridge("train", 5), clips.sample_bridge("val", 2), shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD", 40)
        facts = prepare("bridge", raw, folder / "out", workers=2, size=64)
    return raw, folder / "out", facts


def test_egodex_counts_and_columns(ego):
    raw, out, facts = ego
    placed = rows(out)
    with zipfile.ZipFile(raw / "sample.zip") as archive:
        lengths = {
            name.removesuffix(".mp4"): count(archive.read(name)) for name in archive.namelist() if name.endswith(".mp4")
        }
    assert placed.columns == COLUMNS
    assert dict(placed[["episode_id", "length"]].iter_rows()) == lengths
    assert placed["episode_index"].to_list() == list(range(6))
    assert placed["fps"].to_list() == [30.0] * 6
    assert placed["task"].to_list() == [one.split("/")[1] for one in placed["episode_id"]]
    assert placed["language"].str.len_chars().min() > 5
    assert dropped(out) == {}
    assert facts == {
        "source": "egodex",
        "episodes": 6,
        "frames": sum(lengths.values()),
        "dropped": 0,
        "dropped_by_kind": {},
        "noted": {},
        "shards": 3,
        "tasks": 2,
        "fps": [30.0],
        "episodes_by_split": {"train": 6},
    }
    assert len(FrameStore(out)) == facts["frames"]


def count(clip):
    with av.open(io.BytesIO(clip)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_egodex_rows_point_to_the_right_frames(ego):
    raw, out, _ = ego
    is_a_good_store(out, 130)
    reader = FrameStore(out)
    with zipfile.ZipFile(raw / "sample.zip") as archive:
        for one in rows(out).iter_rows(named=True):
            with av.open(io.BytesIO(archive.read(one["member"]))) as container:
                want = [fit(frame.to_image(), 72) for frame in container.decode(video=0)]
            got = reader.read(np.arange(one["dataset_from_index"], one["dataset_to_index"]))
            assert len(got) == len(want)
            assert min(clips.psnr(a, b) for a, b in zip(got, want, strict=True)) > 30


def test_bridge_counts_and_columns(robot):
    _, out, facts = robot
    placed = rows(out)
    assert placed.columns == COLUMNS
    assert len(placed) == facts["episodes"] == 7
    assert placed["split"].to_list() == ["train"] * 5 + ["val"] * 2
    assert facts["episodes_by_split"] == {"train": 5, "val": 2}
    assert facts["fps"] == [5.0]
    assert facts["frames"] == placed["length"].sum() == len(FrameStore(out))
    assert placed["task"].str.len_chars().min() > 0
    assert placed["offset"].to_list()[:2] == [0, len(clips.sample_bridge("train", 1)[0])]


def test_bridge_rows_point_to_the_right_frames(robot):
    raw, out, _ = robot
    is_a_good_store(out, 40)
    reader = FrameStore(out)
    for one in rows(out).iter_rows(named=True):
        episode = bridge.survey(raw)[0][one["episode_index"]]
        images = bridge_rlds.steps(raw, episode)["steps/observation/image_0"]
        got = reader.read(np.arange(one["dataset_from_index"], one["dataset_to_index"]))
        for frame, jpeg in zip(got, images, strict=True):
            assert clips.psnr(frame, fit(Image.open(io.BytesIO(jpeg)), 64)) > 28


def test_an_episode_longer_than_a_shard(tmp_path, monkeypatch):
    names = {"fold/0": 5, "fold/1": 40, "fold/2": 3, "fold/3": 16, "fold/4": 33, "fold/5": 1}
    raw = clips.egodex(tmp_path / "raw", {name: clips.episode(n, seed=i) for i, (name, n) in enumerate(names.items())})
    prepare("egodex", raw, tmp_path / "whole")
    monkeypatch.setattr(store, "SHARD", 16)
    facts = prepare("egodex", raw, tmp_path / "cut")
    assert rows(tmp_path / "cut")["length"].to_list() == list(names.values())
    assert rows(tmp_path / "cut")["dataset_from_index"].to_list() == [0, 16, 56, 64, 80, 113]
    assert facts["shards"] == 8
    got = is_a_good_store(tmp_path / "cut", 16)
    assert np.array_equal(got, FrameStore(tmp_path / "whole").read(np.arange(98)))


def test_the_digest_depends_neither_on_workers_nor_on_the_place(ego, tmp_path, monkeypatch):
    raw, out, facts = ego
    monkeypatch.setattr(store, "SHARD", 130)
    shutil.copytree(raw, tmp_path / "elsewhere")
    assert prepare("egodex", tmp_path / "elsewhere", tmp_path / "out", workers=1, size=72) == facts
    assert digest(tmp_path / "out") == digest(out)


# Hostile input.


def without(pose, name):
    """The pose file without a group."""
    import h5py

    buffer = io.BytesIO(pose)
    with h5py.File(buffer, "a") as file:
        del file[name]
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hostile_zip(tmp_path_factory):
    """Name -> (clip, poses), and the reason that its drop must give; no reason: it is good."""
    clip, pose = clips.episode(20)
    middle = sum(clips.payload(clip)) // 2
    episodes = {
        "a/0": (clip, pose, ""),
        "a/1": (clip[: len(clip) // 2], pose, r"frame 0 does not decode: Invalid data found"),
        "a/2": (clips.remux(clip, "-movflags +faststart")[:-2000], pose, r"frame \d+ does not decode: \w+"),
        "a/3": (clips.flipped(clip, middle, 7), pose, r"frame \d+ does not decode: \w+"),
        "a/4": (clip, clips.poses(20, confidences=False), ""),
        "a/5": (clip, None, "has no .hdf5 beside it"),
        "a/6": (None, pose, "has no .mp4 beside it"),
        "a/7": (clip, pose[:1000], r"a/7.hdf5 is no EgoDex pose file: .*truncated file"),
        "a/8": (clip, b"not an HDF5 file", r"a/8.hdf5 is no EgoDex pose file: .*signature not found"),
        "a/9": (clip, b"", r"a/9.hdf5 is no EgoDex pose file"),
        "b/0": (clip, without(pose, "transforms/camera"), r"b/0.hdf5 is no EgoDex pose file: .*camera"),
        "b/1": (clip, clips.poses(21), r"b/1.mp4: the clip has 20 frames, its hdf5 has 21 poses"),
        "b/2": (clip, clips.poses(19), r"b/2.mp4: the clip has 20 frames, its hdf5 has 19 poses"),
        "b/3": (*clips.episode(1), ""),
        "b/4": (b"", pose, "frame 0 does not decode: Invalid data"),
        "b/5": (b"\0", pose, "frame 0 does not decode: Invalid data"),
        "b/6": (b"once upon a time", pose, "frame 0 does not decode: Invalid data"),
        "b/7": (clips.sound(), pose, "frame 0 does not decode: no video stream"),
        "b/8": (clip, pose, r"b/8.mp4 is damaged \(Bad CRC-32"),
        "b/9": (clip, pose, r"b/9.hdf5 is damaged \(Bad CRC-32"),
        "c/x": (clip, pose, "is not <part>/<task>/<n>"),
        "c/1": (clip, pose, ""),
    }
    raw = clips.egodex(tmp_path_factory.mktemp("hostile"), {name: one[:2] for name, one in episodes.items()})
    clips.damage(raw / "part1.zip", "part1/b/8.mp4", 999, 3)
    clips.damage(raw / "part1.zip", "part1/b/9.hdf5", 999, 3)
    return raw, {f"part1/{name}": reason for name, (_, _, reason) in episodes.items()}


def test_hostile_episodes_are_dropped_by_name_and_the_good_ones_finish(hostile_zip, tmp_path):
    raw, reasons = hostile_zip
    facts = prepare("egodex", raw, tmp_path / "out", drop=True, workers=2)
    good = [name for name, reason in reasons.items() if not reason]
    assert rows(tmp_path / "out")["episode_id"].to_list() == good
    assert rows(tmp_path / "out")["length"].to_list() == [20, 20, 1, 20]
    found = dropped(tmp_path / "out")
    assert sorted(found) == sorted(set(reasons) - set(good))
    assert facts["dropped"] == len(found) == 18
    for name, words in found.items():
        pytest.fail(f"{name}: {words}") if not matches(reasons[name], words) else None
        assert "scratch" not in words
        assert str(raw) not in words
    is_a_good_store(tmp_path / "out", store.SHARD)
    want = FrameStore(tmp_path / "out").read(np.arange(20))
    assert np.array_equal(FrameStore(tmp_path / "out").read(np.arange(20, 40)), want)


def matches(pattern, words):
    import re

    return re.search(pattern, words)


def test_what_was_dropped_enters_the_digest_in_words_that_stay(hostile_zip, tmp_path):
    raw, _ = hostile_zip
    shutil.copytree(raw, tmp_path / "elsewhere")
    digests = set()
    for number, place in enumerate((raw, tmp_path / "elsewhere")):
        prepare("egodex", place, tmp_path / f"out{number}", drop=True, workers=1 + number)
        digests.add(digest(tmp_path / f"out{number}"))
    assert len(digests) == 1


def test_each_hostile_episode_is_an_error_of_its_own(hostile_zip, tmp_path):
    raw, reasons = hostile_zip
    episodes, unusable = egodex.survey(raw)
    assert {one.episode_id for one in unusable} == {"part1/a/5", "part1/a/6", "part1/c/x"}
    job = frames.Job("egodex", raw, tmp_path, View(SIZE), 90, drop=False)
    for one in episodes:
        if not reasons[one.episode_id]:
            frames.encode_episode(job, one)
            continue
        with pytest.raises(IntegrityError, match=reasons[one.episode_id]) as caught:
            frames.encode_episode(job, one)
        assert one.episode_id in caught.value.cause
        assert caught.value.next_step
        assert not list(tmp_path.glob(f"{one.episode_index:07d}*"))


def test_without_on_error_drop_the_first_damage_ends_the_run(tmp_path):
    clip, pose = clips.episode(6)
    raw = clips.egodex(tmp_path / "raw", {"a/0": (clip, pose), "a/1": (clip[:-900], pose), "a/2": (clip, pose)})
    with pytest.raises(DecodeError, match=r"part1.zip:part1/a/1.mp4: frame 0 does not decode"):
        prepare("egodex", raw, tmp_path / "out")
    assert not (tmp_path / "out" / "episodes.parquet").exists()
    raw = clips.egodex(tmp_path / "alone", {"a/0": (clip, pose), "a/1": (clip, None), "a/2": (clip, None)})
    with pytest.raises(IntegrityError, match=r"part1/a/1 has no .hdf5 beside it \(and 1 more\); .*--on-error drop"):
        prepare("egodex", raw, tmp_path / "out2")


@pytest.mark.parametrize("drop", [False, True])
def test_a_zip_that_leaves_its_folder_is_refused_as_a_whole(tmp_path, drop):
    raw = clips.egodex(tmp_path / "raw", {"a/0": clips.episode(3)})
    with zipfile.ZipFile(raw / "part1.zip", "a") as archive:
        archive.writestr(zipfile.ZipInfo("../x"), b"out")
    with pytest.raises(IntegrityError, match=r"part1.zip: member '../x' has a name that leaves its folder"):
        prepare("egodex", raw, tmp_path / "out", drop=drop)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("drop", [False, True])
def test_nothing_usable_is_an_error(tmp_path, drop):
    raw = clips.egodex(tmp_path / "raw", {"a/0": (b"", clips.poses(3))})
    with pytest.raises(IntegrityError, match="does not decode" if not drop else "has no usable episode"):
        prepare("egodex", raw, tmp_path / "out", drop=drop)
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="has no usable episode"):
        prepare("bridge", tmp_path / "empty", tmp_path / "out2", drop=drop)


def example(**changed):
    return clips.framed(clips.example({**clips.still(4), **changed}))


@pytest.fixture(scope="module")
def hostile_shards(tmp_path_factory):
    """Three shards: bad records among good ones, a bad length, a cut tail; and the drops that must come of them."""
    images = clips.jpegs(clips.ramps(4, 32, 32))
    good = example()
    records = [
        good,
        clips.flipped(good, 40, 3),
        clips.framed(b"this is no tf.Example"),
        example(**{"steps/observation/image_0": [*images[:3], images[3][:150]]}),
        example(**{"steps/observation/state": np.zeros(27)}),
        example(**{"steps/observation/image_0": []}),
        good,
    ]
    raw = clips.bridge(tmp_path_factory.mktemp("shards"), records, [good, good])
    place = raw / clips.BRIDGE
    name = "bridge_dataset-train.tfrecord-0000{}-of-00003"
    (place / "bridge_dataset-train.tfrecord-00000-of-00001").rename(place / name.format(0))
    (place / name.format(1)).write_bytes(good + clips.flipped(good, 3) + good)
    (place / name.format(2)).write_bytes(good + good + good[:-1])
    reasons = {
        name.format(0) + "#1": r"the record at byte \d+ is damaged \(crc32c\)",
        name.format(0) + "#2": r"is no tf.Example: ",
        name.format(0) + "#3": r"frame 3 does not decode: ",
        name.format(0) + "#4": r"steps/observation/state is not 4 x 7 finite floats",
        name.format(0) + "#5": r"has no steps/observation/image_0",
        name.format(1) + " from record 1 on": r"the length at byte \d+ is damaged \(crc32c\)",
        name.format(2) + " from record 2 on": r"the record at byte \d+ is cut off",
    }
    return raw, reasons


def test_hostile_records_are_dropped_by_name_and_the_good_ones_finish(hostile_shards, tmp_path):
    raw, reasons = hostile_shards
    facts = prepare("bridge", raw, tmp_path / "out", drop=True, workers=2)
    found = dropped(tmp_path / "out")
    assert sorted(found) == sorted(reasons)
    for name, words in found.items():
        assert matches(reasons[name], words), (name, words)
        assert name.split("#")[0].split(" ")[0] in words
        assert str(raw) not in words
    placed = rows(tmp_path / "out")
    assert [one.split("-")[1] + "-" + one.split("-")[-1] for one in placed["episode_id"]] == [
        "train.tfrecord-00003#0",
        "train.tfrecord-00003#6",
        "train.tfrecord-00003#0",
        "train.tfrecord-00003#0",
        "train.tfrecord-00003#1",
        "val.tfrecord-00001#0",
        "val.tfrecord-00001#1",
    ]
    assert placed["episode_index"].to_list() == [0, 6, 7, 8, 9, 10, 11]  # stable under drops: labels meet on it
    assert (facts["episodes"], facts["frames"], facts["dropped"]) == (7, 28, 7)
    is_a_good_store(tmp_path / "out", store.SHARD)


def test_each_hostile_record_is_an_error_of_its_own(hostile_shards, tmp_path):
    raw, reasons = hostile_shards
    with pytest.raises(IntegrityError, match=r"from record 1 on .*the length at byte \d+ is damaged .*\(and 1 more\)"):
        prepare("bridge", raw, tmp_path / "out")
    job = frames.Job("bridge", raw, tmp_path, View(SIZE), 90, drop=False)
    for one in bridge.survey(raw)[0]:
        if one.episode_id in reasons:
            with pytest.raises(IntegrityError, match=reasons[one.episode_id]) as caught:
                frames.encode_episode(job, one)
            assert one.file in caught.value.cause
        else:
            frames.encode_episode(job, one)


# Interrupted.


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD", 25)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six short episodes, one of them damaged, one longer than a shard of 25."""
    episodes = {f"a/{n}": clips.episode(length, seed=n) for n, length in enumerate((10, 12, 9, 30, 11, 8))}
    episodes["a/2"] = episodes["a/2"][0][:-700], episodes["a/2"][1]
    return clips.egodex(tmp_path_factory.mktemp("six"), episodes)


@pytest.mark.usefixtures("small_shards")
def test_every_half_finished_state_leads_to_the_same_artifact(six, tmp_path):
    """What a kill may leave: any number of finished files, half-written ones under temporary names, lost records."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    facts = prepare("egodex", six, whole, drop=True)
    want, rng = digest(whole), random.Random(6)
    job = frames.Job("egodex", six, tmp_path / "blobs", View(SIZE), 90, drop=True)
    job.scratch.mkdir()
    for one in egodex.survey(six)[0]:
        frames.encode_episode(job, one)
    blobs = sorted(job.scratch.glob("000*"))
    records = sorted((whole / SCRATCH).glob("shards-*.json"))
    for trial in range(8):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        if trial:  # the first one lacks nothing but the rename of its folder
            (out / "episodes.parquet").unlink()
            kept = rng.randrange(len(records) + 1)
            for one in records[kept : kept + 1]:  # a later one may still be there
                (out / SCRATCH / one.name).unlink()
            shards = json.loads(records[kept - 1].read_bytes())["shards"] if kept else 0
            # A shard may be missing only where no record vouches for it: it is synced before.
            spare = [store.shard_path(out / "frames.zarr", number) for number in range(shards, facts["shards"])]
            for path in [*spare, *out.rglob("zarr.json"), out / "dropped.parquet"]:
                if rng.random() < 0.5:
                    path.unlink()
            for path in blobs:
                if path.suffix == ".blob" or (path.with_suffix(".blob").exists() and rng.random() < 0.5):
                    shutil.copy(path, out / SCRATCH)
            cut = out / SCRATCH / f"{rng.randrange(6):07d}.json"
            cut.write_bytes(b"")  # a power cut may empty what was not synced
            (out / SCRATCH / f"{cut.stem}.json.99.tmp").write_bytes(b"{")
            if shards < facts["shards"]:
                store.shard_path(out / "frames.zarr", shards).with_name("0.tmp").write_bytes(b"half")
        assert prepare("egodex", six, out, drop=True) == facts
        assert digest(out) == want


@pytest.mark.usefixtures("small_shards")
def test_a_lost_shard_record_is_not_bridged_by_a_later_one(six, tmp_path):
    """Shard records are a chain: removing scratch may be cut short, in any order."""
    prepare("egodex", six, tmp_path / "out", drop=True)
    want = digest(tmp_path / "out")
    records = sorted((tmp_path / "out" / SCRATCH).glob("shards-*.json"))
    assert len(records) >= 2
    records[0].unlink()
    (tmp_path / "out" / "episodes.parquet").unlink()
    prepare("egodex", six, tmp_path / "out", drop=True)
    assert digest(tmp_path / "out") == want


@pytest.mark.usefixtures("small_shards")
def test_a_damaged_blob_is_never_packed(six, tmp_path):
    out = tmp_path / "out"
    job = frames.Job("egodex", six, out / SCRATCH, View(SIZE), 90, drop=True)
    job.scratch.mkdir(parents=True)
    frames.encode_episode(job, egodex.survey(six)[0][0])
    blob = out / SCRATCH / "0000000.blob"
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(IntegrityError, match=r"0000000.blob is damaged"):
        prepare("egodex", six, out, drop=True)


# Killed.

ENTRY = "from avrl import store; store.SHARD = 120; from avrl_cli.app import main; main()"


class Prep:
    """Real ``avrl prep`` processes in a session of their own, on one raw artifact of twelve clips."""

    def __init__(self, folder):
        self.cache, copy = Cache(folder / "cache"), folder / "copy"
        self.zipped = clips.egodex(copy, clips.sample_egodex(3, 4), part="sample") / "sample.zip"
        self.whole = self.zipped.read_bytes()
        config = fetch.settled(fetch.FetchConfig(part=("sample",), origin=str(copy)))
        run(fetch.STAGE, config, {}, self.cache)

    def start(self, *options, workers=2):
        arguments = ["prep", "egodex", "--image-size", "64", "--json", "--workers", str(workers), *options]
        environment = {**os.environ, "AVRL_CACHE": str(self.cache.root)}
        return subprocess.Popen(
            [sys.executable, "-c", ENTRY, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *options):
        """Run to the end; the exit code, the artifact's digest and its path."""
        process = self.start(*options)
        out, err = process.communicate(timeout=120)
        assert process.returncode in (0, 4), err
        return process.returncode, json.loads(out)["artifacts"][0]

    def forget(self):
        clips.replace(self.zipped, self.whole)
        shutil.rmtree(self.cache.root / "frames", ignore_errors=True)

    def done(self):
        """Episodes that records on disk vouch for."""
        (scratch,) = [*(self.cache.root / "frames").glob(f".partial-*/{SCRATCH}")] or [None]
        if scratch is None:
            return set()
        found = {int(one.stem) for one in scratch.glob("0*.json")}
        found |= set(range(packing.Packer(scratch.parent).next))
        return {index for index in found if index < 12}

    def spoil(self, episodes):
        """Damage the clips of these episodes: whoever decodes one of them again fails."""
        with zipfile.ZipFile(self.zipped) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".mp4"))
        for index in episodes:
            clips.damage(self.zipped, names[index], 500)


@pytest.fixture(scope="module")
def prep(tmp_path_factory):
    """The runs, with the seconds and the digest of an undisturbed one."""
    runs = Prep(tmp_path_factory.mktemp("killed"))
    started = time.monotonic()
    runs.artifact = runs.finish()[1]
    runs.seconds = time.monotonic() - started
    assert runs.artifact["facts"]["shards"] > 3
    yield runs
    runs.forget()


def killed_and_run_again(prep, seed):
    rng = random.Random(seed)
    prep.forget()
    process = prep.start()
    wanted = rng.randrange(13)  # so that a slow machine does not only kill the imports
    while len(prep.done()) < wanted and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1 if wanted else prep.seconds / 2))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = prep.done()
    prep.spoil(done)  # nothing that was done is done again: it could not be
    code, artifact = prep.finish()
    assert code == 0
    assert artifact["digest"] == prep.artifact["digest"]
    assert artifact["facts"] == prep.artifact["facts"]
    assert [one.name for one in (prep.cache.root / "frames").iterdir()] == [prep.artifact["ref"]]
    names = {one.name for one in (prep.cache.root / "frames" / artifact["ref"]).iterdir()}
    assert names == {"manifest.json", "episodes.parquet", "dropped.parquet", "frames.zarr"}
    return len(done)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_and_run_again(prep, seed):
    killed_and_run_again(prep, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 18))
def test_killed_at_many_random_moments_and_run_again(prep, seed):
    killed_and_run_again(prep, seed)


def begun(prep, process, *, episodes=1):
    """Wait until some episodes are done; the worker processes."""
    deadline = time.monotonic() + 60
    while len(prep.done()) < episodes and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    return [pid for pid, _ in clips.descendants(process.pid)]


def workers_of(pids):
    """Of some processes those that decode: multiprocessing's own tracker is not one."""
    return [pid for pid in pids if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_killed_worker_is_a_temporary_error(prep):
    prep.forget()
    process = prep.start()
    os.kill(workers_of(begun(prep, process))[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert err.strip().splitlines()[-1] == "avrl: a decoder process was killed; run the same command: it goes on"
    prep.spoil(prep.done())
    assert prep.finish()[1]["digest"] == prep.artifact["digest"]


def test_workers_do_not_outlive_a_killed_parent(prep):
    prep.forget()
    process = prep.start()
    family = begun(prep, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(family) == []
    assert prep.finish()[1]["digest"] == prep.artifact["digest"]


def alive(pids):
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text()
            found += [pid] if text[text.rindex(")") + 2] not in "ZX" else []
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_no_good_clip_is_taken_for_damaged(prep, number, code):
    """Ctrl-C and Slurm signal the decoders too; with --on-error drop a clip cut short must not be listed."""
    prep.forget()
    process = prep.start("--on-error", "drop")
    begun(prep, process, episodes=2)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 1
    code, artifact = prep.finish("--on-error", "drop")
    assert code == 0
    assert artifact["facts"] == prep.artifact["facts"]
    assert artifact["digest"] == prep.artifact["digest"]


def test_with_drops_the_exit_code_is_4(prep):
    prep.forget()
    prep.spoil([4])
    process = prep.start()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "is damaged (Bad CRC-32" in err
    code, artifact = prep.finish("--on-error", "drop")
    assert code == 4
    assert artifact["facts"]["dropped"] == 1
