"""Training from a bucket: the frames of the local store, whatever has arrived, whatever is damaged on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import clips
import numpy as np
import pytest
from bucket import BACKEND, NAME, refuse

from avrl import remotestore
from avrl.artifact import MANIFEST, load
from avrl.cache import Cache
from avrl.errors import AvrlError, ConfigError, IntegrityError, NotFoundError
from avrl.mirror import upload
from avrl.pairs import Pairs, Sampling
from avrl.remotestore import RemoteStore, mirrored
from avrl.stage import run
from avrl.stages import fetch, prep, pretrain
from avrl.store import FrameStore, opened

ONE = "bytes=0-0"  # the first question, whoever asks
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
    wait_for(found, 1)
    assert sum(path.stat().st_size for path in shards(found)) <= cap
    assert 1 <= len(shards(found)) <= 2


def test_a_shard_that_was_damaged_in_the_bucket_never_comes_here(url, made, cache, caplog):
    name = f"{url.removeprefix(f's3://{NAME}/')}/frames.zarr/frames/c/1/0/0/0"
    data = shards(made)[1].read_bytes()
    BACKEND.put_object(NAME, name, clips.flipped(data, 100))
    found = mirrored(url, cache, 0)
    far = opened(found.root)
    with pytest.raises(IntegrityError, match=rf"{url}/.*c/1/0/0/0 is damaged: the frame in row 32.*; mirror the"):
        far.read(every_row(made))
    far.read(np.arange(64, 88))
    assert wait_for(found, 2) == 2
    until = time.monotonic() + 20
    while "c/1/0/0/0 stays where it is" not in caplog.text and time.monotonic() < until:
        time.sleep(0.02)
    assert "c/1/0/0/0 stays where it is" in caplog.text
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
    assert far.manifest.input("frames") == near.manifest.input("frames")


def prepared(made, cache, **options):
    """Another artifact of the same raw data."""
    return run(prep.STAGE, prep.PrepConfig(workers=1, **options), {"raw": load(next(raw_of(made)))}, cache)[0]


def raw_of(made):
    return (made.root.parent.parent / "raw").glob("[!.]*")


def test_another_content_under_the_same_name_is_another_store(url, made, cache, monkeypatch):
    """Here under the same address, as an address elsewhere leads to the same folder of the cache."""
    first = mirrored(url, cache, 0)
    opened(first.root).read(every_row(made))
    assert wait_for(first, 3) == 3
    monkeypatch.setattr("avrl.packing.UNIT", 2)
    monkeypatch.setattr("avrl.store.SHARD", 32)
    other = prepared(made, Cache(cache.root / "here"), image_size=32, quality=30)
    moved = other.root.rename(other.root.with_name(made.root.name))
    again = upload(other.manifest.files, moved, f"s3://{NAME}/frames")
    assert again == url
    second = mirrored(again, cache, 0)
    assert second.digest == other.digest != first.digest
    assert second.ref == first.ref == made.ref
    assert np.array_equal(opened(second.root).read(every_row(made)), FrameStore(moved).read(every_row(made)))


def test_what_is_no_frame_store_is_refused_before_a_byte_of_it_comes(store, made, cache):
    raw = load(next(raw_of(made)))
    there = upload(raw.manifest.files, raw.root, f"s3://{NAME}/raw")
    store.asked.clear()
    with pytest.raises(ConfigError, match=f"{there} holds no frame store: raw; name one"):
        mirrored(there, cache, 0)
    assert store.sent("GetObject") == [f"raw/{raw.root.name}/{MANIFEST}"]
    assert not cache.root.exists()


def test_a_share_is_no_store_to_pretrain_on(store, made, cache, monkeypatch):
    from typer.testing import CliRunner

    from avrl_cli.app import app

    monkeypatch.setattr("avrl.packing.UNIT", 2)
    share = prepared(made, Cache(cache.root / "here"), image_size=32, shard="1/2")
    there = upload(share.manifest.files, share.root, f"s3://{NAME}/frames")
    said = CliRunner().invoke(app, ["pretrain", "two-stream", "--frames", there, "--cache", str(cache.root)])
    assert isinstance(said.exception, ConfigError), said.output
    assert "is a share (1/2); join the shares: avrl prep" in str(said.exception)


def test_ranks_that_begin_at_once_all_have_the_store(url, made, cache, store):
    """Each slow enough to meet the others, with locks and where the file system has none."""

    def slow(call, _):
        time.sleep(0.05 if call.operation == "GetObject" else 0)

    store.fault = slow
    for locks in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", threading.get_ident)  # as if each were a process
            if not locks:
                patch.setattr(fcntl, "flock", lockless)
            with ThreadPoolExecutor(4) as ranks:
                found = list(ranks.map(lambda _: mirrored(url, cache, 0), range(4)))
        assert [one.digest for one in found] == [made.digest] * 4
        assert not list(cache.root.rglob("*.arriving*"))
        shutil.rmtree(cache.root)


def lockless(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_shards_come_where_the_file_system_has_no_locks(url, made, cache, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lockless)
    found = mirrored(url, cache, 0)
    opened(found.root).read(every_row(made))
    assert wait_for(found, 3) == 3


def test_a_shard_that_has_no_place_does_not_end_the_fetching(url, made, cache, caplog):
    found = mirrored(url, cache, 0)
    (found.root / "frames.zarr/frames/c").mkdir(exist_ok=True)
    (found.root / "frames.zarr/frames/c/0").write_text("in the way")
    far = opened(found.root)
    for row in (0, 32, 64):
        far.read(np.array([row]))
    assert wait_for(found, 2) == 2
    assert "c/0/0/0/0 stays where it is" in caplog.text


def test_a_process_ends_while_a_shard_does_not_come(url, made, cache, store):
    found = mirrored(url, cache, 0)
    asked = threading.Event()

    def only_frames(call, _):
        if "/c/" in call.key and call.headers.get("Range", "").startswith("bytes=0-") and call.headers["Range"] != ONE:
            asked.set()
            return refuse(503, "SlowDown")
        return None

    store.fault = only_frames
    script = (
        "import sys, time, numpy, pathlib; from avrl.store import opened; "
        "opened(pathlib.Path(sys.argv[1])).read(numpy.array([5])); time.sleep(1)"
    )
    command = [sys.executable, "-c", script, found.root]
    done = subprocess.run(command, timeout=30, capture_output=True, text=True, env=os.environ, check=False)
    assert asked.is_set()
    assert (done.returncode, done.stderr) == (0, "")


def test_a_client_for_all_shards(url, made, cache, monkeypatch):
    found, clients = mirrored(url, cache, 0), []
    connect = remotestore.connect
    for module in ("remotestore", "s3"):
        monkeypatch.setattr(f"avrl.{module}.connect", lambda *a, **b: clients.append(a) or connect(*a, **b))
    opened(found.root).read(every_row(made))
    assert wait_for(found, 3) == 3
    assert len(clients) == 1


def test_shards_are_counted_seldom_but_the_cap_holds_beside_another_rank(url, made, cache, monkeypatch):
    found = mirrored(url, cache, 10**6)
    monkeypatch.setattr(remotestore.threading.Thread, "start", lambda _: None)
    rank, counts = opened(found.root), []
    glob = type(found.root).glob
    monkeypatch.setattr(type(found.root), "glob", lambda *a: counts.append(a) or glob(*a))
    path = found.root / "frames.zarr/frames/c/7/0/0/0"
    path.parent.mkdir(parents=True)
    path.touch()
    came = 0
    while rank._room(1000):
        rank._left -= 1000
        came += 2  # for another rank brings as much
        os.truncate(path, came * 1000)
    assert 995 <= came <= 1001
    assert len(counts) < 100
    for _ in range(1000):
        assert not rank._room(1000)
    assert len(counts) < 100


def test_few_indexes_of_far_shards_are_kept(url, made, cache, monkeypatch):
    monkeypatch.setattr(remotestore, "FAR_SHARDS", 2)
    monkeypatch.setattr(RemoteStore, "_room", lambda *_: False)
    far = opened(mirrored(url, cache, 0).root)
    assert np.array_equal(far.read(every_row(made)), FrameStore(made.root).read(every_row(made)))
    assert far._far.cache_info().currsize == 2


def test_a_frame_damaged_on_its_way_is_asked_for_again(url, made, cache, store, monkeypatch):
    monkeypatch.setattr(RemoteStore, "_room", lambda *_: False)
    far, damaged = opened(mirrored(url, cache, 0).root), []

    def damage(call, forward):
        wanted = call.headers.get("Range")
        if call.operation != "GetObject" or wanted == ONE or wanted in damaged:
            return None
        damaged.append(wanted)
        answer = forward()
        answer.data = clips.flipped(answer.data, 40)
        return answer

    store.fault = damage
    rows = every_row(made)[:3]
    assert np.array_equal(far.read(rows), FrameStore(made.root).read(rows))
    assert len(damaged) == 4


def test_a_shard_that_rotted_here_is_to_be_fetched_again(url, made, cache):
    found = mirrored(url, cache, 0)
    opened(found.root).read(every_row(made))
    assert wait_for(found, 3) == 3
    path = shards(found)[0]
    path.write_bytes(clips.flipped(path.read_bytes(), 100))
    with pytest.raises(IntegrityError, match=rf"{path} is damaged: .*; rm {path} and run the same command: it comes"):
        opened(found.root).read(every_row(made))
    path.unlink()
    assert np.array_equal(opened(found.root).read(every_row(made)), FrameStore(made.root).read(every_row(made)))
