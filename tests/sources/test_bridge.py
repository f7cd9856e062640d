"""`avrl.sources.bridge`: shards as TFDS names them, records at their offsets, and the main camera's pictures."""

from __future__ import annotations

import io

import clips
import numpy as np
import pytest
from contracts.source import SourceContract
from PIL import Image

from avrl.episodes import View
from avrl.errors import DecodeError, IntegrityError, NotFoundError
from avrl.sources import bridge


def record(**changed):
    return clips.framed(clips.example({**clips.still(4), **changed}))


class TestBridge(SourceContract):
    module = bridge
    parts = ("train", "val")

    def make(self, folder):
        return clips.bridge(folder, clips.sample_bridge("train", 3), clips.sample_bridge("val", 1), shards=1)

    def damage(self, raw):
        path = raw / clips.BRIDGE / "bridge_dataset-train.tfrecord-00000-of-00001"
        path.write_bytes(clips.flipped(path.read_bytes(), 5000))


def test_records_keep_the_order_of_shards_and_offsets(tmp_path):
    raw = clips.bridge(tmp_path, [record()] * 5, [record()] * 2, shards=2)
    found, _ = bridge.survey(raw)
    names = [f"bridge_dataset-train.tfrecord-0000{k}-of-00002#{i}" for k, n in ((0, 2), (1, 3)) for i in range(n)]
    names += [f"bridge_dataset-val.tfrecord-0000{k}-of-00002#0" for k in range(2)]
    assert [one.episode_id for one in found] == names
    assert [one.split for one in found] == ["train"] * 5 + ["val"] * 2
    assert [one.offset for one in found[2:5]] == [0, len(record()), 2 * len(record())]


@pytest.mark.parametrize("below", ["", "bridge_dataset", "bridge_dataset/1.0.0"])
def test_a_copy_is_found_from_each_of_its_folders(tmp_path, below):
    clips.bridge(tmp_path, [record()] * 3)
    place = tmp_path / clips.BRIDGE
    names = ["bridge_dataset-train.tfrecord-00000-of-00001", "bridge_dataset-val.tfrecord-00000-of-00001"]
    assert bridge.local_files(tmp_path / below, ("train", "val")) == {
        f"{clips.BRIDGE}/{name}": place / name for name in names
    }
    assert list(bridge.local_files(tmp_path / below, ("val",))) == [f"{clips.BRIDGE}/{names[1]}"]


def test_a_copy_brings_the_same_files_as_a_mirror(tmp_path):
    clips.bridge(tmp_path, [record()])
    for name in ("dataset_info.json", "features.json", "action_proprio_stats_x.json"):
        (tmp_path / clips.BRIDGE / name).write_text("{}")
    found = bridge.local_files(tmp_path, ("train",))
    mirrored = {one.name for one in bridge.remote_files(("train",))}
    assert [name for name in found if name.endswith(".json")] == [
        f"{clips.BRIDGE}/dataset_info.json",
        f"{clips.BRIDGE}/features.json",
    ]
    assert {name for name in mirrored if name.endswith(".json")} <= set(found)


def test_a_split_that_is_missing_is_named(tmp_path):
    clips.bridge(tmp_path, [record()])
    (tmp_path / clips.BRIDGE / "bridge_dataset-val.tfrecord-00000-of-00001").unlink()
    assert bridge.local_files(tmp_path, ("train",))
    with pytest.raises(NotFoundError, match=r"has no \*-val.tfrecord-\* shard; fetch that split too"):
        bridge.local_files(tmp_path, ("train", "val"))


def test_what_an_unfinished_download_left_is_no_shard(tmp_path):
    clips.bridge(tmp_path, [record()] * 2)
    shard = tmp_path / clips.BRIDGE / "bridge_dataset-train.tfrecord-00000-of-00001"
    for suffix in (".part", ".1", ".tmp"):
        shard.with_name(shard.name + suffix).write_bytes(b"half of i")
    assert list(bridge.local_files(tmp_path, ("train",)).values()) == [shard]
    assert bridge.survey(tmp_path) == bridge.survey(clips.bridge(tmp_path / "clean", [record()] * 2))


def test_published_shards_are_the_1024_and_128(tmp_path):
    names = [one.name for one in bridge.remote_files(("train", "val"))]
    assert len(names) == 1024 + 128 + 2
    assert "bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-01023-of-01024" in names
    assert "bridge_dataset/1.0.0/bridge_dataset-val.tfrecord-00127-of-00128" in names
    assert len(bridge.remote_files(("val",))) == 130


