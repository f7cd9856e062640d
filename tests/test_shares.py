"""`avrl prep --shard i/n`: however the work is shared out, and whoever is lost, the joined store is the same one."""

from __future__ import annotations

import shutil

import clips
import polars as pl
import pytest

from avrl import frames, packing, store
from avrl.cache import Cache
from avrl.episodes import View
from avrl.errors import ConfigError, DecodeError, IntegrityError, MissingError
from avrl.sources import egodex
from avrl.stage import run
from avrl.stages import fetch, prep
from avrl.store import FrameStore
from avrl.workers import in_order

LENGTHS = (10, 12, 9, 30, 11, 8, 5, 7, 14, 6)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Five units of two episodes; one episode is longer than a shard."""
    monkeypatch.setattr(packing, "UNIT", 2)
    monkeypatch.setattr(store, "SHARD", 25)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Ten short clips; one is damaged, one has no poses beside it, one none that say how sure they are."""
    episodes = {f"a/{n}": clips.episode(length, seed=n) for n, length in enumerate(LENGTHS)}
    episodes["a/2"] = episodes["a/2"][0][:-700], episodes["a/2"][1]
    episodes["a/6"] = episodes["a/6"][0], clips.poses(LENGTHS[6], confidences=False)
    episodes["a/7"] = episodes["a/7"][0], clips.poses(LENGTHS[7] + 1)
    episodes["a/99"] = episodes["a/0"][0], None
    return clips.egodex(tmp_path_factory.mktemp("copy"), episodes)


def config(**options):
    return prep.PrepConfig(image_size=32, on_error="drop", workers=2, **options)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def raw(cache, copy, tmp_path):
    """The raw artifact, on a copy that a test may damage."""
    shutil.copytree(copy, tmp_path / "copy")
    return run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(tmp_path / "copy"))), {}, cache)[0]


def make(cache, raw, **options):
    return run(prep.STAGE, config(**options), {"raw": raw}, cache)[0]


@pytest.fixture(scope="module")
def whole(copy, tmp_path_factory):
    """The store that one machine makes alone."""
    cache = Cache(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "UNIT", 2)
        patch.setattr(store, "SHARD", 25)
        raw = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy))), {}, cache)[0]
        return make(cache, raw)


def spoil(raw):
    """Nobody can decode a clip any more: what comes now was not decoded."""
    zipped = (raw.root / "part1.zip").resolve()
    for n in range(len(LENGTHS)):
        clips.damage(zipped, f"part1/a/{n}.mp4", 500)


def test_the_whole_tells_what_is_dropped_and_what_is_noted(whole):
    facts = whole.manifest.facts
    assert (facts["episodes"], facts["dropped"]) == (8, 3)
    assert facts["dropped_by_kind"] == {"damaged": 1, "mismatch": 1, "unpaired": 1}
    assert facts["noted"] == {"no confidences": 1, "too short": 4}
    placed = pl.read_parquet(whole.root / "episodes.parquet")
    assert dict(placed.filter(pl.col("note") != "")[["episode_id", "note"]].iter_rows()) == {
        "part1/a/0": "too short",
        "part1/a/5": "too short",
        "part1/a/6": "too short, no confidences",
        "part1/a/9": "too short",
    }


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_shares_are_joined_by_links_into_the_same_store(cache, raw, whole, n):
    shares = [make(cache, raw, shard=f"{i + 1}/{n}") for i in range(n)]
    assert sum(one.manifest.facts["episodes"] for one in shares) == whole.manifest.facts["episodes"]
    spoil(raw)
    joined = make(cache, raw)
    assert joined.digest == whole.digest
    assert joined.manifest.facts == whole.manifest.facts
    files = [path.stat().st_ino for one in shares for path in one.root.glob("frames.zarr/frames/c/*/0/0/0")]
    assert sorted(files) == sorted(path.stat().st_ino for path in joined.root.glob("frames.zarr/frames/c/*/0/0/0"))
    for one in shares:  # whoever tidies up takes nothing away
        shutil.rmtree(one.root)
    placed = FrameStore(joined.root)
    rows = pl.int_ranges(placed.episodes["dataset_from_index"], placed.episodes["dataset_to_index"], eager=True)
    assert len(placed.read(rows.explode().to_numpy())) == len(placed)


