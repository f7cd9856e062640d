"""Training from a bucket: the frames of the local store, whatever has arrived, whatever is damaged on the way."""

from __future__ import annotations

import json
import time

import clips
import numpy as np
import pytest
from bucket import BACKEND, NAME

from avrl.artifact import MANIFEST
from avrl.cache import Cache
from avrl.errors import AvrlError, IntegrityError, NotFoundError
from avrl.mirror import upload
from avrl.pairs import Pairs, Sampling
from avrl.remotestore import RemoteStore, mirrored
from avrl.stage import run
from avrl.stages import fetch, prep, pretrain
from avrl.store import FrameStore, opened

SAMPLING = Sampling(seed=0, max_gap=4, sample_decay=0.8, pairs_per_episode=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of three shards."""
    folder = tmp_path_factory.mktemp("made")
    copy = clips.egodex(folder / "copy", {f"a/{n}": clips.episode(12, seed=n) for n in range(6)})
    cache = Cache(folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avrl.packing.UNIT", 2)
        patch.setattr("avrl.store.SHARD", 32)
        raw = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy))), {}, cache)[0]
        return run(prep.STAGE, prep.PrepConfig(image_size=32, workers=1), {"raw": raw}, cache)[0]


@pytest.fixture
def url(store, made):
    return upload(made.manifest.files, made.root, f"s3://{NAME}/frames")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "elsewhere")


def shards(artifact):
    return sorted(artifact.root.glob("frames.zarr/frames/c/*/0/0/0"))


def wait_for(artifact, count, seconds=20.0):
    until = time.monotonic() + seconds
    while len(shards(artifact)) < count and time.monotonic() < until:
        time.sleep(0.02)
    return len(shards(artifact))


def every_row(artifact):
    placed = opened(artifact.root).episodes
    pairs = placed[["dataset_from_index", "dataset_to_index"]].iter_rows()
    return np.concatenate([np.arange(a, b) for a, b in pairs])


def test_frames_are_those_of_the_local_store_before_and_after_shards_arrive(url, made, cache):
    found = mirrored(url, cache, 0)
    assert found.digest == made.digest
    assert not shards(found)
    far = opened(found.root)
    assert isinstance(far, RemoteStore)
    rows = every_row(made)
    want = FrameStore(made.root).read(rows)
    assert np.array_equal(far.read(rows), want)
    assert wait_for(found, 3) == 3
    assert np.array_equal(far.read(rows), want)
    assert [path.read_bytes() for path in shards(found)] == [path.read_bytes() for path in shards(made)]


def test_once_all_is_here_the_bucket_is_not_asked_for_a_frame(url, store, cache, made):
    found = mirrored(url, cache, 0)
    opened(found.root).read(every_row(made))
    assert wait_for(found, 3) == 3
    store.asked.clear()
    opened(found.root).read(every_row(made))
    assert store.sent("GetObject") == []


def test_batches_are_the_same_as_of_the_local_store(url, made, cache):
    far, near = (Pairs(opened(root), SAMPLING, 8) for root in (mirrored(url, cache, 0).root, made.root))
    for step in range(far.steps_per_epoch):
        a, b = far.batch(step), near.batch(step)
        assert np.array_equal(a.frames_BTHWC, b.frames_BTHWC)


def test_the_cap_holds_and_what_does_not_fit_is_read_from_afar(url, made, cache):
    cap = sum(path.stat().st_size for path in shards(made)[:2]) + 100
    found = mirrored(url, cache, cap)
    far = opened(found.root)
    for _ in range(3):
        assert np.array_equal(far.read(every_row(made)), FrameStore(made.root).read(every_row(made)))
        time.sleep(0.3)
    assert sum(path.stat().st_size for path in shards(found)) <= cap
    assert 1 <= len(shards(found)) <= 2


def test_a_shard_that_was_damaged_in_the_bucket_never_comes_here(url, made, cache, caplog):
    name = f"{url.removeprefix(f's3://{NAME}/')}/frames.zarr/frames/c/1/0/0/0"
    data = shards(made)[1].read_bytes()
    BACKEND.put_object(NAME, name, clips.flipped(data, 100))
    found = mirrored(url, cache, 0)
    far = opened(found.root)
    with pytest.raises(IntegrityError, match=r"c/1/0/0/0.*is damaged: the frame in row 32 has another crc32c"):
        far.read(every_row(made))
    far.read(np.arange(64, 88))
    assert wait_for(found, 3, 2.0) == 2
    assert not (found.root / "frames.zarr/frames/c/1/0/0/0").exists()


def test_an_object_replaced_by_a_shorter_one_is_refused(url, made, cache):
    found = mirrored(url, cache, 0)
    BACKEND.put_object(NAME, f"{url.removeprefix(f's3://{NAME}/')}/frames.zarr/frames/c/0/0/0/0", b"short")
    with pytest.raises(AvrlError, match="is not what its manifest lists"):
        opened(found.root).read(np.arange(3))


def test_without_a_manifest_nothing_is_believed(store, cache):
    with pytest.raises(NotFoundError, match=r"holds no manifest\.json"):
        mirrored(f"s3://{NAME}/frames/x", cache, 0)


def test_a_manifest_that_leaves_its_folder_is_refused(url, made, cache):
    from avrl.artifact import File, digest_of

    values = json.loads((made.root / MANIFEST).read_text())
    values["files"].append({"path": "../../x", "bytes": 1, "sha256": "0" * 64})
    values["digest"] = digest_of([File(**one) for one in values["files"]])
    BACKEND.put_object(NAME, f"{url.removeprefix(f's3://{NAME}/')}/{MANIFEST}", json.dumps(values).encode())
    with pytest.raises(IntegrityError, match="leaves its folder"):
        mirrored(url, cache, 0)


def test_a_checkpoint_from_the_bucket_is_that_from_the_disk(url, made, cache, tmp_path):
    config = pretrain.PretrainConfig(
        objective="two-stream", size="tiny", image_size=32, epochs=1, pairs_per_episode=4, batch_size=8, device="cpu"
    )
    near = run(pretrain.STAGE, config, {"frames": made}, Cache(tmp_path / "near"))[0]
    far = run(pretrain.STAGE, config, {"frames": mirrored(url, cache, 0)}, cache)[0]
    assert (far.manifest.key, far.digest) == (near.manifest.key, near.digest)
