"""Zips that stay where they are: some members of one, and a store made of one that is never kept."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile

import clips
import polars as pl
import pytest
from loopback import Files, NoRange, serving

from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.errors import ConfigError, IntegrityError, NotFoundError, StaleError, TemporaryError
from avrl.remotezip import RemoteZip
from avrl.server import Patience
from avrl.sources import egodex
from avrl.stage import run
from avrl.stages import fetch, prep

QUICK = Patience(attempts=3, backoff_s=0.01, timeout_s=2)
NAMES = [f"{task}/{n}" for task in ("fold", "pour", "stack") for n in (0, 1, 2, 10)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Twelve clips of three tasks, in the order of a disk, not of their names."""
    episodes = {name: clips.episode(12 + seed, seed=seed) for seed, name in enumerate(NAMES)}
    random.Random(0).shuffle(order := list(episodes))
    return clips.egodex(tmp_path_factory.mktemp("copy"), {name: episodes[name] for name in order})


@pytest.fixture(scope="module")
def zipped(copy):
    return (copy / "part1.zip").read_bytes()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def asked(server, **values):
    return fetch.settled(fetch.FetchConfig(part=("1",), origin=server.url, **values))


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Some of its members.


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({"episodes": 3}, ["fold/0", "pour/0", "stack/0"]),
        ({"episodes": 5}, ["fold/0", "fold/1", "pour/0", "pour/1", "stack/0"]),
        ({"task": ("pour",)}, ["pour/0", "pour/1", "pour/10", "pour/2"]),
        (
            {"task": ("stack", "fold"), "episodes": 7},
            ["fold/0", "fold/1", "fold/10", "fold/2", *("stack/0", "stack/1", "stack/2")],
        ),
        ({"episodes": 99}, sorted(NAMES)),
    ],
)
def test_only_the_members_asked_for_come_over(values, want, cache, zipped):
    with serving(Files, {"part1.zip": zipped}) as server:
        raw, _ = run(fetch.STAGE, asked(server, **values), {}, cache)
        sent = server.sent
    got, there = members((raw.root / "part1.zip").read_bytes()), members(zipped)
    assert sorted(got) == sorted(f"part1/{name}{ext}" for name in want for ext in (".mp4", ".hdf5"))
    assert all(got[name] == there[name] for name in got)
    directory = 2 * 2**16  # read twice, each time with the first read of the end
    assert sent <= sum(map(len, got.values())) + 200 * len(got) + directory + 6 * 64
    assert raw.manifest.facts["clips"] == len(want)
    assert {one.episode_id for one in egodex.survey(raw.root)[0]} == {f"part1/{name}" for name in want}


def test_out_of_a_local_zip_the_same_members_give_the_same_artifact(cache, copy, zipped):
    with serving(Files, {"part1.zip": zipped}) as server:
        remote, _ = run(fetch.STAGE, asked(server, task=("pour",)), {}, cache)
    local, _ = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy), task=("pour",))), {}, cache)
    assert remote.digest == local.digest


def test_a_task_that_is_not_there_is_told_with_those_like_it(cache, zipped):
    with (
        serving(Files, {"part1.zip": zipped}) as server,
        pytest.raises(NotFoundError, match=r"'fould'.*try one of: fold"),
    ):
        run(fetch.STAGE, asked(server, task=("fould",)), {}, cache)


@pytest.mark.parametrize("values", [{"task": ("x",)}, {"episodes": 3}, {"stream": True}])
def test_bridge_has_no_members_to_choose(values):
    with pytest.raises(ConfigError, match="bridge comes in shards"):
        fetch.settled(fetch.FetchConfig(source="bridge", **values))


SCRIPT = """
import sys
from pathlib import Path
from avrl.cache import Cache
from avrl.stage import run
from avrl.stages import fetch
config = fetch.FetchConfig(origin=sys.argv[1], episodes=9, workers=2)
run(fetch.STAGE, fetch.settled(config), {}, Cache(Path(sys.argv[2])))
"""


class Slow(Files):
    slice_bytes = 1 << 10
    pause_s = 0.002


