"""What lies in a cache and what may be removed; nothing is removed by asking."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from descent import Made, family, stage
from test_cells import avrl

from avrl.artifact import MANIFEST
from avrl.cache import Cache
from avrl.holdings import (
    BEGUN,
    BROKEN,
    BUSY,
    CHANGED,
    DAMAGED,
    FINISHED,
    FOREIGN,
    LOG,
    OLD,
    ORPHANED,
    SCORED,
    UNUSED,
    quoted,
    removable,
    survey,
)
from avrl.lineage import Stock, held
from avrl.stage import run


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def reasons(cache):
    return {one.place: one.why for one in removable(survey(cache), Stock(held(cache)[0]))}


def place(artifact):
    return f"{artifact.manifest.stage}/{artifact.ref}"


def test_only_features_of_a_whole_line_may_go_and_their_price_is_told(cache):
    made = family(cache)
    (one,) = removable(survey(cache), Stock(held(cache)[0]))
    assert (one.place, one.why) == (place(made["features"]), SCORED)
    assert one.loss == "made again in 0 s"
    assert one.command == f"rm -r {made['features'].root}"


def test_products_stay_when_their_parents_go(cache):
    """Else the advice to remove features would be followed by the advice to remove their scores."""
    made = family(cache)
    for name in ("features", "raw"):
        shutil.rmtree(made[name].root)
    assert reasons(cache) == {}


def test_features_whose_checkpoint_is_gone_cannot_be_asked_for(cache):
    made = family(cache)
    shutil.rmtree(made["checkpoint"].root)
    (one,) = removable(survey(cache), Stock(held(cache)[0]))
    assert (one.place, one.why) == (place(made["features"]), ORPHANED)
    assert one.loss == "cannot be made again as it is: no checkpoint; it took 0 s"


def test_children_of_what_came_out_different_are_told(cache):
    old = family(cache)
    shutil.rmtree(old["checkpoint"].root)
    new = family(cache, luck="!")
    assert reasons(cache) == {place(old["features"]): CHANGED, place(new["features"]): SCORED}
    shutil.rmtree(new["scores"].root)
    assert reasons(cache)[place(new["features"])] == UNUSED


def test_all_reports_but_the_newest(cache):
    reports = [run(stage("tables"), Made(text=name), {}, cache)[0] for name in ("one", "two", "three")]
    for age, one in zip((50, 10, 90), reports, strict=True):
        os.utime(one.root / MANIFEST, (time.time() - age,) * 2)
    assert reasons(cache) == {place(reports[0]): OLD, place(reports[2]): OLD}


def test_unfinished_ones_unless_somebody_is_at_work(cache):
    run(stage("frames"), Made(), {}, cache)
    for name in ("left", "held"):
        partial = cache.partial("frames", name, "0" * 64)
        partial.mkdir()
        (partial / "file").write_bytes(b"x" * 100_000)
    with partial.with_name(partial.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        states = {one.path.name.split("-")[1]: one.state for one in survey(cache) if one.path.name.startswith(".")}
        assert states["held"] == BUSY
        assert reasons(cache) == {"frames/.partial-left-000000000000": BEGUN}
    assert len(reasons(cache)) == 2


def test_damage_and_strangers_are_a_line_each_not_a_crash(cache):
    made = family(cache)
    (made["frames"].root / MANIFEST).write_text("{")
    (cache.root / "features" / "stray").mkdir()
    (cache.root / "notes" / "deep").mkdir(parents=True)
    (cache.root / "tensorboard" / "run-1").mkdir(parents=True)
    (cache.root / "README.md").write_text("x")
    (cache.root / ".git").mkdir()
    states = {one.place: one.state for one in survey(cache) if one.state != FINISHED}
    assert states == {
        place(made["frames"]): DAMAGED,
        "features/stray": FOREIGN,
        "notes": FOREIGN,
        "tensorboard/run-1": LOG,
    }
    found = reasons(cache)
    assert found[place(made["frames"])] == BROKEN
    assert "notes" not in found
    assert found[place(made["features"])] == ORPHANED
    done = avrl(cache, "cache")
    assert done.exit_code == 0
    (line,) = [one for one in done.stdout.splitlines() if "frames/frames-" in one and "  damaged: " in one]
    assert "Expecting property name" in line


def test_freed_is_what_the_disk_gets_back(cache, tmp_path):
    made, _ = run(stage("raw"), Made(text="own twin linked"), {}, cache)
    for name in ("own", "twin"):
        (made.root / name).write_bytes(b"x" * 1_000_000)
    os.link(made.root / "twin", tmp_path / "twin")
    (tmp_path / "away").write_bytes(b"x" * 1_000_000)
    (made.root / "linked").unlink()
    (made.root / "linked").symlink_to(tmp_path / "away")
    (one,) = survey(cache)
    assert 1_000_000 <= one.freed < 1_100_000
    (cache.root / "frames").mkdir()
    (cache.root / "frames" / "link").symlink_to(made.root)
    assert [one.freed for one in survey(cache) if one.stage == "frames"] == [0]


HOSTILE = ("new\nline", "\x1b[2J", "로봇", "\u202eevil", "$(touch x)", os.fsdecode(b"\xff"))


@pytest.mark.parametrize("name", ["plain", "a b", "it's", *HOSTILE])
def test_the_command_removes_exactly_that_and_is_safe_to_show(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "bystander").mkdir()
    command = f"rm -r {quoted(tmp_path / name)}"
    assert command.isprintable()
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["bystander"]


def test_the_listing_has_sums_ages_lines_and_commands(cache):
    made = family(cache)
    os.utime(made["raw"].root / MANIFEST, (time.time() - 5 * 86400,) * 2)
    shutil.rmtree(made["checkpoint"].root)
    partial = cache.partial("frames", "evil\x1b[2J\n", "0" * 64)
    partial.mkdir()
    before = sorted(cache.root.rglob("*"))
    done = avrl(cache, "cache")
    assert sorted(cache.root.rglob("*")) == before
    assert "\x1b" not in done.stdout
    told = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert told[0].startswith(f"{cache.root}: 5 folders, ")
    assert "free on its disk" in told[0]
    assert any(line.startswith("raw 1 ") for line in told)
    assert any("5 days" in line and f"raw/{made['raw'].ref}" in line for line in told)
    (line,) = [line for line in told if line.split(" from ")[0].endswith(place(made["features"]))]
    assert line.endswith(
        f"from checkpoint {made['checkpoint'].manifest.key[:6]} (gone), frames {made['frames'].manifest.key[:6]}"
    )
    commands = [line.split("  #")[0].strip() for line in done.stdout.splitlines() if line.startswith("  rm -r")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(["bash", "-c", command], check=True)
    assert not partial.exists()
    assert not made["features"].root.exists()
    assert made["scores"].root.exists()


def test_json_is_one_document(cache):
    made = family(cache)
    told = json.loads(avrl(cache, "cache", "--json").stdout)
    assert told["verb"] == "report cache"
    assert told["stages"]["scores"]["folders"] == 1
    (features,) = [one for one in told["holdings"] if one["place"] == place(made["features"])]
    assert [(one["role"], one["state"]) for one in features["made_from"]] == [
        ("checkpoint", "there"),
        ("frames", "there"),
    ]
    assert features["used_by"] == [made["scores"].ref]
    assert shlex.split(told["removable"][0]["command"])[2] == str(made["features"].root)
    assert told["free"] > 0


def test_no_cache_and_misplaced_options_are_refused(tmp_path):
    nowhere = avrl(Cache(tmp_path / "none"), "cache")
    assert nowhere.exception.exit_code == 3
    assert not Path(tmp_path / "none").exists()
    early = avrl(Cache(tmp_path), "--json", "cache")
    assert early.exception.exit_code == 2
    assert early.exception.next_step == "type: root report cache --json"
    early = avrl(Cache(tmp_path), "--only", "bridge", "cache")
    assert early.exception.next_step == "leave it out: cache has none"
