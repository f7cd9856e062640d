"""`avrl.store` and `avrl.codec`: plain zarr-python reads the same pixels, and no damage passes for a picture."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clips
import google_crc32c
import numpy as np
import polars as pl
import pytest
import simplejpeg
import zarr

from avrl import codec, store
from avrl.errors import IntegrityError, TemporaryError
from avrl.store import FrameStore

SIZE, SLOTS = 32, 16
N = 2 * SLOTS + 9  # two full shards and a part of a third


@pytest.fixture(scope="module")
def frames():
    noise = np.random.default_rng(0).integers(-9, 9, (N, SIZE, SIZE, 3))
    return np.clip(clips.ramps(N, SIZE, SIZE) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def root(tmp_path, frames, monkeypatch):
    """A store of three shards, written in pieces of five frames."""
    monkeypatch.setattr(store, "SHARD", SLOTS)
    return build(tmp_path, frames)


def build(root, frames):
    chunks = [store.seal(codec.encode(frame, 90)) for frame in frames]
    for shard in range(-(-len(chunks) // SLOTS)):
        mine = chunks[shard * SLOTS : (shard + 1) * SLOTS]
        pieces = [mine[at : at + 5] for at in range(0, len(mine), 5)]
        path = store.shard_path(root / "frames.zarr", shard)
        store.write_shard(path, ((b"".join(piece), [len(one) for one in piece]) for piece in pieces))
    store.create(root / "frames.zarr", 3, SIZE, 90)
    pl.DataFrame({"length": [len(frames)]}).write_parquet(root / "episodes.parquet")
    return root


def shard(root, number):
    return store.shard_path(root / "frames.zarr", number)


# The same pixels, whoever reads.


def test_plain_zarr_reads_what_was_written(root, frames):
    array = zarr.open_array(root / "frames.zarr" / "frames", mode="r")
    assert array.shape == (3 * SLOTS, SIZE, SIZE, 3)
    assert array.shards == (SLOTS, SIZE, SIZE, 3)
    assert array.chunks == (1, SIZE, SIZE, 3)
    assert array.metadata.dimension_names == ("frame", "height", "width", "channel")
    got = FrameStore(root).read(np.arange(N))
    assert np.array_equal(array[:N], got)
    assert all(np.array_equal(array[row], got[row]) for row in range(N))
    assert clips.psnr(got, frames) > 25
    assert np.abs((got - frames.astype(float)).mean((0, 1, 2))).max() < 0.5


def test_zarr_finds_the_codec_by_itself(root):
    """In a process that never imports avrl: the entry point announces the codec."""
    script = (
        "import sys, zarr; array = zarr.open_group(sys.argv[1], mode='r')['frames'];"
        "print(int(array[:41].astype('int64').sum()), 'avrl.store' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(root / "frames.zarr")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    assert told.split() == [str(int(FrameStore(root).read(np.arange(N)).astype("int64").sum())), "False"]


def test_zarr_itself_writes_shards_that_we_read(root, tmp_path, frames):
    copy = tmp_path / "copy"
    store.create(copy / "frames.zarr", 3, SIZE, 90)
    zarr.open_array(copy / "frames.zarr" / "frames")[:N] = frames
    pl.DataFrame({"length": [N]}).write_parquet(copy / "episodes.parquet")
    assert np.array_equal(FrameStore(copy).read(np.arange(N)), FrameStore(root).read(np.arange(N)))


def test_any_order_repeats_and_threads(root):
    whole = FrameStore(root, threads=1).read(np.arange(N))
    rows = np.random.default_rng(1).integers(0, N, 200)
    for threads in (1, 2, 4, 7):
        assert np.array_equal(FrameStore(root, threads).read(rows), whole[rows])
    assert FrameStore(root, 4).read(rows[:0]).shape == (0, SIZE, SIZE, 3)
    assert np.array_equal(FrameStore(root, 4).read(rows[:3]), whole[rows[:3]])


@pytest.mark.parametrize("threads", [1, 4])
def test_out_is_filled_in_place(root, threads):
    rows = np.arange(N)[::-1]
    out = np.full((2, N, SIZE, SIZE, 3), 77, np.uint8)
    given = out[1]
    assert FrameStore(root, threads).read(rows, given) is given
    assert np.array_equal(given, FrameStore(root).read(rows))
    assert (out[0] == 77).all()


def test_the_reader_goes_by_the_shard_size_in_the_metadata(root, monkeypatch):
    want = FrameStore(root).read(np.arange(N))
    monkeypatch.setattr(store, "SHARD", 4096)
    assert np.array_equal(FrameStore(root).read(np.arange(N)), want)
    assert len(FrameStore(root)) == N


def test_metadata_written_twice_is_the_same(root):
    path = root / "frames.zarr" / "frames" / "zarr.json"
    before = path.read_bytes()
    store.create(root / "frames.zarr", 3, SIZE, 90)
    assert path.read_bytes() == before
    names = sorted(one.relative_to(root).as_posix() for one in root.rglob("*") if one.is_file())
    chunks = [f"frames.zarr/frames/c/{i}/0/0/0" for i in range(3)]
    assert names == ["episodes.parquet", *chunks, "frames.zarr/frames/zarr.json", "frames.zarr/zarr.json"]


# Damage.


def hostile(root, data, number=1):
    """Reading every frame of a shard with these bytes ends in an error that names it."""
    path = shard(root, number)
    whole = path.read_bytes()
    path.write_bytes(data)
    reader = FrameStore(root, threads=1)
    with pytest.raises(IntegrityError, match=str(path)) as caught:
        reader.read(np.arange(number * SLOTS, (number + 1) * SLOTS))
    path.write_bytes(whole)
    return caught.value


def test_every_flipped_bit_is_refused(root):
    """A flip that gave the same pixels would be harmless, but crc32c lets none pass at all."""
    rng = random.Random(4)
    data = shard(root, 1).read_bytes()
    index = len(data) - SLOTS * 16 - 4
    spots = [rng.randrange(index) for _ in range(150)] + [rng.randrange(index, len(data)) for _ in range(60)]
    spots += [0, index - 1, index, len(data) - 4, len(data) - 1]
    for at in spots:
        error = hostile(root, clips.flipped(data, at, rng.randrange(8)))
        assert "crc32c" in error.cause
        assert ("its index" in error.cause) == (at >= index)


def test_a_damaged_frame_leaves_the_others(root):
    data = shard(root, 1).read_bytes()
    want = FrameStore(root).read(np.arange(N))
    shard(root, 1).write_bytes(clips.flipped(data, 10))  # in the first chunk
    rest = np.array([row for row in range(N) if row != SLOTS])
    assert np.array_equal(FrameStore(root).read(rest), want[rest])
    with pytest.raises(IntegrityError, match=f"is damaged: the frame in row {SLOTS}"):
        FrameStore(root, threads=4).read(np.arange(N))


def test_plain_zarr_refuses_flips_too(root):
    data, rng = shard(root, 1).read_bytes(), random.Random(5)
    for _ in range(20):
        shard(root, 1).write_bytes(clips.flipped(data, rng.randrange(len(data))))
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(root / "frames.zarr" / "frames", mode="r")[SLOTS : 2 * SLOTS]


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 259, 260, 261, -1000, -261, -260, -259, -4, -1])
def test_truncated_shards_are_refused(root, kept):
    hostile(root, shard(root, 1).read_bytes()[:kept])


def test_longer_and_mixed_up_shards_are_refused(root):
    first, second = shard(root, 0).read_bytes(), shard(root, 1).read_bytes()
    hostile(root, second + b"\0")
    hostile(root, first + second[-SLOTS * 16 - 4 :])
    hostile(root, second[: -SLOTS * 16 - 4] + first[-SLOTS * 16 - 4 :])


def test_an_index_that_points_outside_is_refused(root):
    data = shard(root, 1).read_bytes()
    body, table = data[: -SLOTS * 16 - 4], bytearray(data[-SLOTS * 16 - 4 : -4])
    struct.pack_into("<QQ", table, 48, len(body) - 2, 100)
    forged = body + bytes(table) + struct.pack("<I", google_crc32c.value(bytes(table)))
    assert "points outside" in hostile(root, forged).cause


def test_a_missing_frame_is_an_error_and_never_black(root):
    reader = FrameStore(root)
    for row in (N, 3 * SLOTS - 1):
        with pytest.raises(IntegrityError, match=f"{shard(root, 2)} has no frame in row {row}"):
            reader.read(np.array([0, row]))
    for row in (3 * SLOTS, 10**6, -1):
        with pytest.raises(IntegrityError, match="is missing"):
            reader.read(np.array([row]))


def test_a_missing_shard_is_an_error_by_name(root):
    shard(root, 1).unlink()
    assert FrameStore(root).read(np.arange(SLOTS)).shape == (SLOTS, SIZE, SIZE, 3)
    with pytest.raises(IntegrityError, match=f"{shard(root, 1)} is missing"):
        FrameStore(root).read(np.arange(N))


def test_sealed_chunks_are_compared_before_they_are_packed(tmp_path):
    chunks = [store.seal(bytes([i]) * 50) for i in range(4)]
    blob, lengths = b"".join(chunks), [len(one) for one in chunks]
    store.check_chunks(blob, lengths, tmp_path / "a" / "0.blob")
    for bad in (clips.flipped(blob, 60), clips.flipped(blob, len(blob) - 1), blob[:-1], b"", bytes(len(blob))):
        with pytest.raises(IntegrityError, match=rf"0\.blob is damaged; rm {tmp_path}/a/0\.\* and run the same"):
            store.check_chunks(bad, lengths, tmp_path / "a" / "0.blob")


def test_a_shard_shows_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", SLOTS)
    path = store.shard_path(tmp_path, 0)

    def pieces():
        yield store.seal(b"x" * 50), [54]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        store.write_shard(path, pieces())
    assert not path.exists()
    store.write_shard(path, iter([(store.seal(b"x" * 50), [54])]))
    assert os.listdir(path.parent) == ["0"]  # noqa: PTH208


def test_a_file_system_that_fails_for_a_while_is_no_reason_to_prep_again(root, monkeypatch):
    reader = FrameStore(root, threads=1)
    reader.read(np.arange(3))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(TemporaryError, match=f"{shard(root, 0)} cannot be read: Input/output error; run the same"):
        reader.read(np.arange(3))


# Many processes, threads and shards.


def in_a_fork(work):
    """Run in a forked child that dies if it hangs; whether `work` was true there."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_store_in_use_works_after_a_fork_on_both_sides(root):
    reader, rows = FrameStore(root, 3), np.arange(N)[::-1]
    want = reader.read(rows)
    assert in_a_fork(lambda: np.array_equal(reader.read(rows), want))
    assert in_a_fork(lambda: in_a_fork(lambda: np.array_equal(reader.read(rows), want)))
    assert np.array_equal(reader.read(rows), want)