def test_killed_it_fetches_again_at_most_one_member_a_worker(cache, zipped, tmp_path):
    with serving(Slow, {"part1.zip": zipped}) as server:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(cache.root)], start_new_session=True)
        while server.sent < 2 * 2**16 + 60_000 and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done = [one.name for one in cache.root.rglob(f"{SCRATCH}/part1/*/*") if one.suffix != ".tmp"]
        assert done
        server.asked.clear()
        raw, _ = run(fetch.STAGE, asked(server, episodes=9), {}, cache)
        assert len([span for span in server.asked if span and span[1] < len(zipped) - 1000]) <= 18 - len(done) + 4
        again, _ = run(fetch.STAGE, asked(server, episodes=9), {}, Cache(tmp_path / "undisturbed"))
    assert raw.digest == again.digest


def test_after_a_kill_members_of_another_edition_are_not_taken(cache, copy, zipped, tmp_path):
    """The zip was published anew between the two runs, or a power cut emptied a member that has its name."""
    other = clips.egodex(tmp_path / "other", {name: clips.episode(9, seed=7) for name in NAMES})
    data = (other / "part1.zip").read_bytes()
    with serving(Files, {"part1.zip": zipped}) as server:
        config = asked(server, episodes=3)
        partial = cache.partial("raw", fetch.STAGE.slug(config, {}), fetch.STAGE.key(config, {}))
        for name in ("part1/fold/0.mp4", "part1/pour/0.mp4"):
            (partial / SCRATCH / name).parent.mkdir(parents=True)
            (partial / SCRATCH / name).write_bytes(members(zipped)[name] if "fold" in name else b"")
        server.files["part1.zip"] = data
        raw, _ = run(fetch.STAGE, config, {}, cache)
    got, there = members((raw.root / "part1.zip").read_bytes()), members(data)
    assert got == {name: there[name] for name in got}


def test_a_task_that_one_part_lacks_is_taken_from_the_others(cache, copy, tmp_path):
    clips.egodex(copy, {"sew/0": clips.episode(8)}, part="test")
    values = fetch.FetchConfig(part=("1", "test"), origin=str(copy), task=("sew",))
    raw, _ = run(fetch.STAGE, fetch.settled(values), {}, cache)
    assert [path.name for path in raw.root.glob("*.zip")] == ["test.zip"]
    (copy / "test.zip").unlink()


def test_a_linked_copy_that_was_moved_is_told_by_name(cache, copy, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "part1.zip").write_bytes((copy / "part1.zip").read_bytes())
    raw, _ = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(moved))), {}, cache)
    (moved / "part1.zip").rename(tmp_path / "part1.zip")
    with pytest.raises(NotFoundError, match=r"part1\.zip is gone: .*/moved/part1\.zip is not there"):
        store(cache, raw)


# Never kept.


def store(cache, raw, **options):
    return run(prep.STAGE, prep.PrepConfig(image_size=32, workers=2, **options), {"raw": raw}, cache)[0]


@pytest.mark.parametrize("values", [{}, {"episodes": 4}])
def test_a_streamed_store_is_the_one_of_the_fetched_zip(values, cache, zipped):
    with serving(Files, {"part1.zip": zipped}) as server:
        there = run(fetch.STAGE, asked(server, stream=True, **values), {}, cache)[0]
        assert there.bytes < 20_000  # the directory, and where the rest lies
        streamed = store(cache, there)
        fetched = store(cache, run(fetch.STAGE, asked(server, **values), {}, cache)[0])
    assert streamed.digest == fetched.digest
    assert streamed.manifest.key != fetched.manifest.key
    assert there.manifest.facts["clips"] == (values.get("episodes") or 12)


def test_each_member_is_asked_for_once_and_nothing_is_left(cache, zipped):
    with serving(Files, {"part1.zip": zipped}) as server:
        there = run(fetch.STAGE, asked(server, stream=True), {}, cache)[0]
        server.asked.clear()
        made = store(cache, there)
        assert len(server.asked) == 24
        assert server.sent < 1.2 * len(zipped) + 2**17
    assert {one.suffix for one in made.root.rglob("*") if one.is_file()} <= {".parquet", ".json", ""}


class Replaced(Files):
    """The zip is published anew after its directory was read."""

    def etag(self, data: bytes) -> str:
        return '"new"' if self.server.whole.is_set() else '"old"'


def test_a_zip_published_anew_is_no_reason_to_drop_its_clips(cache, zipped):
    with serving(Replaced, {"part1.zip": zipped}) as server:
        there = run(fetch.STAGE, asked(server, stream=True), {}, cache)[0]
        server.whole.set()
        with pytest.raises(StaleError, match="changed at the server while it was fetched") as caught:
            store(cache, there, on_error="drop")
        assert caught.value.exit_code == 8