@pytest.mark.parametrize(
    ("language", "task"), [(b"put it down", "put it down"), (b"", "(none)"), (b"caf\xe9", "caf\ufffd")]
)
def test_the_instruction_names_the_task(tmp_path, language, task):
    raw = clips.bridge(tmp_path, [record(**{"steps/language_instruction": [language] * 4})])
    one, _ = bridge.frames(raw, bridge.survey(raw)[0][0], View(16), tmp_path)
    assert one.task == task
    assert one.language == ("" if task == "(none)" else task)
    assert (one.fps, one.length) == (5.0, 4)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 96), (256, 256)])
def test_pictures_are_the_box_mean_of_the_central_square(tmp_path, width, height):
    images = clips.jpegs(clips.ramps(3, width, height))
    given = clips.trajectory(np.zeros((3, 7)), np.zeros((3, 7)), images)
    raw = clips.bridge(tmp_path, [clips.framed(clips.example(given))])
    _, frames = bridge.frames(raw, bridge.survey(raw)[0][0], View(32), tmp_path)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    for frame, jpeg in zip(frames, images, strict=True):
        full = np.asarray(Image.open(io.BytesIO(jpeg)), float)[top : top + side, left : left + side]
        want = full.reshape(32, side // 32, 32, side // 32, 3).mean((1, 3))
        assert np.abs(frame - want).max() <= 1.5


def test_a_damaged_picture_is_named_by_number(tmp_path):
    images = clips.jpegs(clips.ramps(4, 64, 64))
    for bad in (images[2][:200], b"", b"GIF89a", images[2][:-300] + bytes(300)):
        given = {"steps/observation/image_0": [*images[:2], bad, images[3]]}
        raw = clips.bridge(tmp_path, [record(**given)])
        _, frames = bridge.frames(raw, bridge.survey(raw)[0][0], View(16), tmp_path)
        with pytest.raises(DecodeError, match="of-00001#0: frame 2 does not decode") as caught:
            list(frames)
        assert caught.value.frame == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps/observation/state": np.zeros(27)}, "steps/observation/state is not 4 x 7 finite floats"),
        ({"steps/observation/state": np.zeros(21)}, "steps/observation/state is not 4 x 7 finite floats"),
        ({"steps/observation/state": np.full(28, np.nan)}, "steps/observation/state is not 4 x 7 finite floats"),
        ({"steps/observation/state": np.zeros(28, int)}, "steps/observation/state is not 4 x 7 finite floats"),
        ({"steps/action": [b"x"] * 28}, "steps/action is not 4 x 7 finite floats"),
        ({"steps/action": np.zeros(32)}, "steps/action is not 4 x 7 finite floats"),
        ({"steps/observation/image_0": []}, "has no steps/observation/image_0"),
        ({"steps/observation/image_0": np.zeros(4)}, "has no steps/observation/image_0"),
        ({"steps/observation/image_0": clips.jpegs(clips.ramps(3, 16, 16))}, "is not 3 x 7 finite floats"),
    ],
)
def test_features_that_do_not_fit_each_other(tmp_path, changed, words):
    raw = clips.bridge(tmp_path, [record(**changed)])
    with pytest.raises(IntegrityError, match=words) as caught:
        bridge.frames(raw, bridge.survey(raw)[0][0], View(16), tmp_path)
    assert "bridge_dataset-train.tfrecord-00000-of-00001#0" in caught.value.cause


def test_an_unreadable_rest_of_a_shard_is_named_and_the_other_shards_are_read(tmp_path):
    clean = record()
    for bad, start in ((0, 0), (1, len(clean)), (2, 2 * len(clean))):
        raw = clips.bridge(tmp_path / str(bad), [clean] * 3, [clean] * 2)
        path = raw / clips.BRIDGE / "bridge_dataset-train.tfrecord-00000-of-00001"
        path.write_bytes(clips.flipped(path.read_bytes(), start + 2))
        found, dropped = bridge.survey(raw)
        assert [one.split for one in found] == ["train"] * bad + ["val"] * 2
        (one,) = dropped
        assert one.episode_id == f"{path.name} from record {bad} on"
        assert one.reason == f"{clips.BRIDGE}/{path.name}: the length at byte {start} is damaged (crc32c)"