def test_what_a_lost_machine_did_not_make_is_decoded_here(cache, raw, whole):
    for shard in ("1/3", "3/3", "1/2"):  # and a share of another cut serves as well
        make(cache, raw, shard=shard)
    assert make(cache, raw).digest == whole.digest


def test_a_share_of_another_request_is_not_taken(cache, raw, whole):
    make(cache, raw, shard="1/1", quality=50)
    assert make(cache, raw).digest == whole.digest


def test_a_damaged_share_is_refused_by_name(cache, raw):
    share = make(cache, raw, shard="2/2")
    path = next(share.root.glob("frames.zarr/frames/c/0/0/0/0"))
    path.write_bytes(clips.flipped(path.read_bytes(), 100))
    with pytest.raises(IntegrityError, match=r"2of2.*/0 is damaged; rm -r .*2of2"):
        make(cache, raw)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"2of2.*/0 is damaged; rm -r .*2of2"):
        make(cache, raw)


def test_joining_goes_on_where_it_was_killed(cache, raw, whole, monkeypatch):
    for i in (1, 2):
        make(cache, raw, shard=f"{i}/2")
    link, left = packing._link, [4]

    def die(source, target):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        link(source, target)

    monkeypatch.setattr(packing, "_link", die)
    with pytest.raises(KeyboardInterrupt):
        make(cache, raw)
    monkeypatch.setattr(packing, "_link", link)
    assert make(cache, raw).digest == whole.digest


def test_a_unit_that_was_begun_here_is_not_linked_on_top(cache, raw, monkeypatch):
    """Its first episodes are in place already: taking the whole unit from a share would list them twice."""
    monkeypatch.setattr(packing, "UNIT", 4)
    flush, left = packing.Packer.flush, [1]

    def die(packer, **options):
        flush(packer, **options)
        left[0] -= packer.shards > 0
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(packing.Packer, "flush", die)
    with pytest.raises(KeyboardInterrupt):
        make(cache, raw)
    monkeypatch.setattr(packing.Packer, "flush", flush)
    begun = next(cache.root.glob("frames/.partial-*[0-9a-f]"))
    assert 0 < packing.Packer(begun).next < 4
    make(cache, raw, shard="1/1")
    joined = pl.read_parquet(make(cache, raw).root / "episodes.parquet")
    alone = make(Cache(cache.root / "alone"), raw)
    assert joined["episode_id"].is_unique().all()
    assert make(cache, raw).digest == alone.digest


def test_when_all_shares_are_there_the_plan_is_to_link(cache, raw):
    for i in (1, 2):
        make(cache, raw, shard=f"{i}/2")
    told = prep.plan(config(), {"raw": raw}, cache)
    assert prep.plan(prep.PrepConfig(image_size=32, on_error="fail"), {"raw": raw}, cache).episodes == 10
    assert (told.episodes, told.bytes, told.words(5.0)) == (0, 0, "nothing is left to decode")


def test_where_the_disk_has_no_links_shards_are_copied(cache, raw, whole, monkeypatch):
    make(cache, raw, shard="1/1")

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(packing.os, "link", refuse)
    assert make(cache, raw).digest == whole.digest


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "01/2"])
def test_shares_that_there_are_not(shard):
    with pytest.raises(ConfigError, match="--shard"):
        config(shard=shard)


def test_a_share_is_never_taken_for_the_whole(cache, raw):
    assert not prep.whole(make(cache, raw, shard="1/2"))
    assert prep.whole(make(cache, raw))


# As tasks of a Ray cluster.


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_store_and_the_same_errors(cache, raw, whole):
    assert make(cache, raw, engine="ray").digest == whole.digest
    job = frames.Job("egodex", raw.root, cache.root, View(32), 90, drop=False)
    with pytest.raises(DecodeError, match="part1/a/2"):
        list(in_order(frames.encode_episode, [(job, one) for one in egodex.survey(raw.root)[0]], 1, "ray"))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingError, match=r"pip install 'avrl\[ray\]'"):
        next(in_order(len, [("a",)], 1, "ray"))