class Flips(Files):
    """A bit of every member's middle is wrong: on the way once, or for good."""

    def body(self, data: bytes) -> None:
        small = 1000 < len(data) < 60_000 and data[:2] == b"PK"
        first = self.server.busy.acquire(blocking=False) if small else False
        super().body(clips.flipped(data, len(data) // 2) if first else data)


def test_what_is_damaged_on_the_way_is_asked_for_again(cache, zipped):
    with serving(Flips, {"part1.zip": zipped}) as server:
        raw, _ = run(fetch.STAGE, asked(server, episodes=2), {}, cache)
        assert len(server.asked) == 2 * 2 + 4 + 1
    assert all(members((raw.root / "part1.zip").read_bytes()).values())


def test_what_is_damaged_where_it_lies_is_dropped_by_name_and_the_rest_finish(cache, copy, tmp_path):
    spoilt = tmp_path / "part1.zip"
    spoilt.write_bytes((copy / "part1.zip").read_bytes())
    clips.damage(spoilt, "part1/pour/1.mp4", 400)
    with serving(Files, {"part1.zip": spoilt.read_bytes()}) as server:
        there = run(fetch.STAGE, asked(server, stream=True), {}, cache)[0]
        made = store(cache, there, on_error="drop")
        with pytest.raises(IntegrityError, match=r"part1.zip:part1/pour/1.mp4 is damaged \(Bad CRC-32"):
            store(cache, there)
    dropped = pl.read_parquet(made.root / "dropped.parquet")
    assert dropped["episode_id"].to_list() == ["part1/pour/1"]
    assert str(server.url) not in dropped["reason"][0]
    assert made.manifest.facts["episodes"] == 11


def test_a_server_that_goes_away_is_temporary_and_the_next_run_goes_on(cache, zipped):
    with serving(Files, {"part1.zip": zipped}) as server:
        there = run(fetch.STAGE, asked(server, stream=True), {}, cache)[0]
    told = json.loads((there.root / "part1.zip.remote").read_text())
    assert told["length"] == len(zipped)
    zip_ = RemoteZip.recall(there.root / "part1.zip", patience=QUICK)
    with pytest.raises(TemporaryError, match="the connection fails"):
        zip_.copy("part1/pour/1.mp4", cache.root / "x")


# Directories that lie.


@pytest.mark.parametrize("cut", [1, 30, 3000])
def test_a_cut_directory_is_refused(cut, zipped):
    with (
        serving(Files, {"part1.zip": zipped[:-cut]}) as server,
        pytest.raises(IntegrityError, match=r"part1\.zip is cut"),
    ):
        RemoteZip(f"{server.url}part1.zip", patience=QUICK)


def test_a_directory_that_claims_to_begin_far_away_is_not_followed(zipped, monkeypatch):
    monkeypatch.setattr("avrl.remotezip.TAIL_BYTES", 100)
    monkeypatch.setattr("avrl.remotezip.MAX_DIRECTORY", 5000)
    end = zipped.rindex(b"PK\5\6")
    lie = (
        zipped[: end + 12]
        + (len(zipped) - 2000).to_bytes(4, "little")
        + (100).to_bytes(4, "little")
        + zipped[end + 20 :]
    )
    with serving(Files, {"part1.zip": lie}) as server:
        with pytest.raises(IntegrityError):
            RemoteZip(f"{server.url}part1.zip", patience=QUICK)
        assert server.sent < 10_000


@pytest.mark.parametrize("name", ["../x.mp4", "/x.mp4", "a\\b.mp4"])
def test_hostile_names_are_refused_from_afar_too(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    with serving(Files, {"x.zip": buffer.getvalue()}) as server, pytest.raises(IntegrityError, match="member"):
        RemoteZip(f"{server.url}x.zip", patience=QUICK)


def test_a_local_header_that_reaches_beyond_its_member_is_damage(zipped, tmp_path):
    at = zipped.index(b"PK\3\4")
    lie = zipped[: at + 28] + b"\xff\xff" + zipped[at + 30 :]
    name = next(iter(members(zipped)))
    with serving(Files, {"part1.zip": lie}) as server, pytest.raises(IntegrityError, match="is damaged"):
        RemoteZip(f"{server.url}part1.zip", patience=QUICK).copy(name, tmp_path / "x")


def test_a_server_without_ranges_is_told_apart(zipped):
    with serving(NoRange, {"part1.zip": zipped}) as server, pytest.raises(IntegrityError, match="does not serve parts"):
        RemoteZip(f"{server.url}part1.zip", patience=QUICK)