def test_a_store_in_use_travels_to_a_spawned_process(root):
    reader, rows = FrameStore(root, 3), np.arange(N)[::-1]
    want = reader.read(rows)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(reader.read, (rows,)), want)
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.root, len(copy), copy.threads) == (root, N, 3)


@pytest.fixture(scope="module")
def many(tmp_path_factory, frames):
    """A store of 200 shards with indices of real size, four frames each."""
    root = tmp_path_factory.mktemp("many")
    chunks = [store.seal(codec.encode(frame, 90)) for frame in frames]
    for number in range(200):
        mine = [chunks[(number + i) % N] for i in range(4)]
        store.write_shard(shard(root, number), [(b"".join(mine), [len(one) for one in mine])])
    store.create(root / "frames.zarr", 200, SIZE, 90)
    pl.DataFrame({"length": [800]}).write_parquet(root / "episodes.parquet")
    return root


def rows_of(numbers):
    return np.add.outer(np.asarray(numbers) * store.SHARD, np.arange(4)).ravel()


def shards_open(root):
    """Files under root that this process holds open."""
    found = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += [one] if one.readlink().is_relative_to(root) else []
    return len(found)


def test_shards_are_opened_once_however_many_threads_come(many):
    reader, rows = FrameStore(many, 4), rows_of(range(200))
    with ThreadPoolExecutor(4) as pool:
        first, *rest = pool.map(reader.read, [rows] * 4)
    assert all(np.array_equal(first, one) for one in rest)
    assert shards_open(many) == 200
    del reader
    assert shards_open(many) == 0


