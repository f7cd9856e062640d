"""`avrl prep --dry-run`: what a store will come to, from a few clips; and the refusal of what cannot fit."""

from __future__ import annotations

import json
import random
import shutil
from collections import namedtuple

import clips
import pytest
from loopback import Files, serving
from typer.testing import CliRunner

from avrl import plan, store
from avrl.artifact import SCRATCH
from avrl.cache import Cache
from avrl.episodes import View
from avrl.errors import ConfigError, DiskFullError, IntegrityError
from avrl.frames import Job
from avrl.stage import run
from avrl.stages import fetch, prep
from avrl_cli.app import app

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Seventy clips of four kinds, 5 to 24 frames long; one is damaged."""
    rng = random.Random(1)
    kinds = [clips.episode(n, seed=n) for n in (5, 9, 15, 24)]
    episodes = {f"task{n % 3}/{n}": kinds[rng.randrange(4)] for n in range(70)}
    episodes["task0/3"] = episodes["task0/3"][0][:-400], episodes["task0/3"][1]
    return clips.egodex(tmp_path_factory.mktemp("copy"), episodes)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(plan, "FEWEST", 12)
    monkeypatch.setattr(plan, "ERROR", 0.04)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def raw(cache, copy):
    return run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy))), {}, cache)[0]


def config(**options):
    return prep.PrepConfig(**{"image_size": 64, "workers": 2, "on_error": "drop", **options})


@pytest.mark.parametrize("options", [{}, {"fps": 10.0, "quality": 40}])
def test_the_store_is_as_large_as_planned(options, cache, raw):
    told = prep.plan(config(**options), {"raw": raw}, cache)
    made = run(prep.STAGE, config(**options), {"raw": raw}, cache)[0]
    assert told.sampled < told.episodes == 70
    assert told.bytes == pytest.approx(made.bytes, rel=0.1)
    assert told.frames == pytest.approx(made.manifest.facts["frames"], rel=0.1)
    assert abs(told.bytes / made.bytes - 1) < 4 * told.error + 0.02  # tables and indices are not planned
    assert told.seconds > 0


def test_a_plan_leaves_nothing_behind(cache, raw, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(tmp_path.rglob("*"))
    prep.plan(config(), {"raw": raw}, cache)
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_share_only_the_share_is_planned(cache, raw):
    shares = [prep.plan(config(shard=f"{i}/2"), {"raw": raw}, cache).episodes for i in (1, 2)]
    assert shares == [64, 6]


def test_all_of_a_few_are_decoded_and_there_is_no_error_left(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST", 1000)
    monkeypatch.setattr(plan, "ERROR", 0.0)
    job = Job("egodex", copy, tmp_path, View(32), 90, drop=True)
    told = plan.estimate(job, workers=2)
    assert (told.sampled, told.error) == (70, 0.0)
    shards = 2  # one a unit
    assert told.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.blob")) + shards * store.INDEX_BYTES


def test_nothing_to_plan_is_an_error(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(IntegrityError, match="no usable episode"):
        plan.estimate(Job("egodex", tmp_path / "raw", tmp_path, View(32), 90, drop=True))


def test_what_cannot_fit_is_refused_before_the_first_shard(cache, raw, monkeypatch):
    needed = prep.plan(config(), {"raw": raw}, cache).bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, int(needed * 0.8)))
    with pytest.raises(DiskFullError, match=r"the frame store of egodex-part1-.* needs .* free"):
        prep.plan(config(), {"raw": raw}, cache)
    for _ in range(2):  # a refusal holds as long as the disk is what it is
        with pytest.raises(DiskFullError, match="frame store"):
            run(prep.STAGE, config(), {"raw": raw}, cache)
    assert not list(cache.root.rglob("frames.zarr"))
    monkeypatch.undo()
    assert run(prep.STAGE, config(), {"raw": raw}, cache)[0].manifest.facts["episodes"] == 69


def test_what_was_decoded_to_know_is_not_decoded_again(cache, raw, monkeypatch):
    """The plan of a real run fills the run's own scratch."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10 * raw.manifest.facts["bytes"]))
    whole = run(prep.STAGE, config(), {"raw": raw}, cache)[0]
    seen = []
    monkeypatch.setattr("avrl.frames.prepare", lambda job, *_, **__: seen.extend(job.scratch.glob("*.json")) or {})
    run(prep.STAGE, config(quality=80), {"raw": raw}, cache)
    assert len(seen) >= plan.FEWEST
    assert whole.manifest.facts["dropped"] == 1
    assert SCRATCH not in {path.name for path in whole.root.iterdir()}


def test_where_nothing_decodes_there_is_no_plan(tmp_path):
    there = clips.egodex(tmp_path / "copy", {"a/0": (clips.episode(9)[0][:-400], clips.episode(9)[1])})
    (tmp_path / "scratch").mkdir()
    with pytest.raises(IntegrityError, match=r"of 1 episode none decodes: .* does not decode.*; fetch it again$"):
        plan.estimate(Job("egodex", there, tmp_path / "scratch", View(32), 90, drop=True), workers=1)


def test_a_rate_that_does_not_divide_is_no_damage(cache, raw):
    with pytest.raises(ConfigError, match=r"of which 7 is no whole part; try --fps 7.5"):
        prep.plan(config(fps=7.0), {"raw": raw}, cache)


def test_three_clips_do_not_keep_forty_eight_decoders_busy(cache, copy):
    raw = run(fetch.STAGE, fetch.settled(fetch.FetchConfig(origin=str(copy), episodes=3)), {}, cache)[0]
    assert prep.plan(config(workers=4), {"raw": raw}, cache).decoders == 3


# The verb.


def avrl(cache, *words):
    done = CliRunner().invoke(app, [*words, "--json"], env={"AVRL_CACHE": str(cache.root)})
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


def test_the_verb_tells_size_time_and_money(cache, raw):
    told, said = avrl(cache, "prep", "--image-size", "64", "--dry-run", "--price", "5.67", "--workers", "2")
    (one,) = told["plan"]
    assert one["dollars"] == round(one["seconds"] / 3600 * 5.67, 2)
    assert "70 episodes" in said
    assert "at $5.67/h" in said
    assert "it fits" in said


def test_what_comes_in_no_zip_cannot_be_planned_from_afar(cache):
    words = ["prep", "bridge", "--from", "http://127.0.0.1:9/", "--dry-run"]
    told, said = avrl(cache, *words)
    assert told["artifacts"][-1] == {"stage": "frames", "hit": False, "why": [said.splitlines()[-1].split(": ", 1)[1]]}


def test_a_zip_far_away_is_planned_without_fetching_it(cache, copy):
    data = (copy / "part1.zip").read_bytes()
    with serving(Files, {"part1.zip": data}) as server:
        words = ["prep", "--stream", "--from", server.url, "--image-size", "32", "--dry-run", "--workers", "2"]
        told, said = avrl(cache, *words)
        assert server.sent < 0.8 * len(data) + 6 * 2**16
    assert told["plan"][0]["episodes"] == 70
    assert "70 clips" in said
    assert not cache.root.exists() or not list(cache.root.rglob("manifest.json"))
