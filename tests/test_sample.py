"""The bundled sample is what it is said to be: EgoDex's and Bridge's own layouts, small, and fit to learn from."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from pathlib import PurePosixPath

import av
import h5py
import numpy as np
import pytest
import simplejpeg

from avrl import tfrecord
from avrl.sources import SAMPLE

BRIDGE = SAMPLE / "bridge_dataset" / "1.0.0"
SIDES = ("left", "right")
FINGERS = ("Index", "Middle", "Ring", "Little")
BONES = ("Metacarpal", "Knuckle", "IntermediateBase", "IntermediateTip", "Tip")
JOINTS = {
    "hip",
    *(f"spine{i}" for i in range(1, 8)),
    *(f"neck{i}" for i in range(1, 5)),
    *(f"{side}{part}" for side in SIDES for part in ("Shoulder", "Arm", "Forearm", "Hand")),
    *(f"{side}{finger}Finger{bone}" for side in SIDES for finger in FINGERS for bone in BONES),
    *(f"{side}Thumb{bone}" for side in SIDES for bone in BONES[1:]),
}
STEP = {
    **{f"steps/observation/image_{k}": bytes for k in range(4)},
    "steps/observation/state": 7,
    "steps/action": 7,
    "steps/reward": 1,
    "steps/discount": 1,
    "steps/is_first": 1,
    "steps/is_last": 1,
    "steps/is_terminal": 1,
    "steps/language_instruction": bytes,
    "steps/language_embedding": 512,
}
METADATA = {
    "episode_metadata/file_path",
    "episode_metadata/episode_id",
    "episode_metadata/has_language",
    *(f"episode_metadata/has_image_{k}" for k in range(4)),
}


def test_it_is_at_most_16_mb():
    assert sum(one.stat().st_size for one in SAMPLE.rglob("*") if one.is_file()) <= 16_000_000


# EgoDex.


@pytest.fixture(scope="module")
def archive():
    with zipfile.ZipFile(SAMPLE / "egodex" / "sample.zip") as opened:
        yield opened


def stems(archive):
    return sorted(name.removesuffix(".mp4") for name in archive.namelist() if name.endswith(".mp4"))


def test_one_zip_of_at_least_ten_tasks_with_six_episodes(archive):
    names = archive.namelist()
    assert all(re.fullmatch(r"sample/[a-z_]+/\d+\.(mp4|hdf5)", name) for name in names)
    assert sorted(names) == sorted(f"{stem}{ext}" for stem in stems(archive) for ext in (".mp4", ".hdf5"))
    tasks = Counter(PurePosixPath(stem).parent.name for stem in stems(archive))
    assert len(tasks) >= 10
    assert min(tasks.values()) >= 6
    assert archive.testzip() is None


def test_clips_are_h264_at_30_fps_and_as_long_as_their_poses(archive):
    for stem in stems(archive):
        with av.open(io.BytesIO(archive.read(f"{stem}.mp4"))) as clip, poses(archive, stem) as file:
            (stream,) = clip.streams
            assert stream.codec_context.name == "h264"
            assert stream.average_rate == 30
            assert stream.frames == sum(packet.size > 0 for packet in clip.demux(stream)) >= 15
            assert {len(one) for one in file["transforms"].values()} == {stream.frames}


def poses(archive, stem):
    return h5py.File(io.BytesIO(archive.read(f"{stem}.hdf5")))


def test_poses_follow_egodex_schema(archive):
    without = 0
    for stem in stems(archive):
        with poses(archive, stem) as file:
            assert file["camera/intrinsic"].shape == (3, 3)
            assert set(file["transforms"]) == JOINTS | {"camera"}
            n = len(file["transforms/camera"])
            for one in file["transforms"].values():
                assert one.shape == (n, 4, 4)
                assert one.dtype == np.float32
            assert np.allclose(file["transforms/rightHand"][:, 3], [0, 0, 0, 1])
            without += "confidences" not in file
            if "confidences" in file:
                assert set(file["confidences"]) == JOINTS
                assert {one.shape for one in file["confidences"].values()} == {(n,)}
            told = dict(file.attrs)
            assert {"task", "llm_description", "llm_type", "which_llm_description", "environment"} <= set(told)
            assert told["which_llm_description"] in ("1", "2")
            assert told["llm_description" if told["which_llm_description"] == "1" else "llm_description2"]
    assert 0 < without < len(stems(archive)) // 2  # as in the real set, a few lack `confidences`


def test_the_camera_and_the_hand_move(archive):
    for stem in stems(archive)[::7]:
        with poses(archive, stem) as file:
            for name in ("camera", "rightHand"):
                assert np.ptp(file[f"transforms/{name}"][:, :3, 3], axis=0).max() > 0.01


# Bridge.


def records(split):
    for path in sorted(BRIDGE.glob(f"*-{split}.tfrecord-*")):
        for offset in tfrecord.offsets(path):
            yield tfrecord.parse_example(tfrecord.read(path, offset))


@pytest.fixture(scope="module")
def episodes():
    return {split: list(records(split)) for split in ("train", "val")}


def every(episodes):
    return episodes["train"] + episodes["val"]


def length(record):
    return len(record["steps/observation/image_0"])


def tasks(split):
    """Task names as `file_path` holds them: ``metaworld/<task>/<camera>/``."""
    return {record["episode_metadata/file_path"][0].decode().split("/")[-3] for record in split}


def test_shards_are_named_and_counted_as_tfds_does(episodes):
    info = json.loads((BRIDGE / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("bridge_dataset", "1.0.0", "tfrecord")
    listed = {split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]}
    for split, counts in listed.items():
        names = [f"bridge_dataset-{split}.tfrecord-{k:05d}-of-{len(counts):05d}" for k in range(len(counts))]
        assert [one.name for one in sorted(BRIDGE.glob(f"*-{split}.*"))] == names
        assert [len(list(tfrecord.offsets(BRIDGE / name))) for name in names] == counts
        assert sum(counts) == len(episodes[split])
    assert len(episodes["train"]) >= 60
    assert len(episodes["val"]) >= 20


def test_the_features_are_exactly_those_of_bridge(episodes):
    for record in every(episodes):
        n = length(record)
        assert set(record) == set(STEP) | METADATA
        for name, width in STEP.items():
            if width is bytes:
                assert isinstance(record[name], list)
                assert len(record[name]) == n
            else:
                assert record[name].dtype == (np.int64 if "/is_" in name else np.float32)
                assert record[name].size == n * width
                assert np.isfinite(record[name]).all()
        assert record["steps/is_first"].tolist() == [1] + [0] * (n - 1)
        assert record["steps/is_last"].tolist() == [0] * (n - 1) + [1]
        assert not any(record[f"episode_metadata/has_image_{k}"][0] for k in range(4))  # wrong in the real set too


def test_the_feature_tree_describes_the_same():
    tree = json.loads((BRIDGE / "features.json").read_text())
    features = tree["featuresDict"]["features"]
    step = features["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    observation = step.pop("observation")["featuresDict"]["features"]
    names = {f"steps/{name}" for name in step} | {f"steps/observation/{name}" for name in observation}
    names |= {f"episode_metadata/{name}" for name in features["episode_metadata"]["featuresDict"]["features"]}
    assert names == set(STEP) | METADATA


def test_the_first_action_is_zero_and_the_others_are_not(episodes):
    for record in every(episodes):
        action, state = (record[name].reshape(-1, 7) for name in ("steps/action", "steps/observation/state"))
        assert not action[0].any()
        assert action[1:-1, :3].any()
        assert np.ptp(state[:, :3], axis=0).max() > 0.005
        assert ((state[:, 6] >= 0) & (state[:, 6] <= 1.2)).all()


def test_pictures_are_256_px_and_only_the_main_camera_sees(episodes):
    for record in every(episodes)[::9]:
        for jpeg in record["steps/observation/image_0"][::5]:
            frame = simplejpeg.decode_jpeg(jpeg)
            assert frame.shape == (256, 256, 3)
            assert frame.std() > 10
    for record in every(episodes):
        for k in range(4):
            height, width, *_ = simplejpeg.decode_jpeg_header(record[f"steps/observation/image_{k}"][0])
            assert (height, width) == (256, 256)


def test_several_cameras_and_some_empty_instructions(episodes):
    for split in episodes.values():
        cameras = {record["episode_metadata/file_path"][0].decode().rstrip("/").rsplit("/", 1)[-1] for record in split}
        assert len(cameras) >= 2
    told = [record["steps/language_instruction"][0] for record in every(episodes)]
    assert 0 < sum(not words for words in told) < len(told) // 4


def test_some_tasks_are_only_in_val_and_none_is_in_both_parts(episodes, archive):
    assert 2 <= len(tasks(episodes["val"]) - tasks(episodes["train"])) < len(tasks(episodes["val"]))
    egodex = {PurePosixPath(stem).parent.name.replace("_", "-") for stem in stems(archive)}
    assert not egodex & tasks(every(episodes))