@pytest.mark.parametrize(("soft", "hard", "opened"), [(64, 4096, 200), (64, 100, 50)])
def test_more_shards_than_the_process_may_open(many, soft, hard, opened):
    """``ulimit -n``, the soft limit, is raised; where the hard one is too low, shards are closed again."""
    script = (
        "import os, resource, sys, numpy as np; from pathlib import Path; from avrl.store import FrameStore\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); reader = FrameStore(Path(sys.argv[1]), 4)\n"
        "rows = np.tile(np.add.outer(np.arange(200) * 4096, np.arange(4)).ravel(), 3)\n"
        "print(int(reader.read(rows).astype('int64').sum()), reader._most, len(os.listdir('/proc/self/fd')))"
    )
    command = [sys.executable, "-c", script, str(many)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    total, most, descriptors = map(int, told.split())
    assert total == 3 * FrameStore(many).read(rows_of(range(200))).astype("int64").sum()
    assert most == opened
    assert descriptors < most + 20


def test_private_memory_does_not_grow_with_the_shards_read(many):
    """Copies of the 190 indices alone would be 12 MB; a mapping would show as RssFile and in page tables."""

    def kilobytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile", "VmPTE")))

    reader, out = FrameStore(many, 2), np.empty((16, SIZE, SIZE, 3), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        reader.read(rows_of(rng.integers(0, 10, 4)), out)
    before = kilobytes()
    for _ in range(2000):
        reader.read(rows_of(rng.integers(0, 200, 4)), out)
    assert len(reader._shards) == 200
    assert kilobytes() - before < 6000


# JPEG.


def test_jpeg_is_faithful_and_keeps_full_chroma():
    smooth = clips.ramps(10, 224, 224)[4]
    fine = np.zeros((224, 224, 3), np.uint8)
    fine[:, ::2], fine[:, 1::2] = (200, 60, 60), (60, 60, 200)  # what 4:2:0 would smear into purple
    for frame, least in ((smooth, 40), (fine, 35)):
        data = codec.encode(frame, 90)
        assert simplejpeg.decode_jpeg_header(data)[:2] == (224, 224)
        assert simplejpeg.decode_jpeg_header(data)[3] == "444"
        assert clips.psnr(simplejpeg.decode_jpeg(data), frame) > least
    assert len(codec.encode(smooth, 50)) < len(codec.encode(smooth, 90)) < len(codec.encode(smooth, 98))


def test_the_codec_says_what_it_is():
    mine = codec.ImagecodecsJpeg(85, "444")
    assert codec.ImagecodecsJpeg.from_dict(mine.to_dict()) == mine
    assert mine.to_dict() == {"name": "imagecodecs_jpeg", "configuration": {"level": 85, "subsampling": "444"}}
